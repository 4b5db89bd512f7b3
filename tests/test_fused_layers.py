"""Fused decoder layers against transformers' own and against fp64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from rlvr_fast import attention, fused_layers
from rlvr_fast.ops import decoder, laid_out
from rlvr_fast.ops.laid_out import LaidOut
from rlvr_fast.packed import Sample, pack

SHAPE = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
)
CONFIGS = [LlamaConfig, Qwen2Config, Qwen3Config]
DTYPES = [torch.float32, torch.bfloat16]
HEADS = decoder.Heads(queries=4, keys=2, size=16, eps=None)
BIASES = pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])


def random(*shape, dtype=torch.float32, seed=0):
    draws = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=draws).to(dtype).requires_grad_()


def error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


def results(function, inputs, dtype=None):
    """Outputs and all gradients, for gradients that are fixed."""
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    outputs = function(*inputs)
    d_outputs = [random(*x.shape, seed=9).detach().to(x.dtype) for x in outputs]
    return [x.detach() for x in outputs] + list(torch.autograd.grad(outputs, inputs, d_outputs))


def compare(fused, plain, inputs):
    """Fused results are as near to fp64 as torch's own in the same dtypes, give or take."""
    exact = results(plain, inputs, torch.float64)
    for ours, theirs, wanted in zip(
        results(fused, inputs), results(plain, inputs), exact, strict=True
    ):
        assert ours.dtype == theirs.dtype
        assert error(ours, wanted) <= 1.3 * error(theirs, wanted) + 2e-7


def rms_norm(x, weight):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    return weight * normed.to(x.dtype)


def rotated(x, cosine, sine):
    first, second = x.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return x * cosine[:, None].to(x.dtype) + turned * sine[:, None].to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 33, 1100])  # A block of rows has 32; threads want 2^16 values.
def test_norm_and_sum_equal_torchs(rows, dtype):
    inputs = [random(rows, 64, dtype=dtype, seed=i) for i in range(2)] + [random(64, dtype=dtype)]

    def fused(x, added, weight):
        return decoder.rms_norm(x, weight, eps=1e-5, dtype=dtype, added=added)

    def plain(x, added, weight):
        return x + added, rms_norm(x + added, weight)

    compare(fused, plain, inputs)


def test_a_norm_gives_a_narrower_result_than_its_input_and_takes_the_residual_along():
    x, added, weight = random(9, 64), random(9, 64, dtype=torch.bfloat16, seed=1), random(64)

    total, normed = decoder.rms_norm(x, weight, eps=1e-5, dtype=torch.bfloat16, added=added)
    (total.sum() + normed.float().sum()).backward()

    assert torch.equal(total, x + added)
    assert torch.equal(normed, rms_norm(x + added, weight).bfloat16())
    assert torch.equal(added.grad, x.grad.bfloat16())


def test_the_gradient_of_a_norm_is_the_same_for_any_number_of_threads():
    def gradients(threads):
        torch.set_num_threads(threads)
        x, weight = random(2100, 64), random(64)
        decoder.rms_norm(x, weight, eps=1e-5, dtype=x.dtype)[1].square().sum().backward()
        return x.grad, weight.grad

    one, two = gradients(1), gradients(2)

    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@BIASES
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gated_product_equals_torchs(dtype, bias):
    inputs = [random(33, 64, dtype=dtype), *(random(96, 64, dtype=dtype, seed=i) for i in (1, 2))]
    inputs += [random(96, dtype=dtype, seed=i) for i in (3, 4)] if bias else []

    def fused(x, *layers):
        return [decoder.gated(x, layers[:2], layers[2:] or (None, None))]

    def plain(x, *layers):
        gate, up = (
            F.linear(x, *layer)
            for layer in zip(*(layers[i : i + 2] for i in (0, 2) if layers[i:]), strict=True)
        )
        return [F.silu(gate) * up]

    compare(fused, plain, inputs)


def test_a_gate_far_from_zero_has_its_limits():
    x = torch.tensor([[-1e30], [-200.0], [200.0], [1e30], [float("nan")]])
    one = torch.ones(1, 1)

    found = decoder.gated(x, [one, torch.zeros(1, 1)], [None, torch.ones(1)])

    assert found[:4].flatten().tolist() == pytest.approx([0, 0, 200, 1e30], rel=1e-6, abs=1e-6)
    assert found[4].isnan()


@BIASES
@pytest.mark.parametrize("normed", [False, True], ids=["no norm", "norm"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotated_heads_equal_torchs(dtype, normed, bias):
    angle = torch.rand(33, 8, generator=torch.Generator().manual_seed(0)).repeat(1, 2) * 6
    angles = angle.cos(), angle.sin()
    sizes = [64, 32, 32]
    inputs = [random(33, 48, dtype=dtype)]
    inputs += [random(size, 48, dtype=dtype, seed=i) for i, size in enumerate(sizes)]
    inputs += [random(size, dtype=dtype, seed=7 + i) for i, size in enumerate(sizes) if bias]
    inputs += [random(16, dtype=dtype, seed=i) for i in (5, 6) if normed]

    def split(inputs):
        x, *layers = inputs
        biases = layers[3:6] if bias else [None] * 3
        return x, layers[:3], biases, layers[-2:] if normed else None

    def fused(*inputs):
        x, weights, biases, norms = split(inputs)
        narrow = tuple(angle.to(dtype) for angle in angles)
        heads = HEADS._replace(eps=1e-5 if normed else None)
        return decoder.rotated_heads(x, weights, biases, narrow, heads, norms)

    def plain(*inputs):
        x, weights, biases, norms = split(inputs)
        q, k, v = (
            F.linear(x, w, b).view(len(x), -1, 16) for w, b in zip(weights, biases, strict=True)
        )
        if norms:
            q, k = rms_norm(q, norms[0]), rms_norm(k, norms[1])
        return *(rotated(part, *(angle.to(dtype) for angle in angles)) for part in (q, k)), v

    compare(fused, plain, inputs)


def model_of(config, **settings):
    """With weights that leave no part without an effect."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SHAPE | settings))
    for parameter in model.parameters():
        scale = 1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
        parameter.data.normal_(std=scale)
    return model


def packed():
    draws = torch.Generator().manual_seed(1)

    def ids(count):
        return torch.randint(0, 97, (count,), generator=draws).tolist()

    prompts = [ids(7), ids(9)]
    return pack([[Sample(prompt_ids=p, completion_ids=ids(5)) for _ in range(3)] for p in prompts])


def passed(model, dtype=torch.float32):
    """Hidden states and every parameter's gradient, by name."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        hidden = attention.hidden_states(model, packed())
    hidden.backward(random(*hidden.shape).detach().to(hidden.dtype))
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"": hidden.detach()} | {n: x.clone() for n, x in grads.items() if x is not None}


@pytest.fixture
def plain(monkeypatch):
    """Turns a model into one whose layers are transformers' own."""

    def made(model):
        model = copy.deepcopy(model)
        with monkeypatch.context() as patch:
            patch.setattr(fused_layers, "install", lambda model: None)
            attention.install(model)
        assert not fused(model)
        return model

    return made


def fused(model):
    return sum("forward" in vars(layer) for layer in model.get_decoder().layers)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_fused_model_is_as_near_to_fp64_as_the_plain_one(config, dtype, plain):
    model = model_of(config)
    exact = passed(plain(model).double())
    theirs = passed(plain(model), dtype)

    ours = passed(model, dtype)

    assert fused(model) == 2
    for name, wanted in exact.items():
        # The gradient of a head's norm is 16 numbers: a single one decides.
        assert error(ours[name], wanted) <= 2.5 * error(theirs[name], wanted), name
    total = [sum(error(side[name], exact[name]) for name in exact) for side in (ours, theirs)]
    assert total[0] <= 1.1 * total[1]


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (GemmaConfig, {}),
        (GraniteConfig, {"residual_multiplier": 0.5}),
        (LlamaConfig, {"hidden_act": "gelu"}),
    ],
    ids=["another norm", "a scaled residual", "another activation"],
)
def test_other_layers_stay_as_they_are(config, settings):
    model = model_of(config, **settings)

    attention.install(model)

    assert not fused(model)


def test_names_parameters_and_other_uses_stay_as_they_are(plain):
    model = model_of(LlamaConfig)
    other = plain(model)
    names = list(model.state_dict())
    ids = torch.arange(12)[None]

    attention.install(model)

    assert list(model.state_dict()) == names
    assert torch.equal(model(ids).logits, other(ids).logits)
    own = copy.deepcopy(model)
    assert own.model.layers[0].forward.__self__ is own.model.layers[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_checkpointing_changes_no_bit(dtype):
    model = model_of(Qwen3Config).train()
    wanted = passed(model, dtype)

    model.gradient_checkpointing_enable()
    found = passed(model, dtype)

    assert fused(model) == 2
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("one_context", [False, True], ids=["two contexts", "one context"])
def test_weights_that_change_are_seen(one_context):
    def hidden(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attention.hidden_states(model, packed()).detach()

    model = model_of(LlamaConfig)
    fresh = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=one_context):
        before = attention.hidden_states(model, packed())
        before.float().square().mean().backward()
        with torch.no_grad():
            for layer in model.model.layers:
                for part in (layer.self_attn.q_proj, layer.mlp.up_proj):
                    part.weight.sub_(0.1)
                    part.weight.data.mul_(2)
        torch.clear_autocast_cache()  # That of o_proj and down_proj is torch's.
        after = hidden(model)
    fresh.load_state_dict(model.state_dict())

    assert not torch.equal(after, before)
    assert torch.equal(after, hidden(fresh))


@pytest.mark.parametrize("config", CONFIGS)
def test_weights_that_are_laid_out_give_the_same_in_inference_mode(config, monkeypatch):
    model = model_of(config).bfloat16()
    if not laid_out.supported(model.lm_head.weight):
        pytest.skip("this CPU's oneDNN has no bf16")
    exact = attention.hidden_states(copy.deepcopy(model).double(), packed()).detach()
    with torch.inference_mode():
        plain = attention.hidden_states(model, packed())
    used, product = [], LaidOut.__call__
    monkeypatch.setattr(LaidOut, "__call__", lambda self, x: used.append(x) or product(self, x))

    fused_layers.lay_out(model)
    trained = attention.hidden_states(model, packed())
    assert trained.requires_grad
    assert not used
    with torch.inference_mode():
        found = attention.hidden_states(model, packed())

    assert len(used) == 2 * 4
    assert error(found, exact) <= 1.1 * error(plain, exact)


def test_layers_with_and_without_a_bias_are_laid_out_side_by_side():
    x, one, other = (random(n, 64, dtype=torch.bfloat16).detach() for n in (5, 32, 48))
    if not laid_out.supported(one):
        pytest.skip("this CPU's oneDNN has no bf16")
    bias = random(48, dtype=torch.bfloat16)  # A parameter, as a model's.

    found = LaidOut([one, other], [None, bias])(x)

    wanted = torch.cat([F.linear(x, one), F.linear(x, other, bias)], 1)
    torch.testing.assert_close(found, wanted, rtol=0.01, atol=0.05)
    assert not found.requires_grad


def test_layers_with_hooks_or_of_another_dtype_are_not_laid_out():
    hooked, wide = model_of(LlamaConfig).bfloat16(), model_of(LlamaConfig)
    hooked.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    for model in (hooked, wide):
        attention.install(model)
        fused_layers.lay_out(model)

    assert hooked.model.layers[0].laid_out is None
    assert [layer.laid_out for layer in wide.model.layers] == [None, None]


def test_hooks_of_inner_modules_still_run():
    model = model_of(LlamaConfig)
    wanted = passed(model)
    seen = []
    for name in ("q_proj", "o_proj"):
        part = model.model.layers[0].self_attn.get_submodule(name)
        part.register_forward_hook(lambda *_, name=name: seen.append(name))

    found = passed(model)

    assert seen == ["q_proj", "o_proj"]
    assert error(found[""], wanted[""].double()) < 1e-6


def test_adapters_that_come_after_are_used(plain):
    lora = pytest.importorskip("rlvr_fast.lora")
    pytest.importorskip("peft")
    model = model_of(LlamaConfig)
    attention.install(model)
    sides = [model, plain(model_of(LlamaConfig))]
    for side in sides:
        lora.wrap(side, rank=2, alpha=4.0, targets="q_proj,down_proj,up_proj")
        for _, parameter in lora.trained(side):
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(3))

    def gradients(side):
        side.zero_grad()
        attention.hidden_states(side, packed()).square().sum().backward()
        return [parameter.grad for _, parameter in lora.trained(side)]

    ours, theirs = (gradients(side) for side in sides)

    assert fused(model) == 2
    assert max(error(a, b.double()) for a, b in zip(ours, theirs, strict=True)) < 1e-5
