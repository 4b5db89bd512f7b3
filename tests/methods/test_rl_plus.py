"""RL-PLUS: demonstrations in the group, and what their tokens are worth."""

import math
from contextlib import closing

import pytest
import torch
from known import BACKENDS, LOGP, OLD, SEQUENCE_SUM, f1

from benches import drawn
from rlvr_fast import config as configs
from rlvr_fast import models
from rlvr_fast.methods import method
from rlvr_fast.methods.base import BatchShape, written
from rlvr_fast.methods.rl_plus import MixedAuthorSurrogate
from rlvr_fast.methods.rollouts import as_values, from_values
from rlvr_fast.tasks import Example, load_task
from rlvr_fast.trainer import Trainer

LAST_TWO = {"off_policy": [0.0, 0.0, 0.0, 1.0, 1.0]}


def tokenizer():
    return models.load(models.resolve("tiny"))[1]


def context(*examples, samples=4, longest=6):
    return drawn.context(examples, tokenizer(), samples=samples, lengths=(1, longest))


def groups(chosen, on):
    return chosen.rollout(on, chosen.select_prompts(on))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("probability", "old", "exponent", "loss", "slope"),
    [
        (0.5, 0.5, 0.5, -0.565685, -0.565685),
        (0.2, 0.1, 0.5, -0.615385 * 0.894427, -0.615385 * 0.894427),
        (0.2, 0.1, 0.0, -0.615385, -0.615385),
        (0.2, 0.1, 0.7, -0.615385 * 0.8**0.7, -0.615385 * 0.8**0.7),
        (0.9999999, 0.9999999, 0.5, 0.0, 0.0),
    ],
)
def test_a_demonstrated_token_has_known_values(probability, old, exponent, loss, slope, backend):
    """Source: the method's notes, from the released code; the weight's slope is the value, since
    it is linear in the probability."""
    objective = MixedAuthorSurrogate(exponent=exponent)

    found = f1(
        objective,
        backend,
        torch.tensor([1.0, 1.0]),
        extras=LAST_TWO,
        advantage=[0.0, 0.0, 0.0, 1.0, 0.0],
        logp=[-0.7, -0.7, -0.7, math.log(probability), -0.7],
        old=[-0.7, -0.7, -0.7, math.log(old), -0.7],
    )

    assert found.loss == pytest.approx(loss, abs=5e-4 if probability > 0.9 else 2e-6)
    wanted = [0.0, 0.0, 0.0, slope, 0.0]
    assert found.dlogp.tolist() == pytest.approx(wanted, abs=5e-4 if probability > 0.9 else 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_own_tokens_have_their_ratio_and_no_clip(backend):
    """Oracle: `-r A` in Python; both sequences are the policy's own."""
    found = f1(
        method("rl_plus", {}).objective(), backend, SEQUENCE_SUM, extras={"off_policy": [0.0] * 5}
    )

    ratios = [math.exp(logp - old) for logp, old in zip(LOGP, OLD, strict=True)]
    wanted = [-0.5 * a * ratio for a, ratio in zip([1, 1, 1, -1, -1], ratios, strict=True)]
    assert found.dlogp.tolist() == pytest.approx(wanted, rel=1e-5)
    assert found.loss == pytest.approx(sum(wanted), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_of_both_authors_stay_finite_wherever_the_policy_has_gone(backend):
    far = [-60.0, -0.001, -60.0, -60.0, -0.001]
    found = f1(
        method("rl_plus", {}).objective(),
        backend,
        SEQUENCE_SUM,
        extras=LAST_TWO,
        logp=far,
        old=[-0.001, -60.0, -60.0, -0.001, -60.0],
    )

    assert math.isfinite(found.loss)
    assert found.dlogp.isfinite().all()


def test_the_last_rollouts_of_a_group_are_solutions():
    on = context(Example("3+4=", columns={"solution": "=7"}), Example("1+1=", {"solution": "2"}))

    first, second = groups(method("rl_plus", {}), on)

    end = on.tokenizer.eos_token_id
    given = first[-1]
    assert len(first) == len(second) == 4
    assert list(given.completion_ids) == [*on.tokenizer("=7")["input_ids"][-2:], end]
    assert on.tokenizer.decode(given.completion_ids[:-1]) == given.text == "=7"
    assert given.finished
    assert given.rollout_logp is None
    assert given.metadata == {"off_policy": True}
    assert [rollout.extras["off_policy"] for rollout in first] == [0.0, 0.0, 0.0, 1.0]
    assert all(rollout.rollout_logp is not None for rollout in first[:-1])
    assert second[-1].text == "2"
    assert from_values(as_values(given), on.prompts) == given


def test_several_demonstrations_come_from_a_list_and_sizes_stay_those_of_the_examples():
    columns = {"worked": ["a", "b", "c"]}
    on = context(Example("?", columns, samples=5), Example("!", columns, samples=3))

    found = groups(method("rl_plus", {"demonstrations": 2, "column": "worked"}), on)

    assert [[rollout.text for rollout in group[-2:]] for group in found] == [["a", "b"]] * 2
    assert [sum(r.extras["off_policy"] for r in group) for group in found] == [2, 2]
    assert [len(group) for group in found] == [5, 3]


def test_a_number_is_a_solution_too():
    on = context(Example("3+4=", columns={"solution": 7}))

    (group,) = groups(method("rl_plus", {}), on)

    assert group[-1].text == "7"


def test_a_demonstration_is_cut_off_like_any_completion():
    on = context(Example("?", columns={"solution": "123456789"}), longest=3)

    (group,) = groups(method("rl_plus", {}), on)

    assert group[-1].text == "123"
    assert len(group[-1].completion_ids) == 3
    assert not group[-1].finished


def test_a_text_that_fits_but_for_its_end_is_not_finished():
    on = context(Example("?"), longest=2)
    (prompt,) = on.prompts.take(0, 1)

    assert written(on, prompt, "1").finished
    assert not written(on, prompt, "12").finished


def test_without_demonstrations_all_is_sampled():
    on = context(Example("?"))

    (group,) = groups(method("rl_plus", {"demonstrations": 0}), on)

    assert [rollout.extras for rollout in group] == [{"off_policy": 0.0}] * 4


@pytest.mark.parametrize("columns", [{}, {"solution": None}, {"solution": []}, {"solution": True}])
def test_an_example_without_a_solution_is_refused(columns):
    message = (
        r"^column: wanted 1 solutions in column 'solution' of every example of task drawn, got"
    )
    with pytest.raises(ValueError, match=message):
        groups(method("rl_plus", {}), context(Example("?", columns)))


def test_a_group_of_demonstrations_only_is_refused():
    message = r"^demonstrations: wanted fewer than the samples of a prompt, 2, got 2$"
    on = context(Example("?", columns={"solution": "1"}), samples=2)
    with pytest.raises(ValueError, match=message):
        groups(method("rl_plus", {"demonstrations": 2}), on)


def test_a_tokenizer_without_an_end_is_refused():
    on = context(Example("?"))
    on.tokenizer.eos_token = None
    (prompt,) = on.prompts.take(0, 1)

    with pytest.raises(ValueError, match=r"^model: wanted one whose tokenizer has an end-of-seq"):
        written(on, prompt, "1")


def test_token_losses_are_divided_by_a_constant_length():
    shape = BatchShape(
        seq_lengths=torch.tensor([2, 3]),
        group_offsets=torch.tensor([0, 2]),
        max_completion_tokens=8,
    )

    assert method("rl_plus", {}).seq_weights(shape).tolist() == [1 / 16] * 2
    assert method("rl_plus", {"length": 2}).seq_weights(shape).tolist() == [0.25] * 2


def test_demonstrations_are_verified_trained_and_teach(tmp_path):
    """The random model finds next to no sum by itself; each group holds one right answer."""
    given = {
        "run_folder": str(tmp_path),
        "method": "rl_plus",
        "method_options": {"column": "answer"},
        "entropy_coef": 0.0,
    }
    config = configs.load("tiny", given)
    with closing(load_task(config.task, config.task_options)) as task:
        trainer = Trainer(config, task)
        trainer.sync()
        before = trainer.evaluate()["eval_reward"]

        read = [trainer.step(step) for step in range(1, 31)]

        after = trainer.evaluate()["eval_reward"]
    metrics, found = read[0]
    shown = [group[-1] for group in found]
    assert {rollout.reward for rollout in shown} == {1.0}
    assert min(rollout.advantage for rollout in shown) > 0
    assert [r.text for r in shown] == [str(r.prompt.example.columns["answer"]) for r in shown]
    assert "mismatch_mean" not in metrics
    assert before < 0.2
    assert after > before + 0.25
