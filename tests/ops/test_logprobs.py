"""`logprobs` and its two row primitives over all backends, against fp64."""

import pytest
import torch
from torch import Tensor

from rlvr_fast.ops import logprobs as op

# One past a block of every backend; SmolLM2's; Qwen's without padding; smaller than any block.
VOCABULARIES = {"one past a block": 2049, "unpadded Qwen": 151_665, "tiny": 7}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRANSFORMS = {"plain": (1.0, 0.0), "temperature": (1 / 0.6, 0.0), "softcap": (0.5 / 1.3, 20 / 1.3)}
backends = pytest.mark.parametrize("backend", op.BACKENDS)


def rows(vocab_size: int, dtype: torch.dtype, num_tokens: int = 3) -> tuple[Tensor, Tensor]:
    targets = torch.randint(0, vocab_size, (num_tokens,))
    return (torch.randn(num_tokens, vocab_size) * 3).to(dtype), targets


def gradient_truth(
    logits: Tensor, targets: Tensor, dlogp: Tensor, dentropy: Tensor, scale: float, cap: float
) -> Tensor:
    leaf = logits.double().requires_grad_()
    stats = op.reference(leaf, targets, scale, cap)
    (stats[0] * dlogp + stats[1] * dentropy).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@backends
@pytest.mark.parametrize("vocab_size", VOCABULARIES.values(), ids=VOCABULARIES.keys())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "cap"), TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_statistics_and_gradient_are_as_exact_as_plain_torch(
    backend, vocab_size, dtype, scale, cap, as_exact_as_torch
):
    logits, targets = rows(vocab_size, dtype)
    truth = op.reference(logits.double(), targets, scale, cap)
    plain = op.reference(logits.float(), targets, scale, cap)
    stats = op.BACKENDS[backend](logits, targets, scale, cap)
    for ours, torchs, exact in zip(stats, plain, truth, strict=True):
        as_exact_as_torch(ours, torchs, exact)

    dlogp, dentropy = torch.randn(3), torch.randn(3)
    out = torch.empty_like(logits)
    op.GRAD_BACKENDS[backend](logits, targets, stats, dlogp, dentropy, scale, cap, out)
    exact = gradient_truth(logits, targets, dlogp, dentropy, scale, cap)
    as_exact_as_torch(out, exact.to(dtype), exact)


@backends
def test_the_gradient_may_overwrite_the_logits(backend):
    logits, targets = rows(2049, torch.bfloat16)
    stats = op.reference(logits, targets, 1.0, 0.0)
    separate = torch.empty_like(logits)
    arguments = (targets, stats, torch.randn(3), None, 1.0, 0.0)
    op.GRAD_BACKENDS[backend](logits, *arguments, separate)
    op.GRAD_BACKENDS[backend](logits, *arguments, logits)
    assert torch.equal(logits, separate)


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cap", [0.0, 20.0])
def test_the_gradient_of_fp32_logits_may_be_narrower(backend, dtype, cap):
    logits, targets = rows(4100, torch.float32)
    stats = op.reference(logits, targets, 0.7, cap)
    wide, narrow = torch.empty_like(logits), torch.empty_like(logits, dtype=dtype)
    dlogp, dentropy = torch.tensor([0.5, 0.0, -2.0]), torch.tensor([0.1, 0.0, 0.3])
    arguments = (targets, stats, dlogp, dentropy, 0.7, cap)
    op.GRAD_BACKENDS[backend](logits, *arguments, wide)
    op.GRAD_BACKENDS[backend](logits, *arguments, narrow)
    # Triton's interpreter cuts where a GPU rounds.
    torch.testing.assert_close(narrow, wide.to(dtype), rtol=1e-2, atol=1e-7)
    front = logits.view(dtype)[:, :4100]
    op.GRAD_BACKENDS[backend](logits, *arguments, front)
    assert torch.equal(front, narrow)


@backends
def test_rows_may_lie_any_distance_apart(backend):
    wide, targets = rows(2056, torch.float32)
    logits = wide[:, :2049]
    targets = targets.clamp(max=2048)
    strided = op.BACKENDS[backend](logits, targets, 1.0, 0.0)
    assert torch.equal(strided, op.BACKENDS[backend](logits.contiguous(), targets, 1.0, 0.0))


@backends
def test_targets_may_be_every_other_entry_of_a_tensor(backend):
    logits, targets = rows(50, torch.float32)
    strided = torch.stack([targets, torch.zeros_like(targets)], 1)[:, 0]
    stats = op.BACKENDS[backend](logits, targets, 1.0, 0.0)
    assert torch.equal(op.BACKENDS[backend](logits, strided, 1.0, 0.0), stats)
    found = [torch.empty_like(logits) for _ in range(2)]
    for ids, out in zip((targets, strided), found, strict=True):
        op.GRAD_BACKENDS[backend](logits, ids, stats, torch.ones(3), None, 1.0, 0.0, out)
    assert torch.equal(*found)


@backends
@pytest.mark.parametrize("level", [0.0, 1e4, -1e4])
def test_equal_logits_give_the_uniform_distribution(backend, level):
    logits, targets = torch.full((2, 1000), level), torch.tensor([0, 999])
    logp, entropy, _, _ = op.BACKENDS[backend](logits, targets, 1.0, 0.0)
    log_v = torch.tensor(1000.0).log().expand(2)
    torch.testing.assert_close(logp, -log_v, rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy, log_v, rtol=1e-6, atol=0)


@backends
def test_logp_is_never_above_zero_and_keeps_its_last_digits(backend):
    margins = torch.tensor([0.0, 5.0, 12.0, 17.0, 25.0, 60.0, 200.0])
    logits = torch.zeros(7, 5)
    logits[:, 2] = margins
    stats = op.BACKENDS[backend](logits, torch.full((7,), 2), 1.0, 0.0)
    expected = -torch.log1p(4 * torch.exp(-margins.double()))
    assert (stats[0] <= 0).all()
    assert (stats[1] >= 0).all()
    torch.testing.assert_close(stats[0].double(), expected, rtol=1e-5, atol=1e-37)


@backends
def test_a_sure_token_keeps_its_gradient(backend):
    logits = torch.zeros(1, 5)
    logits[0, 2] = 17.0
    targets = torch.tensor([2])
    stats = op.BACKENDS[backend](logits, targets, 1.0, 0.0)
    out = torch.empty_like(logits)
    op.GRAD_BACKENDS[backend](logits, targets, stats, torch.ones(1), None, 1.0, 0.0, out)
    expected = gradient_truth(logits, targets, torch.ones(1), torch.zeros(1), 1.0, 0.0)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=0)


@backends
@pytest.mark.parametrize("impossible", [-torch.inf, torch.finfo(torch.float32).min])
def test_impossible_tokens_cost_nothing_and_spoil_nothing(backend, impossible):
    logits, targets = rows(50, torch.float32)
    targets = torch.tensor([0, 7, 49])
    holes = torch.full((3, 5000), impossible)
    holed = torch.cat([holes, logits, holes], dim=1)
    whole = op.BACKENDS[backend](logits, targets, 1.0, 0.0)
    targets = targets + 5000
    stats = op.BACKENDS[backend](holed, targets, 1.0, 0.0)
    torch.testing.assert_close(stats, whole, rtol=1e-6, atol=1e-6)
    out = torch.empty_like(holed)
    op.GRAD_BACKENDS[backend](holed, targets, stats, torch.ones(3), torch.ones(3), 1.0, 0.0, out)
    assert (out[:, :5000] == 0).all()
    assert (out[:, 5050:] == 0).all()
    assert torch.isfinite(out).all()


@backends
def test_a_row_without_coefficients_gets_a_gradient_of_zeros(backend):
    logits, targets = rows(2049, torch.float32)
    stats = op.reference(logits, targets, 1.0, 0.0)
    out = torch.empty_like(logits)
    dlogp = torch.tensor([1.0, 0.0, 1.0])
    op.GRAD_BACKENDS[backend](logits, targets, stats, dlogp, torch.zeros(3), 1.0, 0.0, out)
    assert (out[1] == 0).all()
    assert (out[0] != 0).any()


@backends
def test_no_rows_are_fine(backend):
    stats = op.BACKENDS[backend](torch.zeros(0, 9), torch.zeros(0, dtype=torch.int64), 1.0, 0.0)
    assert stats.shape == (4, 0)


@backends
def test_a_nan_in_a_row_is_seen_and_stays_there(backend):
    logits, targets = rows(2049, torch.float32)
    logits[1, 1234] = torch.nan
    logp, entropy, _, _ = op.BACKENDS[backend](logits, targets, 1.0, 0.0)
    assert torch.equal(logp.isnan(), torch.tensor([False, True, False]))
    assert torch.equal(entropy.isnan(), torch.tensor([False, True, False]))


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("which", ["logp", "entropy"])
def test_each_output_passes_gradcheck(temperature, softcap, which):
    logits, targets = rows(11, torch.float64, num_tokens=4)
    logits.requires_grad_()

    def output(x: Tensor) -> Tensor:
        out = op.logprobs(x, targets, temperature=temperature, softcap=softcap, logit_scale=0.7)
        return 3 * getattr(out, which)

    assert torch.autograd.gradcheck(output, logits)


def test_the_number_of_threads_changes_no_bit():
    logits, targets = rows(40_000, torch.bfloat16, num_tokens=9)
    assert op.threads(logits) == torch.get_num_threads() == 1
    one = op.cpp(logits, targets, 1.0, 0.0)
    torch.set_num_threads(3)
    assert op.threads(logits) == 3
    assert torch.equal(one, op.cpp(logits, targets, 1.0, 0.0))


def test_it_equals_log_softmax_of_the_scaled_logits():
    logits, targets = rows(50, torch.float32)
    out = op.logprobs(logits, targets, temperature=0.6)
    expected = (logits / 0.6).log_softmax(-1)
    torch.testing.assert_close(out.logp, expected.gather(-1, targets[:, None]).squeeze(-1))
    torch.testing.assert_close(out.entropy, -(expected.exp() * expected).sum(-1))


def test_a_constant_added_to_a_row_changes_nothing():
    logits, targets = rows(50, torch.float32)
    shifted, plain = (op.logprobs(x, targets).logp for x in (logits + 100, logits))
    torch.testing.assert_close(shifted, plain, rtol=0, atol=1e-4)


def test_the_custom_ops_keep_torchs_rules():
    logits, targets = rows(50, torch.float32)
    torch.library.opcheck(op.row_stats, (logits.requires_grad_(), targets, 0.7, 0.0))


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), r"wanted floating point \[T, V\]"),
        (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), "wanted float"),
        (torch.zeros(4, 3).t(), torch.zeros(3, dtype=torch.int64), "wanted contiguous rows"),
        (torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64), r"wanted int64 \[3\]"),
        (torch.zeros(3, 4), torch.zeros(3), r"wanted int64 \[3\]"),
        (torch.zeros(3, 4), torch.tensor([0, 4, 1]), r"wanted ids in \[0, 4\), got 0 to 4"),
        (torch.zeros(3, 4), torch.tensor([0, -100, 1]), r"got -100 to 1"),
    ],
)
def test_bad_input_is_told_what_was_wanted(logits, targets, message):
    with pytest.raises(ValueError, match=message):
        op.logprobs(logits, targets)


@pytest.mark.parametrize("name", ["temperature", "softcap", "logit_scale"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_settings_must_be_positive_and_finite(name, value):
    with pytest.raises(ValueError, match=f"{name}: wanted positive and finite"):
        op.logprobs(torch.zeros(1, 4), torch.tensor([0]), **{name: value})
