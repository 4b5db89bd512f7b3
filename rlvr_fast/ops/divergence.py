"""Divergence between two tiles of logits, row by row, and its gradient to the first.

The formulas stand in `kernels/divergence.py`.
"""

from enum import Enum

import torch
from torch import Tensor

from rlvr_fast.ops.logprobs import CPP_VIEWS, as_numpy, cpp_can_grad, threads
from rlvr_fast.ops.transform import transformed

WIDEST_BLOCK = 2048
"""Of a row, in the Triton kernel: half of what one row alone gets."""
MOST_REGISTERS = 128
"""For each of its threads: left alone the compiler spills a few to fit one more row in."""


class Divergence(Enum):
    """Of a student's distribution s and a teacher's t."""

    FORWARD = 0
    """`KL(t || s)`: the student has to cover all that the teacher does."""
    REVERSE = 1
    """`KL(s || t)`: the student has to stay where the teacher is."""
    JENSEN_SHANNON = 2
    """`(KL(s || m) + KL(t || m)) / 2` with `m = (s + t) / 2`; at most log 2."""


def divergence(student: Tensor, teacher: Tensor, kind: int, scale: float, cap: float) -> Tensor:
    """The definition of `[T]` from two `[T, V]` of logits; its gradients are autograd's own."""
    log_p, log_q = (transformed(x, scale, cap).log_softmax(-1) for x in (student, teacher))
    return _divergence(log_p, log_q, kind)


def _divergence(log_p: Tensor, log_q: Tensor, kind: int) -> Tensor:
    if kind == Divergence.FORWARD.value:
        return _relative_entropy(log_q, log_p)
    if kind == Divergence.REVERSE.value:
        return _relative_entropy(log_p, log_q)
    log_m = _mixture(log_p, log_q)
    return (_relative_entropy(log_p, log_m) + _relative_entropy(log_q, log_m)) / 2


def _log_ratio(log_a: Tensor, log_b: Tensor) -> Tensor:
    """`log(a / b)`, 0 where a is 0."""
    return torch.where(log_a.exp() > 0, log_a - log_b, 0)


def _relative_entropy(log_a: Tensor, log_b: Tensor) -> Tensor:
    a = log_a.exp()
    return (a * _log_ratio(log_a, log_b) - a + log_b.exp()).sum(-1)


def _mixture(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`log((p + q) / 2)`."""
    apart = torch.where(log_p == log_q, 0, log_p - log_q).abs()
    return torch.maximum(log_p, log_q) + torch.log1p(torch.expm1(-apart) / 2)


def reference(
    student: Tensor,
    teacher: Tensor,
    coef: Tensor,
    kind: int,
    scale: float,
    cap: float,
    out: Tensor | None,
) -> Tensor:
    """The divergence of each row; d(sum(coef * divergence)) / d(student) goes to `out`.

    Entries that are `-inf` in both rows change nothing. Where only one of the two is possible the
    divergence from the other is infinite; the forward one has a finite gradient all the same, the
    reverse one has none: it comes out `nan` or infinite.

    Args:
        student: `[T, V]` fp32, bf16 or fp16 (fp64 too in plain torch), rows contiguous.
        teacher: `[T, V]` of the same dtype, any row stride.
        coef: `[T]` fp32 (fp64 for fp64 logits). Where it is 0 the row is not looked at: its
            divergence and its gradient are 0.
        kind: value of a `Divergence`.
        scale, cap: see `LogitTransform`.
        out: `[T, V]`, any float dtype. May be `student`, or the front of the same rows in a
            narrower dtype. None: no gradient wanted.

    Returns:
        `[T]` of coef's dtype, in nats, >= 0 but for rounding; exactly 0 for equal rows.
    """
    z = transformed(student, scale, cap)
    log_p, log_q = z.log_softmax(-1), transformed(teacher, scale, cap).log_softmax(-1)
    if out is not None:
        slope = scale * (1 - (z / cap) ** 2) if cap else scale
        dx = coef[:, None] * slope * _gradient(log_p, log_q, kind)
        out.copy_(torch.where(coef[:, None] == 0, 0, dx))
    return torch.where(coef == 0, 0, _divergence(log_p, log_q, kind))


def _gradient(log_p: Tensor, log_q: Tensor, kind: int) -> Tensor:
    p = log_p.exp()
    if kind == Divergence.FORWARD.value:
        return p - log_q.exp()
    reverse = kind == Divergence.REVERSE.value
    log_other = log_q if reverse else _mixture(log_p, log_q)
    centre = _relative_entropy(log_p, log_other)[:, None]
    return (1.0 if reverse else 0.5) * p * (_log_ratio(log_p, log_other) - centre)


def cpp(
    student: Tensor,
    teacher: Tensor,
    coef: Tensor,
    kind: int,
    scale: float,
    cap: float,
    out: Tensor | None,
) -> Tensor:
    """Three sweeps over both rows, which stay in the cache between them."""
    if not cpp_can_grad(student, student if out is None else out):
        return reference(student, teacher, coef, kind, scale, cap, out)
    from rlvr_fast import _C

    kl = torch.empty(len(student), dtype=torch.float32)
    _C.divergence(
        as_numpy(student),
        as_numpy(teacher),
        coef.contiguous().numpy(),
        kind,
        scale,
        cap,
        kl.numpy(),
        None if out is None else as_numpy(out),
        threads(student),
    )
    return kl


def triton(
    student: Tensor,
    teacher: Tensor,
    coef: Tensor,
    kind: int,
    scale: float,
    cap: float,
    out: Tensor | None,
) -> Tensor:
    """One program a row."""
    if student.dtype not in CPP_VIEWS:
        return reference(student, teacher, coef, kind, scale, cap, out)
    from rlvr_fast.kernels.divergence import divergence_kernel
    from rlvr_fast.kernels.launch import launch
    from rlvr_fast.kernels.logprobs import row_launch

    num_tokens, vocab_size = student.shape
    kl = torch.empty(num_tokens, dtype=torch.float32, device=student.device)
    if num_tokens:
        launch(divergence_kernel, num_tokens)(
            student,
            teacher,
            coef.contiguous(),
            kl,
            out,
            vocab_size,
            student.stride(0),
            teacher.stride(0),
            0 if out is None else out.stride(0),
            (scale, cap),
            KIND=kind,
            HAS_CAP=cap > 0,
            maxnreg=MOST_REGISTERS,
            **row_launch(min(vocab_size, WIDEST_BLOCK)),
        )
    return kl


BACKENDS = {"reference": reference, "cpp": cpp, "triton": triton}

row_divergence = torch.library.custom_op(
    "rlvr_fast::row_divergence", reference, mutates_args=("out",)
)
row_divergence.register_kernel("cpu", cpp)
row_divergence.register_kernel("cuda", triton)


@row_divergence.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    coef: Tensor,
    kind: int,
    scale: float,
    cap: float,
    out: Tensor | None,
) -> Tensor:
    return torch.empty_like(coef)
