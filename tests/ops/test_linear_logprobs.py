"""`linear_logprobs`: logits from hidden states without the logits."""

import pytest
import torch
from torch import Tensor

from rlvr_fast.ops.linear_logprobs import linear_logprobs, reference
from rlvr_fast.ops.transform import LogitTransform

SETTINGS = {"temperature": 0.7, "softcap": 9.0, "logit_scale": 1.5}


def problem(
    dtype: torch.dtype, num_tokens: int = 13, hidden_size: int = 8, vocab_size: int = 33
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, targets."""
    hidden = torch.randn(num_tokens, hidden_size).to(dtype).requires_grad_()
    weight = torch.randn(vocab_size, hidden_size).to(dtype).requires_grad_()
    bias = torch.randn(vocab_size).to(dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(0, vocab_size, (num_tokens,))


@pytest.mark.parametrize("which", ["logp", "entropy"])
@pytest.mark.parametrize("rows_per_tile", [100, 5, 1])
def test_each_output_passes_gradcheck(which, rows_per_tile):
    hidden, weight, bias, targets = problem(torch.float64, 6, 3, 7)

    def output(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        budget = rows_per_tile * 7 * 8
        out = linear_logprobs(h, w, targets, bias=b, logits_budget=budget, **SETTINGS)
        return 3 * getattr(out, which)

    assert torch.autograd.gradcheck(output, (hidden, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows_per_tile", [100, 5])
def test_outputs_and_gradients_are_as_exact_as_plain_torch(dtype, rows_per_tile, as_exact_as_torch):
    inputs = problem(dtype)

    def run(cast: torch.dtype, ours: bool) -> list[Tensor]:
        h, w, b = (x.detach().to(cast).requires_grad_() for x in inputs[:3])
        if ours:
            budget = rows_per_tile * 33 * dtype.itemsize
            out = linear_logprobs(h, w, inputs[3], bias=b, logits_budget=budget, **SETTINGS)
        else:
            out = reference(h, w, inputs[3], bias=b, transform=LogitTransform(**SETTINGS))
        (3 * out.logp - out.entropy).sum().backward()
        return [out.logp.detach(), out.entropy.detach(), h.grad, w.grad, b.grad]

    for ours, plain, truth in zip(
        run(dtype, True), run(dtype, False), run(torch.float64, False), strict=True
    ):
        as_exact_as_torch(ours.to(dtype), plain.to(dtype), truth)


def test_no_tokens_give_no_values_and_zero_gradients():
    hidden, weight, bias, _ = problem(torch.float32, num_tokens=0)
    out = linear_logprobs(hidden, weight, torch.zeros(0, dtype=torch.int64), bias=bias)
    out.logp.sum().backward()
    assert out.logp.shape == (0,)
    assert (weight.grad == 0).all()
    assert (bias.grad == 0).all()


def test_fp32_logits_from_bf16_inputs_keep_what_bf16_logits_lose():
    hidden, weight, _, targets = problem(torch.bfloat16, 64, 32, 500)
    truth = reference(hidden.double(), weight.double(), targets).logp
    narrow = linear_logprobs(hidden, weight, targets, logits_dtype=torch.bfloat16).logp
    wide = linear_logprobs(hidden, weight, targets, logits_dtype=torch.float32).logp
    assert (wide - truth).abs().max() < 1e-5
    assert (narrow - truth).abs().max() > 1e-3


def test_autocast_computes_in_bf16_and_returns_fp32_gradients():
    hidden, weight, bias, targets = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        linear_logprobs(hidden, weight, targets, bias=bias).logp.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight, bias)]
    linear_logprobs(low[0], low[1], targets, bias=low[2]).logp.sum().backward()
    torch.testing.assert_close(weight.grad, low[1].grad.float(), rtol=1e-2, atol=1e-2)


def test_a_frozen_operand_gets_no_gradient():
    hidden, weight, _, targets = problem(torch.float32)
    linear_logprobs(hidden, weight.detach(), targets).logp.sum().backward()
    assert hidden.grad is not None
    linear_logprobs(hidden.detach(), weight, targets).logp.sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(13, 9)}, r"wanted \[T, D\] and \[V, D\]"),
        ({"hidden": torch.zeros(13, 8, dtype=torch.bfloat16)}, "wanted one floating point dtype"),
        ({"bias": torch.zeros(32)}, r"bias: wanted \[33\]"),
        ({"targets": torch.full((13,), 33)}, r"wanted ids in \[0, 33\)"),
        ({"logits_budget": 0}, "logits_budget: wanted at least one byte"),
        ({"logits_dtype": torch.float16}, "logits_dtype: wanted torch.float32"),
    ],
)
def test_bad_input_is_told_what_was_wanted(change, message):
    hidden, weight, bias, targets = problem(torch.float32)
    arguments = {"hidden": hidden, "weight": weight, "targets": targets, "bias": bias} | change
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**arguments)
