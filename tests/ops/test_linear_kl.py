"""`linear_kl`: the divergence of two heads without the logits of either."""

import pytest
import torch
from torch import Tensor

from rlvr_fast.ops.divergence import Divergence
from rlvr_fast.ops.linear_kl import LinearKL, linear_kl, reference
from rlvr_fast.ops.transform import LogitTransform

VOCAB, HIDDEN, TEACHER_HIDDEN = 33, 8, 12
SETTINGS = {"temperature": 0.7, "softcap": 9.0, "logit_scale": 1.5}

kinds = pytest.mark.parametrize("kind", Divergence)


def problem(num_tokens: int = 13, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Arguments of both heads; the student's ask for gradients."""
    shapes = {
        "student_hidden": (num_tokens, HIDDEN),
        "student_weight": (VOCAB, HIDDEN),
        "student_bias": (VOCAB,),
        "teacher_hidden": (num_tokens, TEACHER_HIDDEN),
        "teacher_weight": (VOCAB, TEACHER_HIDDEN),
        "teacher_bias": (VOCAB,),
    }
    found = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    return {name: x.requires_grad_("student" in name) for name, x in found.items()}


def student(given: dict[str, Tensor]) -> list[Tensor]:
    return [x for name, x in given.items() if "student" in name]


def budget(rows_per_tile: int, dtype: torch.dtype) -> int:
    return 2 * rows_per_tile * VOCAB * dtype.itemsize


def token_weights(num_tokens: int = 13) -> Tensor:
    """Of both signs, a quarter of them masked."""
    return torch.randn(num_tokens) * (torch.arange(num_tokens) % 4 != 2)


def ours(given: dict[str, Tensor], token_weight: Tensor, kind: Divergence, **others) -> LinearKL:
    return linear_kl(token_weight=token_weight, kind=kind, **given, **others)


def gradients(loss: Tensor, given: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(3 * loss, student(given)))


def gemms(given: dict[str, Tensor], num_tokens: int = 13, **others) -> int:
    with torch.profiler.profile() as profile:
        ours(given, torch.ones(num_tokens), Divergence.REVERSE, **others)
    return sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm"))


@kinds
@pytest.mark.parametrize("rows_per_tile", [100, 5, 1])
def test_kl_loss_and_gradients_equal_the_reference_in_fp64(kind, rows_per_tile):
    given, weight = problem(dtype=torch.float64), token_weights()
    tiles = budget(rows_per_tile, torch.float64)
    out = ours(given, weight, kind, logits_budget=tiles, **SETTINGS)
    kl = reference(**given, kind=kind, transform=LogitTransform(**SETTINGS))
    torch.testing.assert_close(out.kl, torch.where(weight == 0, 0, kl), rtol=1e-10, atol=1e-12)
    loss = (weight * kl).sum()
    torch.testing.assert_close(out.loss, loss, rtol=1e-10, atol=1e-12)
    for a, b in zip(gradients(out.loss, given), gradients(loss, given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows_per_tile", [100, 5])
def test_it_is_as_exact_as_plain_torch_in_the_same_dtype(
    kind, dtype, rows_per_tile, as_exact_as_torch
):
    inputs, weight = problem(dtype=dtype), token_weights()

    def run(cast: torch.dtype, fused: bool) -> list[Tensor]:
        given = {n: x.detach().to(cast).requires_grad_(x.requires_grad) for n, x in inputs.items()}
        if fused:
            tiles = budget(rows_per_tile, dtype)
            out = ours(given, weight, kind, logits_budget=tiles, **SETTINGS)
            return [out.kl[weight != 0], *gradients(out.loss, given)]
        kl = reference(**given, kind=kind, transform=LogitTransform(**SETTINGS))
        return [kl[weight != 0].detach(), *gradients((weight * kl).sum(), given)]

    for found, plain, truth in zip(
        run(dtype, True), run(dtype, False), run(torch.float64, False), strict=True
    ):
        as_exact_as_torch(found.to(dtype), plain.to(dtype), truth)


@kinds
def test_the_loss_passes_gradcheck(kind):
    given, weight = problem(4, torch.float64), token_weights(4)
    fixed = {name: x for name, x in given.items() if "teacher" in name}
    names = [name for name in given if "student" in name]

    def loss(*leaves: Tensor) -> Tensor:
        return 3 * ours({**fixed, **dict(zip(names, leaves, strict=True))}, weight, kind).loss

    assert torch.autograd.gradcheck(loss, student(given))


@kinds
def test_the_order_of_rows_changes_nothing(kind):
    given, weight = problem(dtype=torch.float64), token_weights()
    order = torch.randperm(13)
    moved = {name: x[order] if "hidden" in name else x for name, x in given.items()}
    plain, other = (
        ours(g, w, kind, logits_budget=budget(5, torch.float64))
        for g, w in ((given, weight), (moved, weight[order]))
    )
    torch.testing.assert_close(other.kl, plain.kl[order])
    for a, b in zip(gradients(plain.loss, given), gradients(other.loss, given), strict=True):
        torch.testing.assert_close(a, b)


@kinds
def test_whatever_lies_in_masked_rows_changes_nothing(kind):
    given, weight = problem(), token_weights()
    masked = (weight == 0)[:, None]
    spoiled = {
        name: x.detach().masked_fill(masked, torch.nan).requires_grad_(x.requires_grad)
        if "hidden" in name
        else x
        for name, x in given.items()
    }
    plain, other = ours(given, weight, kind), ours(spoiled, weight, kind)
    assert torch.equal(plain.kl, other.kl)
    assert torch.equal(plain.loss, other.loss)
    for a, b in zip(gradients(plain.loss, given), gradients(other.loss, spoiled), strict=True):
        assert torch.equal(a, b)


@kinds
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(kind):
    hidden, weight = (x.requires_grad_() for x in (torch.randn(13, HIDDEN), torch.randn(VOCAB, 8)))
    out = linear_kl(hidden, weight, hidden, weight, torch.ones(13), kind=kind)
    out.loss.backward()
    assert (out.kl == 0).all()
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


def test_a_loss_that_is_not_linear_in_kl_takes_its_derivative_as_the_weight():
    given, kind = problem(dtype=torch.float64), Divergence.REVERSE
    expected = gradients((reference(**given, kind=kind) ** 2).sum(), given)
    with torch.no_grad():
        kl = ours(given, torch.ones(13), kind).kl
    for a, b in zip(gradients(ours(given, 2 * kl, kind).loss, given), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_frozen_operands_and_no_grad_skip_their_gemms():
    given = problem()
    del given["student_bias"], given["teacher_bias"]

    def frozen(*names: str) -> dict[str, Tensor]:
        return {name: x.detach() if name in names else x for name, x in given.items()}

    assert gemms(given) == 4
    assert gemms(frozen("student_hidden")) == 3
    assert gemms(frozen("student_weight")) == 3
    assert gemms(frozen("student_hidden", "student_weight")) == 2
    assert gemms(given, logits_budget=budget(7, torch.float32)) == 8
    with torch.no_grad():
        assert gemms(given) == 2


def test_a_frozen_operand_gets_no_gradient_and_the_others_theirs():
    given, weight = problem(dtype=torch.float64), token_weights()
    whole = gradients(ours(given, weight, Divergence.FORWARD).loss, given)
    for i, name in enumerate(("student_hidden", "student_weight", "student_bias")):
        loss = ours({**given, name: given[name].detach()}, weight, Divergence.FORWARD).loss
        left = [x for n, x in given.items() if "student" in n and n != name]
        found = torch.autograd.grad(3 * loss, left)
        for a, b in zip(found, whole[:i] + whole[i + 1 :], strict=True):
            torch.testing.assert_close(a, b)


def test_the_teacher_gets_no_gradient_even_if_it_asks():
    given = {name: x.detach().requires_grad_() for name, x in problem().items()}
    ours(given, torch.ones(13), Divergence.FORWARD).loss.backward()
    assert all((x.grad is None) == ("teacher" in name) for name, x in given.items())


def test_kl_comes_along_detached():
    out = ours(problem(), torch.ones(13), Divergence.FORWARD)
    assert not out.kl.requires_grad
    assert (out.kl > 0).all()


def test_a_retained_graph_gives_the_same_gradients_again():
    given = problem()
    loss = ours(given, token_weights(), Divergence.JENSEN_SHANNON).loss
    first, second = (torch.autograd.grad(loss, student(given), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_tokens_give_zero_loss_with_gradients_attached():
    given = problem(0)
    out = ours(given, torch.zeros(0), Divergence.REVERSE)
    out.loss.backward()
    assert out.loss == 0
    assert out.kl.shape == (0,)
    assert all((x.grad == 0).all() for x in student(given))


def test_under_autocast_fp32_master_weights_get_fp32_gradients():
    given, weight = problem(), token_weights()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(given, weight, Divergence.FORWARD).loss
    truth = gradients(ours(given, weight, Divergence.FORWARD).loss, given)
    for a, b in zip(gradients(loss, given), truth, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("narrow", ["student", "teacher"])
def test_heads_of_two_dtypes_meet_in_the_wider_one(narrow):
    given, weight = problem(), token_weights()
    mixed = {
        name: x.detach().bfloat16().requires_grad_(x.requires_grad) if narrow in name else x
        for name, x in given.items()
    }
    out = ours(mixed, weight, Divergence.FORWARD)
    wide = {name: x.detach().float() for name, x in mixed.items()}
    torch.testing.assert_close(out.kl, ours(wide, weight, Divergence.FORWARD).kl)
    assert [g.dtype for g in gradients(out.loss, mixed)] == [x.dtype for x in student(mixed)]


def test_fp32_logits_from_bf16_inputs_keep_what_bf16_logits_lose():
    given = problem(dtype=torch.bfloat16)
    exact = {name: x.detach().double() for name, x in given.items()}
    truth = reference(**exact, kind=Divergence.REVERSE)

    def error(logits_dtype: torch.dtype) -> float:
        out = ours(given, torch.ones(13), Divergence.REVERSE, logits_dtype=logits_dtype)
        return (out.kl - truth).abs().max().item()

    assert error(torch.float32) < 1e-4
    assert error(torch.bfloat16) > 1e-3


@kinds
def test_a_vocabulary_masked_in_both_heads_changes_nothing(kind):
    given, weight = problem(), token_weights()
    allowed = torch.arange(VOCAB) < 20
    masked = {n: torch.where(allowed, x, -torch.inf) for n, x in given.items() if "bias" in n}
    small = {n: x if "hidden" in n else x[:20] for n, x in given.items()}
    out, alone = ours({**given, **masked}, weight, kind), ours(small, weight, kind)
    torch.testing.assert_close(out.kl, alone.kl)
    for a, b in zip(gradients(out.loss, given), gradients(alone.loss, given), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_hidden": torch.zeros(13, 9)}, r"student: hidden, weight: wanted \[T, D\]"),
        ({"teacher_hidden": torch.zeros(13, 9)}, r"teacher: hidden, weight: wanted \[T, D\]"),
        ({"teacher_hidden": torch.zeros(12, 12)}, "teacher_hidden: wanted 13 rows, got 12"),
        ({"teacher_weight": torch.zeros(34, 12)}, "teacher: bias"),
        (
            {"teacher_weight": torch.zeros(34, 12), "teacher_bias": None},
            "teacher_weight: wanted 33 rows, got 34",
        ),
        ({"student_hidden": torch.zeros(13, 8).half()}, "student: .* wanted one floating point"),
        ({"student_bias": torch.zeros(32)}, r"student: bias: wanted \[33\]"),
        ({"token_weight": torch.ones(12)}, r"token_weight: wanted floating point \[13\]"),
        ({"token_weight": torch.ones(13).long()}, "token_weight: .* got torch.int64"),
        ({"kind": "forward"}, "kind: wanted a Divergence, got 'forward'"),
        ({"kind": 1}, "kind: wanted a Divergence, got 1"),
        ({"logits_budget": 0}, "logits_budget: wanted at least one byte"),
        ({"logits_dtype": torch.float16}, "logits_dtype: wanted torch.float32"),
        ({"temperature": 0.0}, "temperature: wanted positive and finite"),
    ],
)
def test_bad_input_is_told_what_was_wanted(change, message):
    arguments = {**problem(), "token_weight": torch.ones(13), "kind": Divergence.FORWARD}
    with pytest.raises(ValueError, match=message):
        linear_kl(**{**arguments, **change})
