"""Fused losses and a minimal trainer for reinforcement learning with verifiable rewards."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "GroupNormalisation": "rlvr_fast.ops.group_advantages",
    "LogitTransform": "rlvr_fast.ops.transform",
    "Packed": "rlvr_fast.packed",
    "PolicyLossOutput": "rlvr_fast.ops.policy_loss",
    "Sample": "rlvr_fast.packed",
    "Scale": "rlvr_fast.ops.group_advantages",
    "ScoredTokens": "rlvr_fast.packed",
    "TokenLogprobs": "rlvr_fast.ops.logprobs",
    "group_advantages": "rlvr_fast.ops.group_advantages",
    "linear_logprobs": "rlvr_fast.ops.linear_logprobs",
    "logprobs": "rlvr_fast.ops.logprobs",
    "pack": "rlvr_fast.packed",
    "policy_loss": "rlvr_fast.ops.policy_loss",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    """Imports on first use: verifier workers import the package without paying for torch."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'rlvr_fast' has no attribute {name!r}")
