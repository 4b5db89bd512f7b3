"""Exactness, remainders of every size, strides, and the bits of a row."""

import pytest
import torch
from torch import Tensor

from rlvr_fast.ops.wide_linear import supported, wide_linear

pytestmark = pytest.mark.skipif(not supported(), reason="needs a processor with AVX512-BF16")


def operands(num_tokens: int, hidden_size: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    hidden, weight = torch.randn(num_tokens, hidden_size), torch.randn(vocab_size, hidden_size)
    return hidden.bfloat16(), weight.bfloat16()


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, threads: int = 1) -> Tensor:
    out = torch.empty(len(hidden), len(weight))
    wide_linear(hidden, weight, bias, out, threads)
    return out


@pytest.mark.parametrize("hidden_size", [1, 2, 3, 31, 321, 576, 1537])
def test_logits_are_as_exact_as_those_of_an_fp32_gemm(hidden_size, as_exact_as_torch):
    hidden, weight = operands(64, hidden_size, 151)
    truth = hidden.double() @ weight.double().t()
    as_exact_as_torch(logits(hidden, weight), hidden.float() @ weight.float().t(), truth)


@pytest.mark.parametrize("hidden_size", [1, 2, 3, 31, 576, 1537])
def test_any_count_of_rows_will_do(hidden_size, as_exact_as_torch):
    hidden, weight = operands(13, hidden_size, 151)
    truth, plain = hidden.double() @ weight.double().t(), hidden.float() @ weight.float().t()
    for t in range(1, 14):
        as_exact_as_torch(logits(hidden[:t], weight), plain[:t], truth[:t])


@pytest.mark.parametrize("hidden_size", [1, 2, 3, 31, 576, 1537])
def test_any_vocabulary_will_do(hidden_size, as_exact_as_torch):
    hidden, weight = operands(7, hidden_size, 151)
    truth, plain = hidden.double() @ weight.double().t(), hidden.float() @ weight.float().t()
    for v in (*range(1, 71), 151):
        as_exact_as_torch(logits(hidden, weight[:v]), plain[:, :v], truth[:, :v])


@pytest.mark.parametrize("hidden_size", [31, 576, 1537])
def test_a_bias_is_added_once(hidden_size, as_exact_as_torch):
    hidden, weight = operands(7, hidden_size, 151)
    bias = torch.randn(151)
    plain = torch.addmm(bias, hidden.float(), weight.float().t())
    truth = torch.addmm(bias.double(), hidden.double(), weight.double().t())
    as_exact_as_torch(logits(hidden, weight, bias), plain, truth)


@pytest.mark.parametrize("hidden_size", [31, 576, 1537])
def test_rows_may_lie_apart_and_nothing_between_them_counts(hidden_size):
    hidden, weight = operands(7, hidden_size, 151)
    apart_hidden = torch.full((14, hidden_size + 5), torch.nan, dtype=torch.bfloat16)
    apart_weight = torch.full((302, hidden_size + 3), torch.nan, dtype=torch.bfloat16)
    apart_hidden[::2, :hidden_size], apart_weight[::2, :hidden_size] = hidden, weight
    found = logits(apart_hidden[::2, :hidden_size], apart_weight[::2, :hidden_size])
    assert torch.equal(found, logits(hidden, weight))


@pytest.mark.parametrize("vocab_size", [1, 16, 64, 70, 151])
@pytest.mark.parametrize("num_tokens", [1, 6, 13])
def test_nothing_outside_of_out_is_written(num_tokens, vocab_size):
    hidden, weight = operands(num_tokens, 576, vocab_size)
    around = torch.full((num_tokens + 2, vocab_size + 70), 7.0)
    inside = (slice(1, -1), slice(3, 3 + vocab_size))
    wide_linear(hidden, weight, None, around[inside], 1)
    assert torch.equal(around[inside], logits(hidden, weight))
    around[inside] = 7.0
    assert torch.equal(around, torch.full_like(around, 7.0))


@pytest.mark.parametrize("hidden_size", [3, 576, 1537])
def test_a_row_has_the_same_bits_in_any_batch_and_place_and_on_any_threads(hidden_size):
    hidden, weight = operands(40, hidden_size, 151)
    bias = torch.randn(151)
    everything = logits(hidden, weight, bias)
    for t in range(1, 14):
        assert torch.equal(logits(hidden[5 : 5 + t], weight, bias), everything[5 : 5 + t])
    for v in (1, 17, 63, 100):
        assert torch.equal(logits(hidden, weight[v:], bias[v:]), everything[:, v:])
    for threads in (2, 3, 5):
        assert torch.equal(logits(hidden, weight, bias, threads), everything)


def test_small_whole_numbers_come_out_exactly():
    hidden, weight = torch.randint(-8, 9, (13, 801)), torch.randint(-8, 9, (151, 801))
    found = logits(hidden.bfloat16(), weight.bfloat16())
    assert torch.equal(found, (hidden @ weight.t()).float())


def test_infinities_and_nan_stay_in_their_rows_and_columns():
    hidden, weight = operands(7, 31, 70)
    hidden[2, 30], weight[65, 3] = torch.inf, torch.nan
    found = logits(hidden, weight)
    assert torch.equal(found.isnan(), (torch.arange(70) == 65).expand(7, 70))
    assert found[2].isinf().sum() == 69
    assert found.isinf().sum() == 69


def test_no_rows_are_no_work():
    hidden, weight = operands(0, 576, 151)
    assert logits(hidden, weight).shape == (0, 151)
