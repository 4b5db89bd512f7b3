"""Which token is drawn, its log-probability, and that a row is drawn alone."""

import math

import pytest
import torch
from torch import Tensor

from rlvr_fast.ops.sample import reference, sample
from rlvr_fast.ops.transform import LogitTransform

PLAIN = LogitTransform()
TRANSFORMS = [PLAIN, LogitTransform(temperature=0.7), LogitTransform(softcap=5.0, logit_scale=1.5)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Blocks hold 1024 fp32 logits and 2048 narrower ones.
SIZES = [1, 2, 1023, 1024, 1025, 2049, 5000]


def logits_and_noise(rows: int, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (3 * torch.randn(rows, vocab_size)).to(dtype), torch.rand(rows, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "temperature", "softcap"])
@pytest.mark.parametrize("vocab_size", SIZES)
def test_the_token_is_where_the_cumulative_probability_reaches_the_mark(
    vocab_size, transform, dtype
):
    logits, noise = logits_and_noise(200, vocab_size, dtype)

    tokens, logp = sample(logits, noise, transform)

    wanted, wanted_logp = reference(logits.double(), noise, transform)
    ends = _z(logits, transform).softmax(-1).cumsum(-1)
    ends = ends / ends[:, -1:]
    away = (ends - (1 - noise)[:, None]).abs().amin(-1) > 1e-6
    assert away.double().mean() > (0.95 if vocab_size > 1 else -1)
    assert torch.equal(tokens[away], wanted[away])
    torch.testing.assert_close(logp[away].double(), wanted_logp[away], rtol=3e-7, atol=1e-6)


def _z(logits: Tensor, transform: LogitTransform) -> Tensor:
    z = logits.double() * transform.scale
    return transform.cap * torch.tanh(z / transform.cap) if transform.cap else z


def test_frequencies_are_the_probabilities():
    count, row = 40000, 2 * torch.randn(3000)
    tokens, _ = sample(row.expand(count, -1), torch.rand(count, dtype=torch.float64), PLAIN)
    seen = torch.bincount(tokens, minlength=3000)

    wanted = count * row.double().softmax(-1)

    often = wanted >= 5
    freedom = int(often.sum())
    assert freedom > 500
    assert ((seen - wanted) ** 2 / wanted)[often].sum() < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("place", [0, 1023, 1024, 4000, 4999])
def test_greedy_takes_the_first_of_equal_maxima(place):
    logits = torch.randn(3, 5000)
    logits[:, place], logits[:, 4999] = 9.0, 9.0
    tokens, logp = sample(logits, None, PLAIN)
    assert tokens.tolist() == [place] * 3
    wanted = logits.double().log_softmax(-1)[:, place]
    torch.testing.assert_close(logp.double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("noise", [0.0, 1e-12, 0.3, 0.5, 1 - 2**-53])
def test_a_token_without_mass_is_never_drawn(noise):
    logits = torch.full((4, 5000), -torch.inf)
    for row, allowed in enumerate([[0], [4999], [1024, 3000], [2047, 2048]]):
        logits[row, allowed] = 1.0
    tokens, logp = sample(logits, torch.full((4,), noise, dtype=torch.float64), PLAIN)
    assert logits.gather(1, tokens[:, None]).isfinite().all()
    wanted = torch.tensor([1.0, 1.0, 0.5, 0.5]).log()
    torch.testing.assert_close(logp, wanted, rtol=0, atol=1e-6)


def test_a_mark_that_rounding_puts_past_the_last_mass_draws_the_last_token_with_mass():
    logits = torch.randn(200, 5000)
    logits[:, 700:] = -torch.inf
    tokens, _ = sample(logits, torch.zeros(200, dtype=torch.float64), PLAIN)
    assert tokens.max() == 699
    assert tokens.min() > 600


def test_the_ends_of_the_noise_give_the_ends_of_the_vocabulary():
    tokens, _ = sample(torch.zeros(2, 5000), torch.tensor([0.0, 1 - 2**-53]).double(), PLAIN)
    assert tokens.tolist() == [4999, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 1500, 4999])
@pytest.mark.parametrize("greedy", [True, False])
def test_a_row_without_a_distribution_has_no_finite_logp(bad, place, greedy):
    logits, noise = logits_and_noise(2, 5000, torch.float32)
    logits[1, place] = bad
    tokens, logp = sample(logits, None if greedy else noise, PLAIN)
    assert logp.isfinite().tolist() == [True, False]
    assert ((tokens >= 0) & (tokens < 5000)).all()


def test_a_row_of_impossible_tokens_has_no_finite_logp():
    _, logp = sample(torch.full((1, 5000), -torch.inf), torch.tensor([0.4]).double(), PLAIN)
    assert not logp.isfinite().any()


def test_a_row_alone_and_any_count_of_threads_draw_the_same(monkeypatch):
    logits, noise = logits_and_noise(64, 5000, torch.float32)
    tokens, logp = sample(logits, noise, PLAIN)
    for t in (0, 17, 63):
        one = sample(logits[t : t + 1], noise[t : t + 1], PLAIN)
        assert (one[0][0], one[1][0]) == (tokens[t], logp[t])
    monkeypatch.setattr("rlvr_fast.ops.sample.threads", lambda _: 3)
    again = sample(logits, noise, PLAIN)
    assert torch.equal(again[0], tokens)
    assert torch.equal(again[1], logp)


def test_rows_may_lie_apart():
    logits, noise = logits_and_noise(6, 3000, torch.bfloat16)
    apart = torch.full((12, 3001), torch.nan, dtype=torch.bfloat16)
    apart[::2, :3000] = logits
    found, wanted = sample(apart[::2, :3000], noise, PLAIN), sample(logits, noise, PLAIN)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


def test_no_rows_are_no_work():
    tokens, logp = sample(torch.empty(0, 50), torch.empty(0, dtype=torch.float64), PLAIN)
    assert tokens.shape == logp.shape == (0,)
