"""Keys and values of rows that continue shared prompts, and the attention of one token per row.

A prompt is stored once and answers the queries of all its rows in one product; each row has its
own columns for what it wrote.
"""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rlvr_fast.attention import Plan
from rlvr_fast.ops import decode_attention as block_op


class Batch(NamedTuple):
    """The rows that a cache is for."""

    prompt_of_row: Tensor
    """`[R]` int64, which prompt each row continues; ascending."""
    prompt_lengths: Tensor
    """`[P]` int64."""
    capacity: int
    """Tokens that a row may add."""


class Cache(Plan, Protocol):
    """The state of `R` rows between two tokens; a plan for `[R, 1]` tokens."""

    def add(self, keys: Tensor, values: Tensor) -> None:
        """A layer: of the prompts `[P, K, width, d]`, what is past their lengths arbitrary."""

    def grow(self) -> None:
        """Opens a column, which the next `attend` of each layer fills."""

    def drop(self, ended: Tensor) -> Tensor:
        """Takes rows out.

        Args:
            ended: `[R]` bool, not all true.

        Returns:
            The remaining rows by their former number, in their new order.
        """


class BlockCache:
    """A `Cache` for the C++ attention, in the model's dtype: rows that leave move no others."""

    def __init__(self, batch: Batch) -> None:
        self._layers: list[tuple[block_op.Cached, block_op.Cached]] = []
        count = len(batch.prompt_of_row)
        own = torch.arange(count)
        self._rows = block_op.DecodeRows(batch.prompt_of_row, own, batch.prompt_lengths)
        self._count, self._blocks = count, block_op.blocks(batch.capacity)
        self._width = int(batch.prompt_lengths.max())
        self._used = 0

    @property
    def longest(self) -> int:
        return self._width + self._used

    def add(self, keys: Tensor, values: Tensor) -> None:
        surplus = (0, 0, 0, -keys.shape[2] % block_op.BLOCK)
        prompts = block_op.cached(F.pad(keys, surplus), F.pad(values, surplus))
        _, heads, _, size = keys.shape
        shape = (self._count, heads, self._blocks)
        own = block_op.Cached(
            torch.empty(*shape, size, block_op.BLOCK, dtype=keys.dtype),
            torch.empty(*shape, block_op.BLOCK, size, dtype=keys.dtype).flatten(2, 3),
        )
        self._layers.append((prompts, own))

    def grow(self) -> None:
        self._used += 1

    def drop(self, ended: Tensor) -> Tensor:
        kept = (~ended).nonzero()[:, 0]
        prompt, own, lengths = self._rows
        self._rows = block_op.DecodeRows(prompt[kept], own[kept], lengths)
        return kept

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, dropout: float
    ) -> Tensor:
        prompts, own = self._layers[layer]
        heads = (query[:, :, 0], key[:, :, 0], value[:, :, 0])
        output = block_op.decode_attention(
            heads, prompts, own, self._rows, used=self._used, scale=scale
        )
        return output[:, None]


class _Layer(NamedTuple):
    prompt_keys: Tensor
    """`[P, K, width, d]` fp32, as the values."""
    prompt_values: Tensor
    keys: Tensor
    """`[R, K, capacity, d]` fp32, as the values."""
    values: Tensor


class PlainCache:
    """A `Cache` for any device and dtype, in fp32; rows from the end move into gaps."""

    def __init__(self, batch: Batch) -> None:
        self.layers: list[_Layer] = []
        self.capacity = batch.capacity
        self._prompt_of_row = batch.prompt_of_row
        self._prompt_lengths = batch.prompt_lengths
        self._width = int(batch.prompt_lengths.max())
        self._used = 0
        self._regroup()

    @property
    def longest(self) -> int:
        return self._width + self._used

    def add(self, keys: Tensor, values: Tensor) -> None:
        shape = (len(self._prompt_of_row), keys.shape[1], self.capacity)
        own = [torch.empty(*shape, x.shape[3], device=x.device) for x in (keys, values)]
        self.layers.append(_Layer(keys.float(), values.float(), *own))

    def grow(self) -> None:
        self._used += 1

    def drop(self, ended: Tensor) -> Tensor:
        written = [x[:, :, : self._used] for layer in self.layers for x in layer[2:]]
        order = _close_gaps(ended, written)
        self._prompt_of_row = self._prompt_of_row[order]
        idle = torch.bincount(self._prompt_of_row, minlength=len(self._prompt_lengths)) == 0
        prompts = _close_gaps(idle, [x for layer in self.layers for x in layer[:2]])
        renamed = torch.empty_like(self._prompt_lengths)
        renamed[prompts] = torch.arange(len(prompts), device=renamed.device)
        self._prompt_of_row = renamed[self._prompt_of_row]
        self._prompt_lengths = self._prompt_lengths[prompts]
        self._regroup()
        return order

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, dropout: float
    ) -> Tensor:
        prompts, rows = len(self._prompt_lengths), len(query)
        prompt_keys, prompt_values = (x[:prompts] for x in self.layers[layer][:2])
        keys, values = (x[:rows, :, : self._used] for x in self.layers[layer][2:])
        keys[:, :, -1], values[:, :, -1] = key[:, :, 0], value[:, :, 0]
        # `[R, K, H / K, d]`: the query heads of one key head are like further queries.
        q = query.float().mul(scale).view(rows, keys.shape[1], -1, query.shape[-1])
        to_prompt = self._by_prompt(q) @ prompt_keys.transpose(2, 3) + self._mask
        scores = torch.cat([self._by_row(to_prompt), q @ keys.transpose(2, 3)], dim=-1)
        on_prompt, on_own = scores.softmax(-1).split([self._width, self._used], dim=-1)
        output = self._by_row(self._by_prompt(on_prompt) @ prompt_values) + on_own @ values
        heads: Tensor = output.view(rows, 1, query.shape[1], -1)
        return heads.to(value.dtype)

    def _regroup(self) -> None:
        prompt_of_row = self._prompt_of_row
        rows = torch.arange(len(prompt_of_row), device=prompt_of_row.device)
        sizes = torch.bincount(prompt_of_row, minlength=len(self._prompt_lengths))
        self._most = int(sizes.max())
        by_prompt = prompt_of_row.argsort(stable=True)
        rank = torch.empty_like(rows)
        rank[by_prompt] = rows - (sizes.cumsum(0) - sizes)[prompt_of_row[by_prompt]]
        self._place_of_row = prompt_of_row * self._most + rank
        # Places without a row compute the first row once more.
        self._row_of_place = torch.zeros(
            len(sizes) * self._most, dtype=torch.int64, device=rows.device
        )
        self._row_of_place[self._place_of_row] = rows
        columns = torch.arange(self._width, device=rows.device)
        hidden = columns >= self._prompt_lengths[:, None]
        self._mask = torch.zeros(hidden.shape, device=rows.device)
        self._mask = self._mask.masked_fill_(hidden, -torch.inf)[:, None, None]

    def _by_prompt(self, x: Tensor) -> Tensor:
        """`[R, K, g, w]` to `[P, K, most * g, w]`, where `most` rows have the same prompt."""
        placed: Tensor = x[self._row_of_place].unflatten(0, (-1, self._most))
        return placed.transpose(1, 2).flatten(2, 3)

    def _by_row(self, x: Tensor) -> Tensor:
        placed: Tensor = x.unflatten(2, (self._most, -1)).transpose(1, 2)
        return placed.flatten(0, 1)[self._place_of_row]


class Prefill:
    """Attention within the prompts, which leaves their keys and values in `cache`.

    Args:
        blocks: the plan of the pack that the prompts are in.
        source: `[P, width]` int64, the token of the pack at each place of a prompt, surplus ones
            any.
        batch: the rows to come.
    """

    cache: Cache
    """There as soon as the first layer has run."""

    def __init__(self, blocks: Plan, source: Tensor, batch: Batch) -> None:
        self._blocks, self._source, self._batch = blocks, source, batch

    @property
    def longest(self) -> int:
        return self._blocks.longest

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, dropout: float
    ) -> Tensor:
        if layer == 0:
            alike = key.shape == value.shape and query.dtype == key.dtype == value.dtype
            fits = alike and block_op.supported(key)
            self.cache = BlockCache(self._batch) if fits else PlainCache(self._batch)
        self.cache.add(*(x[0][:, self._source].transpose(0, 1).contiguous() for x in (key, value)))
        return self._blocks.attend(layer, query, key, value, scale=scale, dropout=dropout)


def _close_gaps(gone: Tensor, tensors: Iterable[Tensor]) -> Tensor:
    """Moves the last rows into the places of those gone; returns which ones are left, in order."""
    order = torch.arange(len(gone), device=gone.device)
    left = len(gone) - int(gone.sum())
    gaps, moved = order[:left][gone[:left]], order[left:][~gone[left:]]
    for x in tensors:
        x[gaps] = x[moved]
    order[gaps] = moved
    return order[:left]
