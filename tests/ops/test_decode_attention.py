"""One new token per row against an fp64 oracle, in every shape, and that a row stays by itself."""

import pytest
import torch
from torch import Tensor

from rlvr_fast.ops.decode_attention import (
    BLOCK,
    Cached,
    DecodeRows,
    blocks,
    cached,
    decode_attention,
    supported,
)


class Batch:
    """Rows with random prompts, and what they wrote so far, kept as plain tensors besides."""

    def __init__(self, rows_of_prompt, lengths, shape, dtype, capacity=40):
        self.heads, self.key_heads, self.size = shape
        self.dtype, self.lengths = dtype, lengths
        self.prompt = torch.arange(len(lengths)).repeat_interleave(torch.tensor(rows_of_prompt))
        self.rows, self.used = len(self.prompt), 0
        width = blocks(max(lengths)) * BLOCK
        plain = [self._random(len(lengths), self.key_heads, width) for _ in range(2)]
        for x in plain:
            for p, length in enumerate(lengths):
                x[p, :, length:] = torch.nan
        self.prompts = plain
        self.cached = cached(*plain)
        places = (self.rows, self.key_heads, blocks(capacity))
        self.own = Cached(
            torch.empty(*places, self.size, BLOCK, dtype=dtype),
            torch.empty(*places[:2], places[2] * BLOCK, self.size, dtype=dtype),
        )
        self.written = [torch.empty(self.rows, self.key_heads, 0, self.size) for _ in range(2)]

    def _random(self, *shape) -> Tensor:
        return torch.randn(*shape, self.size).to(self.dtype)

    def step(self, rows=slice(None), scale=0.2) -> tuple[Tensor, Tensor, Tensor]:
        """Ours, torch's in fp32 or less, and the oracle's."""
        query = self._random(self.rows, self.heads)
        new = [self._random(self.rows, self.key_heads) for _ in range(2)]
        self.used += 1
        self.written = [
            torch.cat([x, y[:, :, None]], 2) for x, y in zip(self.written, new, strict=True)
        ]
        where = DecodeRows(
            self.prompt[rows], torch.arange(self.rows)[rows], torch.tensor(self.lengths)
        )
        heads = tuple(x[rows] for x in (query, *new))
        ours = decode_attention(heads, self.cached, self.own, where, used=self.used, scale=scale)
        return ours, *(self._plain(query, t, scale)[rows] for t in (self.dtype, torch.float64))

    def _plain(self, query, dtype, scale) -> Tensor:
        out = []
        for r in range(self.rows):
            p = self.prompt[r]
            k, v = (
                torch.cat([x[p, :, : self.lengths[p]], y[r]], 1)
                .to(dtype)
                .repeat_interleave(self.heads // self.key_heads, 0)
                for x, y in zip(self.prompts, self.written, strict=True)
            )
            q = query[r].to(dtype)[:, None]
            out.append(((q @ k.transpose(1, 2) * scale).softmax(-1) @ v)[:, 0])
        return torch.stack(out)


SHAPES = [(9, 3, 64), (4, 4, 16), (14, 2, 80), (3, 1, 128), (40, 1, 32)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_as_exact_as_torch(shape, dtype, as_exact_as_torch):
    batch = Batch([3, 1, 12], [5, 16, 81], shape, dtype)
    for _ in range(18):
        as_exact_as_torch(*batch.step())


def test_rows_that_left_are_not_looked_at(as_exact_as_torch):
    batch = Batch([3, 2], [7, 20], (4, 2, 32), torch.float32)
    batch.step()
    left = torch.tensor([0, 2, 4])
    for _ in range(3):
        as_exact_as_torch(*batch.step(left))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_of_a_row_do_not_depend_on_the_others(dtype):
    torch.manual_seed(3)
    together = Batch([11, 2], [21, 100], (6, 2, 48), dtype)
    for _ in range(4):
        together.step()
    own, where = together.own, torch.tensor([4])

    query = torch.randn(13, 6, 48).to(dtype)
    new = [torch.randn(13, 2, 48).to(dtype) for _ in range(2)]
    found = []
    for rows in (torch.arange(13), where):
        mine = Cached(*(x.clone() for x in own))
        table = DecodeRows(together.prompt[rows], rows, torch.tensor([21, 100]))
        heads = (query[rows], new[0][rows], new[1][rows])
        found.append(decode_attention(heads, together.cached, mine, table, used=5, scale=0.1))

    assert torch.equal(found[0][4], found[1][0])


def test_the_count_of_threads_does_not_change_a_bit():
    found = []
    for threads in (1, 3):
        torch.manual_seed(1)
        torch.set_num_threads(threads)
        batch = Batch([5, 2, 9], [21, 3, 17], (6, 2, 32), torch.bfloat16)
        found.append(torch.stack([batch.step()[0] for _ in range(3)]))
    assert torch.equal(*found)


def test_large_scores_overflow_nothing(as_exact_as_torch):
    batch = Batch([2], [30], (2, 1, 16), torch.float32)
    as_exact_as_torch(*batch.step(scale=300.0))


def test_kinds_without_a_kernel_are_known():
    assert supported(torch.empty(2, 64))
    assert not supported(torch.empty(2, 24))
    assert not supported(torch.empty(2, 64, dtype=torch.float64))
