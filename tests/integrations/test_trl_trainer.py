"""`FastGRPOTrainer` around its loss: whole runs, the model it leaves, and what it refuses."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlvr_fast.methods import METHODS
from rlvr_fast.methods.dppo_tv import Behaviour, TrustedWeight
from rlvr_fast.models import resolve
from rlvr_fast.objectives import ClippedSurrogate, Distillation, Objective, Tokens

trl = pytest.importorskip("trl", reason="stock TRL is the oracle; the test extra installs it")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from rlvr_fast import integrations  # noqa: E402
from rlvr_fast.integrations import trl as ours  # noqa: E402
from rlvr_fast.integrations.trl import FastGRPOTrainer  # noqa: E402

PROMPTS = ["1+1=", "2+3=", "17+4=", "5+5+5="]


def many_ones(completions: list[str], **_: Any) -> list[float]:
    return [sum(c in "0123456789" for c in text) / 3 for text in completions]


Build = Callable[..., Any]


@pytest.fixture
def build(tmp_path) -> Build:
    def make(kind: Any, model: Any = None, extra: dict[str, Any] | None = None, **args: Any) -> Any:
        defaults = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "bf16": False,
            "per_device_train_batch_size": 4,
            "num_generations": 4,
            "max_completion_length": 6,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
        }
        tokenizer = transformers.AutoTokenizer.from_pretrained(resolve("tiny"))
        return kind(
            model=str(resolve("tiny")) if model is None else model(),
            reward_funcs=many_ones,
            args=trl.GRPOConfig(**(defaults | args)),
            train_dataset=datasets.Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=tokenizer,
            **(extra or {}),
        )

    return make


LORA = {"peft_config": peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])}
RUNS = {
    "one micro-batch": ({}, {}),
    "accumulated, off policy, KL": (
        {
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 4,
            "beta": 0.04,
            "loss_type": "grpo",
        },
        {},
    ),
    "without checkpointing": ({"gradient_checkpointing": False, "num_iterations": 2}, {}),
    "adapters": ({"beta": 0.04}, LORA),
}


@pytest.mark.parametrize(("args", "extra"), RUNS.values(), ids=RUNS.keys())
def test_ten_steps_give_the_rewards_and_losses_of_stock_trl(build, args, extra):
    logs = []
    for kind in (trl.GRPOTrainer, FastGRPOTrainer):
        trainer = build(kind, extra=extra, max_steps=10, **args)
        trainer.train()
        logs.append(trainer.state.log_history)

    stock, own = logs

    assert len(own) == len(stock) == 11
    for step, wanted in zip(own[:10], stock[:10], strict=True):
        assert step.get("reward") == wanted.get("reward")
        assert step["loss"] == pytest.approx(wanted["loss"], abs=1e-5)
        assert step["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3, abs=1e-4)
        assert step["entropy"] == pytest.approx(wanted["entropy"], rel=1e-4)
        assert step.keys() == wanted.keys()


def test_completions_of_a_prompt_meet_in_a_micro_batch_of_their_step(build, monkeypatch):
    seen: dict[Any, list[Tensor]] = {trl.GRPOTrainer: [], FastGRPOTrainer: []}
    for kind, found in seen.items():
        trainer = build(kind, max_steps=1, gradient_accumulation_steps=4, loss_type="grpo")
        compute = trainer._compute_loss

        def watched(model: nn.Module, inputs: dict[str, Any], compute=compute, found=found):
            found.append(torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1))
            return compute(model, inputs)

        monkeypatch.setattr(trainer, "_compute_loss", watched)
        trainer.train()
    stock, own = ([sorted(batch.tolist()) for batch in found] for found in seen.values())

    width = len(seen[FastGRPOTrainer][0][0]) - 6

    assert sorted(chain(*stock)) == sorted(chain(*own))
    assert [len({tuple(row[:width]) for row in batch}) for batch in own] == [1, 1, 1, 1]
    assert max(len({tuple(row[:width]) for row in batch}) for batch in stock) > 1


def test_the_model_is_saved_and_generates_as_before(build, tmp_path):
    stock = build(trl.GRPOTrainer)
    trainer = build(FastGRPOTrainer)
    ids = torch.tensor([[5, 6, 7]])

    texts = [
        t.model.eval().generate(ids, max_new_tokens=8, do_sample=False) for t in (stock, trainer)
    ]
    trainer.save_model(str(tmp_path / "saved"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")

    assert torch.equal(*texts)
    wanted, found = stock.model.state_dict(), trainer.model.state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], again.state_dict()[name]) for name in wanted)


def test_restored_the_model_is_stock_trls_again(build):
    trainer = build(FastGRPOTrainer, beta=0.04, bf16=True, max_steps=2)
    trainer.train()

    trainer.restore_model()

    for model in (trainer.model, trainer.ref_model):
        assert model.config._attn_implementation == "sdpa"
        with pytest.raises(ValueError, match="input_ids"):
            model(rlvr_fast_call=lambda base: base)


@dataclass(frozen=True, kw_only=True)
class GroupBaseline(Objective):
    def token_loss(self, t: Tokens) -> Tensor:
        return -(t.advantage - t.group_mean(t.advantage)) * t.logp


def with_head_hook() -> nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(resolve("tiny"))
    model.lm_head.register_forward_hook(lambda module, args, output: 1.5 * output)
    return model


def mixture() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    config = transformers.MixtralConfig(vocab_size=100, **sizes, **heads)
    return transformers.MixtralForCausalLM(config)


PROMPT_TUNING = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
HEAD_COPY = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fp32 head": ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32"),
    "compiled": ({"torch_compile": True}, "torch_compile"),
    "Liger": ({"use_liger_kernel": True}, "use_liger_kernel"),
    "experts": (
        {"model": mixture, "router_aux_loss_coef": 0.01, "beta": 0.0},
        "router_aux_loss_coef",
    ),
    "other logits": ({"model": with_head_hook}, "model: wanted logits"),
    "prompt tuning": ({"extra": {"peft_config": PROMPT_TUNING}}, "peft_config: .* PROMPT_TUNING"),
    "adapted head": ({"extra": {"peft_config": HEAD_COPY}}, "model: wanted a plain linear head"),
    "loss type": ({"loss_type": "ppo"}, "loss_type: .* got ppo"),
    "level": ({"importance_sampling_level": "group"}, "importance_sampling_level: .* got group"),
    "objective of groups": ({"extra": {"objective": GroupBaseline()}}, "looks at a group"),
    "objective that reads the sampler": (
        {"extra": {"objective": TrustedWeight(behaviour=Behaviour.ROLLOUT)}},
        "objective: .* reads rollout_logp",
    ),
    "distillation": ({"extra": {"objective": Distillation()}}, "objective: .* got Distillation"),
    "two": (
        {"extra": {"objective": ClippedSurrogate(), "method": "grpo"}},
        "objective, method: .* got both",
    ),
    "unknown method": ({"extra": {"method": "grpoo"}}, "grpoo"),
    "method with hooks": ({"extra": {"method": "dapo"}}, "method: .* dapo, .* advantages"),
    "other advantages": (
        {"extra": {"method": "gspo"}, "scale_rewards": "none"},
        "scale_rewards: wanted 'group'",
    ),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_supported_is_refused_by_name(build, settings, message):
    with pytest.raises(ValueError, match=message):
        build(FastGRPOTrainer, **settings)


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "luspo", "sapo", "vespo"])
def test_a_method_trains_as_the_loss_type_of_its_name(build, name):
    by_name = {"gspo": "grpo"}
    args: dict[str, Any] = {"loss_type": by_name.get(name, name), "epsilon": 3e-4}
    args |= {"epsilon_high": 4e-4, "num_iterations": 2, "steps_per_generation": 2}
    if name in ("gspo", "luspo"):
        args["importance_sampling_level"] = "sequence"
    options = {
        "grpo": {"clip_low": 3e-4, "clip_high": 4e-4},
        "luspo": {"clip_low": 3e-4, "clip_high": 4e-4},
        "cispo": {"cap": 4e-4},
    }.get(name, {})
    method = METHODS[name](**options)
    losses = []
    for extra in ({}, {"method": method}):
        trainer = build(FastGRPOTrainer, extra=extra, max_steps=4, **args)
        trainer.train()
        losses.append([step["grad_norm"] for step in trainer.state.log_history[:4]])

    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert trainer.state.log_history[0].keys() >= {"entropy", "reward"}
    assert "clip_ratio/low_mean" not in trainer.state.log_history[0]


def test_an_objective_is_averaged_as_the_loss_type_says(build):
    losses = []
    for extra in ({}, {"objective": ClippedSurrogate()}):
        trainer = build(FastGRPOTrainer, extra=extra, max_steps=3, loss_type="dr_grpo", beta=0.1)
        trainer.train()
        losses.append([step["loss"] for step in trainer.state.log_history[:3]])

    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert any(losses[0])


def test_the_trainer_is_also_in_the_package():
    assert integrations.FastGRPOTrainer is FastGRPOTrainer
    with pytest.raises(AttributeError, match="SlowGRPOTrainer"):
        integrations.SlowGRPOTrainer  # noqa: B018


def test_another_trl_is_refused(monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.17.0")

    with pytest.raises(ImportError, match=r"trl: wanted version 1\.16 .* got 1\.17\.0"):
        importlib.reload(ours)
