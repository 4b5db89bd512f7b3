"""What the configs have in common."""

import re
from enum import StrEnum
from typing import Any


class Precision(StrEnum):
    """Of the matrix products; sums, statistics and the trainer's weights are fp32 in both."""

    BF16 = "bf16"
    FP32 = "fp32"


def check(config: object, name: str, holds: bool, wanted: str) -> None:
    """Raises a ValueError that says what the field `name` should be, unless it `holds`."""
    if not holds:
        raise ValueError(f"{name}: wanted {wanted}, got {getattr(config, name)!r}")


def check_device(config: Any) -> None:
    """`check` of the field `device`."""
    known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.device) is not None
    check(config, "device", known, "auto, cpu, cuda or cuda:N")
