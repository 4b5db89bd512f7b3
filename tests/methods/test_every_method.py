"""What holds for every registered method, whatever it is: nothing here knows one by name."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from every import NEXT_SEED, collected, every_method, moved, optimiser
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from rlvr_fast.methods.rollouts import as_values
from rlvr_fast.tracing.level import Level

NAN = float("nan")


def gradients(made, groups):
    """`[updates, parameters]`, the weights drifting between updates as in every other call."""
    model, found = made.model, []
    before = parameters_to_vector(model.parameters()).detach()

    def apply():
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        made.adamw.zero_grad()
        moved(model, seed=len(found), by=0.01)
        return 0.0

    made.apply = apply
    try:
        made.update(groups, step=1)
    finally:
        vector_to_parameters(before, model.parameters())
        made.adamw.zero_grad()
    return torch.stack(found)


@cache
def usual_gradients(name):
    made = optimiser(name)
    return gradients(made, made._method.advantages(collected(made)))


def assert_usual(name, found):
    wanted = usual_gradients(name)
    assert wanted.norm(dim=1).min() > 0
    assert ((found - wanted).norm(dim=1) <= 1e-5 * wanted.norm(dim=1)).all()


@every_method
@pytest.mark.parametrize("budget", [1, 20])
def test_how_a_batch_is_cut_changes_no_gradient(name, budget):
    """With a budget of 1 each sequence is a pass of its own, or each group where one is whole."""
    made = optimiser(name, tokens_per_microbatch=budget, share_prompts=budget > 1)
    passes = []
    backward = made.backward
    made.backward = lambda packed: passes.append(packed) or backward(packed)

    found = gradients(made, made._method.advantages(collected(made)))

    assert len(passes) > len(found) or made._level is Level.BATCH
    assert_usual(name, found)


@every_method
def test_the_order_of_groups_and_completions_changes_no_gradient(name):
    made = optimiser(name)

    turned = [group[::-1] for group in collected(made)[::-1]]

    assert_usual(name, gradients(made, made._method.advantages(turned)))


@every_method
def test_masked_tokens_change_no_gradient_whatever_their_fields_hold(name):
    made = optimiser(name)
    groups = [[with_masked_tokens(rollout) for rollout in group] for group in collected(made)]

    groups = [[spoiled(rollout) for rollout in g] for g in made._method.advantages(groups)]

    assert_usual(name, gradients(made, groups))


def with_masked_tokens(rollout):
    """The same, and two tokens that the policy did not write."""

    def longer(value, more):
        return [*value, more, more] if isinstance(value, list | tuple) else value

    length = len(rollout.completion_ids)
    return replace(
        rollout,
        completion_ids=[*rollout.completion_ids, 7, 8],
        loss_mask=longer(rollout.loss_mask or [1] * length, 0),
        rollout_logp=longer(rollout.rollout_logp, NAN),
        advantage=longer(rollout.advantage, NAN),
        extras={key: longer(value, NAN) for key, value in rollout.extras.items()},
    )


def spoiled(rollout):
    """NaN wherever a masked token has a field of its own."""

    def without(value):
        if not isinstance(value, list | tuple):
            return value
        return [x if keep else NAN for x, keep in zip(value, rollout.loss_mask, strict=True)]

    return replace(
        rollout,
        advantage=without(rollout.advantage),
        extras={key: without(value) for key, value in rollout.extras.items()},
    )


@every_method
def test_what_a_method_remembers_survives_a_checkpoint(name):
    kept = optimiser(name)
    metrics = kept_weights(kept, kept._method.advantages(collected(kept)))
    kept._method.observe(metrics)
    fresh = optimiser(name)

    fresh._method.load_state_dict(json.loads(json.dumps(kept._method.state_dict())))

    found, wanted = (
        [
            [as_values(rollout) for rollout in group]
            for group in made._method.advantages(collected(made, NEXT_SEED))
        ]
        for made in (fresh, kept)
    )
    assert found == wanted
    assert fresh._method.state_dict() == kept._method.state_dict()


def kept_weights(made, groups):
    """What an update reports; the weights are as before."""
    made.apply = lambda: made.adamw.zero_grad() or 1.0
    return made.update(groups, step=1)
