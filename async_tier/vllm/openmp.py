"""How vLLM's CPU backend binds its workers to processors."""

from __future__ import annotations

import contextlib
import multiprocessing
import os

# How vLLM tells OpenMP to bind a worker's threads: its variable depends on the library.
_OPENMP_BINDINGS = ("KMP_AFFINITY", "GOMP_CPU_AFFINITY", "OMP_PLACES")


def cpus_before_openmp() -> set[int]:
    """Where a worker process of vLLM's CPU backend may run, although OpenMP has bound the calling thread to less.

    vLLM starts its workers so that OpenMP binds their threads (`OMPProcessManager`), the first one before Python runs.
    What the process was given can only be asked of the process that started it, which vLLM does not bind.

    The calling thread's CPUs alone where vLLM binds nothing, so that whatever does is the user's, and where vLLM put
    numactl between the two processes (`--numa-bind`), so that the worker was given less.
    """
    cpus = os.sched_getaffinity(0)
    parent = multiprocessing.parent_process()
    is_bound = any(name in os.environ for name in _OPENMP_BINDINGS)
    is_asked = os.environ.get("VLLM_CPU_OMP_THREADS_BIND") != "nobind"
    has_numactl = "_VLLM_INTERNAL_NUMACTL_ARGS" in os.environ
    if parent and parent.pid and is_bound and is_asked and not has_numactl:
        with contextlib.suppress(OSError):  # it has ended, or may not be asked
            cpus |= os.sched_getaffinity(parent.pid)
    return cpus
