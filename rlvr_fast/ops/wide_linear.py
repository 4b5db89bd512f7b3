"""fp32 logits of bf16 operands on the CPU: torch's GEMM would round them to bf16."""

from functools import cache

import torch
from torch import Tensor

from rlvr_fast.ops.logprobs import as_numpy


@cache
def supported() -> bool:
    """Whether this processor has AVX512-BF16 and the build knows it; `wide_linear` needs it."""
    from rlvr_fast import _C

    return _C.linear_f32_supported()


@cache
def keeps_up() -> bool:
    """Whether `wide_linear` takes no longer than torch's bf16 GEMM, which AMX makes much faster."""
    return supported() and not torch.cpu._is_amx_tile_supported()


def wide_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, threads: int
) -> None:
    """`out = hidden @ weight.T + bias`, summed in fp32.

    The bits of an element depend on its row of `hidden`, its row of `weight` and its bias alone:
    not on other rows, its place or the threads. Subnormals count as 0.

    Args:
        hidden: `[t, D]` bf16.
        weight: `[V, D]` bf16.
        bias: `[V]` fp32, contiguous.
        out: `[t, V]` fp32. Of all matrices the rows are contiguous, with any stride between them.

    Cost: the time of `torch.mm` in bf16, which writes half as many bytes; no memory to speak of.
    """
    from rlvr_fast import _C

    _C.linear_f32(
        as_numpy(hidden),
        as_numpy(weight),
        None if bias is None else as_numpy(bias),
        as_numpy(out),
        threads,
    )
