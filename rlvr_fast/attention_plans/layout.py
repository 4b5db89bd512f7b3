"""Who sees whom in a pack, and the copies of rows that an arrangement of it needs."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rlvr_fast.packed import Packed


class Plan(Protocol):
    """Decides who attends to whom; passed through the model to every layer."""

    @property
    def longest(self) -> int: ...  # Tokens that see each other, first to last, at most.

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, dropout: float
    ) -> Tensor:
        """`[B, H, q, d]`, and `[B, K, q, d]` for the keys and values, to `[B, q, H, d]`."""


class Stretch(NamedTuple):
    """Rows `start` to `start + length`; before themselves they see the pack's first `prefix_length`
    rows and `trunk_length` of their trunk. Of one trunk's, those that see more come first.
    """

    length: int
    trunk_length: int
    start: int
    trunk_start: int
    prefix_length: int

    @property
    def seen(self) -> int:
        """Rows before its own."""
        return self.prefix_length + self.trunk_length


def stretches(packed: Packed) -> Iterator[Stretch]:
    """In the order of the pack, whose every row is in exactly one.

    A trunk is a causal sequence of its own, and so is what all prompts begin with.
    """
    rows = list(itertools.pairwise(packed.cu_seqlens.tolist()))
    seen, prefix = packed.seen.tolist(), packed.prefix_length
    if prefix:
        yield Stretch(prefix, 0, 0, 0, 0)
    for first, last in itertools.pairwise(packed.block_offsets.tolist()):
        trunk = rows[first][0]
        for (start, end), of_trunk in zip(rows[first:last], seen[first:last], strict=True):
            # The first one is the trunk.
            yield Stretch(end - start, of_trunk, start, trunk, prefix)


def longest(parts: Iterable[Stretch]) -> int:
    """Tokens of a sequence, at most; 0 for none."""
    return max((s.seen + s.length for s in parts), default=0)


class Copies(NamedTuple):
    """`source[rows]`, and which of the copies each row's gradient is the sum of."""

    rows: Tensor
    """`[n]` int64, of the source."""
    places: Tensor
    """`[n]` int64, of the copies, those of the same row together."""
    offsets: Tensor
    """`[rows of the source]` int64, where in `places` those of each row begin."""


def copies(rows: Tensor, size: int, device: torch.device) -> Copies:
    """For `rows`, on the CPU, of a source with `size` of them; the tensors are on `device`."""
    ordered, places = rows.sort(stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(size))
    return Copies(*(x.to(device, non_blocking=True) for x in (rows, places, offsets)))


def gather(source: Tensor, wanted: Copies) -> Tensor:
    """`[size, ...]` to `[n, ...]`, differentiable.

    The backward adds in fp32 at least and in one order. On CUDA, `index_select` adds in the
    tensor's dtype and in any order, and `embedding` sorts the index in every backward.
    """
    copied: Tensor = _Gather.apply(source.flatten(1), *wanted)  # type: ignore[no-untyped-call]
    return copied.unflatten(-1, source.shape[1:])  # type: ignore[no-any-return]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, rows: Tensor, places: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(places, offsets)
        return source.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        places, offsets = ctx.saved_tensors
        return F.embedding_bag(places, gradient, offsets, mode="sum"), None, None, None
