"""More statistics of rows of logits: what `logprobs` gives, and what methods besides that need.

The formulas stand in `kernels/token_statistics.py`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlvr_fast.ops import logprobs as row_op
from rlvr_fast.ops.row_statistics import row_statistics, row_statistics_grad
from rlvr_fast.ops.tiled_head import HeadSettings, TiledHead, Wanted, head_settings
from rlvr_fast.ops.transform import LogitTransform


class TokenStatistics(NamedTuple):
    """`[T]` each, fp32 (fp64 of fp64 logits) but for `top_id`; z is a transformed logit."""

    logp: Tensor
    """Of the target, in nats, <= 0."""
    entropy: Tensor
    """In nats, in [0, log V]."""
    mean_logit: Tensor
    """The mean of z over the vocabulary."""
    logsumexp: Tensor
    """Of z."""
    sum_squared_prob: Tensor
    """`sum p^2`, in (0, 1]."""
    kept_mass: Tensor
    """The probability of all tokens with `p >= min_p max p`, in (0, 1]."""
    max_prob: Tensor
    """Not differentiable."""
    top_id: Tensor
    """int64, the likeliest token; the lowest id if there are several."""


def token_statistics(
    logits: Tensor,
    targets: Tensor,
    *,
    min_p: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> TokenStatistics:
    """Log-probability of one token per row of logits, and statistics of the row.

    Args:
        logits: `[T, V]` fp32, bf16 or fp16, rows contiguous (any row stride). Differentiable.
        targets: `[T]` int64, each in `[0, V)`; on CUDA not checked.
        min_p: in [0, 1]; a token exactly at the bound is kept. 0 keeps all.
        temperature, softcap, logit_scale: see `LogitTransform`.

    Returns:
        `TokenStatistics`, differentiable but for `max_prob` and `top_id`. To the gradient the set
        of tokens that `min_p` keeps is constant.

    Raises:
        ValueError: for a shape, dtype, stride, target, min_p or temperature other than these.

    Cost: forward reads the logits once, with `min_p` a second time from the cache; backward reads
    them once and writes as much.
    """
    transform = LogitTransform(temperature=temperature, softcap=softcap, logit_scale=logit_scale)
    row_op.check_logits(logits)
    row_op.check_targets(targets, logits.shape[0], logits.shape[1])
    _check_min_p(min_p)
    return _named(*row_statistics(logits, targets, transform.scale, transform.cap, min_p))


def linear_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    min_p: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    logits_budget: int | None = None,
) -> TokenStatistics:
    """`token_statistics(hidden @ weight.T + bias, targets)` without the `[T, V]` logits.

    Args:
        hidden: `[T, D]`, differentiable.
        weight: `[V, D]`, differentiable.
        targets: `[T]` int64, each in `[0, V)`; on CUDA not checked.
        bias: `[V]`, differentiable.
        min_p: see `token_statistics`.
        temperature, softcap, logit_scale: see `LogitTransform`.
        logits_dtype, logits_budget: see `policy_loss`.

    Returns:
        `TokenStatistics`, as `token_statistics`.

    Raises:
        ValueError: for shapes, dtypes, targets or settings other than these.

    Cost: 2 T D V flops forward and 6 T D V backward, which recomputes the logits; a frozen operand
    saves 2 of those.
    """
    settings = head_settings(
        hidden, weight, bias, logits_dtype=logits_dtype, logits_budget=logits_budget
    )
    row_op.check_targets(targets, len(hidden), len(weight))
    _check_min_p(min_p)
    transform = LogitTransform(temperature=temperature, softcap=softcap, logit_scale=logit_scale)
    found = _LinearStatistics.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, settings, targets, transform, min_p
    )
    return _named(*found)


def _check_min_p(min_p: float) -> None:
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p: wanted a number in [0, 1], got {min_p}")


def _named(stats: Tensor, top_id: Tensor) -> TokenStatistics:
    logp, entropy, _, _, mean_logit, log_sum, squared, kept, max_prob = stats
    return TokenStatistics(
        logp, entropy, mean_logit, log_sum, squared, kept, max_prob.detach(), top_id
    )


class _LinearStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        settings: HeadSettings,
        targets: Tensor,
        transform: LogitTransform,
        min_p: float,
    ) -> tuple[Tensor, Tensor]:
        head = TiledHead(hidden, weight, bias, settings, Wanted.of((), hidden, weight, bias))
        arguments = (transform.scale, transform.cap, min_p)
        found = [
            row_statistics(head.logits(tile), targets[tile], *arguments)
            for tile in head.tiles(slice(0, max(len(hidden), 1)))
        ]
        stats = torch.cat([x for x, _ in found], dim=1)
        top_id = torch.cat([x for _, x in found])
        ctx.mark_non_differentiable(top_id)
        ctx.save_for_backward(hidden, weight, bias, targets, stats, top_id)
        ctx.settings, ctx.arguments = settings, arguments
        return stats, top_id

    @staticmethod
    def backward(ctx: Any, grads: Tensor, _: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, targets, stats, top_id = ctx.saved_tensors
        wanted = Wanted.of(ctx.needs_input_grad, hidden, weight, bias)
        head = TiledHead(hidden, weight, bias, ctx.settings, wanted)
        for tile in head.tiles(slice(0, len(hidden))):
            logits = head.logits(tile)
            gradient = head.gradient_buffer(logits)
            row_statistics_grad(
                logits,
                targets[tile],
                stats[:, tile].contiguous(),
                top_id[tile],
                grads[:, tile].contiguous(),
                *ctx.arguments,
                gradient,
            )
            head.accumulate(tile, gradient)
        return (*head.gradients(), None, None, None, None)
