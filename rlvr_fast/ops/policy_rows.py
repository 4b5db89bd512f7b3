"""The pass behind `policy_loss`: tile by tile from hidden states to loss and gradients."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlvr_fast.ops import logprobs as row_op
from rlvr_fast.ops.active_rows import advantages
from rlvr_fast.ops.add_product import VOCAB_BLOCK
from rlvr_fast.ops.fused_rows import GroupRewards, fused_rows
from rlvr_fast.ops.group_advantages import GroupNormalisation
from rlvr_fast.ops.objective_rows import Segmentation, evaluate, sliced, token_fields
from rlvr_fast.ops.tiled_head import Gradients, HeadSettings, TiledHead, Wanted
from rlvr_fast.ops.transform import LogitTransform
from rlvr_fast.ops.vocab_shard import VocabShard
from rlvr_fast.scored import ScoredTokens
from rlvr_fast.tracing.level import Level, level
from rlvr_fast.tracing.objective import Objective
from rlvr_fast.tracing.tokens import TokenFields
from rlvr_fast.tracing.trace import Traced, trace

WORTH_COMPACTING = 0.8
"""Of a tile's rows at most this many have a gradient: moving them costs less than it saves."""


@dataclass(frozen=True, kw_only=True)
class PolicyCall:
    """One call of `policy_loss` but for the tensors it differentiates."""

    settings: HeadSettings
    tokens: ScoredTokens
    objective: Objective
    transform: LogitTransform
    normalisation: GroupNormalisation
    weight_grad: Tensor | None = None
    """Takes the gradient of the weight, which then does not go through autograd."""
    skip_clipped: bool = False
    """On CUDA too, rows found without a gradient are left out of the gradient GEMMs."""
    shard: VocabShard | None = None
    """The weight is a slice of the vocabulary; None: it is all of it."""

    def run(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Wanted
    ) -> tuple[Tensor, Tensor, Gradients]:
        """The loss; `[4, T]` of logp, entropy, d(loss)/d(logp) and advantage; the gradients."""
        # The objective needs statistics of the whole row, which other ranks have a part of.
        traced = None if self.shard is not None else fusible(self.objective, hidden.device)
        run_chunk = TwoSweeps(self) if traced is None else OneKernel(self, traced)
        head = TiledHead(
            hidden,
            weight,
            bias,
            self.settings,
            wanted,
            weight_grad=self.weight_grad,
            tiles_alive=run_chunk.tiles_alive,
        )
        dtype = torch.promote_types(self.settings.logits_dtype, torch.float32)
        rows = hidden.new_empty(4, len(hidden), dtype=dtype)
        loss = hidden.new_zeros((), dtype=dtype)
        for chunk in self.chunks(head):
            loss += run_chunk(head, chunk, rows)
        run_chunk.finish(head)
        gradients = head.gradients()
        if self.shard is not None and gradients[0] is not None:
            self.shard.add_up(gradients[0])
        return loss, rows, gradients

    def statistics(self, logits: Tensor, targets: Tensor) -> Tensor:
        """`[4, t]` of whole rows, see `row_stats`."""
        if self.shard is not None:
            return self.shard.row_stats(logits, targets, self.transform)
        scale, cap = self.transform.scale, self.transform.cap
        stats: Tensor = row_op.row_stats(logits, targets, scale, cap)
        return stats

    @torch.no_grad()
    def score(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor) -> Tensor:
        """`[2, n]` logp and entropy of some rows, by `index [n]` int64, without gradients."""
        hidden, targets = (x.index_select(0, index) for x in (hidden, self.tokens.targets))
        head = TiledHead(hidden, weight, bias, self.settings, Wanted(None, None, None))
        rows = [
            self.statistics(head.logits(tile), targets[tile])[:2]
            for tile in head.tiles(slice(0, len(hidden)))
        ]
        return torch.cat(rows, 1)

    def chunks(self, head: TiledHead) -> Iterator[slice]:
        """Runs of whole segments of at most a tile, or one longer segment."""
        needed, whole = level(self.objective), slice(0, self.tokens.num_tokens)
        if needed is Level.TOKEN:
            yield from head.tiles(whole)
            return
        cut = Segmentation.of(self.tokens, needed)
        offsets = cut.group if needed is Level.GROUP else cut.seq
        bounds = [0, whole.stop]
        if needed is not Level.BATCH and offsets is not None:
            bounds = offsets.tolist()
        start = 0
        for end, following in zip(bounds, [*bounds[1:], None], strict=True):
            if end > start and (following is None or following - start > head.rows):
                yield slice(start, end)
                start = end


def fusible(objective: Objective, device: torch.device) -> Traced | None:
    """The objective as a device function, if this device has use for one."""
    if device.type != "cuda" or level(objective) is not Level.TOKEN:
        return None
    return trace(objective)


class TwoSweeps:
    """Statistics, the objective in plain torch, gradient: any device, any objective."""

    tiles_alive = 1

    def __init__(self, call: PolicyCall) -> None:
        self._call = call
        self._fields = token_fields(call.tokens, advantages(call.tokens, call.normalisation))
        self._cut = Segmentation.of(call.tokens, level(call.objective))

    def __call__(self, head: TiledHead, chunk: slice, rows: Tensor) -> Tensor:
        """The chunk's loss; fills `rows` and adds to the head's gradients."""
        targets, transform = self._call.tokens.targets, self._call.transform
        tiles, stats = list(head.tiles(chunk)), []
        for tile in tiles:
            logits = head.logits(tile)
            stats.append(self._call.statistics(logits, targets[tile]))
        joined = torch.cat(stats, 1)
        fields = sliced(self._fields, chunk, joined.dtype)
        found = evaluate(self._call.objective, joined, fields, self._cut, chunk)
        for tile, tile_stats in zip(tiles, stats, strict=True) if head.wanted.any else ():
            if len(tiles) > 1:
                logits = head.logits(tile)
            local = slice(tile.start - chunk.start, tile.stop - chunk.start)
            dlogp, dentropy = found.dlogp[local], found.dentropy
            dentropy = None if dentropy is None else dentropy[local]
            ids, kept = targets[tile], None
            if self._call.shard is not None:
                ids = self._call.shard.ids(ids)
            if self._call.skip_clipped or not dlogp.is_cuda:
                kept = LiveRows(dlogp, dentropy).worth_keeping()
            if kept is not None:
                logits = compacted(logits, kept)
                ids, dlogp, tile_stats = ids[kept], dlogp[kept], tile_stats[:, kept]
                dentropy = None if dentropy is None else dentropy[kept]
            gradient = head.gradient_buffer(logits)
            row_op.row_grad(
                logits, ids, tile_stats, dlogp, dentropy, transform.scale, transform.cap, gradient
            )
            head.accumulate(tile, gradient, kept)
        rows[:3, chunk] = torch.stack([joined[0], joined[1], found.dlogp])
        rows[3, chunk] = 0.0 if fields.advantage is None else fields.advantage
        return (fields.weight * found.token_loss).sum()

    def finish(self, head: TiledHead) -> None:
        """Nothing is left over."""


class OneKernel:
    """Both sweeps and the traced objective in one kernel a tile: CUDA, token by token."""

    def __init__(self, call: PolicyCall, traced: Traced) -> None:
        self._call, self._traced = call, traced
        self.tiles_alive = 2 if call.skip_clipped else 1
        self._waiting: tuple[slice, Tensor, LiveRows] | None = None
        advantage, self._groups = call.tokens.advantage, None
        if advantage is None:
            self._groups = group_rewards_of(call.tokens, call.normalisation)
        elif len(advantage) != call.tokens.num_tokens:
            advantage = call.tokens.expand(advantage)
        self._fields: TokenFields = token_fields(call.tokens, advantage)

    def __call__(self, head: TiledHead, chunk: slice, rows: Tensor) -> Tensor:
        """As `TwoSweeps`."""
        call, groups = self._call, self._groups
        logits = head.logits(chunk)
        gradient = head.gradient_buffer(logits) if head.wanted.any else None
        fields = sliced(self._fields, chunk, torch.float32)
        logp, entropy, token_loss, dlogp, dentropy, advantage = fused_rows(
            logits,
            call.tokens.targets[chunk],
            fields,
            groups and replace(groups, seq_of_token=groups.seq_of_token[chunk]),
            call.objective,
            self._traced,
            scale=call.transform.scale,
            cap=call.transform.cap,
            out=gradient,
        )
        if gradient is not None and call.skip_clipped:
            live = LiveRows(dlogp, dentropy)
            # The device has this tile to work on while the host waits for the last one's count.
            self.finish(head)
            self._waiting = chunk, gradient, live
        elif gradient is not None:
            head.accumulate(chunk, gradient)
        rows[:, chunk] = torch.stack([logp, entropy, dlogp, advantage])
        loss: Tensor = (fields.weight * token_loss).sum()
        return loss

    def finish(self, head: TiledHead) -> None:
        """Runs the gradient GEMMs of the tile whose rows were being counted."""
        if self._waiting is None:
            return
        tile, gradient, live = self._waiting
        self._waiting = None
        kept = live.worth_keeping()
        head.accumulate(tile, gradient if kept is None else compacted(gradient, kept), kept)


class LiveRows:
    """The rows of a tile that have a gradient, counted without waiting until somebody asks."""

    def __init__(self, dlogp: Tensor, dentropy: Tensor | None) -> None:
        alive = dlogp != 0 if dentropy is None else (dlogp != 0) | (dentropy != 0)
        self._live_first = torch.argsort(alive, descending=True, stable=True)
        self._count = torch.empty((), dtype=torch.int64, pin_memory=alive.is_cuda)
        self._count.copy_(alive.sum(), non_blocking=True)
        self._counted = torch.cuda.current_stream().record_event() if alive.is_cuda else None

    def worth_keeping(self) -> Tensor | None:
        """`[n]` int64, ascending; None where leaving the others out would not pay."""
        if self._counted is not None:
            self._counted.synchronize()
        count, rows = int(self._count), len(self._live_first)
        return self._live_first[:count] if count <= WORTH_COMPACTING * rows else None


def compacted(tile: Tensor, rows: Tensor) -> Tensor:
    """`[n, V]`: the rows moved to the front of the same memory, which they overwrite."""
    for block in tile.split(VOCAB_BLOCK, dim=1):
        block[: len(rows)] = block.index_select(0, rows)
    return tile[: len(rows)]


def group_rewards_of(
    tokens: ScoredTokens, normalisation: GroupNormalisation
) -> GroupRewards | None:
    """For the kernel to normalise; None without rewards or groups."""
    found = tokens.segments
    if tokens.rewards is None or found.group_offsets is None:
        return None
    assert found.seq_of_token is not None
    assert found.group_of_seq is not None
    return GroupRewards(
        rewards=tokens.rewards,
        group_offsets=found.group_offsets,
        seq_of_token=found.seq_of_token,
        group_of_seq=found.group_of_seq,
        normalisation=normalisation,
    )
