"""What a loss needs to know about the tokens of a pack."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SegmentIndex:
    """What lies on the CPU as indices beside the tokens; None without the offsets."""

    seq_of_token: Tensor | None = None
    """`[T]` int64."""
    group_of_seq: Tensor | None = None
    """`[S]` int64."""
    group_offsets: Tensor | None = None
    """`[G+1]` int64."""
    active: Tensor | None = None
    """`[n]` int64, the active rows; None if all are."""


@dataclass(frozen=True, kw_only=True)
class ScoredTokens:
    """What a loss needs to know about the `T` completion tokens of a pack.

    Only `targets` and `weight` are required. Without `old_logp` the policy has not moved since
    sampling and every ratio is exactly 1. Without `advantage`, `rewards` and both offsets let the
    op normalise each group itself. The offsets plan the work, so they live on the CPU.

    Raises:
        ValueError: for a field whose shape, dtype or device does not fit the others.
    """

    targets: Tensor
    """`[T]` int64, the token each hidden state should predict, in `[0, V)`."""
    weight: Tensor
    """`[T]` fp32. The loss is `sum(weight * token_loss)`; 0 masks a token. See `aggregate`."""
    seq_offsets: Tensor | None = None
    """`[S+1]` int64 on the CPU: tokens `seq_offsets[s]` to `seq_offsets[s+1]` are sequence `s`."""
    group_offsets: Tensor | None = None
    """`[G+1]` int64 on the CPU: which sequences answer the same prompt."""
    old_logp: Tensor | None = None
    """`[T]` fp32 nats, under the policy at the start of the update."""
    ref_logp: Tensor | None = None
    """`[T]` fp32 nats, under the reference policy."""
    rollout_logp: Tensor | None = None
    """`[T]` fp32 nats, as the sampler reported them."""
    rewards: Tensor | None = None
    """`[S]` fp32; NaN marks a sequence nobody could score (advantage 0)."""
    advantage: Tensor | None = None
    """`[T]` or `[S]` fp32."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Further named `[T]` tensors that an objective reads as `t.extras[name]`."""
    active: Tensor | None = None
    """`[T]` bool on the CPU: False promises that a row's gradient is zero, so that nobody needs to
    multiply it. `mark_active` finds out; for tokens on the CPU `policy_loss` calls it by itself."""
    _index: SegmentIndex | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.targets.dim() != 1 or self.targets.dtype != torch.int64:
            raise ValueError(f"targets: wanted int64 [T], got {_shown(self.targets)}")
        for name, value in self._token_fields().items():
            if value.shape != self.targets.shape or not value.is_floating_point():
                raise ValueError(
                    f"{name}: wanted floating point [{self.num_tokens}], got {_shown(value)}"
                )
        _check_offsets("seq_offsets", self.seq_offsets, self.num_tokens)
        if self.group_offsets is not None and self.seq_offsets is None:
            raise ValueError("group_offsets: wanted seq_offsets beside it, got None")
        _check_offsets("group_offsets", self.group_offsets, self.num_sequences)
        if self.active is not None and (
            self.active.shape != self.targets.shape
            or self.active.dtype != torch.bool
            or self.active.is_cuda
        ):
            raise ValueError(
                f"active: wanted bool [{self.num_tokens}] on the CPU, got {_shown(self.active)}"
            )
        if self.rewards is not None and self.rewards.shape != (self.num_sequences,):
            raise ValueError(
                f"rewards: wanted [{self.num_sequences}] and seq_offsets, "
                f"got {_shown(self.rewards)}"
            )
        if self.advantage is not None and self.advantage.shape not in (
            (self.num_tokens,),
            (self.num_sequences,),
        ):
            raise ValueError(
                f"advantage: wanted [{self.num_tokens}] or [{self.num_sequences}], "
                f"got {_shown(self.advantage)}"
            )

    def _token_fields(self) -> dict[str, Tensor]:
        named = {
            "weight": self.weight,
            "old_logp": self.old_logp,
            "ref_logp": self.ref_logp,
            "rollout_logp": self.rollout_logp,
        } | {f"extras[{name!r}]": value for name, value in self.extras.items()}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def num_tokens(self) -> int:
        return self.targets.shape[0]

    @property
    def num_sequences(self) -> int:
        """0 when there are no `seq_offsets`."""
        return 0 if self.seq_offsets is None else self.seq_offsets.shape[0] - 1

    @property
    def seq_lengths(self) -> Tensor:
        """`[S]` int64 on the CPU."""
        if self.seq_offsets is None:
            raise ValueError("wanted ScoredTokens with seq_offsets, got None")
        return self.seq_offsets.diff()

    @property
    def active_rows(self) -> Tensor | None:
        """`[n]` int64 on the CPU, ascending; None if all rows are active, or may be."""
        if self.active is None or bool(self.active.all()):
            return None
        return self.active.nonzero().squeeze(1)

    @property
    def segments(self) -> SegmentIndex:
        """Indices on the device of the tokens, made once; `to` makes them in advance."""
        if self._index is None:
            object.__setattr__(self, "_index", self._indices(self.targets.device))
        assert self._index is not None
        return self._index

    def _indices(self, device: torch.device | str) -> SegmentIndex:
        def move(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device, non_blocking=True)

        seq, group = self.seq_offsets, self.group_offsets
        return SegmentIndex(
            seq_of_token=None if seq is None else move(_index_of(seq)),
            group_of_seq=None if group is None else move(_index_of(group)),
            group_offsets=move(group),
            active=move(self.active_rows),
        )

    def expand(self, per_sequence: Tensor) -> Tensor:
        """`[S]` to `[T]`: every token gets the value of its sequence."""
        seq_of_token = self.segments.seq_of_token
        if seq_of_token is None:
            raise ValueError("wanted ScoredTokens with seq_offsets, got None")
        return per_sequence.index_select(0, seq_of_token.to(per_sequence.device))

    def select(self, rows: Tensor, index: Tensor | None = None) -> "ScoredTokens":
        """Some of the tokens only; sequences that lose all of theirs stay, with none.

        Args:
            rows: `[n]` int64 on the CPU, ascending.
            index: the same beside the tokens, if it is there already.
        """
        index = rows.to(self.targets.device, non_blocking=True) if index is None else index

        def pick(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.index_select(0, index)

        advantage, segments = self.advantage, self.segments
        if advantage is not None and len(advantage) != self.num_tokens:
            advantage = self.expand(advantage)
        part = ScoredTokens(
            targets=self.targets.index_select(0, index),
            weight=self.weight.index_select(0, index),
            seq_offsets=(
                None if self.seq_offsets is None else torch.searchsorted(rows, self.seq_offsets)
            ),
            group_offsets=self.group_offsets,
            old_logp=pick(self.old_logp),
            ref_logp=pick(self.ref_logp),
            rollout_logp=pick(self.rollout_logp),
            rewards=self.rewards,
            advantage=pick(advantage),
            extras={name: value.index_select(0, index) for name, value in self.extras.items()},
        )
        kept = replace(segments, seq_of_token=pick(segments.seq_of_token), active=None)
        object.__setattr__(part, "_index", kept)
        return part

    def to(self, device: torch.device | str) -> "ScoredTokens":
        """A copy whose tensors are on `device`; the offsets stay on the CPU."""

        def move(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device, non_blocking=True)

        moved = replace(
            self,
            targets=self.targets.to(device, non_blocking=True),
            weight=self.weight.to(device, non_blocking=True),
            old_logp=move(self.old_logp),
            ref_logp=move(self.ref_logp),
            rollout_logp=move(self.rollout_logp),
            rewards=move(self.rewards),
            advantage=move(self.advantage),
            extras={
                name: value.to(device, non_blocking=True) for name, value in self.extras.items()
            },
        )
        # Otherwise every op would have to copy them; a `replace` forgets them again.
        object.__setattr__(moved, "_index", self._indices(device))
        return moved


def _index_of(offsets: Tensor) -> Tensor:
    return torch.arange(len(offsets) - 1).repeat_interleave(
        offsets.diff(), output_size=int(offsets[-1])
    )


def _check_offsets(name: str, offsets: Tensor | None, total: int) -> None:
    if offsets is None:
        return
    if offsets.dim() != 1 or offsets.dtype != torch.int64 or offsets.is_cuda or not len(offsets):
        raise ValueError(f"{name}: wanted int64 [n+1] on the CPU, got {_shown(offsets)}")
    if offsets[0] != 0 or offsets[-1] != total or (offsets.diff() < 0).any():
        raise ValueError(f"{name}: wanted ascending from 0 to {total}, got {offsets.tolist()[:8]}")


def _shown(value: Tensor) -> str:
    return f"{value.dtype} {list(value.shape)} on {value.device}"
