"""Our head in the place of verl's, against its torch head and the definition in fp64."""

import pytest
import torch

WANTED = "wants verl 0.9.1 and what importing it needs, see the section on verl in the README"

pytest.importorskip("verl", reason=WANTED)
head_module = pytest.importorskip("verl.utils.kernel.linear_cross_entropy", reason=WANTED)

from verl.utils.experimental.torch_functional import FusedLinearForPPOFunction  # noqa: E402

from rlvr_fast.integrations import verl as ours  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def activated():
    ours.activate(["head"])
    yield
    ours.deactivate()


def head_inputs(dtype: torch.dtype) -> tuple:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(1, 96, 64, generator=generator).to(dtype)
    weight = (0.3 * torch.randn(513, 64, generator=generator)).to(dtype)
    labels = torch.randint(0, 513, (1, 96), generator=generator)
    slopes = torch.randn(2, 1, 96, generator=generator)
    return hidden, weight, labels, slopes


def head_outputs(function, hidden, weight, labels, slopes):
    """logp, entropy, and the gradients of hidden and weight, as fp64."""
    hidden, weight = (x.clone().requires_grad_() for x in (hidden, weight))
    logp, entropy = function(hidden, weight, labels, 0.7)
    (slopes[0] * logp + slopes[1] * entropy).sum().backward()
    return [x.detach().double() for x in (logp, entropy, hidden.grad, weight.grad)]


def by_definition(hidden, weight, labels, temperature):
    logp_all = torch.log_softmax(hidden @ weight.T / temperature, -1)
    return logp_all.gather(-1, labels[..., None])[..., 0], -(logp_all.exp() * logp_all).sum(-1)


def test_the_head_in_fp32_is_that_of_verl():
    inputs = head_inputs(torch.float32)

    found = head_outputs(head_module.linear_cross_entropy, *inputs)
    wanted = head_outputs(FusedLinearForPPOFunction.apply, *inputs)

    assert head_module.linear_cross_entropy is ours.linear_cross_entropy
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_the_head_in_bf16_is_nearer_to_the_truth_than_that_of_verl():
    hidden, weight, labels, slopes = head_inputs(torch.bfloat16)
    truth = head_outputs(by_definition, hidden.double(), weight.double(), labels, slopes.double())

    found = head_outputs(ours.linear_cross_entropy, hidden, weight, labels, slopes)
    other = head_outputs(FusedLinearForPPOFunction.apply, hidden, weight, labels, slopes)

    ours_off, verl_off = (
        [float((x - exact).norm() / exact.norm()) for x, exact in zip(each, truth, strict=True)]
        for each in (found, other)
    )
    assert all(own < theirs for own, theirs in zip(ours_off, verl_off, strict=True))


def test_a_model_that_verl_gave_its_fused_forward_gets_our_head():
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from verl.models.transformers.dense_common import forward_with_triton_backend

    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=97, **sizes, **heads)).eval()
    ids = torch.randint(0, 97, (1, 12))

    found = forward_with_triton_backend(model, input_ids=ids, return_dict=True, temperature=0.7)

    logits = model(input_ids=ids).logits.double() / 0.7
    wanted = torch.log_softmax(logits, -1).gather(-1, ids.roll(-1, 1)[..., None])[..., 0]
    torch.testing.assert_close(found.log_probs.double(), wanted, rtol=1e-5, atol=1e-5)
    assert found.entropy.shape == ids.shape


def test_another_reduction_is_refused():
    hidden, weight, labels, _ = head_inputs(torch.float32)

    with pytest.raises(ValueError, match="reduction: wanted none, got mean"):
        ours.linear_cross_entropy(hidden, weight, labels, 1.0, "mean")
