"""An objective is a frozen dataclass with one method, written in plain torch."""

from dataclasses import dataclass

from torch import Tensor

from rlvr_fast.tracing.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Base of everything `policy_loss` can optimise.

    Write `token_loss` with torch functions; its derivative is autograd's. Fields annotated `float`
    become kernel arguments, so other values do not recompile. Pointwise code runs inside the
    kernel; code that calls `t.seq_mean`, `t.group_sum` or their kin runs between its sweeps.
    """

    def token_loss(self, t: Tokens) -> Tensor:
        """`[T]` fp32, before the weight; lower is better."""
        raise NotImplementedError

    def __add__(self, other: "Objective") -> "Objective":
        return SumOf(terms=(*_terms(self), *_terms(other)))


@dataclass(frozen=True, kw_only=True)
class SumOf(Objective):
    """The sum of several objectives' token losses: `ClippedSurrogate() + EntropyBonus()`."""

    terms: tuple[Objective, ...]

    def token_loss(self, t: Tokens) -> Tensor:
        first, *others = (term.token_loss(t) for term in self.terms)
        for loss in others:
            first = first + loss
        return first


def _terms(objective: Objective) -> tuple[Objective, ...]:
    return objective.terms if isinstance(objective, SumOf) else (objective,)
