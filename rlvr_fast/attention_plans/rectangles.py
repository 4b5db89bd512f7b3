"""Attention by a few rectangular SDPA calls: for any device, dtype and head size."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlvr_fast.attention_plans import layout
from rlvr_fast.attention_plans.layout import Copies, Stretch, copies, gather
from rlvr_fast.packed import Packed

_WASTE = 1.5  # How much larger a rectangle may be than what it holds; each is a kernel launch.
_SMALL = 2**16  # Query-key pairs below which waste is not worth another launch.


class _Rectangle(NamedTuple):
    """One SDPA call over `C` sequences; surplus places repeat a row of the same sequence."""

    queries: Tensor
    """`[C, q]` int64, rows of the pack."""
    keys: Tensor
    """`[C, k]` int64, rows of the pack."""
    mask: Tensor | None
    """`[C, 1, q, k]` bool; None for plain causal."""


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """The attention of one pack, see `plan_blocks`."""

    rectangles: Sequence[_Rectangle]
    queries: Copies
    """From the pack to the rectangles' queries, laid end to end."""
    keys: Copies
    outputs: Copies
    """From the rectangles' queries, laid end to end, to the pack."""
    longest: int
    """Tokens of a sequence, at most."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, dropout: float
    ) -> Tensor:
        device = value.device.type
        # On the CPU, SDPA is two to three times as fast in fp32 as in bf16, casts included.
        dtype = torch.promote_types(value.dtype, torch.float32) if device == "cpu" else value.dtype
        with torch.autocast(device, enabled=False):
            q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
            rows = gather(q, self.queries).split([r.queries.numel() for r in self.rectangles])
            columns = [r.keys.numel() for r in self.rectangles]
            keys, values = (gather(x, self.keys).split(columns) for x in (k, v))
            parts = zip(self.rectangles, rows, keys, values, strict=True)
            outputs = [_sdpa(*part, scale=scale, dropout=dropout) for part in parts]
            return gather(torch.cat(outputs), self.outputs)[None].to(value.dtype)


def _sdpa(
    rectangle: _Rectangle,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    dropout: float,
) -> Tensor:
    num_keys, ratio = key.shape[1], query.shape[1] // key.shape[1]
    q, k, v = (
        x.unflatten(0, (len(rectangle.keys), -1)).transpose(1, 2) for x in (query, key, value)
    )
    mask = rectangle.mask
    if mask is None:
        k, v = (x.repeat_interleave(ratio, 1) for x in (k, v))
    else:
        # All query heads of a key head become further queries of it: nothing is repeated.
        q = q.unflatten(1, (num_keys, ratio)).flatten(2, 3)
        mask = mask.repeat(1, 1, ratio, 1)
    output = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale
    )
    heads: Tensor = output.unflatten(2, (-1, rectangle.queries.shape[1])).flatten(1, 2)
    return heads.transpose(1, 2).flatten(0, 1)


def plan_blocks(packed: Packed) -> BlockPlan:
    """Plans the attention of a pack; the tensors are on its device."""
    device, rows = packed.input_ids.device, len(packed.input_ids)
    stretches = list(layout.stretches(packed))
    output_rows = torch.empty(rows, dtype=torch.int64)
    rectangles: list[_Rectangle] = []
    offset = 0
    plain, branches = ([s for s in stretches if bool(s.seen) is b] for b in (False, True))
    for bucket in itertools.chain(_buckets(plain), _buckets(branches)):
        queries, keys, mask = _rectangle(bucket)
        lengths = torch.tensor([s.length for s in bucket])
        real = torch.arange(queries.shape[1]) < lengths[:, None]
        output_rows[queries[real]] = offset + real.flatten().nonzero().squeeze(1)
        offset += queries.numel()
        rectangles.append(_Rectangle(queries, keys, None if mask is None else mask.to(device)))
    queries, keys = (
        torch.cat([x.flatten() for x in side])
        for side in zip(*((r.queries, r.keys) for r in rectangles), strict=True)
    )
    return BlockPlan(
        rectangles=rectangles,
        queries=copies(queries, rows, device),
        keys=copies(keys, rows, device),
        outputs=copies(output_rows, offset, device),
        longest=layout.longest(stretches),
    )


def _buckets(stretches: Sequence[Stretch]) -> Iterator[list[Stretch]]:
    """Sequences of similar size, so that little of their common rectangle is empty."""
    bucket: list[Stretch] = []
    filled = seen = 0
    for stretch in sorted(stretches, reverse=True):
        area = stretch.length * (stretch.seen + stretch.length)
        length = bucket[0].length if bucket else stretch.length
        seen = max(seen, stretch.seen)
        whole = (len(bucket) + 1) * length * (seen + length)
        if bucket and whole > max(_SMALL, _WASTE * (filled + area)):
            yield bucket
            bucket, filled, seen = [], 0, stretch.seen
        bucket.append(stretch)
        filled += area
    if bucket:
        yield bucket


def _rectangle(bucket: Sequence[Stretch]) -> _Rectangle:
    length, trunk_length, start, trunk_start, prefix = torch.tensor(bucket).T[:, :, None]
    seen = prefix + trunk_length
    column = torch.arange(int(length.max()))
    queries = start + torch.minimum(column, length - 1)
    if not seen.any():
        return _Rectangle(queries=queries, keys=queries, mask=None)
    place = torch.arange(int(seen.max()))
    known = torch.minimum(place, seen - 1)
    known = torch.where(known < prefix, known, trunk_start + known - prefix)
    shape = (len(bucket), len(column), -1)
    known_seen = (place < seen)[:, None].expand(shape)
    own_seen = (column <= column[:, None]).expand(shape)
    mask = torch.cat([known_seen, own_seen], dim=2)[:, None]
    return _Rectangle(queries=queries, keys=torch.cat([known, queries], 1), mask=mask)
