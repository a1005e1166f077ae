"""vLLM's OpenAI server as a child process, always ended, with nothing left in /dev/shm."""

from __future__ import annotations

import contextlib
import glob
import json
import os
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

# Loading and profiling take some 20 s on two cores; a machine under load takes longer.
START_TIMEOUT_S = 600
STOP_TIMEOUT_S = 60
LEFT_RUNNING_TIMEOUT_S = 15


@dataclass(frozen=True)
class Server:
    """A running server. `url` has no path; `log` grows while it runs; its processes are `process_group`."""

    url: str
    log: Path
    process_group: int

    def pause(self) -> None:
        """Stop its processes where they are, so that another server has the machine; between requests only."""
        os.killpg(self.process_group, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.process_group, signal.SIGCONT)

    def metrics(self) -> dict[tuple[str, str], float]:
        """(metric, tier label or "") -> value, of everything at /metrics; series of other labels are added up."""
        from prometheus_client.parser import text_string_to_metric_families

        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as reply:
            text = reply.read().decode()
        values: dict[tuple[str, str], float] = {}
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


@contextlib.contextmanager
def serve(
    model: Path | str, log: Path, *, name: str, offloading: dict[str, Any] | None, arguments: list[str]
) -> Iterator[Server]:
    """Run the server while in the block, on a free port of this machine.

    model: a folder, or a name that vLLM knows. name: unique on this machine; names the primary tier's memory.
    offloading: the `kv_connector_extra_config`, None for no offloading at all. arguments: more of the server's.
    Raises RuntimeError with the end of the log if the server does not come up.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    transfer = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "engine_id": name,
        "kv_connector_extra_config": offloading,
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port)]
    command += arguments
    if offloading is not None:
        command += ["--kv-transfer-config", json.dumps(transfer)]
    environment = {
        **os.environ,
        **({"HF_HUB_OFFLINE": "1"} if Path(model).exists() else {}),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        # A session of its own: Ctrl-C reaches us alone, and we end the whole group.
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    server = Server(f"http://127.0.0.1:{port}", log, process.pid)
    try:
        _wait_until_healthy(server, process)
        yield server
    finally:
        try:
            _ask_to_stop(process)
        finally:  # also after a second Ctrl-C
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            # A server that was killed could not remove its primary tier's memory.
            for left in glob.glob(f"/dev/shm/vllm_offload_{glob.escape(name)}*"):
                os.unlink(left)


def _wait_until_healthy(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"{server.url}/health", timeout=5)
            return
        if process.poll() is not None or time.monotonic() > deadline:
            tail = "\n".join(server.log.read_text().splitlines()[-30:])
            raise RuntimeError(f"the server did not come up; the end of {server.log}:\n{tail}")
        time.sleep(0.2)


def _ask_to_stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the server, then what it left running: a server that stops while it starts leaves its children behind.

    The last of them to go are Python's resource trackers, which remove semaphores and shared memory.
    """
    with contextlib.suppress(ProcessLookupError):  # a paused one would not hear
        os.killpg(process.pid, signal.SIGCONT)
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    deadline = time.monotonic() + LEFT_RUNNING_TIMEOUT_S
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.1)
