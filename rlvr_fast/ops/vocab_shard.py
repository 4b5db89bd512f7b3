"""An LM head whose vocabulary is cut into slices, one on each rank of a process group.

Every rank has the statistics of its own slice r, see `kernels/logprobs.py`: the maximum m_r, and
relative to it `s_r = sum e`, `u_r = sum e d = s_r (log s_r - entropy_r)`. With `m = max_r m_r` and
`h_r = m_r - m` those of the whole row are

    s = sum_r s_r exp(h_r)      u = sum_r (u_r + s_r h_r) exp(h_r)      entropy = log s - u / s

    logp = d_y - log s,  or  -log1p(exp(-d_y) sum_r s_r exp(h_r) (1 - p_r(y)))  where y is likely

with `p_r(y)` the target's probability within its own slice, and 0 in the others. Of s the first
maximum itself, 1, is left out and comes back with log1p. All ranks compute this from the same
numbers, so that they agree to the last bit.
"""

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from rlvr_fast.ops import logprobs as row_op
from rlvr_fast.ops.tiled_head import HeadSettings
from rlvr_fast.ops.transform import LogitTransform

NOTHING = -1e30
"""The maximum of a slice that is masked altogether, or less."""


@dataclass(frozen=True, kw_only=True)
class VocabShard:
    """One rank's place among the slices."""

    group: dist.ProcessGroup
    bounds: Tensor
    """`[R+1]` int64 on the device: slice r has the ids from `bounds[r]` up to `bounds[r+1]`."""
    first: int
    """Id of this rank's first row."""
    rows: int
    """Of this rank."""
    vocab_size: int
    """Of all ranks."""

    def ids(self, targets: Tensor) -> Tensor:
        """`[t]` int64: row in this rank's slice, -1 where the target is in another one."""
        local = targets - self.first
        return torch.where((local >= 0) & (local < self.rows), local, -1)

    def row_stats(self, logits: Tensor, targets: Tensor, transform: LogitTransform) -> Tensor:
        """`[4, t]` as `logprobs.row_stats` of the whole rows; one all-gather of as many numbers.

        Args:
            logits: `[t, V_r]`, this rank's slice.
            targets: `[t]` int64, ids of the whole vocabulary.
        """
        # Statistics want some target; that of another slice's row is not looked at below.
        ids = self.ids(targets).clamp(min=0)
        own = row_op.row_stats(logits, ids, transform.scale, transform.cap)
        found = _gathered(self.group, own)
        held = (targets >= self.bounds[:-1, None]) & (targets < self.bounds[1:, None])
        return combined(found, held)

    def add_up(self, partial: Tensor) -> None:
        """Replaces `partial` by its sum over the ranks, which is rounded to its dtype once."""
        total = partial.to(torch.promote_types(partial.dtype, torch.float32))
        if total.numel():
            dist.all_reduce(total, group=self.group)
        if total is not partial:
            partial.copy_(total)


def combined(stats: Tensor, held: Tensor) -> Tensor:
    """Row statistics of a vocabulary from those of its slices.

    Args:
        stats: `[R, 4, t]`, see `logprobs.reference`; the logp of a target elsewhere is not used.
        held: `[R, t]` bool: which slice the target is in.

    Returns:
        `[4, t]`.
    """
    empty = ~(stats[:, 2] > NOTHING)
    logp, entropy, top, log_s = stats.unbind(1)
    log_s, entropy = (torch.where(empty, 0.0, x) for x in (log_s, entropy))
    top = torch.where(empty, NOTHING, top)
    greatest, first = top.max(0)
    drop = (top - greatest).clamp(min=row_op.LOWEST)
    scale, s = drop.exp(), log_s.exp()
    is_first = torch.arange(len(stats), device=stats.device)[:, None] == first
    rest = (scale * torch.where(is_first, torch.expm1(log_s), s)).sum(0)
    spread = (scale * s * (log_s - entropy + drop)).sum(0)
    log_total = torch.log1p(rest)

    target = torch.where(held, drop + (logp + log_s), 0.0).sum(0)
    others = (scale * s * torch.where(held, -torch.expm1(logp), 1.0)).sum(0)
    likely = -torch.log1p(others * torch.exp(-target.clamp(min=-1.0)))
    logp = torch.where(target > -1.0, likely, target - log_total)
    return torch.stack([logp, log_total - spread / (1 + rest), greatest, log_total])


def vocab_shard(
    group: dist.ProcessGroup, hidden: Tensor, weight: Tensor, settings: HeadSettings
) -> tuple[VocabShard, HeadSettings]:
    """This rank's place, and settings with which all ranks cut the same tiles.

    A collective: on the CPU in every call; on CUDA, where the host would wait for the answer, in
    the first one of each group, slice, hidden size and budget.

    Raises:
        ValueError: on every rank, if one has no row, or other hidden states than the others.
    """
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("vocab_group: wanted a group that this rank belongs to, got another")
    # The row of a tile as `TiledHead` lays it out.
    stride = len(weight) + (-len(weight) % 16 if hidden.is_cuda else 0)
    row_bytes = stride * settings.logits_dtype.itemsize
    limit = settings.budget // row_bytes if row_bytes else 0
    plan = (len(weight), hidden.shape[1], limit)
    known = _known.setdefault(group, {}) if hidden.is_cuda else {}
    if plan not in known:
        known[plan] = _met(group, hidden, plan)
    bounds, ends, limit = known[plan]
    shard = VocabShard(
        group=group,
        bounds=bounds,
        first=ends[rank],
        rows=len(weight),
        vocab_size=ends[-1],
    )
    return shard, replace(settings, budget=max(limit, 1) * row_bytes)


_Plan: TypeAlias = tuple[int, int, int]
"""Rows of the slice, hidden size, rows of a tile."""
_Met: TypeAlias = tuple[Tensor, tuple[int, ...], int]
"""Bounds of the slices on the device and on the host, rows of everybody's tiles."""

_known: WeakKeyDictionary[dist.ProcessGroup, dict[_Plan, _Met]] = WeakKeyDictionary()


def _met(group: dist.ProcessGroup, hidden: Tensor, plan: _Plan) -> _Met:
    own = torch.tensor([*plan, len(hidden)], device=hidden.device)
    lengths, sizes, limits, tokens = _gathered(group, own).T.tolist()
    if min(lengths) < 1:
        raise ValueError(f"weight: wanted at least one row on every rank, got {lengths}")
    if len({*zip(sizes, tokens, strict=True)}) > 1:
        shapes = [list(shape) for shape in zip(tokens, sizes, strict=True)]
        raise ValueError(f"hidden: wanted the same [T, D] on every rank, got {shapes}")
    ends = (0, *accumulate(lengths))
    return torch.tensor(ends, device=hidden.device), ends, min(limits)


def _gathered(group: dist.ProcessGroup, own: Tensor) -> Tensor:
    """`[R, ...]` of what every rank gives; on CUDA the host waits for nobody."""
    every = own.new_empty(dist.get_world_size(group), *own.shape)
    dist.all_gather(list(every.unbind()), own.contiguous(), group=group)
    return every
