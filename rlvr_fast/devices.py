"""Devices and precisions by the names that a config gives them."""

import torch

from rlvr_fast.config import Precision

DTYPES = {Precision.BF16: torch.bfloat16, Precision.FP32: torch.float32}


def device(name: str) -> str:
    """`auto` becomes cuda where there is one, else cpu; any other name stays."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
