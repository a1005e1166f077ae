"""How vLLM's CPU backend binds its workers to processors."""

from __future__ import annotations

import contextlib
import multiprocessing
import os

# The variables by which vLLM has OpenMP bind a worker's threads; which one depends on the library.
_OPENMP_BINDINGS = ("KMP_AFFINITY", "GOMP_CPU_AFFINITY", "OMP_PLACES")


def cpus_before_openmp() -> set[int]:
    """The CPUs that a worker process of vLLM's CPU backend may use, although OpenMP bound the calling thread to fewer.

    vLLM has OpenMP bind the threads of its workers (`OMPProcessManager`), the first one before Python runs. The CPUs
    before that can only be read from the parent process, which vLLM does not bind.

    Only the calling thread's CPUs in two cases: if vLLM binds nothing, because then any binding is the user's; and if
    vLLM started the worker by numactl (`--numa-bind`), because that gave it fewer CPUs than the parent has.
    """
    cpus = os.sched_getaffinity(0)
    parent = multiprocessing.parent_process()
    is_bound = any(name in os.environ for name in _OPENMP_BINDINGS)
    is_asked = os.environ.get("VLLM_CPU_OMP_THREADS_BIND") != "nobind"
    has_numactl = "_VLLM_INTERNAL_NUMACTL_ARGS" in os.environ
    if parent and parent.pid and is_bound and is_asked and not has_numactl:
        with contextlib.suppress(OSError):  # it has ended, or must not be inspected
            cpus |= os.sched_getaffinity(parent.pid)
    return cpus
