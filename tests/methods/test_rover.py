"""Squared Bellman error on the value of a random policy: targets, gradients, and the trainer."""

import math
from contextlib import closing
from dataclasses import dataclass

import pytest
import torch
from known import BACKENDS, LOGP, OLD, TOKEN_MEAN, assert_known, f1
from rewarded import FIXTURE, advantages, group

from rlvr_fast import config as configs
from rlvr_fast.methods import method
from rlvr_fast.methods.rover import OLD_VALUE, TARGET, following
from rlvr_fast.objectives import PolicyGradient
from rlvr_fast.ops.token_statistics import TokenStatistics, token_statistics
from rlvr_fast.packed import Sample, pack
from rlvr_fast.tasks import load_task
from rlvr_fast.tracing.level import Level, level
from rlvr_fast.tracing.trace import trace
from rlvr_fast.trainer import Trainer

FLAT, TILTED = -1.098612, -1.407606


@dataclass
class Logits:
    """A scorer of given logits, one `[T, V]` per call."""

    calls: list[torch.Tensor]
    updates: int = 2

    def statistics(self, packed) -> TokenStatistics:
        return token_statistics(self.calls.pop(0), packed.scored.targets)


def packed(completions, advantages, masks=None):
    samples = [
        Sample(prompt_ids=[0], completion_ids=ids, advantage=advantage, loss_mask=mask)
        for ids, advantage, mask in zip(
            completions, advantages, masks or [None] * len(advantages), strict=True
        )
    ]
    return pack([samples])


def targets(pack_, calls, **options):
    """After as many updates as there are calls."""
    kind, scorer = method("rover", options), Logits(list(calls))
    for update in range(len(calls)):
        (pack_,) = kind.prepare([pack_], scorer, update)
    return pack_.scored.extras[TARGET].tolist()


def test_the_value_of_a_state_is_the_mean_log_probability():
    """Source: the method's own definition; three tokens, logits 0 0 0 and 1 0 -1."""
    logits = torch.tensor([[0.0, 0, 0], [1, 0, -1]])

    found = token_statistics(logits, torch.zeros(2, dtype=torch.int64))

    value = found.mean_logit - found.logsumexp
    assert value.tolist() == pytest.approx([FLAT, TILTED], abs=1e-6)


def test_a_target_adds_what_the_next_state_gained_and_the_last_has_no_next():
    """Source: the method's own definition: A = 1, the second state moves by -.308994."""
    before = torch.zeros(2, 3)
    after = torch.tensor([[0.0, 0, 0], [1, 0, -1]])
    found = targets(packed([[1, 2]], [1.0]), [before, after])

    assert found == pytest.approx([0.691006, 1.0], abs=1e-6)


def test_the_loss_and_gradient_of_two_tokens_have_their_known_values():
    """Source: the method's own definition: log-ratios .2 and -.1, loss .725543."""
    gaps = [0.2, -0.1, 0, 0, 0]
    found = f1(
        method("rover", {}).objective(),
        "reference",
        torch.tensor([1 / 2, 1 / 2]),
        extras={TARGET: [0.691006, 1.0, 0, 0, 0]},
        logp=[old + gap for old, gap in zip(OLD, gaps, strict=True)],
    )

    assert found.loss == pytest.approx(0.725543, abs=1e-6)
    assert found.dlogp.tolist() == pytest.approx([-0.491006, -1.1, 0, 0, 0], abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_backends_have_the_closed_form(backend):
    target = [1.0, 0.5, -1.0, 0.25, 0.0]
    found = f1(
        method("rover", {"rho": 2.0}).objective(), backend, TOKEN_MEAN, extras={TARGET: target}
    )

    errors = [2 * (a - b) - y for a, b, y in zip(LOGP, OLD, target, strict=True)]
    assert_known(found, sum(e * e for e in errors) / 5, [4 * e / 5 for e in errors])


def test_the_objective_runs_inside_the_kernel():
    objective = method("rover", {}).objective()

    assert level(objective) is Level.TOKEN
    assert trace(objective) is not None


def test_on_policy_the_gradient_is_twice_that_of_reinforce():
    advantage = [0.5, 0.5, 0.5, -0.5, -0.5]
    plain = f1(PolicyGradient(), "reference", TOKEN_MEAN, advantage=advantage, old=LOGP)

    found = f1(
        method("rover", {}).objective(),
        "reference", TOKEN_MEAN, extras={TARGET: advantage}, old=LOGP,
    )  # fmt: skip

    torch.testing.assert_close(found.dlogp, 2 * plain.dlogp, rtol=1e-12, atol=0)


@pytest.mark.parametrize("gap", [60.0, -60.0])
def test_a_log_ratio_of_sixty_either_way_is_called_back(gap):
    found = f1(
        method("rover", {}).objective(), "cpp", TOKEN_MEAN,
        extras={TARGET: [0.0] * 5}, old=[x - gap for x in LOGP],
    )  # fmt: skip

    assert found.dlogp.tolist() == pytest.approx([2 * gap / 5] * 5)


def test_what_the_next_token_gained_never_crosses_into_another_sequence():
    scored = packed([[1, 2, 3], [], [4], [5, 6]], [1.0] * 4).scored
    values = torch.arange(1.0, 7.0)

    assert following(values, scored).tolist() == [2.0, 3.0, 0.0, 0.0, 6.0, 0.0]


def test_a_next_token_that_the_policy_did_not_write_has_no_future():
    masked = packed([[1, 2, 3], [4, 5]], [1.0, 1.0], [[1, 0, 1], [1, 1]]).scored
    values = torch.tensor([1.0, math.nan, 3.0, 4.0, 5.0])

    assert following(values, masked).tolist() == [0.0, 3.0, 0.0, 5.0, 0.0]


def test_no_tokens_at_all_have_no_future():
    assert following(torch.zeros(0), packed([[]], [1.0]).scored).shape == (0,)


def test_the_old_value_is_that_before_the_first_update():
    flat, tilted = torch.zeros(2, 3), torch.tensor([[0.0, 0, 0], [1, 0, -1]])
    pack_ = packed([[1, 2]], [1.0])

    assert targets(pack_, [flat]) == [1.0, 1.0]
    assert targets(pack_, [flat, tilted, flat]) == [1.0, 1.0]
    assert targets(pack_, [tilted, tilted, flat]) == pytest.approx([1.308994, 1.0], abs=1e-6)
    assert OLD_VALUE not in pack_.scored.extras


@pytest.mark.parametrize(
    ("options", "wanted"), [({"future": 0.5}, 0.845503), ({"rho": 2}, 0.382012)]
)
def test_rho_and_lambda_scale_the_future(options, wanted):
    after = torch.tensor([[0.0, 0, 0], [1, 0, -1]])
    options = {name: float(value) for name, value in options.items()}

    found = targets(packed([[1, 2]], [1.0]), [torch.zeros(2, 3), after], **options)

    assert found == pytest.approx([wanted, 1.0], abs=1e-6)


@pytest.mark.parametrize(("options", "updates"), [({"future": 0.0}, 2), ({}, 1)])
def test_without_a_future_nobody_is_asked_for_statistics(options, updates):
    scorer = Logits([], updates=updates)

    (found,) = method("rover", options).prepare([packed([[1, 2]], [0.5])], scorer, 0)

    assert found.scored.extras[TARGET].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(("standardise", "wanted"), [(False, 0.6), (True, 1.095443)])
def test_the_reward_is_centred_and_on_demand_divided(standardise, wanted):
    first, *_ = advantages("rover", group(*FIXTURE), standardise=standardise)

    assert first == pytest.approx(wanted, abs=2e-6)


def weights_after_a_step(folder, updates, future):
    given = {
        "method": "rover", "run_folder": str(folder), "updates_per_batch": updates,
        "max_completion_tokens": 4, "method_options": {"future": future},
    }  # fmt: skip
    config = configs.load("tiny", given)
    with closing(load_task(config.task, config.task_options)) as task:
        trainer = Trainer(config, task)
        trainer.sync()
        trainer.step(1)
        return [p.detach().clone() for p in trainer.model.parameters()]


@pytest.mark.parametrize(("updates", "same"), [(1, True), (2, False)])
def test_the_future_acts_from_the_second_update_on(updates, same, tmp_path):
    with_it, without = (
        weights_after_a_step(tmp_path / str(future), updates, future) for future in (1.0, 0.0)
    )

    assert all(map(torch.equal, with_it, without)) is same
