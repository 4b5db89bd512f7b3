"""Attention of one new token per row to a prompt that rows share and to what each row wrote."""

from typing import NamedTuple

import torch
from torch import Tensor

from rlvr_fast.ops.logprobs import CPP_VIEWS, as_numpy

BLOCK = 16
"""Sequences are stored in blocks of as many tokens."""


def supported(key: Tensor) -> bool:
    """Whether there is C++ for keys `[..., d]` of this kind."""
    return not key.is_cuda and key.dtype in CPP_VIEWS and key.shape[-1] % BLOCK == 0


class Cached(NamedTuple):
    """Sequences of `n` blocks; their dtype is that of the new keys."""

    keys: Tensor
    """`[S, K, n, d, BLOCK]`"""
    values: Tensor
    """`[S, K, n * BLOCK, d]`"""


class DecodeRows(NamedTuple):
    """Where rows are found; those of the same prompt are neighbours."""

    prompt: Tensor
    """`[R]` int64, into the prompts."""
    own: Tensor
    """`[R]` int64, into the own sequences."""
    prompt_lengths: Tensor
    """`[P]` int64, tokens."""


def blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)


def cached(keys: Tensor, values: Tensor) -> Cached:
    """Of `[S, K, n * BLOCK, d]` keys and values."""
    return Cached(keys.unflatten(2, (-1, BLOCK)).transpose(3, 4).contiguous(), values.contiguous())


def decode_attention(
    heads: tuple[Tensor, Tensor, Tensor],
    prompts: Cached,
    own: Cached,
    rows: DecodeRows,
    *,
    used: int,
    scale: float,
) -> Tensor:
    """Stores the new token of each row in `own`, and attends with it.

    Args:
        heads: query `[R, H, d]`, key and value `[R, K, d]`, of a dtype and d that `supported`
            names, the last dimension contiguous.
        prompts, own: what is stored already.
        rows: of these.
        used: tokens that each row has written, the new one included.
        scale: of the scores.

    Returns:
        `[R, H, d]` in the dtype of the query; sums are fp32. The bits of a row depend on that row
        and its prompt alone.
    """
    from rlvr_fast import _C

    query, key, value = heads
    out = torch.empty(query.shape, dtype=query.dtype)
    _C.decode_attention(
        as_numpy(query),
        as_numpy(key),
        as_numpy(value),
        as_numpy(prompts.keys),
        as_numpy(prompts.values),
        as_numpy(own.keys),
        as_numpy(own.values),
        rows.prompt.numpy(),
        rows.own.numpy(),
        rows.prompt_lengths.numpy(),
        used,
        scale,
        as_numpy(out),
        torch.get_num_threads(),
    )
    return out
