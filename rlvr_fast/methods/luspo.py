"""GSPO without its length bias: each sequence counts by its length (LUSPO, 2602.05261)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rlvr_fast import aggregate
from rlvr_fast.methods.base import BatchShape, Evidence, Paper
from rlvr_fast.methods.gspo import GSPO


@dataclass(frozen=True, kw_only=True)
class LUSPO(GSPO):
    """GSPO's loss of a sequence times the number of its tokens, then the mean over sequences.

    In GSPO a token's gradient shrinks with the length of its answer; here it does not: on policy
    the gradient is that of `-A` times the summed log-probability. A batch's loss grows with its
    lengths, and so does the gradient: `max_grad_norm` and the learning rate see it. The advantage
    is GRPO's.
    """

    paper: ClassVar[Paper] = Paper(
        source="2602.05261; TRL, loss_type luspo",
        formula="-|y| min(s A, clip(s) A), s = exp(mean_t log r)",
        evidence=Evidence.CODE,
    )

    clip_low: float = 2e-3
    """The sequence's ratio counts down to 1 - clip_low."""
    clip_high: float = 2.5e-3
    """The sequence's ratio counts up to 1 + clip_high."""

    def seq_weights(self, shape: BatchShape) -> Tensor:
        return aggregate.constant_length(shape.seq_lengths, length=1)
