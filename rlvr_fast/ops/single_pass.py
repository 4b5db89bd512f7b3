"""Autograd for losses whose gradients are ready with the loss."""

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from rlvr_fast.ops.tiled_head import Gradients, Wanted


class Call(Protocol):
    """One call of an op but for the tensors it differentiates."""

    @property
    def weight_grad(self) -> Tensor | None:
        """Takes the gradient of the weight, which then does not go through autograd."""

    def run(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Wanted
    ) -> tuple[Tensor, Tensor, Gradients]:
        """The loss; what comes along, not differentiable; the gradients."""


def single_pass(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call
) -> tuple[Tensor, Tensor]:
    """`call.run` with its gradients kept for the backward pass, which scales them."""
    loss, rows = _SinglePass.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, call, torch.is_grad_enabled()
    )
    return loss, rows


class _SinglePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: Call,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        wanted = Wanted.of(ctx.needs_input_grad if grad_enabled else (), hidden, weight, bias)
        if grad_enabled and call.weight_grad is not None:
            wanted = replace(wanted, weight=call.weight_grad.dtype)
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
        if ctx.call.weight_grad is not None and (gradients is None or _scaled(dloss)):
            raise ValueError(
                "weight_grad: wanted one backward pass through the loss as it is, got "
                + ("a second one" if gradients is None else f"a factor of {float(dloss)}")
            )
        if gradients is None:
            hidden, weight, bias = ctx.saved_tensors
            gradients = ctx.call.run(hidden, weight, bias, ctx.wanted)[2]
        if dloss.is_cuda or _scaled(dloss):
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(dloss)
        return (*gradients, None, None)


def _scaled(dloss: Tensor) -> bool:
    """Whether the CPU knows of a factor; reading it on CUDA would wait for the device."""
    return not dloss.is_cuda and bool(dloss != 1)
