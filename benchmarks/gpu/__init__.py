"""What is asked of a GPU; with ASYNC_TIER_CUDA=emulated of the emulator, where it shows only that it runs."""

from __future__ import annotations

import os

EMULATED = os.environ.get("ASYNC_TIER_CUDA") == "emulated"
emulator = None
if EMULATED:  # here, because it has to be loaded before anything imports torch
    from tests import cuda_emulator

    emulator = cuda_emulator.load()
