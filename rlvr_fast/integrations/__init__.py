"""This package's loss inside of other trainers: one module each, imported when first used."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "FastGRPOTrainer":
        from rlvr_fast.integrations.trl import FastGRPOTrainer

        return FastGRPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
