"""The row primitives behind `token_statistics`: nine statistics a row, and their gradient.

The formulas stand in `kernels/token_statistics.py`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from rlvr_fast.ops import logprobs as row_op
from rlvr_fast.ops.logprobs import CPP_VIEWS, as_numpy
from rlvr_fast.ops.transform import transformed

NUM_STATS = 9
"""logp, entropy, m, log s, mean, log_sum, squared, kept, max_p, as the kernels call them."""


def reference(
    logits: Tensor, targets: Tensor, scale: float, cap: float, min_p: float
) -> tuple[Tensor, Tensor]:
    """The definition: any device, any float dtype; its gradient is autograd's own.

    Returns `[9, T]`, see `NUM_STATS`, and the `[T]` top ids.
    """
    z = transformed(logits, scale, cap)
    logp, entropy, top, log_total = row_op.reference(logits, targets, scale, cap)
    shifted = (z - top[:, None]).clamp(min=row_op.LOWEST)
    exp = shifted.exp()
    total = exp.sum(-1)
    p = exp / total[:, None]
    kept = torch.where(shifted >= log_of(min_p), p, 0.0).sum(-1)
    stats = [logp, entropy, top, log_total, z.mean(-1), top + total.log(), (p * p).sum(-1)]
    kept = kept if min_p > 0 else torch.ones_like(kept)
    return torch.stack([*stats, kept, 1 / total.detach()]), z.argmax(-1)


def cpp(
    logits: Tensor, targets: Tensor, scale: float, cap: float, min_p: float
) -> tuple[Tensor, Tensor]:
    """One sweep over each row, and a second look with `min_p`, while it is in the cache."""
    if logits.dtype not in CPP_VIEWS:
        return reference(logits, targets, scale, cap, min_p)
    from rlvr_fast import _C

    stats, top_id = _empty(logits)
    _C.token_statistics_fwd(
        as_numpy(logits),
        targets.contiguous().numpy(),
        scale,
        cap,
        log_of(min_p),
        stats.numpy(),
        top_id.numpy(),
        row_op.threads(logits),
    )
    return stats, top_id


def triton(
    logits: Tensor, targets: Tensor, scale: float, cap: float, min_p: float
) -> tuple[Tensor, Tensor]:
    """One program a row, online softmax."""
    if logits.dtype not in CPP_VIEWS:
        return reference(logits, targets, scale, cap, min_p)
    from rlvr_fast.kernels.launch import launch
    from rlvr_fast.kernels.logprobs import row_launch
    from rlvr_fast.kernels.token_statistics import token_statistics_fwd_kernel

    stats, top_id = _empty(logits)
    if len(logits):
        launch(token_statistics_fwd_kernel, len(logits))(
            logits,
            targets.contiguous(),
            stats,
            top_id,
            *logits.shape,
            logits.stride(0),
            scale,
            cap,
            log_of(min_p),
            FILTER=min_p > 0,
            HAS_CAP=cap > 0,
            **row_launch(logits.shape[1]),
        )
    return stats, top_id


BACKENDS = {"reference": reference, "cpp": cpp, "triton": triton}

row_statistics = torch.library.custom_op("rlvr_fast::row_statistics", reference, mutates_args=())
row_statistics.register_kernel("cpu", cpp)
row_statistics.register_kernel("cuda", triton)


@row_statistics.register_fake
def _(
    logits: Tensor, targets: Tensor, scale: float, cap: float, min_p: float
) -> tuple[Tensor, Tensor]:
    return _empty(logits)


def _empty(logits: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    stats = torch.empty(NUM_STATS, len(logits), dtype=dtype, device=logits.device)
    return stats, torch.empty(len(logits), dtype=torch.int64, device=logits.device)


def log_of(min_p: float) -> float:
    return math.log(min_p) if min_p > 0 else -math.inf


def reference_grad(
    logits: Tensor,
    targets: Tensor,
    stats: Tensor,
    top_id: Tensor,
    grads: Tensor,
    scale: float,
    cap: float,
    min_p: float,
    out: Tensor,
) -> None:
    """Writes d(loss)/d(logits) to `out`, which may be `logits` itself.

    Args:
        logits: `[T, V]` as in the forward pass.
        stats, top_id: `[9, T]` and `[T]` from the forward pass.
        grads: `[9, T]` d(loss)/d(stats); those of m, log s and max_p are not read.
        out: `[T, V]`, any float dtype.
    """
    z = transformed(logits, scale, cap)
    logp, entropy, top, log_total, _, _, squared, kept, _ = stats.unsqueeze(-1)
    dlogp, dentropy, _, _, dmean, dlog_sum, dsquared, dkept, _ = grads.unsqueeze(-1)
    shifted = (z - top).clamp(min=row_op.LOWEST)
    ids = targets[:, None]
    log_p = (shifted - log_total).scatter(-1, ids, logp)
    p = log_p.exp()
    inside = (shifted >= log_of(min_p)).to(p.dtype)
    c = dlog_sum - dentropy * (log_p + entropy) + 2 * dsquared * (p - squared)
    c = c + dkept * (inside - kept)
    # p - 1 loses what is left of a sure token's gradient; expm1 keeps it.
    of_logp = (-p).scatter(-1, ids, -torch.expm1(logp)) * dlogp
    slope = scale * (1 - (z / cap) ** 2) if cap else scale
    out.copy_((p * c + of_logp + dmean / logits.shape[1]) * slope)


def cpp_grad(
    logits: Tensor,
    targets: Tensor,
    stats: Tensor,
    top_id: Tensor,
    grads: Tensor,
    scale: float,
    cap: float,
    min_p: float,
    out: Tensor,
) -> None:
    """One sweep; `out` may also be the front of the same rows in a narrower dtype."""
    if not row_op.cpp_can_grad(logits, out):
        reference_grad(logits, targets, stats, top_id, grads, scale, cap, min_p, out)
        return
    from rlvr_fast import _C

    _C.token_statistics_bwd(
        as_numpy(logits),
        targets.contiguous().numpy(),
        stats.contiguous().numpy(),
        top_id.contiguous().numpy(),
        grads.contiguous().numpy(),
        scale,
        cap,
        log_of(min_p),
        as_numpy(out),
        row_op.threads(logits),
    )


def triton_grad(
    logits: Tensor,
    targets: Tensor,
    stats: Tensor,
    top_id: Tensor,
    grads: Tensor,
    scale: float,
    cap: float,
    min_p: float,
    out: Tensor,
) -> None:
    """One program a row; `out` may also be the front of the same rows in a narrower dtype."""
    if logits.dtype not in CPP_VIEWS:
        reference_grad(logits, targets, stats, top_id, grads, scale, cap, min_p, out)
        return
    from rlvr_fast.kernels.launch import launch
    from rlvr_fast.kernels.logprobs import row_launch
    from rlvr_fast.kernels.token_statistics import token_statistics_bwd_kernel

    if len(logits):
        launch(token_statistics_bwd_kernel, len(logits))(
            logits,
            targets.contiguous(),
            stats.contiguous(),
            grads.contiguous(),
            out,
            *logits.shape,
            logits.stride(0),
            out.stride(0),
            scale,
            cap,
            log_of(min_p),
            HAS_CAP=cap > 0,
            **row_launch(logits.shape[1]),
        )


GRAD_BACKENDS = {"reference": reference_grad, "cpp": cpp_grad, "triton": triton_grad}

row_statistics_grad = torch.library.custom_op(
    "rlvr_fast::row_statistics_grad", reference_grad, mutates_args=("out",)
)
row_statistics_grad.register_kernel("cpu", cpp_grad)
row_statistics_grad.register_kernel("cuda", triton_grad)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, *ctx.arguments = inputs
    ctx.save_for_backward(logits, targets, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grads: Tensor, _: Tensor) -> tuple[Any, ...]:
    logits, targets, stats, top_id = ctx.saved_tensors
    out = torch.empty_like(logits)
    row_statistics_grad(logits, targets, stats, top_id, grads, *ctx.arguments, out)
    return out, None, None, None, None


row_statistics.register_autograd(_backward, setup_context=_save)
