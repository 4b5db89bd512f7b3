"""Log-probability and entropy straight from hidden states, for any loss of the caller's."""

from typing import Any

import torch
from torch import Tensor

from rlvr_fast.ops import logprobs as row_op
from rlvr_fast.ops.logprobs import TokenLogprobs
from rlvr_fast.ops.tiled_head import HeadSettings, TiledHead, Wanted, head_settings
from rlvr_fast.ops.transform import LogitTransform


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    logits_budget: int | None = None,
    batch_invariant: bool = False,
) -> TokenLogprobs:
    """`logprobs(hidden @ weight.T + bias, targets)` without the `[T, V]` logits.

    Args:
        hidden: `[T, D]`, differentiable.
        weight: `[V, D]`, differentiable.
        targets: `[T]` int64, each in `[0, V)`; on CUDA not checked.
        bias: `[V]`, differentiable.
        temperature, softcap, logit_scale: see `LogitTransform`.
        logits_dtype, logits_budget, batch_invariant: see `policy_loss`.

    Returns:
        `TokenLogprobs(logp, entropy)`, `[T]` fp32 each, both differentiable.

    Raises:
        ValueError: for shapes, dtypes, targets or settings other than these.

    Cost: 2 T D V flops forward and 6 T D V backward, which recomputes the logits; a frozen operand
    saves 2 of those. `policy_loss` does the same in 6 altogether.
    """
    settings = head_settings(
        hidden,
        weight,
        bias,
        logits_dtype=logits_dtype,
        logits_budget=logits_budget,
        batch_invariant=batch_invariant,
    )
    row_op.check_targets(targets, len(hidden), len(weight))
    transform = LogitTransform(temperature=temperature, softcap=softcap, logit_scale=logit_scale)
    found = _LinearLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, settings, targets, transform
    )
    return TokenLogprobs(*found)


def reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform | None = None,
) -> TokenLogprobs:
    """The definition: all logits at once, any device; gradients are autograd's own."""
    transform = transform or LogitTransform()
    logits = hidden @ weight.t()
    logits = logits if bias is None else logits + bias
    stats = row_op.reference(logits, targets, transform.scale, transform.cap)
    return TokenLogprobs(stats[0], stats[1])


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        settings: HeadSettings,
        targets: Tensor,
        transform: LogitTransform,
    ) -> tuple[Tensor, Tensor]:
        head = TiledHead(hidden, weight, bias, settings, Wanted.of((), hidden, weight, bias))
        stats = torch.cat(
            [
                row_op.row_stats(head.logits(tile), targets[tile], transform.scale, transform.cap)
                for tile in head.tiles(slice(0, max(len(hidden), 1)))
            ],
            dim=1,
        )
        ctx.save_for_backward(hidden, weight, bias, targets, stats)
        ctx.settings, ctx.transform = settings, transform
        return stats[0].clone(), stats[1].clone()

    @staticmethod
    def backward(ctx: Any, dlogp: Tensor, dentropy: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, targets, stats = ctx.saved_tensors
        transform = ctx.transform
        wanted = Wanted.of(ctx.needs_input_grad, hidden, weight, bias)
        head = TiledHead(hidden, weight, bias, ctx.settings, wanted)
        for tile in head.tiles(slice(0, len(hidden))):
            logits = head.logits(tile)
            gradient = head.gradient_buffer(logits)
            row_op.row_grad(
                logits,
                targets[tile],
                stats[:, tile].contiguous(),
                dlogp[tile],
                dentropy[tile],
                transform.scale,
                transform.cap,
                gradient,
            )
            head.accumulate(tile, gradient)
        return (*head.gradients(), None, None, None)
