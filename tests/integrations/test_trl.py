"""`FastGRPOTrainer` against stock TRL: loss, every gradient, every metric, for every loss type."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from rlvr_fast.models import resolve

trl = pytest.importorskip("trl", reason="stock TRL is the oracle; the test extra installs it")
datasets = pytest.importorskip("datasets")

from rlvr_fast.integrations.trl import FastGRPOTrainer  # noqa: E402
from rlvr_fast.integrations.trl_objectives import LOSS_TYPES  # noqa: E402

PROMPTS = [[3, 4, 5], [6, 7], [3, 4, 5], [6, 7], [3, 4, 5], [8]]
LENGTHS = [4, 2, 6, 1, 3, 5]
WIDTH = max(LENGTHS)
ADVANTAGES = [1.0, -0.7, 0.4, -1.2, 0.0, -0.3]
TOLERANCE = 1e-5
"""Relative, of norms; plus the same share of 1 % of the whole gradient for a parameter whose own is
nothing but cancellation."""


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Stock and ours on the same weights."""
    args = {
        "output_dir": str(tmp_path_factory.mktemp("trl")),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": len(PROMPTS),
        "num_generations": 2,
        "max_completion_length": 7,
        "temperature": 0.7,
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "beta": 0.04,
        "report_to": "none",
    }
    return [built(kind, args) for kind in (trl.GRPOTrainer, FastGRPOTrainer)]


def built(kind: Any, args: dict[str, Any]) -> Any:
    trainer = kind(
        model=str(resolve("tiny")),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(**args),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["1+1="] * 8}),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # `train` sets it.
    return trainer


def noise(seed: int, *shape: int, scale: float = 0.3) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(trainer: Any, seed: int) -> dict[str, Any]:
    """A micro-batch as TRL prepares it, with old and reference policies not far away."""
    draw = torch.Generator().manual_seed(seed)
    size, prompt_width = len(PROMPTS), max(map(len, PROMPTS))
    prompt_ids, prompt_mask = torch.full((2, size, prompt_width), 0)
    for row, prompt in enumerate(PROMPTS):
        prompt_ids[row, prompt_width - len(prompt) :] = torch.tensor(prompt)
        prompt_mask[row, prompt_width - len(prompt) :] = 1
    mask = (torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(4, 100, (size, WIDTH), generator=draw) * mask
    with torch.no_grad():
        logp, _, _ = trl.GRPOTrainer._get_per_token_logps_and_entropies(
            trainer,
            trainer.model,
            torch.cat([prompt_ids, ids], 1),
            torch.cat([prompt_mask, mask], 1),
            WIDTH,
        )
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": torch.tensor(ADVANTAGES),
        "old_per_token_logps": logp + noise(seed + 1, size, WIDTH),
        "ref_per_token_logps": logp + noise(seed + 2, size, WIDTH),
        "num_items_in_batch": mask.sum() * trainer.args.steps_per_generation,
    }


Measured = tuple[float, dict[str, Tensor], dict[str, list[float]]]


def run(trainer: Any, batches: list[dict[str, Any]]) -> Measured:
    """Loss and gradients of one optimiser step, and what was logged."""
    trainer._metrics["train"].clear()
    trainer._metrics["eval"].clear()
    trainer.model.zero_grad()
    total = 0.0
    for inputs in batches:
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        total += loss.item()
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    return total, found, {**trainer._metrics["train"], **trainer._metrics["eval"]}


def assert_same(ours: Measured, stock: Measured) -> None:
    assert ours[0] == pytest.approx(stock[0], rel=TOLERANCE, abs=1e-6)
    whole = torch.stack([g.norm() for g in stock[1].values()]).norm()
    assert whole > 0
    for name, wanted in stock[1].items():
        assert (ours[1][name] - wanted).norm() <= TOLERANCE * (wanted.norm() + 0.01 * whole), name
    assert ours[2].keys() == stock[2].keys()
    for name, values in stock[2].items():
        assert ours[2][name] == pytest.approx(values, rel=1e-4, abs=1e-6, nan_ok=True), name


def configure(monkeypatch: pytest.MonkeyPatch, trainers: list[Any], **settings: Any) -> None:
    for trainer, (name, value) in itertools.product(trainers, settings.items()):
        owner = trainer if hasattr(trainer, name) else trainer.args
        monkeypatch.setattr(owner, name, value)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_gradients_and_metrics_equal_stock_trl(
    trainers, monkeypatch, loss_type, accumulation, beta, level
):
    configure(
        monkeypatch,
        trainers,
        loss_type=loss_type,
        beta=beta,
        importance_sampling_level=level,
        current_gradient_accumulation_steps=accumulation,
        steps_per_generation=6,
        epsilon_high=1.1 if loss_type == "cispo" else 0.28,
    )
    batches = [batch(trainers[0], seed) for seed in range(accumulation)]

    stock, ours = (run(trainer, batches) for trainer in trainers)

    assert_same(ours, stock)


def ratios(width: int) -> Tensor:
    return noise(7, len(PROMPTS), width).exp().clamp(max=1.2)


def with_nan(logps: Tensor) -> Tensor:
    logps = logps + 0.4
    logps[0, 1] = torch.nan
    return logps


VLLM = {"use_vllm": True, "vllm_importance_sampling_correction": True}
SEQUENCE = {"importance_sampling_level": "sequence"}
ADAPTIVE = {"_entropy_bonus_enabled": True, "use_adaptive_entropy": True, "entropy_coef": 0.05}
BONUS = {"_entropy_bonus_enabled": True, "entropy_coef": 0.05}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "delta": ({"delta": 1.5}, {}),
    "delta below the clip": ({"delta": 1.1}, {}),
    "no old policy": ({}, {"old_per_token_logps": None}),
    "unbiased KL": ({"use_bias_correction_kl": True, "beta": 0.04}, {}),
    "unbiased KL by sequence": (
        {"use_bias_correction_kl": True, "beta": 0.04, **SEQUENCE},
        {},
    ),
    "advantage per token": ({}, {"advantages": noise(5, 6, WIDTH, scale=1.0)}),
    "advantage per token, by sequence": (SEQUENCE, {"advantages": noise(5, 6, WIDTH, scale=1.0)}),
    "vLLM by token": (VLLM, {"importance_sampling_ratio": ratios(WIDTH)}),
    "vLLM by sequence": (VLLM | SEQUENCE, {"importance_sampling_ratio": ratios(1)}),
    "vLLM, tokens masked": (VLLM, {"importance_sampling_ratio": ratios(WIDTH).relu().round()}),
    "vLLM in VESPO": (
        VLLM | {"loss_type": "vespo"},
        {"importance_sampling_ratio": ratios(WIDTH).masked_fill(noise(8, 6, WIDTH) > 0.3, 0.0)},
    ),
    "bonus": (BONUS, {}),
    "bonus on a sequence mean": (BONUS | {"loss_type": "grpo"}, {}),
    "adaptive bonus, applied": (ADAPTIVE | {"_last_world_entropy": 0.1, "entropy_target": 9.0}, {}),
    "adaptive bonus, withheld": (
        ADAPTIVE | {"_last_world_entropy": 0.3, "entropy_target": 0.2},
        {},
    ),
    "high entropy": ({"top_entropy_quantile": 0.4}, {}),
    "high entropy by sequence": ({"top_entropy_quantile": 0.4, **SEQUENCE}, {}),
    "high entropy, bonus, KL": ({"top_entropy_quantile": 0.4, "beta": 0.04, **BONUS}, {}),
    "off-policy mask": ({"off_policy_mask_threshold": 0.05}, {}),
    "off-policy mask of the sampler": (
        {"off_policy_mask_threshold": 0.05},
        {"sampling_per_token_logps": with_nan},
    ),
    "off-policy mask on policy": (
        {"off_policy_mask_threshold": 0.05},
        {"old_per_token_logps": None},
    ),
    "tool output": (
        {"beta": 0.04},
        {"tool_mask": torch.tensor([1, 0, 1, 1, 0, 1]).expand(6, WIDTH)},
    ),
    "a completion without a token": (
        {},
        {"completion_mask": lambda mask: mask * (torch.arange(6) != 1)[:, None]},
    ),
}


@pytest.mark.parametrize("shared", [True, False], ids=["shared prompts", "padded"])
@pytest.mark.parametrize(("settings", "changed"), SETTINGS.values(), ids=SETTINGS.keys())
def test_every_setting_acts_as_in_stock_trl(trainers, monkeypatch, settings, changed, shared):
    configure(
        monkeypatch,
        trainers,
        **{"beta": 0.0, "current_gradient_accumulation_steps": 2, "steps_per_generation": 2}
        | settings,
    )
    monkeypatch.setattr(trainers[0].accelerator.gradient_state, "sync_gradients", True)
    if not shared:
        monkeypatch.setitem(trainers[1]._window, id(trainers[1].model), 0)
    inputs = batch(trainers[0], 0)
    for name, value in changed.items():
        before = inputs.get(name, inputs["old_per_token_logps"])
        inputs[name] = value(before) if callable(value) else value

    stock, ours = (run(trainer, [inputs, inputs]) for trainer in trainers)

    assert_same(ours, stock)
    for name in ("entropy_coef", "_last_world_entropy"):
        assert getattr(trainers[1], name) == pytest.approx(getattr(trainers[0], name), rel=1e-5)


def test_evaluation_counts_one_batch_alone(trainers, monkeypatch):
    configure(monkeypatch, trainers, loss_type="dapo", current_gradient_accumulation_steps=3)
    inputs = batch(trainers[0], 0)
    for trainer in trainers:
        monkeypatch.setattr(trainer.model, "training", False)

    with torch.no_grad():
        stock, ours = (trainer._compute_loss(trainer.model, inputs) for trainer in trainers)

    torch.testing.assert_close(ours, stock, rtol=TOLERANCE, atol=1e-7)
    assert not ours.requires_grad


def test_a_micro_batch_without_a_token_has_a_gradient_of_zero(trainers):
    inputs = batch(trainers[0], 0)
    inputs["completion_mask"] = torch.zeros_like(inputs["completion_mask"])

    loss, found, _ = run(trainers[1], [inputs])

    assert loss == 0.0
    assert all(not gradient.any() for gradient in found.values())


def test_old_and_reference_scores_equal_stock_trl(trainers):
    inputs = batch(trainers[0], 0)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)

    stock, ours = (
        trainer._get_per_token_logps_and_entropies(
            trainer.ref_model, ids, mask, WIDTH, batch_size=4, compute_entropy=entropy
        )
        for trainer, entropy in zip(trainers, (False, True), strict=True)
    )

    torch.testing.assert_close(ours[0], stock[0], rtol=1e-5, atol=1e-5)
    assert ours[1].shape == stock[0].shape
    assert ours[2] is None
