"""Stock TRL 1.16 as an oracle of whole methods: advantages, then loss and gradients of the model.

The objectives' own comparison is `tests/test_trl.py`; here options and weights are the methods'.
"""

import pytest
import torch
from rewarded import FIXTURE, advantages, group

from rlvr_fast.attention import head, hidden_states
from rlvr_fast.methods import method
from rlvr_fast.methods.base import BatchShape
from rlvr_fast.models import resolve
from rlvr_fast.ops.policy_loss import policy_loss
from rlvr_fast.packed import Sample, pack

trl = pytest.importorskip("trl", reason="stock TRL is the oracle; the test extra installs it")
datasets = pytest.importorskip("datasets")

LONGEST = 6
PROMPTS = [[3, 4, 5], [3, 4, 5], [6, 7], [6, 7]]
COMPLETIONS = [[8, 9, 10, 11], [9, 2], [10, 11, 12, 13, 14, 2], [5]]
LENGTHS = torch.tensor([4, 2, 6, 1])
ADVANTAGES = [1.0, -0.7, 0.4, -1.2]
SHIFT = torch.tensor([0.3, -0.2, 0.1, -0.4, 0.25, 0.15, -0.3, 0.2, -0.1, 0.35, -0.25, 0.05, 3.0])
"""Of the old policy's log-probabilities; the last makes a ratio of 20 with a negative advantage."""

GRPO = {"trainer": trl.GRPOTrainer, "config": trl.GRPOConfig}
RLOO = {"trainer": trl.RLOOTrainer, "config": trl.RLOOConfig}
CASES = {
    "bnpo": (GRPO, {"loss_type": "bnpo"}),
    "dapo": (GRPO, {"loss_type": "dapo", "epsilon_high": 0.28, "delta": 10.0}),
    "dr_grpo": (GRPO, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "rloo": (RLOO, {}),
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    def build(kind, settings):
        defaults = {
            "output_dir": str(tmp_path_factory.mktemp("trl")),
            "use_cpu": True,
            "bf16": False,
            "per_device_train_batch_size": 10,
            "num_generations": 5,
            "max_completion_length": LONGEST,
            "beta": 0.0,
            "report_to": "none",
            "disable_dropout": True,
        }
        return kind["trainer"](
            model=str(resolve("tiny")),
            reward_funcs=lambda completions, **_: [*FIXTURE, 1.0, 1.0, 1.0, 1.0, 1.0],
            args=kind["config"](**(defaults | settings)),
            train_dataset=datasets.Dataset.from_dict({"prompt": ["1+1=", "2+2="]}),
        )

    return build


@pytest.mark.parametrize("name", CASES)
def test_advantages_equal_stock_trl(stock, name):
    """But for its 1e-4 beside the standard deviation, where we have 1e-6."""
    trainer = stock(*CASES[name])
    trainer.model.train()

    batch = [{"prompt": text} for text in ["1+1="] * 5 + ["2+2="] * 5]
    theirs = trainer._generate_and_score_completions(batch)["advantages"]

    ours = advantages(name, group(*FIXTURE), group(*[1.0] * 5, index=1))
    torch.testing.assert_close(torch.tensor(ours).float(), theirs, rtol=0, atol=3e-4)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_stock_trl(stock, name):
    trainer = stock(*CASES[name])
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.model.train()
    old = list((own_logp(model) - SHIFT).split(LENGTHS.tolist()))

    theirs = trainer._compute_loss(model, trl_inputs(old, trainer))
    expected = gradients(model, theirs)
    ours = our_loss(model, method(name, {}), old)

    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    error = (gradients(model, ours) - expected).norm() / expected.norm()
    assert error < 1e-5


def own_logp(model):
    found = []
    with torch.no_grad():
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
            logits = model(torch.tensor([prompt + completion])).logits[0]
            logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            found.append(logp.gather(-1, torch.tensor(completion)[:, None]).squeeze(-1))
    return torch.cat(found)


def padded(rows, side="right"):
    rows = [torch.as_tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)


def trl_inputs(old, trainer):
    return {
        "prompt_ids": padded(PROMPTS, "left"),
        "prompt_mask": padded([[1] * len(row) for row in PROMPTS], "left"),
        "completion_ids": padded(COMPLETIONS),
        "completion_mask": padded([[1] * len(row) for row in COMPLETIONS]),
        "advantages": torch.tensor(ADVANTAGES),
        "old_per_token_logps": padded(old),
        "old_logps": torch.stack([row.sum() for row in old]),
        "num_items_in_batch": LENGTHS.sum() * trainer.args.steps_per_generation,
    }


def our_loss(model, chosen, old):
    shape = BatchShape(
        seq_lengths=LENGTHS,
        group_offsets=torch.tensor([0, 2, 4]),
        max_completion_tokens=LONGEST,
    )
    samples = [
        Sample(
            prompt_ids=PROMPTS[i],
            completion_ids=COMPLETIONS[i],
            token_weight=weight,
            advantage=ADVANTAGES[i],
            old_logp=old[i].tolist(),
        )
        for i, weight in enumerate(chosen.seq_weights(shape).tolist())
    ]
    packed = pack([samples[:2], samples[2:]])
    hidden = hidden_states(model, packed)[packed.hidden_index]
    weight = head(model).weight
    return policy_loss(hidden, weight, packed.scored, chosen.objective()).loss


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])
