"""Devices and precisions by the names that a config gives them."""

import ctypes
import sys

import torch

from rlvr_fast.config import Precision

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # Of <malloc.h>.

DTYPES = {Precision.BF16: torch.bfloat16, Precision.FP32: torch.float32}


def device(name: str) -> str:
    """`auto` becomes cuda where there is one, else cpu; any other name stays."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def keep_freed_memory() -> None:
    """Tensors on the CPU that are freed leave their pages to the next ones.

    By default glibc gives large ones back to the system, and every step pays for fresh pages
    again. Holds for the whole process and for good; other C libraries stay as they are.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
