"""The pass behind `policy_loss`: tile by tile from hidden states to loss and gradients."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlvr_fast.ops import logprobs as row_op
from rlvr_fast.ops.fused_rows import GroupRewards, fused_rows
from rlvr_fast.ops.group_advantages import GroupNormalisation, group_advantages
from rlvr_fast.ops.objective_rows import Segmentation, evaluate, sliced, token_fields
from rlvr_fast.ops.tiled_head import Gradients, HeadSettings, TiledHead, Wanted
from rlvr_fast.ops.transform import LogitTransform
from rlvr_fast.packed import ScoredTokens
from rlvr_fast.tracing.level import Level, level
from rlvr_fast.tracing.objective import Objective
from rlvr_fast.tracing.tokens import TokenFields
from rlvr_fast.tracing.trace import Traced, trace


@dataclass(frozen=True, kw_only=True)
class PolicyCall:
    """One call of `policy_loss` but for the tensors it differentiates."""

    settings: HeadSettings
    tokens: ScoredTokens
    objective: Objective
    transform: LogitTransform
    normalisation: GroupNormalisation

    def run(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Wanted
    ) -> tuple[Tensor, Tensor, Gradients]:
        """The loss; `[4, T]` of logp, entropy, d(loss)/d(logp) and advantage; the gradients."""
        head = TiledHead(hidden, weight, bias, self.settings, wanted)
        dtype = torch.promote_types(self.settings.logits_dtype, torch.float32)
        rows = hidden.new_empty(4, len(hidden), dtype=dtype)
        loss = hidden.new_zeros((), dtype=dtype)
        traced = fusible(self.objective, hidden.device)
        run_chunk = TwoSweeps(self) if traced is None else OneKernel(self, traced)
        for chunk in self.chunks(head):
            loss += run_chunk(head, chunk, rows)
        return loss, rows, head.gradients()

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


def advantages(tokens: ScoredTokens, normalisation: GroupNormalisation) -> Tensor | None:
    """`[T]`: the tokens' own advantage, or their rewards normalised by group, or None."""
    advantage = tokens.advantage
    if advantage is None:
        if tokens.rewards is None or tokens.group_offsets is None:
            return None
        offsets = tokens.group_offsets.to(tokens.rewards.device, non_blocking=True)
        advantage = group_advantages(tokens.rewards, offsets, normalisation=normalisation)
    return advantage if len(advantage) == tokens.num_tokens else tokens.expand(advantage)


class TwoSweeps:
    """Statistics, the objective in plain torch, gradient: any device, any objective."""

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
            stats.append(row_op.row_stats(logits, targets[tile], transform.scale, transform.cap))
        joined = torch.cat(stats, 1)
        fields = sliced(self._fields, chunk, joined.dtype)
        found = evaluate(self._call.objective, joined, fields, self._cut, chunk)
        for tile, tile_stats in zip(tiles, stats, strict=True) if head.wanted.any else ():
            if len(tiles) > 1:
                logits = head.logits(tile)
            local = slice(tile.start - chunk.start, tile.stop - chunk.start)
            gradient = head.gradient_buffer(logits)
            row_op.row_grad(
                logits,
                targets[tile],
                tile_stats,
                found.dlogp[local],
                None if found.dentropy is None else found.dentropy[local],
                transform.scale,
                transform.cap,
                gradient,
            )
            head.accumulate(tile, gradient)
        rows[:3, chunk] = torch.stack([joined[0], joined[1], found.dlogp])
        rows[3, chunk] = 0.0 if fields.advantage is None else fields.advantage
        return (fields.weight * found.token_loss).sum()


class OneKernel:
    """Both sweeps and the traced objective in one kernel a tile: CUDA, token by token."""

    def __init__(self, call: PolicyCall, traced: Traced) -> None:
        self._call, self._traced = call, traced
        advantage, self._groups = call.tokens.advantage, None
        if advantage is None:
            self._groups = _group_rewards(call.tokens, call.normalisation)
        elif len(advantage) != call.tokens.num_tokens:
            advantage = call.tokens.expand(advantage)
        self._fields: TokenFields = token_fields(call.tokens, advantage)

    def __call__(self, head: TiledHead, chunk: slice, rows: Tensor) -> Tensor:
        """As `TwoSweeps`."""
        call, groups = self._call, self._groups
        logits = head.logits(chunk)
        gradient = head.gradient_buffer(logits) if head.wanted.any else None
        fields = sliced(self._fields, chunk, torch.float32)
        logp, entropy, token_loss, dlogp, _, advantage = fused_rows(
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
        if gradient is not None:
            head.accumulate(chunk, gradient)
        rows[:, chunk] = torch.stack([logp, entropy, dlogp, advantage])
        loss: Tensor = (fields.weight * token_loss).sum()
        return loss


def _group_rewards(tokens: ScoredTokens, normalisation: GroupNormalisation) -> GroupRewards | None:
    if tokens.rewards is None or tokens.group_offsets is None:
        return None
    device = tokens.rewards.device
    group_of_seq = torch.arange(len(tokens.group_offsets) - 1).repeat_interleave(
        tokens.group_offsets.diff()
    )
    seq_of_token = tokens.expand(torch.arange(tokens.num_sequences))
    return GroupRewards(
        rewards=tokens.rewards,
        group_offsets=tokens.group_offsets.to(device, non_blocking=True),
        seq_of_token=seq_of_token.to(device, non_blocking=True),
        group_of_seq=group_of_seq.to(device, non_blocking=True),
        normalisation=normalisation,
    )
