"""The value of a uniformly random policy, learned by squared Bellman error (ROVER, 2509.24981)."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from rlvr_fast.methods.base import Evidence, Method, Paper
from rlvr_fast.methods.scores import Scorer
from rlvr_fast.objectives import Objective
from rlvr_fast.ops.group_advantages import GroupNormalisation, Scale
from rlvr_fast.packed import Packed, ScoredTokens
from rlvr_fast.tracing.tokens import Tokens

TARGET, OLD_VALUE = "target", "old_value"
"""The extras: what Q should become; and the value of each token's state before the first update."""


@dataclass(frozen=True, kw_only=True)
class SquaredTargetError(Objective):
    """`(scale (logp - old_logp) - t.extras["target"])^2`.

    Not clamped: what has gone too far is to come back.
    """

    scale: float = 1.0

    def token_loss(self, t: Tokens) -> Tensor:
        return (self.scale * (t.logp - t.old_logp) - t.extras[TARGET]) ** 2


@dataclass(frozen=True, kw_only=True)
class ROVER(Method):
    """Regression of `Q = rho (logp - old_logp)` on `A + future rho (m_next - old m_next)`.

    `m` is the mean over the vocabulary of log-probabilities: what a uniformly random next token is
    worth. The target is constant to the gradient; the last token's is `A`, and a token before one
    that the policy did not write has no future either. `A` is the reward less the group's mean.
    Mean over all tokens. No clip, KL or entropy bonus; the option of the authors' code that freezes
    Q beyond a bound, which they leave off, is not here.

    On the first update of a batch the gradient is twice that of REINFORCE. What makes the method
    comes with the later ones, so with `updates_per_batch` above 1: each update then costs another
    forward pass. (The authors make 4 updates, of a quarter of the batch each; here each update is
    of the whole batch.)
    """

    paper: ClassVar[Paper] = Paper(
        source="2509.24981; github.com/tinnerhrhe/ROVER, dp_actor.py",
        formula="(Q - sg[A + lambda rho (m' - m'_old)])^2, Q = rho log r, m = mean_v log p_v",
        evidence=Evidence.CODE,
    )

    rho: float = 1.0
    """What log-probabilities are multiplied by to become values."""
    future: float = 1.0
    """lambda: how much the next state's value counts; 0 regresses on the advantage alone."""
    standardise: bool = False
    """Divides the advantage by the group's std, as the authors do for mathematics."""

    def __post_init__(self) -> None:
        self.check_not_negative("rho", "future")

    def normalisation(self) -> GroupNormalisation:
        return GroupNormalisation(scale=Scale.STD if self.standardise else Scale.NONE)

    def prepare(self, packs: list[Packed], scorer: Scorer, update: int) -> list[Packed]:
        looks_ahead = self.future > 0 and scorer.updates > 1
        return [self._with_target(packed, scorer if looks_ahead else None) for packed in packs]

    def objective(self) -> Objective:
        return SquaredTargetError(scale=self.rho)

    def _with_target(self, packed: Packed, scorer: Scorer | None) -> Packed:
        scored = packed.scored
        assert scored.advantage is not None
        extras, target = dict(scored.extras), scored.advantage
        if scorer is not None:
            found = scorer.statistics(packed)
            value = (found.mean_logit - found.logsumexp).detach().float()
            gained = value - extras.setdefault(OLD_VALUE, value)
            target = target + self.future * self.rho * following(gained, scored)
        extras[TARGET] = target
        return replace(packed, scored=replace(scored, extras=extras))


def following(values: Tensor, scored: ScoredTokens) -> Tensor:
    """`[T]`: of each token's successor in its sequence; 0 without one, or if that is masked."""
    assert scored.seq_offsets is not None
    kept = torch.where(scored.weight != 0, values, torch.zeros_like(values))
    last = scored.seq_offsets[1:][scored.seq_lengths > 0] - 1
    return kept.roll(-1).index_fill(0, last.to(values.device), 0.0)
