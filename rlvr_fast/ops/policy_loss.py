"""The heavy op: LM head, log-probabilities, objective and all gradients in one pass."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlvr_fast.ops import logprobs as row_op
from rlvr_fast.ops.group_advantages import GroupNormalisation
from rlvr_fast.ops.loss_metrics import LossMetrics, loss_metrics
from rlvr_fast.ops.objective_rows import Segmentation, masked_loss, sliced, token_fields
from rlvr_fast.ops.policy_rows import PolicyCall, advantages
from rlvr_fast.ops.tiled_head import Wanted, head_settings
from rlvr_fast.ops.transform import LogitTransform
from rlvr_fast.packed import ScoredTokens
from rlvr_fast.tracing.level import Level
from rlvr_fast.tracing.objective import Objective


@dataclass(frozen=True, kw_only=True)
class PolicyLossOutput:
    loss: Tensor
    """0-dim fp32, `sum(weight * token_loss)`; its backward hands out finished gradients."""
    logp: Tensor
    """`[T]` fp32, nats, <= 0; detached."""
    entropy: Tensor
    """`[T]` fp32, nats; detached."""
    metrics: LossMetrics


def policy_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: ScoredTokens,
    objective: Objective,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    logits_budget: int | None = None,
    normalisation: GroupNormalisation | None = None,
) -> PolicyLossOutput:
    """Loss of any objective over packed tokens, with gradients to hidden, weight and bias.

    The `[T, V]` logits never exist: tiles of rows go through GEMM, row sweep, objective, row sweep
    and the two gradient GEMMs before the next tile starts. An objective that looks at whole
    sequences or groups gets tiles cut at their boundaries; a segment longer than a tile has its
    logits computed twice.

    Args:
        hidden: `[T, D]` fp32, bf16, fp16 (or fp64 on the CPU): the rows that predict the targets.
        weight: `[V, D]` of the same dtype; under autocast any, as for `nn.Linear`.
        tokens: targets, weights and whatever the objective reads. See `ScoredTokens`.
        objective: see `rlvr_fast.objectives`.
        bias: `[V]`.
        temperature, softcap, logit_scale: see `LogitTransform`.
        logits_dtype: of the tile, fp32 or the GEMM's input dtype. Default: fp32 on CUDA; on the
            CPU, whose GEMMs round their result to the input dtype, that dtype. fp32 there costs an
            fp32 copy of the weight and an fp32 GEMM.
        logits_budget: bytes of logits alive at once; default 512 MiB on the CPU, 2 GiB on CUDA.
            On top come autocast's copies of the inputs and, with several tiles and a weight below
            fp32, an fp32 `[V, D]` accumulator.
        normalisation: how rewards become advantages when `tokens.advantage` is missing; default
            `GroupNormalisation()`.

    Returns:
        `PolicyLossOutput`.

    Raises:
        ValueError: for shapes, dtypes, targets or settings other than these.

    Cost: 6 T D V flops (2 for logits, 2 for each of d_hidden and d_weight; a frozen operand, or
    `no_grad`, saves its 2), plus two reads and one write of each logit. No host sync on CUDA.
    """
    settings = head_settings(
        hidden, weight, bias, logits_dtype=logits_dtype, logits_budget=logits_budget
    )
    row_op.check_targets(tokens.targets, len(hidden), len(weight))
    transform = LogitTransform(temperature=temperature, softcap=softcap, logit_scale=logit_scale)
    call = PolicyCall(
        settings=settings,
        tokens=tokens,
        objective=objective,
        transform=transform,
        normalisation=normalisation or GroupNormalisation(),
    )
    loss, rows = _PolicyLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, call, torch.is_grad_enabled()
    )
    logp, entropy, dlogp, advantage = rows
    metrics = loss_metrics(logp, entropy, dlogp, token_fields(tokens, advantage))
    return PolicyLossOutput(loss=loss, logp=logp, entropy=entropy, metrics=metrics)


def reference(
    hidden: Tensor,
    weight: Tensor,
    tokens: ScoredTokens,
    objective: Objective,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform | None = None,
    normalisation: GroupNormalisation | None = None,
) -> Tensor:
    """The definition of the loss: all logits at once, any device; gradients are autograd's own."""
    transform = transform or LogitTransform()
    logits = hidden @ weight.t()
    logits = logits if bias is None else logits + bias
    stats = row_op.reference(logits, tokens.targets, transform.scale, transform.cap)
    advantage = advantages(tokens, normalisation or GroupNormalisation())
    everything = slice(0, tokens.num_tokens)
    fields = sliced(token_fields(tokens, advantage), everything, stats.dtype)
    view = Segmentation.of(tokens, Level.BATCH).view(stats[0], stats[1], fields, everything)
    return (fields.weight * masked_loss(objective, view)).sum()


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: PolicyCall,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        wanted = Wanted.of(ctx.needs_input_grad if grad_enabled else (), hidden, weight, bias)
        loss, rows, ctx.gradients = call.run(hidden, weight, bias, wanted)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.call, ctx.wanted = call, wanted
        ctx.mark_non_differentiable(rows)
        return loss, rows

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Any, ...]:
        # Autograd keeps a gradient without copying it only if nobody else holds it; so it is
        # handed out once, and a second backward through a retained graph computes it again.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            hidden, weight, bias = ctx.saved_tensors
            gradients = ctx.call.run(hidden, weight, bias, ctx.wanted)[2]
        # Reading dloss would wait for a CUDA device; on the CPU it saves a pass over d_weight.
        if dloss.is_cuda or dloss != 1:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(dloss)
        return (*gradients, None, None)
