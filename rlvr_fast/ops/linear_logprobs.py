"""Log-probability and entropy straight from hidden states, for any loss of the caller's."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlvr_fast.ops import logprobs as row_op
from rlvr_fast.ops.logprobs import TokenLogprobs
from rlvr_fast.ops.tiled_head import HeadSettings, TiledHead, Wanted, head_settings
from rlvr_fast.ops.transform import LogitTransform
from rlvr_fast.ops.vocab_shard import VocabShard, vocab_shard


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
    vocab_group: dist.ProcessGroup | None = None,
    sum_hidden_grad: bool = True,
) -> TokenLogprobs:
    """`logprobs(hidden @ weight.T + bias, targets)` without the `[T, V]` logits.

    Args:
        hidden: `[T, D]`, differentiable.
        weight: `[V, D]`, differentiable.
        targets: `[T]` int64, each in `[0, V)`; on CUDA not checked.
        bias: `[V]`, differentiable.
        temperature, softcap, logit_scale: see `LogitTransform`.
        logits_dtype, logits_budget, batch_invariant, vocab_group: see `policy_loss`.
        sum_hidden_grad: False: with `vocab_group` the gradient of `hidden` is that of this rank's
            slice, for whoever adds them up further down (sequence parallelism).

    Returns:
        `TokenLogprobs(logp, entropy)`, `[T]` fp32 each, both differentiable.

    Raises:
        ValueError: for shapes, dtypes, targets or settings other than these.

    Cost: 2 T D V flops forward and 6 T D V backward, which recomputes the logits; a frozen operand
    saves 2 of those. `policy_loss` does the same in 6 altogether. With `vocab_group` one
    all-gather of four numbers a row and tile, and one all-reduce of d_hidden.
    """
    settings = head_settings(
        hidden,
        weight,
        bias,
        logits_dtype=logits_dtype,
        logits_budget=logits_budget,
        batch_invariant=batch_invariant,
    )
    shard = None
    if vocab_group is not None:
        shard, settings = vocab_shard(vocab_group, hidden, weight, settings)
    vocab_size = len(weight) if shard is None else shard.vocab_size
    row_op.check_targets(targets, len(hidden), vocab_size)
    transform = LogitTransform(temperature=temperature, softcap=softcap, logit_scale=logit_scale)
    found = _LinearLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, settings, targets, transform, shard, sum_hidden_grad
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
        shard: VocabShard | None,
        sum_hidden_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        head = TiledHead(hidden, weight, bias, settings, Wanted.of((), hidden, weight, bias))
        found = []
        for tile in head.tiles(slice(0, max(len(hidden), 1))):
            logits = head.logits(tile)
            if shard is None:
                arguments = (transform.scale, transform.cap)
                found.append(row_op.row_stats(logits, targets[tile], *arguments))
            else:
                found.append(shard.row_stats(logits, targets[tile], transform))
        stats = torch.cat(found, dim=1)
        ctx.save_for_backward(hidden, weight, bias, targets, stats)
        ctx.settings, ctx.transform = settings, transform
        ctx.shard, ctx.sum_hidden_grad = shard, sum_hidden_grad
        return stats[0].clone(), stats[1].clone()

    @staticmethod
    def backward(ctx: Any, dlogp: Tensor, dentropy: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, targets, stats = ctx.saved_tensors
        transform, shard = ctx.transform, ctx.shard
        ids = targets if shard is None else shard.ids(targets)
        wanted = Wanted.of(ctx.needs_input_grad, hidden, weight, bias)
        head = TiledHead(hidden, weight, bias, ctx.settings, wanted)
        for tile in head.tiles(slice(0, len(hidden))):
            logits = head.logits(tile)
            gradient = head.gradient_buffer(logits)
            row_op.row_grad(
                logits,
                ids[tile],
                stats[:, tile].contiguous(),
                dlogp[tile],
                dentropy[tile],
                transform.scale,
                transform.cap,
                gradient,
            )
            head.accumulate(tile, gradient)
        gradients = head.gradients()
        if shard is not None and ctx.sum_hidden_grad and gradients[0] is not None:
            shard.add_up(gradients[0])
        return (*gradients, None, None, None, None, None)
