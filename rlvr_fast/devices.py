"""Devices and precisions by the names that a config gives them."""

import ctypes

import torch

from rlvr_fast.config import Precision

DTYPES = {Precision.BF16: torch.bfloat16, Precision.FP32: torch.float32}


def device(name: str) -> str:
    """`auto` becomes cuda where there is one, else cpu; any other name stays."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def keep_freed_memory() -> None:
    """From here on glibc keeps freed blocks below 32 MiB for this process.

    It would give the large ones back and fetch zeroed pages for the next, which costs a training
    step on a CPU a tenth of its time and more. Another C library is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
