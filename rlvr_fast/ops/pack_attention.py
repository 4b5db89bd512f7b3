"""Attention within a pack in C++: branches go through their trunk's keys together."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlvr_fast.ops.logprobs import CPP_VIEWS, as_numpy

_LANES = 16
_WORK = (
    2**18
)  # Query-key pairs of all heads, some 0.1 ms, below which a thread is not worth waking.


def supported(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether there is C++ for heads `[..., d]` of this kind."""
    return all(
        x.device.type == "cpu" and x.dtype in CPP_VIEWS and x.shape[-1] == key.shape[-1]
        for x in (query, key, value)
    ) and not (key.shape[-1] % _LANES)


def pack_attention(
    query: Tensor, key: Tensor, value: Tensor, stretches: NDArray[np.int64], *, scale: float
) -> Tensor:
    """Each row attends to what its stretch sees, and to its stretch up to itself.

    Args:
        query: `[N, H, d]`, of a kind that `supported` names. Differentiable, as key and value.
        key, value: `[N, K, d]`; each head serves `H / K` neighbouring ones.
        stretches: `[S, 5]`, the fields of `attention_plans.layout.Stretch`, in the order that it
            says; each row is in one.
        scale: of the scores.

    Returns:
        `[N, H, d]` in the dtype of the value. Sums are fp32, and the bits, those of the gradients
        too, do not depend on the number of threads.

    Cost: neither padding nor copies of prompts; the backward computes the probabilities anew, so
    that nothing but the inputs is kept, and holds the fp32 gradients of keys and values.
    """
    return _PackAttention.apply(query, key, value, stretches, scale)  # type: ignore[no-untyped-call, no-any-return]


class _PackAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        stretches: NDArray[np.int64],
        scale: float,
    ) -> Tensor:
        from rlvr_fast import _C

        ctx.save_for_backward(query, key, value)
        ctx.stretches, ctx.scale = stretches, scale
        out = torch.empty(query.shape, dtype=value.dtype)
        q, k, v = _heads(query), _heads(key), _heads(value)
        threads = _threads(query, stretches)
        _C.pack_attention_fwd(q, k, v, stretches, scale, as_numpy(out), threads)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        from rlvr_fast import _C

        query, key, value = ctx.saved_tensors
        d_query, d_key, d_value = (torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value))
        _C.pack_attention_bwd(
            _heads(query),
            _heads(key),
            _heads(value),
            ctx.stretches,
            ctx.scale,
            _heads(d_out),
            as_numpy(d_query),
            as_numpy(d_key),
            as_numpy(d_value),
            _threads(query, ctx.stretches),
        )
        return d_query, d_key, d_value, None, None


def _heads(x: Tensor) -> NDArray[Any]:
    return as_numpy(x if x.stride(-1) == 1 else x.contiguous())


def _threads(query: Tensor, stretches: NDArray[np.int64]) -> int:
    length, trunk, _, _, prefix = stretches.T
    pairs = int((length * (prefix + trunk + length)).sum()) * query.shape[1]
    return max(1, min(torch.get_num_threads(), pairs // _WORK))
