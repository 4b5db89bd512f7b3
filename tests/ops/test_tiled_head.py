"""Tiles, the bits of a row, and gradients that go straight where they are wanted."""

import pytest
import torch
from torch import Tensor

from rlvr_fast import objectives
from rlvr_fast.ops import wide_linear
from rlvr_fast.ops.linear_logprobs import linear_logprobs
from rlvr_fast.ops.policy_loss import policy_loss
from rlvr_fast.ops.tiled_head import TiledHead, Wanted, head_settings
from rlvr_fast.ops.tiles import whole_waves
from rlvr_fast.scored import ScoredTokens

HIDDEN, VOCAB = 24, 99
OBJECTIVE = objectives.ClippedSurrogate() + objectives.EntropyBonus(coef=0.1)


def head(num_tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    hidden, weight = torch.randn(num_tokens, HIDDEN), torch.randn(VOCAB, HIDDEN)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def tokens(num_tokens: int) -> ScoredTokens:
    return ScoredTokens(
        targets=torch.randint(0, VOCAB, (num_tokens,)),
        weight=torch.rand(num_tokens),
        advantage=torch.randn(num_tokens),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_whatever_the_batch_and_the_tiles(dtype):
    hidden, weight = head(600, dtype)
    given = tokens(600)

    def rows(index: Tensor, budget: int | None = None) -> Tensor:
        out = policy_loss(
            hidden.detach()[index], weight, given.select(index), OBJECTIVE,
            batch_invariant=True, logits_budget=budget,
        )  # fmt: skip
        return torch.stack([out.logp, out.entropy])

    everything = rows(torch.arange(600))
    for some in (torch.tensor([7]), torch.arange(3, 600, 7), torch.arange(258)):
        assert torch.equal(rows(some), everything[:, some])
    for tile in (1, 50, 300):
        assert torch.equal(rows(torch.arange(600), tile * VOCAB * dtype.itemsize), everything)


def test_both_ops_give_a_row_the_same_bits():
    hidden, weight = head(300, torch.bfloat16)
    given = tokens(300)
    alone = linear_logprobs(
        hidden[7:9], weight, given.targets[7:9], batch_invariant=True, logits_budget=1
    )
    out = policy_loss(hidden, weight, given, OBJECTIVE, batch_invariant=True)
    assert torch.equal(alone.logp, out.logp[7:9])
    assert torch.equal(alone.entropy, out.entropy[7:9])


def test_fixed_shapes_change_no_gradient():
    hidden, weight = head(300)
    given = tokens(300)
    plain, fixed = (
        torch.autograd.grad(
            policy_loss(hidden, weight, given, OBJECTIVE, batch_invariant=x).loss, (hidden, weight)
        )
        for x in (False, True)
    )
    for a, b in zip(plain, fixed, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows_per_tile", [1000, 7])
def test_the_gradient_of_the_weight_may_go_into_a_buffer(dtype, rows_per_tile):
    hidden, weight = head(20, dtype)
    given, budget = tokens(20), rows_per_tile * VOCAB * dtype.itemsize
    buffer = torch.ones(VOCAB, HIDDEN)
    out = policy_loss(hidden, weight, given, OBJECTIVE, weight_grad=buffer, logits_budget=budget)
    out.loss.backward()
    assert weight.grad is None
    plain = policy_loss(hidden, weight, given, OBJECTIVE, logits_budget=budget)
    d_hidden, d_weight = torch.autograd.grad(plain.loss, (hidden, weight))
    assert torch.equal(hidden.grad, d_hidden)
    torch.testing.assert_close(buffer - 1, d_weight.float(), rtol=2e-2, atol=1e-3)


def test_two_micro_batches_add_up_in_the_buffer():
    hidden, weight = head(20)
    given, buffer = tokens(20), torch.zeros(VOCAB, HIDDEN)
    for rows in (torch.arange(8), torch.arange(8, 20)):
        part = given.select(rows)
        policy_loss(hidden[rows], weight, part, OBJECTIVE, weight_grad=buffer).loss.backward()
    (whole,) = torch.autograd.grad(policy_loss(hidden, weight, given, OBJECTIVE).loss, weight)
    torch.testing.assert_close(buffer, whole)


def test_no_grad_leaves_the_buffer_alone():
    hidden, weight = head(5)
    buffer = torch.zeros(VOCAB, HIDDEN)
    with torch.no_grad():
        policy_loss(hidden, weight, tokens(5), OBJECTIVE, weight_grad=buffer)
    assert not buffer.any()


@pytest.mark.parametrize(
    "buffer",
    [
        torch.zeros(VOCAB, HIDDEN + 1),
        torch.zeros(VOCAB, HIDDEN, dtype=torch.float64),
        torch.zeros(HIDDEN, VOCAB).t(),
    ],
    ids=["shape", "dtype", "layout"],
)
def test_a_buffer_that_does_not_fit_is_refused(buffer):
    hidden, weight = head(5)
    with pytest.raises(ValueError, match=r"weight_grad: wanted contiguous torch\.float32 \[99, 24"):
        policy_loss(hidden, weight, tokens(5), OBJECTIVE, weight_grad=buffer)


def test_a_factor_on_the_loss_would_be_lost_on_the_buffer_and_is_refused():
    hidden, weight = head(5)
    out = policy_loss(hidden, weight, tokens(5), OBJECTIVE, weight_grad=torch.zeros(VOCAB, HIDDEN))
    with pytest.raises(ValueError, match=r"wanted one backward pass .* got a factor of 2\.0"):
        (2 * out.loss).backward()


def test_a_second_backward_would_not_reach_the_buffer_and_is_refused():
    hidden, weight = head(5)
    out = policy_loss(hidden, weight, tokens(5), OBJECTIVE, weight_grad=torch.zeros(VOCAB, HIDDEN))
    out.loss.backward(retain_graph=True)
    with pytest.raises(ValueError, match="got a second one"):
        out.loss.backward()


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16])
def test_gradients_lie_over_the_logits_whatever_their_dtypes(logits_dtype):
    hidden, weight = (x.detach() for x in head(6, torch.bfloat16))
    settings = head_settings(hidden, weight, None, logits_dtype=logits_dtype, logits_budget=None)
    made = TiledHead(hidden, weight, None, settings, Wanted(torch.bfloat16, None, None))
    logits = made.logits(slice(0, 6))
    gradient = made.gradient_buffer(logits)
    assert gradient.dtype == torch.bfloat16
    assert gradient.shape == logits.shape
    for t in range(6):
        assert gradient[t].data_ptr() == logits[t].data_ptr()


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16])
def test_logits_in_fp32_make_bf16_heads_more_exact(logits_dtype):
    hidden, weight = head(64, torch.bfloat16)
    given = tokens(64)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = policy_loss(*exact, given, OBJECTIVE)
    out = policy_loss(hidden, weight, given, OBJECTIVE, logits_dtype=logits_dtype)
    error = float((out.logp - truth.logp).abs().max())
    assert error < (1e-5 if logits_dtype == torch.float32 else 0.2)
    d_hidden = torch.autograd.grad(out.loss, hidden)[0].double()
    wanted = torch.autograd.grad(truth.loss, exact[0])[0]
    limit = 3e-3 if logits_dtype == torch.float32 else 3e-2
    assert (d_hidden - wanted).norm() < limit * wanted.norm()


@pytest.mark.parametrize(
    ("num_tokens", "limit", "hidden_size"),
    [(32768, 7065, 1536), (32768, 4185, 4096), (65536, 10922, 896), (5000, 100, 1536)],
)
def test_tiles_fill_whole_waves_without_becoming_more(num_tokens, limit, hidden_size):
    rows = whole_waves(num_tokens, limit, hidden_size, 132)
    assert 0 < rows <= limit
    assert -(-num_tokens // rows) == -(-num_tokens // limit) or limit < 128


def test_operands_on_two_devices_are_refused():
    hidden, weight = head(5)
    with pytest.raises(ValueError, match="wanted one device, got cpu and meta"):
        policy_loss(hidden, weight.to("meta"), tokens(5), OBJECTIVE)


def test_operands_need_not_lie_in_rows():
    hidden, weight = (x.detach() for x in head(7, torch.bfloat16))
    given = tokens(7)
    plain = policy_loss(hidden, weight, given, OBJECTIVE)
    turned = policy_loss(hidden.t().contiguous().t(), weight.t().contiguous().t(), given, OBJECTIVE)
    assert torch.equal(plain.logp, turned.logp)


@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
def test_a_processor_without_the_instruction_gets_torchs_gemm(logits_dtype, monkeypatch):
    hidden, weight = head(7, torch.bfloat16)
    given, bias = tokens(7), torch.randn(VOCAB).bfloat16()

    def run() -> list[Tensor]:
        out = policy_loss(hidden, weight, given, OBJECTIVE, bias=bias, logits_dtype=logits_dtype)
        return [out.logp, *torch.autograd.grad(out.loss, (hidden, weight))]

    usual = run()
    for question in ("supported", "keeps_up"):
        monkeypatch.setattr(wide_linear, question, lambda: False)
    others = run()
    default = head_settings(hidden, weight, None, logits_dtype=None, logits_budget=None)
    assert default.logits_dtype == torch.bfloat16
    for a, b in zip(usual, others, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)
