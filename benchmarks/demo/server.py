"""vLLM's OpenAI server as a child process, always ended, with nothing left in /dev/shm."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# (metric, tier label or "") -> value.
Metrics = dict[tuple[str, str], float]
# Loading and profiling take some 20 s on two cores; a machine under load takes longer.
START_TIMEOUT_S = 600
STOP_TIMEOUT_S = 60
LEFT_RUNNING_TIMEOUT_S = 15
# The memory of a primary tier, whose name ends with the process that asked for the server, and a number.
PRIMARY_MEMORY = re.compile(r"vllm_offload_async-tier-(?:[a-z]+-)?(?P<process>\d+)-\d+(?:_dp\d+)?\.mmap")
# The folder of a pool, whose name ends with the process that made it.
POOL = re.compile(r"async-tier-demo-(?P<process>\d+)")
# What Python's multiprocessing has in shared memory, and removes when a process ends by itself.
PYTHON_MEMORY = ("psm_*", "sem.mp-*")


def of_tier(metrics: Metrics, name: str) -> float:
    """What vLLM counts of the first secondary tier."""
    metric = f"vllm:kv_offload_tiering_{name}"
    return sum(value for (each, tier), value in metrics.items() if each == metric and tier.startswith("1:"))


@dataclass(frozen=True)
class Answer:
    """A greedy completion. times: seconds from the request until each part of it came, a token or some.

    cached_tokens: of the prompt, from the KV cache and from tiers; 0 if the server does not say.
    """

    text: str
    times: list[float]
    tokens: int
    prompt_tokens: int
    cached_tokens: int

    @property
    def first(self) -> float:
        return self.times[0]

    @property
    def last(self) -> float:
        return self.times[-1]


@dataclass
class Server:
    """A server. `url` has no path; `log` grows while it runs; its processes are one group, led by `process`."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]
    _is_asked_to_stop: bool = False

    def pause(self) -> None:
        """Stop its processes where they are, so that another server has the machine; between requests only."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def wait_until_healthy(self) -> None:
        """Raises RuntimeError with the end of the log if the server does not come up."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
                return
            if self.process.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(self.log.read_text().splitlines()[-30:])
                raise RuntimeError(f"the server did not come up; the end of {self.log}:\n{tail}")
            time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL to all of its processes at once, and wait for their end; nothing of them is left but files.

        What Python would have removed from shared memory is removed here. Raises TimeoutError if one of them lives on.
        """
        group = self.process.pid
        left = shared_memory(living(group))
        os.killpg(group, signal.SIGKILL)
        self.process.wait()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while found := living(group):
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes that were killed live on: {found}")
            time.sleep(0.01)
        for file in left:
            file.unlink(missing_ok=True)

    def ask_to_stop(self) -> None:
        """Once: asked again, it would leave its work undone. Whoever made it waits for its end."""
        if self._is_asked_to_stop:
            return
        self._is_asked_to_stop = True
        with contextlib.suppress(ProcessLookupError):
            self.resume()  # a paused one would not hear
        self.process.send_signal(signal.SIGTERM)

    def ask(self, prompt: str, tokens: int, ignore_eos: bool = False) -> Answer:
        """A streamed completion of at most so many tokens; of exactly so many where it is not to end by itself."""
        from openai import OpenAI

        usage: Any = None
        text, times = "", []
        with OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0) as client:
            started = time.perf_counter()
            for part in client.completions.create(
                model="model",
                prompt=prompt,
                max_tokens=tokens,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": ignore_eos},
            ):
                if part.choices:
                    times.append(time.perf_counter() - started)
                    text += part.choices[0].text
                usage = part.usage or usage
        if not times or usage is None:
            raise RuntimeError("the server sent no token, or does not say how many there were")
        cached = getattr(usage.prompt_tokens_details, "cached_tokens", None) or 0
        return Answer(text, times, usage.completion_tokens, usage.prompt_tokens, cached)

    def metrics(self) -> Metrics:
        """Of everything at /metrics; series of other labels are added up."""
        from prometheus_client.parser import text_string_to_metric_families

        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as reply:
            text = reply.read().decode()
        values: Metrics = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                key = (sample.name, sample.labels.get("tier", ""))
                values[key] = values.get(key, 0.0) + sample.value
        return values

    def tracebacks(self) -> list[str]:
        """Lines of the log that begin a traceback.

        But for one of vLLM's own (seen with 0.32): asked to stop, its API server stops the engine in good order and
        then finds its output handler without one.
        """
        lines = self.log.read_text().splitlines()
        found = []
        stopping = False
        for before, line in zip(["", *lines], lines, strict=False):
            stopping = stopping or "[shutdown] API server: shutdown triggered" in line
            if "Traceback" in line and not (stopping and "AsyncLLM output_handler failed" in before):
                found.append(line)
        return found


def living(group: int) -> list[int]:
    """The processes of a group that have not ended, without those that only wait for their parent to hear of it."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, _parent, its_group = (path / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and (state != "Z" or len(os.listdir(path / "task")) > 1):
                found.append(int(path.name))
    return found


def shared_memory(processes: list[int], folder: Path = Path("/dev/shm")) -> list[Path]:
    """The files of Python's multiprocessing that one of these processes has mapped."""
    device = os.stat(folder).st_dev
    mapped = set()
    for process in processes:
        with contextlib.suppress(OSError):  # it ended meanwhile
            for line in Path(f"/proc/{process}/maps").read_text().splitlines():
                # By number, because a semaphore gets its name after it is mapped.
                _range, _mode, _offset, its_device, inode = line.split()[:5]
                if its_device == f"{os.major(device):02x}:{os.minor(device):02x}":
                    mapped.add(int(inode))
    files = [file for pattern in PYTHON_MEMORY for file in folder.glob(pattern)]
    return [file for file in files if file.exists() and file.stat().st_ino in mapped]


@contextlib.contextmanager
def pool_folder(parent: Path = Path("/dev/shm")) -> Iterator[Path]:
    """The name of a folder for a pool, which whoever uses it makes; removed at the end with all that is in it."""
    folder = parent / f"async-tier-demo-{os.getpid()}"
    try:
        yield folder
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)


def command(model: Path | str, port: int, name: str, offloading: dict[str, Any] | None) -> list[str]:
    found = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    found += ["--model", str(model), "--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port)]
    if offloading is not None:
        transfer = {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "engine_id": name,
            "kv_connector_extra_config": offloading,
        }
        found += ["--kv-transfer-config", json.dumps(transfer)]
    return found


def environment(model: Path | str, model_cores: str, variables: dict[str, str] | None = None) -> dict[str, str]:
    return {
        **os.environ,
        **({"HF_HUB_OFFLINE": "1"} if Path(model).exists() else {}),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": model_cores,
        **(variables or {}),
    }


@contextlib.contextmanager
def serve(
    model: Path | str,
    log: Path,
    *,
    name: str,
    offloading: dict[str, Any] | None,
    arguments: list[str],
    model_cores: str = "nobind",
    variables: dict[str, str] | None = None,
) -> Iterator[Server]:
    """Run the server while in the block, on a free port of this machine.

    model: a folder, or a name that vLLM knows. name: unique on this machine; names the primary tier's memory (see
    PRIMARY_MEMORY). offloading: the `kv_connector_extra_config`, None for no offloading at all. arguments: more of the
    server's. model_cores: the cores that the forward pass is bound to ("1,2,3"); "nobind": it runs anywhere.
    variables: more of its environment. Raises RuntimeError with the end of the log if the server does not come up.
    """
    remove_what_the_dead_left()
    # Bound until the server has ended, or somebody else may be given its port. vLLM's listens on it all the same.
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    port = held.getsockname()[1]
    log.parent.mkdir(parents=True, exist_ok=True)
    server = None
    try:
        with log.open("w") as output, signals_wait():
            # A session of its own: Ctrl-C reaches us alone, and we end the whole group.
            process = subprocess.Popen(
                command(model, port, name, offloading) + arguments,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(model, model_cores, variables),
                start_new_session=True,
            )
            server = Server(f"http://127.0.0.1:{port}", log, process)
        server.wait_until_healthy()
        yield server
    finally:
        if server is not None:
            _end(server, name)
        held.close()


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """What would unwind us waits for the end of the block: nothing is lost that is not yet in our hands."""
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    caught = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in caught:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in caught.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def remove_what_the_dead_left(folder: Path = Path("/dev/shm")) -> None:
    """Primary tiers and pools of servers whose benchmark was killed: memory that nobody else gives back."""
    for file in folder.glob("*async-tier-*"):
        found = PRIMARY_MEMORY.fullmatch(file.name) or POOL.fullmatch(file.name)
        if found and not Path("/proc", found["process"]).exists():
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(file) if file.is_dir() else file.unlink()


def _end(server: Server, name: str) -> None:
    """Ask the server, then what it left running: a server that stops while it starts leaves its children behind.

    The last of them to go are Python's resource trackers, which remove semaphores and shared memory.
    """
    group = server.process.pid
    try:
        server.ask_to_stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(STOP_TIMEOUT_S)
        deadline = time.monotonic() + LEFT_RUNNING_TIMEOUT_S
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGTERM)
            while living(group) and time.monotonic() < deadline:
                time.sleep(0.1)
    finally:  # also after a second Ctrl-C
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        server.process.wait()
        # A server that was killed could not remove its primary tier's memory.
        for left in glob.glob(f"/dev/shm/vllm_offload_{glob.escape(name)}*"):
            os.unlink(left)
