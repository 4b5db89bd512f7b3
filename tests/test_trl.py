"""Stock TRL 1.16 as an oracle: same batch, same loss, same gradient of every parameter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlvr_fast import aggregate, objectives
from rlvr_fast.attention import head, hidden_states
from rlvr_fast.methods.vespo import GammaWeightedGradient
from rlvr_fast.models import resolve
from rlvr_fast.objectives import Objective
from rlvr_fast.ops.policy_loss import policy_loss
from rlvr_fast.packed import Sample, pack

trl = pytest.importorskip("trl", reason="stock TRL is the oracle; the test extra installs it")

TEMPERATURE = 0.7
MAX_LENGTH = 6
PROMPTS = [[3, 4, 5], [3, 4, 5], [6, 7], [6, 7]]
COMPLETIONS = [[8, 9, 10, 11], [9, 2], [10, 11, 12, 13, 14, 2], [5]]
ADVANTAGES = [1.0, -0.7, 0.4, -1.2]
LENGTHS = torch.tensor([len(c) for c in COMPLETIONS])
CLIPPED = objectives.ClippedSurrogate(clip_low=0.2, clip_high=0.28)

Case = tuple[dict[str, Any], Objective, Tensor]
CASES: dict[str, Case] = {
    "grpo": ({"loss_type": "grpo"}, CLIPPED, aggregate.sequence_mean(LENGTHS)),
    "bnpo": ({"loss_type": "bnpo"}, CLIPPED, aggregate.token_mean(LENGTHS)),
    "dapo": ({"loss_type": "dapo"}, CLIPPED, aggregate.token_mean(LENGTHS)),
    "dr_grpo": (
        {"loss_type": "dr_grpo"},
        CLIPPED,
        aggregate.constant_length(LENGTHS, length=MAX_LENGTH),
    ),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.2},
        objectives.CappedWeight(cap=1.2),
        aggregate.token_mean(LENGTHS),
    ),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        objectives.SequenceClippedSurrogate(clip_low=0.2, clip_high=0.28),
        aggregate.sequence_mean(LENGTHS),
    ),
    "luspo": (
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
        objectives.SequenceClippedSurrogate(clip_low=0.2, clip_high=0.28),
        aggregate.constant_length(LENGTHS, length=1),
    ),
    "vespo": ({"loss_type": "vespo"}, GammaWeightedGradient(), aggregate.token_mean(LENGTHS)),
    "with k3": (
        {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},
        CLIPPED + objectives.KL3(coef=0.04),
        aggregate.sequence_mean(LENGTHS),
    ),
    "with entropy": (
        {"loss_type": "bnpo", "entropy_coef": 0.05},
        CLIPPED + objectives.EntropyBonus(coef=0.05),
        aggregate.token_mean(LENGTHS),
    ),
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Any]:
    datasets = pytest.importorskip("datasets")

    def build(settings: dict[str, Any]) -> Any:
        defaults = {
            "output_dir": str(tmp_path_factory.mktemp("trl")),
            "use_cpu": True,
            "bf16": False,
            "per_device_train_batch_size": 4,
            "num_generations": 2,
            "max_completion_length": MAX_LENGTH,
            "temperature": TEMPERATURE,
            "epsilon": 0.2,
            "epsilon_high": 0.28,
            "report_to": "none",
            "disable_dropout": True,
        }
        return trl.GRPOTrainer(
            model=str(resolve("tiny")),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=trl.GRPOConfig(**(defaults | settings)),
            train_dataset=datasets.Dataset.from_dict({"prompt": ["1+1="] * 4}),
        )

    return build


def padded(rows: list[list[Any]], left: bool) -> tuple[Tensor, Tensor]:
    """Values and mask, `[B, L]`."""
    width = max(map(len, rows))
    values, mask = torch.zeros(2, len(rows), width, dtype=torch.float32)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        values[i, place], mask[i, place] = torch.tensor(row).float(), 1.0
    return values, mask


def shifted(logps: list[list[float]], sign: float) -> list[list[float]]:
    """Other log-probabilities not far away."""
    generator = torch.Generator().manual_seed(1)
    noise = (0.3 * torch.randn(len(c), generator=generator) for c in COMPLETIONS)
    return [(torch.tensor(x) + sign * n).tolist() for x, n in zip(logps, noise, strict=True)]


@pytest.mark.parametrize(("settings", "objective", "seq_weight"), CASES.values(), ids=CASES.keys())
def test_loss_and_gradients_equal_stock_trl(stock, settings, objective, seq_weight):
    trainer = stock(settings)
    model = trainer.model
    model.train()
    own = own_logp(model)
    old, ref = shifted(own, -1.0), shifted(own, 1.0)

    trainer.current_gradient_accumulation_steps = 1
    theirs = trainer._compute_loss(model, trl_inputs(old, ref, trainer))
    expected = gradients(model, theirs)
    ours = our_loss(model, objective, seq_weight, old, ref)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    for name, gradient in gradients(model, ours).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def own_logp(model: torch.nn.Module) -> list[list[float]]:
    result = []
    with torch.no_grad():
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
            logits = model(torch.tensor([prompt + completion])).logits[0] / TEMPERATURE
            logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            result.append(logp.gather(-1, torch.tensor(completion)[:, None]).squeeze(-1).tolist())
    return result


def trl_inputs(old: list[list[float]], ref: list[list[float]], trainer: Any) -> dict[str, Tensor]:
    prompt_ids, prompt_mask = padded(PROMPTS, left=True)
    completion_ids, completion_mask = padded(COMPLETIONS, left=False)
    return {
        "prompt_ids": prompt_ids.long(),
        "prompt_mask": prompt_mask.long(),
        "completion_ids": completion_ids.long(),
        "completion_mask": completion_mask.long(),
        "advantages": torch.tensor(ADVANTAGES),
        "old_per_token_logps": padded(old, left=False)[0],
        "ref_per_token_logps": padded(ref, left=False)[0],
        "num_items_in_batch": LENGTHS.sum() * trainer.args.steps_per_generation,
    }


def our_loss(
    model: torch.nn.Module,
    objective: Objective,
    seq_weight: Tensor,
    old: list[list[float]],
    ref: list[list[float]],
) -> Tensor:
    samples = [
        Sample(
            prompt_ids=PROMPTS[i],
            completion_ids=COMPLETIONS[i],
            token_weight=seq_weight[i].item(),
            advantage=ADVANTAGES[i],
            old_logp=old[i],
            ref_logp=ref[i],
        )
        for i in range(4)
    ]
    packed = pack([samples[:2], samples[2:]])
    hidden = hidden_states(model, packed)[packed.hidden_index]
    weight = head(model).weight
    return policy_loss(hidden, weight, packed.scored, objective, temperature=TEMPERATURE).loss


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}
