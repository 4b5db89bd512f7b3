"""Advantages lifted by the growing rank of hidden states (VERL, 2509.23808).

The effective rank of a completion's hidden states is the exponential of the entropy of their
normalised singular values. How it grows while the completion is written, and how that growth
grows, are compared with running means of earlier steps; what is above them lifts the advantage by
at most half of it, so that its sign never changes. As released, only the last token is lifted;
`broadcast` lifts all, as the paper's text has it.

Ours: the hidden states are those that predict the tokens, one position before those that read
them, after the final norm; a completion without any variance has rank 1.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import fmean
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from rlvr_fast.methods.base import Evidence, Paper
from rlvr_fast.methods.grpo import GRPO
from rlvr_fast.methods.rollouts import Groups, Rollout
from rlvr_fast.methods.scores import Scorer

LARGEST = 5.0
"""Bound of a relative difference from a running mean."""


class Indicators(NamedTuple):
    """Of the hidden states of one completion; what a running mean is kept of."""

    rank: float
    """Effective rank of all of them."""
    growth: float
    """Mean difference of a prefix's effective rank from the mean of those of shorter ones."""
    acceleration: float
    """Mean change of that difference from prefix to prefix."""


@dataclass(frozen=True, kw_only=True)
class VerlRank(GRPO):
    """GRPO's advantage A plus min(max(bonus, 0), |A| / kappa).

    Costs a forward pass in every step, and for a completion of t tokens in D dimensions t / stride
    eigenvalue problems of size min(t, D).
    """

    paper: ClassVar[Paper] = Paper(
        source="2509.23808 and github.com/hf618/VERL",
        formula="A + min(relu(g tanh(d rank) + (1 - g) tanh(d growth)), |A| / 2)",
        evidence=Evidence.CODE,
        reconstructed=("states one position earlier, after the norm", "rank without variance"),
    )

    kappa: float = 2.0
    """The lift is at most |A| / kappa; above 1, so that no sign changes."""
    decay: float = 0.3
    """Weight of the last step in the running means."""
    gain: float = 2.0
    """Of the acceleration in the weight between rank and growth."""
    stride: int = 40
    """Tokens from one prefix to the next."""
    last_tokens: int | None = None
    """Growth and acceleration look at so many last tokens only; none: at all."""
    broadcast: bool = False
    """Lift every token of a completion, not its last alone."""
    _means: dict[str, float] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Running means by indicator, steps so far included; empty before the first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.kappa > 1:
            raise ValueError(f"kappa: wanted > 1, got {self.kappa}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay: wanted a number in (0, 1], got {self.decay}")
        if self.stride < 1:
            raise ValueError(f"stride: wanted >= 1, got {self.stride}")
        if self.last_tokens is not None and self.last_tokens < 1:
            raise ValueError(f"last_tokens: wanted >= 1 or none, got {self.last_tokens}")

    def shape(self, groups: Groups, scorer: Scorer) -> Groups:
        """Also moves the running means, which nobody else reads."""
        found = scorer.hidden(groups, self._indicators)
        shaped = groups
        if self._means:
            means = Indicators(**self._means)
            shaped = [
                [
                    self._lifted(rollout, self._bonus(seen, means))
                    for rollout, seen in zip(group, each, strict=True)
                ]
                for group, each in zip(groups, found, strict=True)
            ]
        flat = [seen for each in found for seen in each]
        for name in Indicators._fields if flat else ():
            mean = fmean(getattr(seen, name) for seen in flat)
            before = self._means.get(name, 0.0)
            self._means[name] = (1 - self.decay) * before + self.decay * mean
        return shaped

    def state_dict(self) -> dict[str, Any]:
        return {"means": dict(self._means)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._means.clear()
        self._means.update(state["means"])

    def _indicators(self, hidden: Tensor) -> Indicators:
        rank = effective_rank(hidden)
        tail = hidden if self.last_tokens is None else hidden[-self.last_tokens :]
        return Indicators(rank, *growth_and_acceleration(prefix_ranks(tail, self.stride)))

    def _bonus(self, seen: Indicators, means: Indicators) -> float:
        relative = Indicators(*map(_relative, seen, means))
        return exploration_bonus(relative, gain=self.gain)

    def _lifted(self, rollout: Rollout, bonus: float) -> Rollout:
        assert isinstance(rollout.advantage, float)
        lift = min(max(bonus, 0.0), abs(rollout.advantage) / self.kappa)
        length = len(rollout.completion_ids)
        if not lift or not rollout.scored_tokens:
            return rollout
        if self.broadcast:
            return replace(rollout, advantage=rollout.advantage + lift)
        advantage = [rollout.advantage] * length
        mask = rollout.loss_mask
        last = max(i for i in range(length) if mask is None or mask[i])
        advantage[last] += lift
        return replace(rollout, advantage=advantage)


def effective_rank(hidden: Tensor) -> float:
    """`exp` of the entropy of the normalised singular values of centred rows `[t, D]`; in
    [1, min(t, D)], and 1 where nothing varies.

    Cost: `t D min(t, D)` flops and the eigenvalues of the smaller Gram matrix, in fp64.
    """
    if not len(hidden):
        return 1.0
    rows = _centred(hidden)
    return _rank(rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows)


def prefix_ranks(hidden: Tensor, stride: int) -> list[float]:
    """`effective_rank(hidden[:t + 1])` for t = stride, 2 stride ... below the length.

    Cost: one Gram matrix in all; each prefix adds its eigenvalue problem.
    """
    length, width = hidden.shape
    rows, found = _centred(hidden), list[float]()
    between_rows = rows[:width] @ rows[:width].T  # for prefixes of up to D rows
    between_columns, seen = rows.new_zeros(width, width), 0
    for count in range(stride + 1, length + 1, stride):
        if count <= width:
            part = between_rows[:count, :count]
            by_row = part.mean(0)
            found.append(_rank(part - by_row - by_row[:, None] + by_row.mean()))
            continue
        between_columns += rows[seen:count].T @ rows[seen:count]
        seen, mean = count, rows[:count].mean(0)
        found.append(_rank(between_columns - count * torch.outer(mean, mean)))
    return found


def growth_and_acceleration(ranks: Sequence[float]) -> tuple[float, float]:
    """Mean of `d_j = m_j - mean(m_1 .. m_(j-1))`, and mean of `d_j - d_(j-1)`; 0 without any."""
    differences, total = list[float](), 0.0
    for count, rank in enumerate(ranks):
        if count:
            differences.append(rank - total / count)
        total += rank
    changes = [after - before for before, after in pairwise(differences)]
    return fmean(differences or [0.0]), fmean(changes or [0.0])


def exploration_bonus(relative: Indicators, *, gain: float = 2.0) -> float:
    """`g tanh(rank) + (1 - g) tanh(growth)`, `g = sigmoid(gain acceleration)`; in (-1, 1)."""
    weight = 1 / (1 + math.exp(-gain * relative.acceleration))
    return weight * math.tanh(relative.rank) + (1 - weight) * math.tanh(relative.growth)


def _relative(value: float, mean: float) -> float:
    return min(max((value - mean) / (abs(mean) + 1e-8), -LARGEST), LARGEST)


def _centred(hidden: Tensor) -> Tensor:
    """In fp64: the root of an eigenvalue has half of its digits."""
    rows = hidden.double()
    return rows - rows.mean(0)


def _rank(gram: Tensor) -> float:
    values = torch.linalg.eigvalsh(gram).clamp(min=0)
    # What is left of an exact 0 after rounding is none of the singular values.
    values = values[values > len(gram) * torch.finfo(gram.dtype).eps * values.max()]
    if not len(values):
        return 1.0
    share = values.sqrt() / values.sqrt().sum()
    return float(torch.special.entr(share).sum().exp())
