"""Fused losses and a minimal trainer for reinforcement learning with verifiable rewards."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Divergence": "rlvr_fast.ops.divergence",
    "GroupNormalisation": "rlvr_fast.ops.group_advantages",
    "LinearKL": "rlvr_fast.ops.linear_kl",
    "LogitTransform": "rlvr_fast.ops.transform",
    "Packed": "rlvr_fast.packed",
    "PolicyLossOutput": "rlvr_fast.ops.policy_loss",
    "Sample": "rlvr_fast.packed",
    "Scale": "rlvr_fast.ops.group_advantages",
    "ScoredTokens": "rlvr_fast.scored",
    "TokenLogprobs": "rlvr_fast.ops.logprobs",
    "TokenStatistics": "rlvr_fast.ops.token_statistics",
    "group_advantages": "rlvr_fast.ops.group_advantages",
    "linear_kl": "rlvr_fast.ops.linear_kl",
    "linear_logprobs": "rlvr_fast.ops.linear_logprobs",
    "linear_statistics": "rlvr_fast.ops.token_statistics",
    "logprobs": "rlvr_fast.ops.logprobs",
    "mark_active": "rlvr_fast.ops.active_rows",
    "pack": "rlvr_fast.packed",
    "policy_loss": "rlvr_fast.ops.policy_loss",
    "release_workspace": "rlvr_fast.ops.workspace",
    "token_statistics": "rlvr_fast.ops.token_statistics",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    """Imports on first use: verifier workers import the package without paying for torch."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'rlvr_fast' has no attribute {name!r}")
