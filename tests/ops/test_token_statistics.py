"""`token_statistics`, `linear_statistics` and their row primitives over all backends."""

import math

import pytest
import torch
from torch import Tensor

from rlvr_fast.ops import row_statistics as op
from rlvr_fast.ops.token_statistics import TokenStatistics, linear_statistics, token_statistics

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRANSFORMS = {"plain": (1.0, 0.0), "temperature": (1 / 0.6, 0.0), "softcap": (0.5 / 1.3, 20 / 1.3)}
DIFFERENTIABLE = {
    "logp": 0, "entropy": 1, "mean_logit": 4, "logsumexp": 5, "sum_squared_prob": 6,
    "kept_mass": 7,
}  # fmt: skip
PUBLIC = [*DIFFERENTIABLE.values(), 8]
backends = pytest.mark.parametrize("backend", op.BACKENDS)
differentiable = pytest.mark.parametrize("which", DIFFERENTIABLE)


def rows(vocab_size: int, dtype: torch.dtype, num_tokens: int = 3) -> tuple[Tensor, Tensor]:
    targets = torch.randint(0, vocab_size, (num_tokens,))
    return (torch.randn(num_tokens, vocab_size) * 3).to(dtype), targets


def gradient_of(which: str) -> Tensor:
    grads = torch.zeros(op.NUM_STATS, 3)
    grads[DIFFERENTIABLE[which]] = torch.randn(3)
    return grads


def gradient_truth(
    logits: Tensor, targets: Tensor, grads: Tensor, scale: float, cap: float, min_p: float
) -> Tensor:
    leaf = logits.double().requires_grad_()
    stats, _ = op.reference(leaf, targets, scale, cap, min_p)
    (stats * grads).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@backends
@pytest.mark.parametrize("vocab_size", [1, 7, 2049, 4097, 151_665])
@pytest.mark.parametrize("min_p", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("scale", "cap"), TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_statistics_are_as_exact_as_plain_torch(
    backend, vocab_size, min_p, scale, cap, as_exact_as_torch
):
    logits, targets = rows(vocab_size, torch.bfloat16)
    truth, truth_id = op.reference(logits.double(), targets, scale, cap, min_p)
    plain, _ = op.reference(logits.float(), targets, scale, cap, min_p)
    stats, top_id = op.BACKENDS[backend](logits, targets, scale, cap, min_p)
    assert torch.equal(top_id, truth_id)
    for i in PUBLIC:
        as_exact_as_torch(stats[i], plain[i], truth[i])


@backends
@differentiable
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "cap"), TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_every_gradient_is_as_exact_as_plain_torch(
    backend, which, dtype, scale, cap, as_exact_as_torch
):
    logits, targets = rows(4097, dtype)
    settings, grads = (scale, cap, 0.1), gradient_of(which)
    found = op.BACKENDS[backend](logits, targets, *settings)
    out = torch.empty_like(logits)
    op.GRAD_BACKENDS[backend](logits, targets, *found, grads, *settings, out)
    exact = gradient_truth(logits, targets, grads, *settings)
    leaf = logits.float().requires_grad_()
    (op.reference(leaf, targets, *settings)[0] * grads).sum().backward()
    as_exact_as_torch(out, leaf.grad.to(dtype), exact)


@backends
@pytest.mark.parametrize("vocab_size", [1, 2049, 151_665])
@pytest.mark.parametrize("min_p", [0.0, 1.0])
def test_all_gradients_together_for_every_vocabulary(backend, vocab_size, min_p, as_exact_as_torch):
    logits, targets = rows(vocab_size, torch.float32)
    grads = sum(gradient_of(which) for which in DIFFERENTIABLE)
    found = op.BACKENDS[backend](logits, targets, 1.0, 0.0, min_p)
    out = torch.empty_like(logits)
    op.GRAD_BACKENDS[backend](logits, targets, *found, grads, 1.0, 0.0, min_p, out)
    exact = gradient_truth(logits, targets, grads, 1.0, 0.0, min_p)
    as_exact_as_torch(out, exact.float(), exact)


@backends
def test_the_gradient_may_overwrite_the_logits_also_in_a_narrower_dtype(backend):
    logits, targets = rows(4100, torch.float32)
    grads = sum(gradient_of(which) for which in DIFFERENTIABLE)
    found = op.reference(logits, targets, 1.0, 0.0, 0.1)
    outs = [torch.empty_like(logits), torch.empty_like(logits, dtype=torch.bfloat16)]
    copies = [logits.clone(), logits.clone()]
    in_place = [copies[0], copies[1].view(torch.bfloat16)[:, :4100]]
    for separate, given, out in zip(outs, copies, in_place, strict=True):
        arguments = (targets, *found, grads, 1.0, 0.0, 0.1)
        op.GRAD_BACKENDS[backend](logits, *arguments, separate)
        op.GRAD_BACKENDS[backend](given, *arguments, out)
        assert torch.equal(out, separate)


@backends
def test_the_first_four_are_those_of_logprobs(backend):
    from rlvr_fast.ops import logprobs

    logits, targets = rows(4097, torch.float32)
    stats, _ = op.BACKENDS[backend](logits, targets, 0.7, 0.0, 0.0)
    few = logprobs.BACKENDS[backend](logits, targets, 0.7, 0.0)
    torch.testing.assert_close(stats[:4], few, rtol=1e-6, atol=1e-6)


@backends
def test_of_several_greatest_logits_the_lowest_id_is_reported(backend):
    logits = torch.zeros(3, 9000)
    logits[0, [17, 18, 8999]] = 2.0
    logits[1, [4095, 4096, 8192]] = 2.0
    _, top_id = op.BACKENDS[backend](logits, torch.tensor([17, 18, 5]), 1.3, 0.0, 0.0)
    assert top_id.tolist() == [17, 4095, 0]


@backends
@pytest.mark.parametrize("scale", [1.0, 1 / 0.6, 0.7])
def test_min_p_of_one_keeps_all_of_the_greatest(backend, scale):
    logits = torch.randn(2, 5000)
    logits[:, [3, 2500, 4999]] = 7.3
    stats, top_id = op.BACKENDS[backend](logits, torch.tensor([0, 3]), scale, 0.0, 1.0)
    torch.testing.assert_close(stats[7], 3 * stats[8], rtol=1e-6, atol=0)
    grads = torch.zeros(op.NUM_STATS, 2)
    grads[7] = 1.0
    out = torch.empty_like(logits)
    op.GRAD_BACKENDS[backend](
        logits, torch.tensor([0, 3]), stats, top_id, grads, scale, 0.0, 1.0, out
    )
    assert ((out > 0) == (logits == 7.3)).all()


@backends
def test_a_token_exactly_at_the_bound_is_kept(backend):
    logits = torch.tensor([[0.0, math.log(0.25), -2.0, math.log(0.5)]])
    targets = torch.tensor([0])
    total = logits.double().exp().sum()
    for min_p, expected in ((0.5, 1.5), (0.51, 1.0), (0.25, 1.75), (0.2, 1.75), (0.1, total)):
        stats, _ = op.BACKENDS[backend](logits, targets, 1.0, 0.0, min_p)
        assert stats[7].item() == pytest.approx(float(expected / total), rel=1e-6)


@backends
def test_without_min_p_all_is_kept_and_nothing_depends_on_it(backend):
    logits, targets = rows(2049, torch.float32)
    stats, top_id = op.BACKENDS[backend](logits, targets, 1.0, 0.0, 0.0)
    assert (stats[7] == 1).all()
    out = torch.empty_like(logits)
    op.GRAD_BACKENDS[backend](
        logits, targets, stats, top_id, gradient_of("kept_mass"), 1.0, 0.0, 0.0, out
    )
    assert (out == 0).all()


@backends
def test_impossible_tokens_spoil_only_the_mean(backend):
    logits, targets = rows(5000, torch.float32)
    holes = torch.full((3, 5000), -torch.inf)
    holed = torch.cat([holes, logits], dim=1)
    whole, whole_id = op.BACKENDS[backend](logits, targets, 1.0, 0.0, 0.1)
    stats, top_id = op.BACKENDS[backend](holed, targets + 5000, 1.0, 0.0, 0.1)
    assert torch.equal(top_id, whole_id + 5000)
    assert (stats[4] == -torch.inf).all()
    others = [i for i in PUBLIC if i != 4]
    torch.testing.assert_close(stats[others], whole[others], rtol=1e-6, atol=1e-6)


@backends
def test_no_rows_are_fine(backend):
    none = torch.zeros(0, dtype=torch.int64)
    stats, top_id = op.BACKENDS[backend](torch.zeros(0, 9), none, 1.0, 0.0, 0.1)
    assert stats.shape == (op.NUM_STATS, 0)
    assert top_id.shape == (0,)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("min_p", [0.0, 0.1])
@differentiable
def test_each_output_passes_gradcheck(which, min_p, softcap):
    logits, targets = rows(11, torch.float64, num_tokens=4)

    def output(x: Tensor) -> Tensor:
        out = token_statistics(x, targets, min_p=min_p, temperature=0.7, softcap=softcap)
        return 3 * getattr(out, which)

    assert torch.autograd.gradcheck(output, logits.requires_grad_())


@differentiable
@pytest.mark.parametrize("rows_per_tile", [100, 2])
def test_each_output_of_the_head_passes_gradcheck(which, rows_per_tile):
    hidden, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((5, 3), (7, 3), (7,)))
    targets = torch.randint(0, 7, (5,))

    def output(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        out = linear_statistics(
            h, w, targets, bias=b, min_p=0.1, softcap=9.0, logits_budget=rows_per_tile * 7 * 8
        )
        return 3 * getattr(out, which)

    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(output, inputs)


def test_the_head_gives_what_its_logits_give():
    hidden, weight = torch.randn(13, 8), torch.randn(33, 8)
    targets = torch.randint(0, 33, (13,))
    tiled = linear_statistics(hidden, weight, targets, min_p=0.2, logits_budget=5 * 33 * 4)
    whole = token_statistics(hidden @ weight.t(), targets, min_p=0.2)
    torch.testing.assert_close(tiled, whole)


def test_the_head_gives_bf16_gradients_of_fp32_logits(as_exact_as_torch):
    hidden, weight = torch.randn(13, 8).bfloat16(), torch.randn(33, 8).bfloat16()
    targets = torch.randint(0, 33, (13,))
    narrow, plain, wide = (
        hidden.to(dtype, copy=True).requires_grad_()
        for dtype in (torch.bfloat16, torch.bfloat16, torch.float64)
    )
    outs = (
        linear_statistics(narrow, weight, targets, logits_dtype=torch.float32),
        token_statistics((plain @ weight.t()).float(), targets),
        token_statistics(wide @ weight.double().t(), targets),
    )
    for out in outs:
        (out.sum_squared_prob + out.mean_logit).sum().backward()
    as_exact_as_torch(narrow.grad, plain.grad, wide.grad)


def test_no_tokens_give_no_values_and_zero_gradients():
    hidden, weight = torch.zeros(0, 8), torch.randn(33, 8, requires_grad=True)
    out = linear_statistics(hidden, weight, torch.zeros(0, dtype=torch.int64), min_p=0.1)
    sum(getattr(out, which).sum() for which in DIFFERENTIABLE).backward()
    assert all(x.shape == (0,) for x in out)
    assert (weight.grad == 0).all()


def test_the_greatest_probability_and_its_token_have_no_gradient():
    logits, targets = rows(50, torch.float32)
    out = token_statistics(logits.requires_grad_(), targets)
    assert out.entropy.requires_grad
    assert not out.max_prob.requires_grad
    assert not out.top_id.requires_grad
    assert isinstance(out, TokenStatistics)


def test_it_equals_what_one_would_write_in_torch():
    logits, targets = rows(50, torch.float32)
    out = token_statistics(logits, targets, temperature=0.6)
    log_p = (logits / 0.6).log_softmax(-1)
    torch.testing.assert_close(out.logp, log_p.gather(-1, targets[:, None]).squeeze(-1))
    torch.testing.assert_close(out.mean_logit, (logits / 0.6).mean(-1))
    torch.testing.assert_close(out.logsumexp, (logits / 0.6).logsumexp(-1))
    torch.testing.assert_close(out.sum_squared_prob, log_p.exp().square().sum(-1))
    torch.testing.assert_close(out.max_prob, log_p.exp().amax(-1))
    assert torch.equal(out.top_id, logits.argmax(-1))


def test_the_custom_ops_keep_torchs_rules():
    logits, targets = rows(50, torch.float32)
    torch.library.opcheck(op.row_statistics, (logits.requires_grad_(), targets, 0.7, 0.0, 0.1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_p": -0.1}, r"min_p: wanted a number in \[0, 1\], got -0.1"),
        ({"min_p": 1.1}, r"min_p: wanted a number in \[0, 1\], got 1.1"),
        ({"min_p": math.nan}, r"min_p: wanted a number in \[0, 1\], got nan"),
        ({"targets": torch.tensor([0, 8, 1])}, r"wanted ids in \[0, 8\), got 0 to 8"),
        ({"temperature": 0.0}, "temperature: wanted positive and finite"),
    ],
)
def test_bad_input_is_told_what_was_wanted(change, message):
    targets = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        token_statistics(**{"logits": torch.zeros(3, 8), "targets": targets} | change)
    with pytest.raises(ValueError, match=message):
        linear_statistics(
            **{"hidden": torch.zeros(3, 2), "weight": torch.zeros(8, 2), "targets": targets}
            | change
        )


def test_logits_must_be_rows_of_floats():
    targets = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"wanted floating point \[T, V\]"):
        token_statistics(torch.zeros(3), targets)
    with pytest.raises(ValueError, match="wanted contiguous rows"):
        token_statistics(torch.zeros(4, 3).t(), targets)
