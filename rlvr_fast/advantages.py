"""Advantages that `ops.group_advantages` does not give: plain torch, fp64, a few numbers a step.

`R` is a sequence's reward; NaN marks one that nobody could score: its advantage is 0 and it is in
no sum.
"""

import torch
from torch import Tensor

from rlvr_fast.ops.group_advantages import GroupNormalisation, Scale, group_advantages


def centred(rewards: Tensor, group_offsets: Tensor) -> Tensor:
    """`R - mean(R)` of the group, `[S]` fp64: Dr. GRPO (2503.20783). See `group_advantages`."""
    normalisation = GroupNormalisation(scale=Scale.NONE)
    return group_advantages(rewards.double(), group_offsets, normalisation=normalisation)


def divided_by_mean(rewards: Tensor, group_offsets: Tensor) -> Tensor:
    """`(R - mean(R)) / mean(R)` of the group: MaxRL (2602.02710, algorithm 1).

    Args:
        rewards: `[S]` floating point, not negative; NaN: nobody could score it.
        group_offsets: `[G+1]` int64, ascending from 0 to S.

    Returns:
        `[S]` fp64. Exactly 0 in groups whose mean is not above 0, whose rewards are equal, or with
        fewer than two scored sequences.

    Raises:
        ValueError: for shapes, dtypes or offsets other than these.
    """
    difference = centred(rewards, group_offsets)
    ones = torch.ones_like(difference)
    mean = _group_mean(rewards, ones, group_offsets)
    return torch.where(mean > 0, difference / mean, 0.0)


def less_length_weighted_mean(rewards: Tensor, lengths: Tensor, group_offsets: Tensor) -> Tensor:
    """`R - sum(length R) / sum(length)` of the group: OPO (2505.23585, section 3.2).

    The baseline of least variance where a sequence's squared gradient grows with its length.

    Args:
        rewards: `[S]` floating point; NaN: nobody could score it.
        lengths: `[S]` int64, scored tokens.
        group_offsets: `[G+1]` int64, ascending from 0 to S.

    Returns:
        `[S]` fp64. Exactly 0 in groups whose rewards are equal or with fewer than two scored
        sequences.

    Raises:
        ValueError: for shapes, dtypes or offsets other than these.
    """
    _check_lengths(lengths, rewards)
    apart = (centred(rewards, group_offsets) != 0).double()
    informative = _spread(_group_sum(apart, group_offsets) > 0, group_offsets)
    baseline = _group_mean(rewards, lengths.double(), group_offsets)
    return torch.where(informative & ~rewards.isnan(), rewards.double() - baseline, 0.0)


def whitened(values: Tensor, lengths: Tensor, *, eps: float = 1e-8) -> Tensor:
    """`(x - mean) / sqrt(var + eps)` over the tokens of a batch: REINFORCE++ (2501.03262).

    A sequence's value counts once for each of its tokens; the variance has Bessel's correction.

    Args:
        values: `[S]` floating point; NaN: left out.
        lengths: `[S]` int64, scored tokens.
        eps: added to the variance.

    Returns:
        `[S]` fp64; 0 for NaN, and everywhere if all values that have a token are equal.

    Raises:
        ValueError: for another shape or dtype of lengths.
    """
    _check_lengths(lengths, values)
    counted = ~values.isnan() & (lengths > 0)
    weight = torch.where(counted, lengths.double(), 0.0)
    x = torch.where(counted, values.double(), 0.0)
    if not counted.any() or x[counted].min() == x[counted].max():
        return torch.zeros_like(x)
    mean = (weight * x).sum() / weight.sum()
    variance = (weight * (x - mean) ** 2).sum() / (weight.sum() - 1)
    return torch.where(counted, (x - mean) / (variance + eps).sqrt(), 0.0)


def _group_mean(values: Tensor, weight: Tensor, group_offsets: Tensor) -> Tensor:
    """`[S]`: each sequence gets the weighted mean of its group."""
    scored = ~values.isnan()
    weight = torch.where(scored, weight, 0.0)
    total = _group_sum(weight * torch.where(scored, values.double(), 0.0), group_offsets)
    mean = total / _group_sum(weight, group_offsets).clamp(min=torch.finfo(torch.float64).tiny)
    return _spread(mean, group_offsets)


def _group_sum(values: Tensor, group_offsets: Tensor) -> Tensor:
    groups = len(group_offsets) - 1
    group = _spread(torch.arange(groups, device=values.device), group_offsets)
    return values.new_zeros(groups).index_add(0, group, values)


def _spread(per_group: Tensor, group_offsets: Tensor) -> Tensor:
    return per_group.repeat_interleave(group_offsets.diff())


def _check_lengths(lengths: Tensor, values: Tensor) -> None:
    if lengths.shape != values.shape or lengths.dtype != torch.int64:
        raise ValueError(
            f"lengths: wanted int64 {list(values.shape)}, got {lengths.dtype} {list(lengths.shape)}"
        )
