"""d_weight: a sum of products over the tiles, in fp32 where a product would round."""

import torch
from torch import Tensor

from rlvr_fast.ops.logprobs import as_numpy, threads
from rlvr_fast.ops.workspace import scratch

VOCAB_BLOCK = 4096
"""CPU rows of d_weight per GEMM: the product stays in the cache until it is accumulated."""


def add_product(
    total: Tensor, dlogits: Tensor, hidden: Tensor, *, first: bool, last: Tensor | None = None
) -> None:
    """`total [V, D] (+)= dlogits.T [V, t] @ hidden [t, D]`; the first product only writes.

    With `last [V, D]` in the dtype of `hidden` the sum goes there, and `total` is done with.
    """
    if total.dtype == hidden.dtype:
        torch.addmm(total, dlogits.t(), hidden, beta=0 if first else 1, out=total)
    elif hidden.is_cuda:
        torch.addmm(
            total, dlogits.t(), hidden, beta=0 if first else 1, out_dtype=total.dtype, out=total
        )
    else:
        from rlvr_fast import _C

        shape = (VOCAB_BLOCK, hidden.shape[1])
        products = scratch("product", shape, hidden.dtype, hidden.device)
        for start in range(0, len(total), VOCAB_BLOCK):
            block = slice(start, min(start + VOCAB_BLOCK, len(total)))
            product = torch.mm(dlogits[:, block].t(), hidden, out=products[: block.stop - start])
            _C.accumulate(
                total[block].detach().numpy(),
                as_numpy(product),
                first,
                None if last is None else as_numpy(last[block]),
                threads(product),
            )
