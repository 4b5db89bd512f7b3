"""Adapters: what trains, what generators and files get, and that nothing else moves."""

from pathlib import Path

import pytest
import torch
from rollouts import rollout_of
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from rlvr_fast import attention, checkpoint, lora, models
from rlvr_fast import config as configs
from rlvr_fast.checkpoint import Progress
from rlvr_fast.methods import method
from rlvr_fast.optimise import Optimiser
from rlvr_fast.packed import Sample, pack
from rlvr_fast.rollout import SamplingParams
from rlvr_fast.rollout.embedded import EmbeddedEngine

peft = pytest.importorskip("peft", reason="adapters need it; the test extra installs it")

IDS = torch.tensor([[5, 9, 33, 12, 60, 7]])
PACK = pack([[Sample(prompt_ids=[5, 9, 33], completion_ids=[12, 60, 7], advantage=1.0)]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return models.tiny(tmp_path_factory.mktemp("model") / "tiny")


def adapted_model(folder, *, dtype=torch.float32, moved=True, **settings):
    """With adapters that have been trained for a while, or so it looks."""
    model, tokenizer = models.load(folder, dtype=dtype)
    lora.wrap(model, **({"rank": 4, "alpha": 8.0} | settings))
    if moved:
        draws = torch.Generator().manual_seed(3)
        for name, parameter in lora.trained(model):
            if ".lora_B." in name:
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=draws))
    return model, tokenizer


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def rollouts(seed=0):
    torch.manual_seed(seed)
    groups = []
    for g in range(3):
        ids = torch.randint(4, 99, (3 + 2 * g,)).tolist()
        groups.append(
            [
                rollout_of(
                    torch.randint(4, 99, (4,)).tolist(),
                    prompt_ids=ids,
                    index=g,
                    rollout_logp=[-4.0] * 4,
                    advantage=advantage,
                )
                for advantage in (1.0, -1.0)
            ]
        )
    return groups


def optimiser(folder, model=None, **overrides):
    given = {"method": "grpo", "entropy_coef": 0.0, "learning_rate": 1e-2, **overrides}
    config = configs.load("tiny", given)
    if model is None:
        model = adapted_model(folder, moved=False)[0]
    return Optimiser(config, method("grpo", config.method_options), model, vocab_size=100)


def test_new_adapters_change_no_output_and_the_same_seed_gives_the_same(folder):
    plain, _ = models.load(folder)
    torch.manual_seed(1)
    model, other = (adapted_model(folder, moved=False, seed=5)[0] for _ in range(2))
    third = adapted_model(folder, moved=False, seed=6)[0]

    assert torch.equal(logits(model), logits(plain))
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert not all(map(torch.equal, model.parameters(), third.parameters()))


def test_making_adapters_draws_no_random_number_of_others(folder):
    model, _ = models.load(folder)
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)

    lora.wrap(model, rank=4, alpha=8.0)

    assert torch.equal(torch.rand(3), wanted)


def test_only_adapters_are_trained_and_the_model_under_them_stays(folder):
    made = optimiser(folder)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}

    made.update(rollouts(), step=1)

    moved = {n for n, p in made.model.named_parameters() if not torch.equal(p, before[n])}
    trained = {name for name, _ in lora.trained(made.model)}
    assert trained == {name for name in before if ".lora_" in name}
    assert moved == {name for name in trained if ".lora_B." in name}  # B starts as 0, so A waits.
    assert len(trained) == 2 * 7 * 2
    assert sum(len(group["params"]) for group in made.adamw.param_groups) == len(trained)


def test_a_step_equals_pefts_own(folder):
    """The oracle: stock peft and transformers on each sequence, plain torch for the loss."""
    made = optimiser(folder, adapted_model(folder)[0], method="reinforce")
    stock = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        peft.LoraConfig(r=4, lora_alpha=8.0, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    theirs = {n.removeprefix("base_model.model."): p for n, p in stock.named_parameters()}
    for name, parameter in lora.trained(made.model):
        theirs[name].data.copy_(parameter.data)
    flat = [rollout for group in rollouts() for rollout in group]
    for rollout in flat:
        ids = torch.tensor([[*rollout.train_prompt_ids, *rollout.completion_ids]])
        logp = stock(input_ids=ids).logits[0, -5:-1, :100].log_softmax(-1)
        taken = logp.gather(1, torch.tensor(rollout.completion_ids)[:, None])
        (-rollout.advantage * taken.mean() / len(flat)).backward()

    for packed in made.packs(made.samples(rollouts())):
        made.backward(packed)

    for name, parameter in lora.trained(made.model):
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-7)
        assert parameter.grad.any()


def test_a_frozen_head_costs_two_products(folder):
    """Logits and the gradient of the hidden states: the weight's own is never computed."""
    vocabulary, products = 100, {}
    for name, model in (("full", models.load(folder)[0]), ("adapters", None)):
        made = optimiser(folder, model)
        (packed,) = made.packs(made.samples(rollouts()))
        with torch.profiler.profile(record_shapes=True) as profile:
            made.backward(packed)
        products[name] = sum(
            event.count
            for event in profile.key_averages(group_by_input_shape=True)
            if event.key in ("aten::mm", "aten::addmm")
            and any(vocabulary in shape for shape in event.input_shapes)
        )

        assert (attention.head(made.model).weight.grad is None) == (name == "adapters")

    assert products == {"full": 3, "adapters": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_named_weights_are_those_of_a_merged_model(folder, dtype):
    model, _ = adapted_model(folder, dtype=dtype)
    before = [p.detach().clone() for p in model.parameters()]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    named = list(lora.named_weights(model))
    plain.load_state_dict(dict(named))

    assert [name for name, _ in named] == [
        name for name, _ in plain.named_parameters(remove_duplicate=False)
    ]
    assert len(list(lora.named_weights(model, every_name=False))) == len(named) - 1
    assert not any(tensor.requires_grad for _, tensor in named)
    assert all(map(torch.equal, model.parameters(), before))
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(logits(plain), logits(model).float(), rtol=0, atol=tolerance)
    assert not torch.allclose(logits(plain), logits(models.load(folder)[0]), atol=0.1)


def test_a_model_without_adapters_names_its_own_weights(folder):
    model, _ = models.load(folder)

    named = dict(lora.named_weights(model))

    wanted = dict(model.named_parameters(remove_duplicate=False))
    assert named.keys() == wanted.keys()
    assert all(named[name].data_ptr() == wanted[name].data_ptr() for name in wanted)
    assert [id(p) for _, p in lora.trained(model)] == [id(p) for p in model.parameters()]


def test_an_engine_takes_the_merged_weights_and_samples_what_is_trained(folder):
    model, _ = adapted_model(folder)
    engine = EmbeddedEngine(folder, dtype=torch.float32)

    engine.load_weights(lora.named_weights(model))
    ((completion,),) = engine.generate([IDS[0].tolist()], SamplingParams(max_tokens=6))

    ids = torch.tensor([[*IDS[0].tolist(), *completion.token_ids]])
    with torch.no_grad():
        logp = model(input_ids=ids).logits[0, IDS.shape[1] - 1 : -1].log_softmax(-1)
    taken = logp.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    assert completion.logp == pytest.approx(taken.tolist(), abs=1e-4)


def test_within_reference_the_model_is_the_one_from_before(folder):
    plain, _ = models.load(folder)
    model, _ = adapted_model(folder)
    own = logits(model)

    with lora.reference(model):
        assert torch.equal(logits(model), logits(plain))

    assert torch.equal(logits(model), own)
    assert all(".lora_" in name for name, _ in lora.trained(model))
    assert len(list(lora.trained(model))) == 28


def test_reference_ends_with_an_error_too(folder):
    model, _ = adapted_model(folder)
    own = logits(model)

    with pytest.raises(KeyError), lora.reference(model):
        raise KeyError

    assert torch.equal(logits(model), own)


def test_the_kl_penalty_needs_no_second_model(folder):
    """Against a copy of the initial model, as full fine-tuning keeps one."""
    updates = {"kl_coef": 0.5, "updates_per_batch": 2}
    itself = optimiser(folder, **updates)
    config = itself._config
    copy = Optimiser(
        config,
        method("grpo", config.method_options),
        adapted_model(folder, moved=False)[0],
        adapted_model(folder, moved=False)[0],  # adds zeros; plain layers would round otherwise
        vocab_size=100,
    )

    ours, theirs = ([each.update(rollouts(), step) for step in (1, 2)] for each in (itself, copy))

    assert ours == theirs
    assert ours[1]["ref_kl"] > 1e-4
    assert all(map(torch.equal, itself.model.parameters(), copy.model.parameters()))


def test_a_bf16_model_trains_fp32_adapters(folder):
    model, _ = adapted_model(folder, dtype=torch.bfloat16, moved=False)
    made = optimiser(folder, model, precision="bf16")

    made.update(rollouts(), step=1)
    made.update(rollouts(), step=2)

    assert {p.dtype for _, p in lora.trained(model)} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if ".lora_" not in n} == {torch.bfloat16}
    assert all(p.any() for _, p in lora.trained(model))


def test_a_checkpoint_holds_adapters_only_and_resumes_to_the_same_bits(folder, tmp_path):
    whole, part, resumed = (optimiser(folder) for _ in range(3))
    for step in (1, 2, 3):
        whole.update(rollouts(step), step)
    for step in (1, 2):
        part.update(rollouts(step), step)
    progress = Progress(step=2, method_state={}, position=0)
    saved = checkpoint.save(tmp_path, progress, part.model, part.adamw, keep=1)

    checkpoint.restore(saved, resumed.model, resumed.adamw)
    resumed.update(rollouts(3), 3)

    assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))
    adapters = sum(p.numel() * 4 for _, p in lora.trained(part.model))
    assert adapters <= (saved / "model.safetensors").stat().st_size < adapters + 8000
    assert not any("base_layer" in n for n, _ in checkpoint._weights(part.model))


def test_adapters_of_another_rank_are_refused(folder, tmp_path):
    made = optimiser(folder)
    progress = Progress(step=1, method_state={}, position=0)
    saved = checkpoint.save(tmp_path, progress, made.model, made.adamw, keep=1)
    other = optimiser(folder, adapted_model(folder, rank=8)[0])

    with pytest.raises(ValueError, match=r"wanted the tensors of this model, got others$"):
        checkpoint.restore(saved, other.model, other.adamw)


def test_the_export_is_a_merged_model_and_an_adapter_for_peft(folder, tmp_path):
    model, tokenizer = adapted_model(folder)
    own = logits(model)

    exported = checkpoint.export(tmp_path, model, tokenizer, torch.float32)

    merged = AutoModelForCausalLM.from_pretrained(exported)
    base = AutoModelForCausalLM.from_pretrained(folder)
    stock = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    for found in (logits(merged), logits(stock)):
        torch.testing.assert_close(found, own, rtol=0, atol=1e-5)
    assert not torch.allclose(own, logits(models.load(folder)[0]), atol=0.1)
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    assert stock.peft_config["default"].base_model_name_or_path == str(folder)


def test_a_model_without_adapters_exports_none(folder, tmp_path):
    model, tokenizer = models.load(folder)

    checkpoint.export(tmp_path, model, tokenizer, torch.float32)

    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("targets", "count"),
    [("all-linear", 14), ("q_proj, v_proj", 4), ("layers.1.mlp.up_proj", 1), ("o_proj", 2)],
)
def test_targets_are_layers_by_the_end_of_their_names(folder, targets, count):
    model, _ = adapted_model(folder, targets=targets)

    assert len(list(lora.trained(model))) == 2 * count


@pytest.mark.parametrize(
    "targets", ["lm_head", "embed_tokens", "q_proj,nothing", "", "q_proj,", "proj"]
)
def test_targets_that_are_not_there_are_named_with_those_that_are(folder, targets):
    known = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    message = rf"^lora_targets: wanted all-linear or some of {known}, got '{targets}'$"
    with pytest.raises(ValueError, match=message):
        adapted_model(folder, targets=targets)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"^lora_rank: wanted >= 1, got 0$"),
        ({"alpha": 0.0}, r"^lora_alpha: wanted > 0 and finite, got 0.0$"),
        ({"alpha": float("nan")}, r"^lora_alpha: wanted > 0 and finite, got nan$"),
    ],
)
def test_settings_that_cannot_be_are_refused(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        adapted_model(folder, **settings)


def test_a_second_set_of_adapters_is_refused(folder):
    model, _ = adapted_model(folder)

    with pytest.raises(ValueError, match=r"^model: wanted one without adapters, got one that has"):
        lora.wrap(model, rank=4, alpha=8.0)


def test_another_kind_of_model_with_a_head_of_its_own_works_too(tmp_path):
    config = Qwen3Config(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).eval()
    lora.wrap(model, rank=2, alpha=4.0)
    for name, parameter in lora.trained(model):
        parameter.data.add_(0.1 * (".lora_B." in name))
    own, hidden = logits(model), attention.hidden_states(model, PACK)

    plain = Qwen3ForCausalLM(config).eval()
    plain.load_state_dict(dict(lora.named_weights(model)))

    torch.testing.assert_close(logits(plain), own, rtol=0, atol=1e-5)
    torch.testing.assert_close(attention.hidden_states(plain, PACK), hidden, rtol=0, atol=1e-5)
