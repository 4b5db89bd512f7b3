"""One token drawn per row of logits, and its log-probability."""

import torch
from torch import Tensor

from rlvr_fast.ops.logprobs import CPP_VIEWS, as_numpy, threads
from rlvr_fast.ops.transform import LogitTransform, transformed


def sample(
    logits: Tensor, noise: Tensor | None, transform: LogitTransform
) -> tuple[Tensor, Tensor]:
    """The first token, in the order of ids, whose cumulative probability reaches `1 - noise`.

    Args:
        logits: `[R, V]` fp32, bf16 or fp16, rows contiguous (any row stride).
        noise: `[R]` fp64 in [0, 1); None draws the likeliest token, the first of several.
        transform: what the softmax is taken of.

    Returns:
        `[R]` int64 and `[R]` fp32, in nats, <= 0. A row without a distribution (NaN, an infinite
        logit, all -inf) has a log-probability that is not finite. A token of probability 0 is never
        drawn. A row's token depends on that row and its noise alone.

    Cost: reads the logits once.
    """
    if logits.is_cuda or logits.dtype not in CPP_VIEWS:
        return reference(logits, noise, transform)
    from rlvr_fast import _C

    tokens = torch.empty(len(logits), dtype=torch.int64)
    logp = torch.empty(len(logits))
    _C.sample(
        as_numpy(logits),
        None if noise is None else noise.contiguous().numpy(),
        transform.scale,
        transform.cap,
        tokens.numpy(),
        logp.numpy(),
        threads(logits),
    )
    return tokens, logp


def reference(
    logits: Tensor, noise: Tensor | None, transform: LogitTransform
) -> tuple[Tensor, Tensor]:
    """The definition: any device, any float dtype."""
    z = transformed(logits, transform.scale, transform.cap)
    top, likeliest = z.max(-1, keepdim=True)
    mass = (z - top).exp_().cumsum(-1)
    total = mass[:, -1:]
    if noise is None:
        tokens = likeliest
    else:
        # In (0, 1]: a token without any mass is never the first to reach the mark.
        marks = (total * (1 - noise[:, None])).to(mass.dtype)
        tokens = torch.searchsorted(mass, marks).clamp(max=logits.shape[1] - 1)
    logp = z.gather(1, tokens) - top - total.log()
    return tokens.squeeze(1), logp.squeeze(1)
