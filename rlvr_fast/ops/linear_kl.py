"""Divergence between the distributions of two LM heads, straight from their hidden states."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rlvr_fast.ops.divergence import Divergence, divergence, row_divergence
from rlvr_fast.ops.single_pass import single_pass
from rlvr_fast.ops.tiled_head import Gradients, HeadSettings, TiledHead, Wanted, head_settings
from rlvr_fast.ops.transform import LogitTransform


class LinearKL(NamedTuple):
    loss: Tensor
    """0-dim fp32, `sum(token_weight * kl)`; its backward hands out finished gradients."""
    kl: Tensor
    """`[T]` fp32, nats, >= 0 but for rounding; 0 where `token_weight` is. Detached."""


def linear_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_weight: Tensor,
    *,
    kind: Divergence,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    logits_budget: int | None = None,
) -> LinearKL:
    """Divergence over the whole vocabulary, with gradients to the student's hidden, weight, bias.

    Neither `[T, V]` of logits ever exists: a tile of rows goes through both heads, a row sweep and
    the student's two gradient GEMMs before the next tile starts. The teacher gets no gradient,
    even if it asks for one.

    For a loss that is not linear in kl (capped, squared, a mean over those above a threshold),
    call this under `no_grad` with ones first, and again with d(loss)/d(kl) as `token_weight`: the
    gradients of that second `loss` are those of the first one.

    Args:
        student_hidden: `[T, D]` fp32, bf16, fp16 (or fp64 on the CPU).
        student_weight: `[V, D]` of the same dtype; under autocast any, as for `nn.Linear`.
        teacher_hidden: `[T, D2]`, also of another dtype and hidden size.
        teacher_weight: `[V, D2]`, over the same vocabulary.
        token_weight: `[T]` floating point, of either sign; not differentiated. 0 masks a row,
            whatever its hidden states hold.
        kind: see `Divergence`.
        student_bias, teacher_bias: `[V]`. An entry may be `-inf` in both (a masked vocabulary)
            without consequences; in one of the two it makes the divergence from that one infinite.
        temperature, softcap, logit_scale: see `LogitTransform`; the same for both heads. A teacher
            with a logit scale of its own can have it in its weight.
        logits_dtype: of both tiles, see `policy_loss`. Heads of two dtypes get the wider of their
            defaults.
        logits_budget: as for `policy_loss`; half of it is for each head.

    Returns:
        `LinearKL(loss, kl)`.

    Raises:
        ValueError: for shapes, dtypes or settings other than these.

    Cost: 6 T D V + 2 T D2 V flops (a frozen operand of the student's, or `no_grad`, saves 2 T D V),
    plus three reads of each pair of logits and a write. No host sync on CUDA.
    """
    student = (student_hidden, student_weight, student_bias)
    teacher = (teacher_hidden.detach(), teacher_weight.detach(), _detached(teacher_bias))
    settings, teacher_settings = _settings(student, teacher, logits_dtype, logits_budget)
    _check(student, teacher, token_weight, kind)
    call = _Call(
        teacher=teacher,
        settings=settings,
        teacher_settings=teacher_settings,
        token_weight=token_weight.detach(),
        kind=kind,
        transform=LogitTransform(temperature=temperature, softcap=softcap, logit_scale=logit_scale),
    )
    return LinearKL(*single_pass(*student, call))


def reference(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    kind: Divergence,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    transform: LogitTransform | None = None,
) -> Tensor:
    """The definition of kl: all logits at once, any device; gradients are autograd's own."""
    transform = transform or LogitTransform()
    student = student_hidden @ student_weight.t()
    teacher = teacher_hidden @ teacher_weight.t()
    student = student if student_bias is None else student + student_bias
    teacher = teacher if teacher_bias is None else teacher + teacher_bias
    return divergence(student, teacher, kind.value, transform.scale, transform.cap)


Head = tuple[Tensor, Tensor, Tensor | None]
"""Hidden, weight, bias."""


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _settings(
    student: Head, teacher: Head, logits_dtype: torch.dtype | None, logits_budget: int | None
) -> tuple[HeadSettings, HeadSettings]:
    """Of both heads: logits of one dtype, and half of the budget each."""

    def of(name: str, head: Head, dtype: torch.dtype | None) -> HeadSettings:
        try:
            found = head_settings(*head, logits_dtype=dtype, logits_budget=logits_budget)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        return replace(found, budget=max(1, found.budget // 2))

    first, second = of("student", student, logits_dtype), of("teacher", teacher, logits_dtype)
    common = torch.promote_types(first.logits_dtype, second.logits_dtype)
    return of("student", student, common), of("teacher", teacher, common)


def _check(student: Head, teacher: Head, token_weight: Tensor, kind: Divergence) -> None:
    num_tokens, vocab_size = len(student[0]), len(student[1])
    if len(teacher[0]) != num_tokens:
        raise ValueError(f"teacher_hidden: wanted {num_tokens} rows, got {len(teacher[0])}")
    if len(teacher[1]) != vocab_size:
        raise ValueError(f"teacher_weight: wanted {vocab_size} rows, got {len(teacher[1])}")
    if token_weight.shape != (num_tokens,) or not token_weight.is_floating_point():
        raise ValueError(
            f"token_weight: wanted floating point [{num_tokens}], "
            f"got {token_weight.dtype} {list(token_weight.shape)}"
        )
    if not isinstance(kind, Divergence):
        raise ValueError(f"kind: wanted a Divergence, got {kind!r}")


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One call of `linear_kl` but for the tensors it differentiates."""

    teacher: Head
    settings: HeadSettings
    teacher_settings: HeadSettings
    token_weight: Tensor
    kind: Divergence
    transform: LogitTransform
    weight_grad: None = None

    def run(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Wanted
    ) -> tuple[Tensor, Tensor, Gradients]:
        """The loss, kl and the gradients."""
        dtype = torch.promote_types(self.settings.logits_dtype, torch.float32)
        coef, kl = self.token_weight.to(dtype), hidden.new_empty(len(hidden), dtype=dtype)
        if wanted.weight is not None:
            # A gradient of 0 times a hidden state of NaN would be NaN in the weight's.
            hidden = hidden.masked_fill((coef == 0)[:, None], 0.0)
        student = TiledHead(hidden, weight, bias, self.settings, wanted, name="student")
        nothing = Wanted(None, None, None)
        teacher = TiledHead(*self.teacher, self.teacher_settings, nothing, name="teacher")
        for tile in student.tiles(slice(0, len(hidden))):
            logits = student.logits(tile)
            gradient = student.gradient_buffer(logits) if wanted.any else None
            kl[tile] = row_divergence(
                logits,
                teacher.logits(tile),
                coef[tile],
                self.kind.value,
                self.transform.scale,
                self.transform.cap,
                gradient,
            )
            if gradient is not None:
                student.accumulate(tile, gradient)
        return (coef * kl).sum(), kl, student.gradients()
