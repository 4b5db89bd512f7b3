"""The row primitive of `linear_kl` over all backends, against fp64, PyTorch and TRL."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rlvr_fast.ops import divergence as op
from rlvr_fast.ops.divergence import Divergence

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRANSFORMS = {"plain": (1.0, 0.0), "temperature": (1 / 0.6, 0.0), "softcap": (0.5 / 1.3, 20 / 1.3)}
# Smaller than any block; one past a block of every backend; SmolLM2's and one.
CASES = {
    "tiny": (7, *TRANSFORMS["plain"]),
    **{f"one past a block, {name}": (4097, *values) for name, values in TRANSFORMS.items()},
    "many blocks": (49_153, *TRANSFORMS["softcap"]),
}
INF = float("inf")

backends = pytest.mark.parametrize("backend", op.BACKENDS)
kinds = pytest.mark.parametrize("kind", Divergence)

# NumPy, under Triton's interpreter, warns of `inf - inf` where the kernel then selects the other.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")


def rows(vocab_size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """student, teacher, coef of three rows."""
    student, teacher = torch.randn(2, 3, vocab_size) * 3
    return student.to(dtype), teacher.to(dtype), torch.randn(3)


def run(
    backend: str,
    student: Tensor,
    teacher: Tensor,
    coef: Tensor,
    kind: Divergence,
    scale: float = 1.0,
    cap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """kl and the gradient."""
    out = torch.empty_like(student)
    kl = op.BACKENDS[backend](student, teacher, coef, kind.value, scale, cap, out)
    return kl, out


def by_autograd(
    student: Tensor, teacher: Tensor, coef: Tensor, kind: Divergence, scale: float, cap: float
) -> tuple[Tensor, Tensor]:
    leaf = student.detach().requires_grad_()
    kl = op.divergence(leaf, teacher, kind.value, scale, cap)
    (coef * kl).sum().backward()
    assert leaf.grad is not None
    return kl.detach(), leaf.grad


@backends
@kinds
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab_size", "scale", "cap"), CASES.values(), ids=CASES.keys())
def test_divergence_and_gradient_are_as_exact_as_plain_torch(
    backend, kind, dtype, vocab_size, scale, cap, as_exact_as_torch
):
    student, teacher, coef = rows(vocab_size, dtype)
    kl, gradient = run(backend, student, teacher, coef, kind, scale, cap)
    exact = by_autograd(student.double(), teacher.double(), coef, kind, scale, cap)
    plain = by_autograd(student.float(), teacher.float(), coef, kind, scale, cap)
    as_exact_as_torch(kl, plain[0], exact[0])
    as_exact_as_torch(gradient, plain[1].to(dtype), exact[1])


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@kinds
@pytest.mark.parametrize("step", [1e-1, 1e-3])
def test_a_small_divergence_keeps_its_digits_and_is_never_negative(backend, kind, step):
    student, _, coef = rows(5000)
    teacher = student + step * torch.randn(3, 5000)
    kl, _ = run(backend, student, teacher, coef, kind)
    exact = op.divergence(student.double(), teacher.double(), kind.value, 1.0, 0.0)
    assert (kl > 0).all()
    torch.testing.assert_close(kl.double(), exact, rtol=1e-5, atol=0)


@backends
@kinds
@pytest.mark.parametrize(("scale", "cap"), TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_equal_rows_have_no_divergence_and_no_gradient_at_all(backend, kind, scale, cap):
    student, _, coef = rows(4097)
    kl, gradient = run(backend, student, student.clone(), coef, kind, scale, cap)
    assert (kl == 0).all()
    assert (gradient == 0).all()


@kinds
def test_the_definition_equals_torchs_kl_div(kind):
    student, teacher, _ = (x.double() for x in rows(50))
    s, t = student.log_softmax(-1), teacher.log_softmax(-1)
    m = torch.logaddexp(s, t) - math.log(2)

    def kl_div(of: Tensor, to: Tensor) -> Tensor:
        return functional.kl_div(to, of, log_target=True, reduction="none").sum(-1)

    expected = {
        Divergence.FORWARD: kl_div(t, s),
        Divergence.REVERSE: kl_div(s, t),
        Divergence.JENSEN_SHANNON: (kl_div(s, m) + kl_div(t, m)) / 2,
    }[kind]
    found = op.divergence(student, teacher, kind.value, 1.0, 0.0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "beta"),
    [(Divergence.FORWARD, 0), (Divergence.REVERSE, 1), (Divergence.JENSEN_SHANNON, 0.5)],
)
def test_it_equals_the_generalised_divergence_of_trl(kind, beta):
    trainer = pytest.importorskip("trl.experimental.gkd").GKDTrainer
    student, teacher, _ = rows(50)
    student.requires_grad_()
    theirs = trainer.generalized_jsd_loss(
        student[None], teacher[None], beta=beta, temperature=0.7, reduction="sum"
    )
    theirs.backward()
    kl, gradient = run("cpp", student.detach(), teacher, torch.ones(3), kind, 1 / 0.7)
    torch.testing.assert_close(kl.sum(), theirs.detach())
    torch.testing.assert_close(gradient, student.grad)


@backends
@kinds
def test_a_constant_added_to_a_row_changes_nothing(backend, kind):
    student, teacher, coef = rows(50)
    plain = run(backend, student, teacher, coef, kind)
    for moved in (
        run(backend, student + 100, teacher, coef, kind),
        run(backend, student, teacher - 100, coef, kind),
    ):
        torch.testing.assert_close(moved, plain, rtol=1e-4, atol=1e-5)


@backends
@kinds
@pytest.mark.parametrize("cap", [0.0, 20.0])
def test_the_gradient_may_overwrite_the_logits(backend, kind, cap):
    student, teacher, coef = rows(4097, torch.bfloat16)
    kl, gradient = run(backend, student, teacher, coef, kind, cap=cap)
    again = op.BACKENDS[backend](student, teacher, coef, kind.value, 1.0, cap, student)
    assert torch.equal(student, gradient)
    assert torch.equal(again, kl)


@backends
@kinds
def test_the_gradient_may_be_the_front_of_the_logits_in_a_narrower_dtype(backend, kind):
    student, teacher, coef = rows(4097)
    gradient = run(backend, student, teacher, coef, kind)[1]
    front = student.view(torch.bfloat16)[:, :4097]
    op.BACKENDS[backend](student, teacher, coef, kind.value, 1.0, 0.0, front)
    torch.testing.assert_close(front.float(), gradient, rtol=1e-2, atol=1e-7)


@backends
@kinds
def test_rows_may_lie_any_distance_apart_and_the_gradient_be_left_out(backend, kind):
    wide, teacher, coef = rows(60)
    student, teacher = wide[:, :50], teacher[:, 5:55]
    strided, gradient = run(backend, student, teacher, coef, kind)
    whole = run(backend, student.contiguous(), teacher.contiguous(), coef, kind)
    assert torch.equal(strided, whole[0])
    assert torch.equal(gradient, whole[1])
    alone = op.BACKENDS[backend](student, teacher, coef, kind.value, 1.0, 0.0, None)
    assert torch.equal(alone, strided)


@backends
@kinds
def test_a_row_without_a_coefficient_is_not_looked_at(backend, kind):
    student, teacher, _ = rows(4097)
    student[1], teacher[1] = torch.nan, INF
    kl, gradient = run(backend, student, teacher, torch.tensor([1.0, 0.0, -2.0]), kind)
    assert kl[1] == 0
    assert (gradient[1] == 0).all()
    assert (kl[[0, 2]] > 0).all()
    assert torch.isfinite(gradient).all()


@backends
@kinds
def test_a_nan_in_a_row_is_seen_and_stays_there(backend, kind):
    for which in range(2):
        student, teacher, coef = rows(4097)
        (student, teacher)[which][1, 1234] = torch.nan
        kl, _ = run(backend, student, teacher, coef, kind)
        assert torch.equal(kl.isnan(), torch.tensor([False, True, False]))


@backends
@kinds
def test_entries_impossible_in_both_rows_change_nothing(backend, kind):
    student, teacher, coef = rows(50)
    holes = torch.full((3, 5000), -INF)
    whole = run(backend, student, teacher, coef, kind)
    holed = (torch.cat([holes, x, holes], dim=1) for x in (student, teacher))
    kl, gradient = run(backend, *holed, coef, kind)
    torch.testing.assert_close(kl, whole[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient[:, 5000:5050], whole[1], rtol=1e-5, atol=1e-6)
    assert (gradient[:, :5000] == 0).all()
    assert (gradient[:, 5050:] == 0).all()


@backends
def test_an_entry_impossible_to_one_only_makes_the_divergence_from_that_one_infinite(backend):
    student, teacher, coef = rows(50)
    narrow = torch.where(torch.arange(50) == 7, -INF, student)

    kl, gradient = run(backend, narrow, teacher, coef, Divergence.FORWARD)
    expected = coef[:, None] * (narrow.softmax(-1) - teacher.softmax(-1))
    assert (kl == INF).all()
    torch.testing.assert_close(gradient, expected)
    assert (run(backend, teacher, narrow, coef, Divergence.REVERSE)[0] == INF).all()

    for kind, pair in (
        (Divergence.FORWARD, (teacher, narrow)),
        (Divergence.REVERSE, (narrow, teacher)),
        (Divergence.JENSEN_SHANNON, (narrow, teacher)),
        (Divergence.JENSEN_SHANNON, (teacher, narrow)),
    ):
        exact = by_autograd(*(x.double() for x in pair), coef.double(), kind, 1.0, 0.0)
        kl, gradient = run(backend, *pair, coef, kind)
        torch.testing.assert_close(kl, exact[0].float())
        torch.testing.assert_close(gradient, exact[1].float())


@backends
@kinds
def test_sure_rows_that_disagree_stay_finite(backend, kind):
    student, teacher = torch.zeros(2, 1, 9)
    student[0, 2], teacher[0, 5] = 300.0, 300.0
    kl, gradient = run(backend, student, teacher, torch.ones(1), kind)
    expected = math.log(2) if kind is Divergence.JENSEN_SHANNON else 300.0
    torch.testing.assert_close(kl, torch.tensor([expected]))
    assert torch.isfinite(gradient).all()


@backends
@kinds
def test_no_rows_are_fine(backend, kind):
    kl, gradient = run(backend, torch.zeros(0, 9), torch.zeros(0, 9), torch.zeros(0), kind)
    assert kl.shape == (0,)
    assert gradient.shape == (0, 9)


def test_the_number_of_threads_changes_no_bit():
    student, teacher = torch.randn(2, 9, 40_000)
    arguments = ("cpp", student, teacher, torch.ones(9), Divergence.REVERSE)
    one = run(*arguments)
    torch.set_num_threads(3)
    three = run(*arguments)
    assert torch.equal(one[0], three[0])
    assert torch.equal(one[1], three[1])


@kinds
def test_the_custom_op_keeps_torchs_rules(kind):
    student, teacher, coef = rows(50)
    arguments = (student, teacher, coef, kind.value, 0.7, 0.0)
    torch.library.opcheck(op.row_divergence, (*arguments, torch.empty_like(student)))
    torch.library.opcheck(op.row_divergence, (*arguments, None))
