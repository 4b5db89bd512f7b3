"""What an objective sees: named `[T]` tensors, and means over sequences and groups."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


@dataclass(frozen=True)
class Segments:
    """Which segment each of `T` tokens belongs to, and which tokens count in a mean."""

    index: Tensor
    """`[T]` int64."""
    count: int
    kept: Tensor
    """`[T]` bool, False where the weight is 0."""

    def sum(self, x: Tensor) -> Tensor:
        """`[T]` to `[T]`: every token gets the sum over the kept tokens of its segment."""
        kept = torch.where(self.kept, x, torch.zeros_like(x))
        return kept.new_zeros(self.count).index_add(0, self.index, kept)[self.index]

    def mean(self, x: Tensor) -> Tensor:
        """As `sum`, divided by the number of kept tokens (at least 1)."""
        return self.sum(x) / self.sum(torch.ones_like(x)).clamp(min=1)

    def greatest(self, x: Tensor) -> Tensor:
        """`[T]` to `[T]`, not differentiated: the greatest of the kept tokens of the segment; a
        token that is not kept gets its own.
        """
        x = x.detach()
        least = torch.where(self.kept, x, x.new_full((), -torch.inf))
        found = least.new_full((self.count,), -torch.inf).scatter_reduce(
            0, self.index, least, "amax"
        )
        return torch.where(self.kept, found[self.index], x)


@dataclass(frozen=True, kw_only=True)
class TokenFields:
    """The `[T]` fp32 tensors of a tile, as they came: a field may be missing."""

    weight: Tensor
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    rollout_logp: Tensor | None = None
    advantage: Tensor | None = None
    extras: Mapping[str, Tensor]


class Tokens:
    """The argument of `Objective.token_loss`. Every field is `[T]` fp32; logp in nats.

    Masked tokens (weight 0) never reach the loss: their old, reference and rollout logp read as
    their own logp, their advantage as 0, so that nothing left there can spoil a gradient.

    Raises:
        ValueError: for reading a field that the caller did not supply.
    """

    def __init__(
        self,
        logp: Tensor,
        entropy: Tensor,
        fields: TokenFields,
        seq: Segments | None = None,
        group: Segments | None = None,
    ) -> None:
        self.logp = logp
        """Under the policy being trained; differentiable."""
        self.entropy = entropy
        """Of the whole distribution at this token, in nats; differentiable."""
        self._fields = fields
        self._seq, self._group = seq, group

    @property
    def old_logp(self) -> Tensor:
        """At the start of the update; without one the policy has not moved, and it is `logp`."""
        if self._fields.old_logp is None:
            return self.logp.detach()
        return self._own_logp_where_masked(self._fields.old_logp)

    @property
    def ref_logp(self) -> Tensor:
        """Under the reference policy."""
        return self._own_logp_where_masked(self._wanted("ref_logp", self._fields.ref_logp))

    @property
    def rollout_logp(self) -> Tensor:
        """As the sampler reported it."""
        return self._own_logp_where_masked(self._wanted("rollout_logp", self._fields.rollout_logp))

    @property
    def advantage(self) -> Tensor:
        advantage = self._wanted("advantage (or rewards with both offsets)", self._fields.advantage)
        return torch.where(self.kept, advantage, torch.zeros_like(advantage))

    @property
    def extras(self) -> Mapping[str, Tensor]:
        return {
            name: torch.where(self.kept, value, torch.zeros_like(value))
            for name, value in self._fields.extras.items()
        }

    def seq_sum(self, x: Tensor) -> Tensor:
        """`[T]` to `[T]`: each token gets the sum over the unmasked tokens of its sequence."""
        return self._wanted("seq_offsets", self._seq).sum(x)

    def seq_mean(self, x: Tensor) -> Tensor:
        """`[T]` to `[T]`: each token gets the mean over the unmasked tokens of its sequence."""
        return self._wanted("seq_offsets", self._seq).mean(x)

    def seq_max(self, x: Tensor) -> Tensor:
        """`[T]` to `[T]`: each unmasked token gets the greatest of its sequence, a masked one
        its own; no gradient.
        """
        return self._wanted("seq_offsets", self._seq).greatest(x)

    def seq_min(self, x: Tensor) -> Tensor:
        """`[T]` to `[T]`: each unmasked token gets the least of its sequence; no gradient."""
        return -self.seq_max(-x)

    def group_sum(self, x: Tensor) -> Tensor:
        """`[T]` to `[T]`: each token gets the sum over the unmasked tokens of its group."""
        return self._wanted("group_offsets", self._group).sum(x)

    def group_mean(self, x: Tensor) -> Tensor:
        """`[T]` to `[T]`: each token gets the mean over the unmasked tokens of its group."""
        return self._wanted("group_offsets", self._group).mean(x)

    @property
    def kept(self) -> Tensor:
        """bool, False where the weight is 0."""
        return self._fields.weight != 0

    def _own_logp_where_masked(self, value: Tensor) -> Tensor:
        return torch.where(self.kept, value, self.logp.detach())

    @staticmethod
    def _wanted(name: str, value: Value | None) -> Value:
        if value is None:
            raise ValueError(f"this objective reads {name}: wanted it in ScoredTokens, got None")
        return value
