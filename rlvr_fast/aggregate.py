"""Aggregation is a weight per token.

Each function maps the scored lengths of the *whole* optimiser batch (all micro-batches, all
ranks, sequences that were dropped because their gradient is zero included) to the weight `[S]`
that every token of a sequence carries. The loss is then `sum(weight * token_loss)`, so no split
into micro-batches, order or rank count can change it.
"""

from torch import Tensor


def token_mean(seq_lengths: Tensor) -> Tensor:
    """Every token counts the same: `1 / sum(lengths)`. `[S]` int64 to `[S]` fp32."""
    total = seq_lengths.sum().clamp(min=1).float()
    return (1.0 / total).expand(seq_lengths.shape).clone()


def sequence_mean(seq_lengths: Tensor) -> Tensor:
    """Every sequence counts the same: mean over its tokens, then over sequences."""
    return mean_per_sequence(seq_lengths) / max(len(seq_lengths), 1)


def constant_length(seq_lengths: Tensor, *, length: int) -> Tensor:
    """Sum over tokens divided by a constant `length`, then mean over sequences.

    Raises:
        ValueError: for a `length` below 1.
    """
    if length < 1:
        raise ValueError(f"length: wanted at least 1, got {length}")
    return (seq_lengths.new_ones(seq_lengths.shape) / (length * max(len(seq_lengths), 1))).float()


def mean_per_sequence(seq_lengths: Tensor, *, scale: float = 1.0) -> Tensor:
    """Mean over the tokens of each sequence, then `scale` times the *sum* over sequences."""
    return scale / seq_lengths.clamp(min=1).float()
