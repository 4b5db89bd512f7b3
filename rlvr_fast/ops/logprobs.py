"""Log-probability and entropy of ready logits, and the two row primitives all ops share.

The formulas stand in `kernels/logprobs.py`.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlvr_fast import tuning
from rlvr_fast.ops.transform import LogitTransform, transformed

LOWEST = -1e4
"""A shifted logit below this has probability 0; the bound keeps `0 * -inf` out of the entropy."""


class TokenLogprobs(NamedTuple):
    logp: Tensor
    """`[T]` fp32, in nats, <= 0."""
    entropy: Tensor
    """`[T]` fp32, in nats, in [0, log V]."""


def logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> TokenLogprobs:
    """Log-probability of one token per row of logits, and the row's entropy.

    Args:
        logits: `[T, V]` fp32, bf16 or fp16, rows contiguous (any row stride). Differentiable.
        targets: `[T]` int64, each in `[0, V)`; on CUDA not checked.
        temperature, softcap, logit_scale: see `LogitTransform`.

    Returns:
        `TokenLogprobs(logp, entropy)`, both differentiable.

    Raises:
        ValueError: for a shape, dtype, stride, target or temperature other than these.

    Cost: forward reads the logits once; backward reads them once and writes as much.
    """
    transform = LogitTransform(temperature=temperature, softcap=softcap, logit_scale=logit_scale)
    check_logits(logits)
    check_targets(targets, logits.shape[0], logits.shape[1])
    stats = row_stats(logits, targets, transform.scale, transform.cap)
    return TokenLogprobs(stats[0], stats[1])


def check_logits(logits: Tensor) -> None:
    """Raises ValueError unless floating point `[T, V]` with contiguous rows."""
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"logits: wanted floating point [T, V], got {_shown(logits)}")
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"logits: wanted contiguous rows, got strides {logits.stride()}")


def check_targets(targets: Tensor, num_tokens: int, vocab_size: int) -> None:
    """Raises ValueError unless `[T]` int64 within the vocabulary (the range only on the CPU)."""
    if targets.shape != (num_tokens,) or targets.dtype != torch.int64:
        raise ValueError(f"targets: wanted int64 [{num_tokens}], got {_shown(targets)}")
    if targets.device.type == "cpu" and num_tokens:
        low, high = targets.aminmax()
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"targets: wanted ids in [0, {vocab_size}), got {int(low)} to {int(high)}"
            )


def reference(logits: Tensor, targets: Tensor, scale: float, cap: float) -> Tensor:
    """The definition: any device, any float dtype; its gradient is autograd's own.

    Returns `[4, T]`: logp, entropy, the row's greatest transformed logit, and the log of the sum
    of exponentials relative to it.
    """
    z = transformed(logits, scale, cap)
    top = z.amax(-1, keepdim=True).detach()
    shifted = (z - top).clamp(min=LOWEST)
    exp = shifted.exp()
    total = exp.sum(-1)
    target = shifted.gather(-1, targets[:, None]).squeeze(-1)
    others = exp.scatter(-1, targets[:, None], 0.0).sum(-1)
    # A sure token is the row's greatest: log1p keeps the last digits of its logp below 0. There
    # exp(-target) is 1 and matters to the gradient only; elsewhere its clamp keeps it finite.
    sure = -torch.log1p(others * torch.exp(-target.clamp(min=-1.0)))
    logp = torch.where(target == 0, sure, target - total.log())
    entropy = total.log() - (exp * shifted).sum(-1) / total
    return torch.stack([logp, entropy, top.squeeze(-1), total.log().detach()])


def cpp(logits: Tensor, targets: Tensor, scale: float, cap: float) -> Tensor:
    """Two sweeps over each row, which stays in the cache between them."""
    if logits.dtype not in CPP_VIEWS:
        return reference(logits, targets, scale, cap)
    from rlvr_fast import _C

    stats = torch.empty(4, logits.shape[0], dtype=torch.float32)
    ids = targets.contiguous().numpy()
    _C.logprobs_fwd(as_numpy(logits), ids, scale, cap, stats.numpy(), threads(logits))
    return stats


def triton(logits: Tensor, targets: Tensor, scale: float, cap: float) -> Tensor:
    """One program a row, online softmax."""
    if logits.dtype not in CPP_VIEWS:
        return reference(logits, targets, scale, cap)
    from rlvr_fast.kernels.launch import launch
    from rlvr_fast.kernels.logprobs import logprobs_fwd_kernel

    num_tokens, vocab_size = logits.shape
    stats = torch.empty(4, num_tokens, dtype=torch.float32, device=logits.device)
    if num_tokens:
        launch(logprobs_fwd_kernel, num_tokens)(
            logits,
            targets.contiguous(),
            stats,
            num_tokens,
            vocab_size,
            logits.stride(0),
            scale,
            cap,
            HAS_CAP=cap > 0,
            **tuning.row_launch("statistics", vocab_size, logits.dtype, logits.device),
        )
    return stats


BACKENDS = {"reference": reference, "cpp": cpp, "triton": triton}

row_stats = torch.library.custom_op("rlvr_fast::row_stats", reference, mutates_args=())
row_stats.register_kernel("cpu", cpp)
row_stats.register_kernel("cuda", triton)


@row_stats.register_fake
def _(logits: Tensor, targets: Tensor, scale: float, cap: float) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(4, logits.shape[0], dtype=dtype)


def reference_grad(
    logits: Tensor,
    targets: Tensor,
    stats: Tensor,
    dlogp: Tensor,
    dentropy: Tensor | None,
    scale: float,
    cap: float,
    out: Tensor,
) -> None:
    """Writes d(loss)/d(logits) to `out`, which may be `logits` itself.

    Args:
        logits: `[T, V]` as in the forward pass.
        targets: `[T]` int64; -1 where the target is in another slice of the vocabulary.
        stats: `[4, T]` from the forward pass.
        dlogp: `[T]` d(loss)/d(logp).
        dentropy: `[T]` d(loss)/d(entropy), or None for zeros.
        out: `[T, V]`, any float dtype.
    """
    z = transformed(logits, scale, cap)
    logp, entropy, top, log_total = stats.unsqueeze(-1)
    logp_all = (z - top).clamp(min=LOWEST) - log_total
    inner = (
        dlogp[:, None]
        if dentropy is None
        else dlogp[:, None] + dentropy[:, None] * (logp_all + entropy)
    )
    dz = -logp_all.exp() * inner
    # p - 1 loses what is left of a sure token's gradient; expm1 keeps it.
    at_target = -torch.expm1(logp) * dlogp[:, None]
    if dentropy is not None:
        at_target = at_target - logp.exp() * dentropy[:, None] * (logp + entropy)
    here = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    dz = torch.where(here, at_target, dz)
    slope = scale * (1 - (z / cap) ** 2) if cap else scale
    out.copy_(dz * slope)


def cpp_grad(
    logits: Tensor,
    targets: Tensor,
    stats: Tensor,
    dlogp: Tensor,
    dentropy: Tensor | None,
    scale: float,
    cap: float,
    out: Tensor,
) -> None:
    """One sweep; a row whose gradients are both exactly zero is only filled with zeros.

    `out` may also be the front of the same rows in a narrower dtype.
    """
    if not cpp_can_grad(logits, out):
        reference_grad(logits, targets, stats, dlogp, dentropy, scale, cap, out)
        return
    from rlvr_fast import _C

    _C.logprobs_bwd(
        as_numpy(logits),
        targets.contiguous().numpy(),
        stats.contiguous().numpy(),
        dlogp.contiguous().numpy(),
        None if dentropy is None else dentropy.contiguous().numpy(),
        scale,
        cap,
        as_numpy(out),
        threads(logits),
    )


def triton_grad(
    logits: Tensor,
    targets: Tensor,
    stats: Tensor,
    dlogp: Tensor,
    dentropy: Tensor | None,
    scale: float,
    cap: float,
    out: Tensor,
) -> None:
    """One program a row; `out` may also be the front of the same rows in a narrower dtype."""
    if logits.dtype not in CPP_VIEWS:
        reference_grad(logits, targets, stats, dlogp, dentropy, scale, cap, out)
        return
    from rlvr_fast.kernels.launch import launch
    from rlvr_fast.kernels.logprobs import logprobs_bwd_kernel

    num_tokens, vocab_size = logits.shape
    if num_tokens:
        launch(logprobs_bwd_kernel, num_tokens)(
            logits,
            targets.contiguous(),
            stats.contiguous(),
            dlogp.contiguous(),
            None if dentropy is None else dentropy.contiguous(),
            out,
            num_tokens,
            vocab_size,
            logits.stride(0),
            out.stride(0),
            scale,
            cap,
            HAS_CAP=cap > 0,
            **tuning.row_launch("gradient", vocab_size, logits.dtype, logits.device),
        )


GRAD_BACKENDS = {"reference": reference_grad, "cpp": cpp_grad, "triton": triton_grad}

row_grad = torch.library.custom_op("rlvr_fast::row_grad", reference_grad, mutates_args=("out",))
row_grad.register_kernel("cpu", cpp_grad)
row_grad.register_kernel("cuda", triton_grad)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, targets, ctx.scale, ctx.cap = inputs
    ctx.save_for_backward(logits, targets, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    logits, targets, stats = ctx.saved_tensors
    out = torch.empty_like(logits)
    row_grad(logits, targets, stats, grad[0], grad[1], ctx.scale, ctx.cap, out)
    return out, None, None, None


row_stats.register_autograd(_backward, setup_context=_save)

CPP_VIEWS = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.uint16,
    torch.float16: torch.float16,
}


def cpp_can_grad(logits: Tensor, out: Tensor) -> bool:
    """The gradient has its logits' dtype; that of fp32 logits may have any of these."""
    known = logits.dtype in CPP_VIEWS and out.dtype in CPP_VIEWS
    return known and logits.dtype in (out.dtype, torch.float32)


def threads(logits: Tensor) -> int:
    """Of torch's threads as many as have at least 2^16 logits (some 10 us) to work on."""
    return max(1, min(torch.get_num_threads(), logits.numel() >> 16))


def as_numpy(x: Tensor) -> np.ndarray[Any, Any]:
    """Shares the memory; NumPy has no bf16, so it crosses as its bits."""
    # Tensor.numpy() would forbid FSDP for good to free a weight's memory.
    return np.from_dlpack(x.detach().view(CPP_VIEWS[x.dtype]))


def _shown(value: Tensor) -> str:
    return f"{value.dtype} {list(value.shape)}"
