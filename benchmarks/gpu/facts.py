"""The facts that the CUDA engine and its emulator take from NVIDIA's documentation, each as a question to the device.

The numbers are those of tests/cuda_emulator/README.md, which also says why some are not asked.
"""

from __future__ import annotations

from benchmarks.gpu import facts_beside, facts_copies, facts_memory
from benchmarks.gpu.asking import Fact


def _order(numbers: str) -> tuple[int, str]:
    """By the first number: F2 before F12."""
    return int(numbers.removeprefix("F").partition("-")[0]), numbers


_NOTED = facts_copies.FACTS | facts_memory.FACTS | facts_beside.FACTS
FACTS: dict[str, tuple[str, Fact]] = {numbers: _NOTED[numbers] for numbers in sorted(_NOTED, key=_order)}
