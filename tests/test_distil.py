"""Distillation through the trainer: the teacher reads other prompts, the replies are the same."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from rollouts import rollout_of
from torch.nn.utils import parameters_to_vector
from transformers import AutoModelForCausalLM

from rlvr_fast import config as configs
from rlvr_fast import lora, models
from rlvr_fast.methods.base import Method
from rlvr_fast.objectives import Distillation, Divergence
from rlvr_fast.ops import linear_kl
from rlvr_fast.ops.transform import LogitTransform
from rlvr_fast.optimise import Optimiser

VOCABULARY = 97
"""Fewer than the model's embedding has: the rest can be neither taught nor learnt."""
LENGTHS = [[4, 1, 6], [3, 5]]
"""Of the replies to two questions."""
WANTED = Distillation(kind=Divergence.FORWARD, temperature=2.0, scale=4.0)


@dataclass(frozen=True, kw_only=True)
class Hinted(Method):
    """The mean divergence of all tokens, whatever the advantages."""

    needs_reference: ClassVar[bool] = True
    wanted: Distillation = WANTED

    def objective(self):
        return self.wanted


def rollouts(*, hinted=True):
    """Every reply has a hint of its own length; the questions differ in length too."""
    torch.manual_seed(0)
    groups = []
    for index, lengths in enumerate(LENGTHS):
        question = torch.randint(4, VOCABULARY, (3 + 9 * index,)).tolist()
        replies = [torch.randint(4, VOCABULARY, (length,)).tolist() for length in lengths]
        hints = [torch.randint(4, VOCABULARY, (5 + 4 * n,)).tolist() for n in range(len(replies))]
        groups.append(
            [
                rollout_of(
                    reply,
                    prompt_ids=question,
                    index=index,
                    advantage=1.0,
                    teacher_prompt_ids=[*hint, *question] if hinted else question,
                )
                for hint, reply in zip(hints, replies, strict=True)
            ]
        )
    return groups


def optimiser(wanted=WANTED, *, moved=False, **overrides):
    config = configs.load("tiny", {"method": "grpo", "entropy_coef": 0.0, **overrides})
    path = models.resolve("tiny")
    model, _ = models.load(path)
    reference = None
    if config.lora_rank:
        lora.wrap(model, rank=config.lora_rank, alpha=config.lora_alpha, seed=0)
    else:
        reference = models.load(path)[0].requires_grad_(False)
    if moved:
        shift(model)
    return Optimiser(config, Hinted(wanted=wanted), model, reference, vocab_size=VOCABULARY)


@torch.no_grad()
def shift(model):
    draw = torch.Generator().manual_seed(1)
    for _, parameter in lora.trained(model):
        parameter += 0.05 * torch.randn(parameter.shape, generator=draw)


def passed(made, groups):
    """The loss and the gradient of one batch, as one vector."""
    loss = sum(made.backward(p).loss for p in made.packs(made.samples(groups)))
    gradient = torch.cat([p.grad.flatten() for _, p in lora.trained(made.model)])
    made.adamw.zero_grad()
    return loss, gradient


def defined(student, teacher, groups, wanted):
    """The same in fp64 by Hugging Face's own forward, one sequence at a time, and autograd."""

    def hidden(model, prompt, reply):
        states = model.model(torch.tensor([[*prompt, *reply]])).last_hidden_state[0]
        return states[len(prompt) - 1 : -1]

    flat = [rollout for group in groups for rollout in group]
    divergences = torch.cat(
        [
            linear_kl.reference(
                hidden(student, rollout.train_prompt_ids, rollout.completion_ids),
                student.lm_head.weight[:VOCABULARY],
                hidden(teacher, rollout.teacher_prompt_ids, rollout.completion_ids),
                teacher.lm_head.weight[:VOCABULARY],
                kind=wanted.kind,
                transform=LogitTransform(temperature=wanted.temperature),
            )
            for rollout in flat
        ]
    )
    assert len(divergences) == sum(len(rollout.completion_ids) for rollout in flat)
    return wanted.scale * divergences.mean()


def theirs():
    return AutoModelForCausalLM.from_pretrained(models.resolve("tiny"), dtype=torch.float64).eval()


@pytest.mark.parametrize("kind", Divergence)
def test_loss_and_gradient_are_the_definition_on_other_hidden_states(kind):
    wanted = Distillation(kind=kind, temperature=2.0, scale=4.0)
    made, groups = optimiser(wanted, moved=True, temperature=0.7), rollouts()
    student, teacher = theirs(), theirs().requires_grad_(False)
    student.load_state_dict(made.model.state_dict())

    loss, gradient = passed(made, groups)

    truth = defined(student, teacher, groups, wanted)
    truth.backward()
    exact = torch.cat([p.grad.flatten() for p in student.parameters()])
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    assert (gradient - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize("changes", [
    {"tokens_per_microbatch": 1}, {"tokens_per_microbatch": 24}, {"share_prompts": False},
    {"logits_budget": 4 * VOCABULARY * 3},
])  # fmt: skip
def test_how_the_batch_is_cut_changes_no_gradient(changes):
    whole, cut = optimiser(moved=True), optimiser(moved=True, **changes)
    groups = rollouts()

    (loss, gradient), (other_loss, other) = passed(whole, groups), passed(cut, groups)

    few = "tokens_per_microbatch" in changes
    assert (len(cut.packs(cut.samples(groups))) > 1) == few
    assert other_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert (other - gradient).norm() < 1e-6 * gradient.norm()


def test_a_student_that_sees_and_is_what_its_teacher_does_has_nothing_to_learn():
    loss, gradient = passed(optimiser(), rollouts(hinted=False))

    assert loss == 0
    assert gradient.abs().max() < 1e-8


def test_a_hint_alone_gives_something_to_learn():
    loss, gradient = passed(optimiser(), rollouts())

    assert loss > 1e-4
    assert gradient.norm() > 1e-3


def test_half_precision_is_near():
    (loss, gradient), (other_loss, other) = (
        passed(optimiser(moved=True, precision=precision), rollouts())
        for precision in ("fp32", "bf16")
    )

    assert other_loss.item() == pytest.approx(loss.item(), rel=0.02)
    assert 1e-4 < (other - gradient).norm() / gradient.norm() < 0.05


def test_under_adapters_the_teacher_is_the_model_without_them():
    made, groups = optimiser(moved=True, lora_rank=4), rollouts()
    student, teacher = theirs(), theirs().requires_grad_(False)
    student.load_state_dict(dict(lora.named_weights(made.model)))

    loss, gradient = passed(made, groups)

    truth = defined(student, teacher, groups, WANTED)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    assert gradient.norm() > 0
    assert all(p.grad is None for p in made.model.parameters() if not p.requires_grad)


def test_adapters_get_the_gradient_of_the_weights_they_stand_for():
    """`dB = (alpha / rank) dW A^T` at the start, where the adapters change no output."""
    made, whole, groups = optimiser(lora_rank=4, lora_alpha=8.0), optimiser(), rollouts()
    for each in (made, whole):
        for packed in each.packs(each.samples(groups)):
            each.backward(packed)

    checked = 0
    for name, layer in made.model.named_modules():
        if hasattr(layer, "lora_B"):
            exact = (
                2.0 * whole.model.get_submodule(name).weight.grad @ layer.lora_A.default.weight.T
            )
            found = layer.lora_B.default.weight.grad
            assert (found - exact).norm() <= 1e-5 * exact.norm()
            checked += 1
    assert checked == 14


def test_masked_tokens_have_no_influence():
    made, groups = optimiser(moved=True), rollouts()
    longer = [
        [
            replace(r, completion_ids=[*r.completion_ids, 7, 8],
                    loss_mask=[1] * len(r.completion_ids) + [0, 0])
            for r in group
        ]
        for group in groups
    ]  # fmt: skip

    (loss, gradient), (other_loss, other) = passed(made, groups), passed(made, longer)

    assert other_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert (other - gradient).norm() < 1e-6 * gradient.norm()


@pytest.mark.parametrize("rank", [0, 4])
def test_updates_bring_the_student_to_its_teacher(rank):
    made = optimiser(learning_rate=5e-3, updates_per_batch=2, lora_rank=rank)

    read = [made.update(rollouts(), step) for step in range(1, 17)]

    assert read[-1]["loss"] < 0.1 * read[0]["loss"]
    assert all(values["grad_norm"] > 0 for values in read)


def test_the_teacher_never_moves():
    made = optimiser(learning_rate=1e-2)
    before = parameters_to_vector(made.reference.model.parameters()).clone()

    made.update(rollouts(), step=1)

    assert torch.equal(parameters_to_vector(made.reference.model.parameters()), before)


def test_a_batch_that_nobody_is_taught_in_is_harmless():
    made = optimiser()
    before = parameters_to_vector(made.model.parameters()).clone()
    groups = [[replace(r, loss_mask=[0] * len(r.completion_ids)) for r in g] for g in rollouts()]

    read = made.update(groups, step=1)

    assert read["microbatches"] == 0
    assert torch.equal(parameters_to_vector(made.model.parameters()), before)


def test_replies_without_a_teachers_prompt_are_refused():
    groups = [[replace(r, teacher_prompt_ids=None) for r in group] for group in rollouts()]

    with pytest.raises(ValueError, match=r"^teacher_prompt_ids: wanted them on every rollout"):
        optimiser().update(groups, step=1)


@pytest.mark.parametrize("setting", [
    {"kl_coef": 0.1}, {"entropy_coef": 0.1}, {"mismatch_correction": "token_truncate"}
])  # fmt: skip
def test_what_only_a_policy_gradient_can_have_is_refused(setting):
    (name,) = setting

    with pytest.raises(ValueError, match=rf"^{name}: wanted .* which distils, got"):
        optimiser(**setting)
