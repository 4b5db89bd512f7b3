"""DCPO: smoothed advantages and what they remember, the sum over responses."""

import json
import statistics

import pytest
import torch
from rewarded import group
from safetensors.torch import load_file

from rlvr_fast import checkpoint, metrics
from rlvr_fast import config as configs
from rlvr_fast.methods import dcpo, method
from rlvr_fast.methods.base import BatchShape
from rlvr_fast.run import resumed_config, train


def visited(chosen, *visits):
    """The advantages of the last of these groups of one prompt."""
    for rewards in visits:
        (found,) = chosen.advantages([group(*rewards)])
    return [rollout.advantage for rollout in found]


@pytest.mark.parametrize(
    ("ddof", "second", "wanted"),
    [
        (0, [1, 1, 1, 1], [0.3873] * 4),
        (0, [0, 0, 0, 0], [-0.1890] * 4),
        (0, [1, 1, 0, 0], [1.1455, 1.1455, -0.8873, -0.8873]),
        (1, [1, 1, 1, 1], [0.3638] * 4),
        (1, [0, 0, 0, 0], [-0.1667] * 4),
        (1, [1, 1, 0, 0], [0.9967, 0.9967, -0.7713, -0.7713]),
    ],
)
def test_the_second_visit_has_known_advantages(ddof, second, wanted):
    """Source: 2509.02333, section on smooth advantages; the method's notes."""
    found = visited(method("dcpo", {"ddof": ddof}), [1, 0, 0, 0], second)

    assert found == pytest.approx(wanted, abs=5e-5)


@pytest.mark.parametrize("ddof", [0, 1])
def test_on_the_first_visit_the_advantage_is_that_of_the_group(ddof):
    rewards = [1.0, 0.0, 0.5, 0.0]

    found = visited(method("dcpo", {"ddof": ddof}), rewards)

    spread = (statistics.pstdev, statistics.stdev)[ddof](rewards)
    mean = statistics.fmean(rewards)
    assert found == pytest.approx([(reward - mean) / spread for reward in rewards], rel=1e-12)
    off = visited(method("dcpo", {"ddof": ddof, "smoothing": False}), rewards)
    assert found == pytest.approx(off, abs=1e-6)


@pytest.mark.parametrize(
    "visits",
    [
        [[1, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]],
        [[1, 0, 0], [1, 1], [0, 1, 1, 0, 1], [0]],
        [[0.25, 0.5], [0.125], [1, -1, 1, -1, 0.5, 0.5]],
    ],
    ids=["equal sizes", "unequal sizes", "fractions"],
)
def test_what_is_remembered_is_the_mean_and_variance_of_all_responses(visits):
    """Oracle: the standard library on all of them at once. The first has the published values
    .583333 and .2430556."""
    chosen = method("dcpo", {})

    visited(chosen, *visits)

    pooled = [float(reward) for rewards in visits for reward in rewards]
    mean, variance, responses, times = chosen.state_dict()["seen"]["0"]
    assert (responses, times) == (len(pooled), len(visits))
    assert mean == pytest.approx(statistics.fmean(pooled), rel=1e-12)
    assert variance == pytest.approx(statistics.pvariance(pooled), rel=1e-12)


def test_with_the_other_divisor_the_recursion_is_the_published_one_for_equal_sizes():
    """Source: 2509.02333: ((i - 1) old + new) / i and the shift of the means, here with i = 3."""
    first, second = dcpo.observed([1, 0, 0, 0], 1), dcpo.observed([1, 1, 1, 0], 1)
    before = dcpo.merged(first, second)
    now = dcpo.observed([0, 1, 1, 0], 1)

    found = dcpo.merged(before, now)

    assert before.variance == pytest.approx((0.25 + 0.25 + 0.5 * 0.5**2) / 2, rel=1e-12)
    shift = 2 / 3 * (before.mean - now.mean) ** 2
    wanted = (now.variance + 2 * before.variance + shift) / 3
    assert found.variance == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("repeats", [2, 3, 7])
def test_a_group_of_equal_rewards_has_its_share_of_the_advantage_over_all(repeats):
    visits = [[1, 0, 1, 0], *[[1, 1, 1, 1]] * (repeats - 1)]

    found = visited(method("dcpo", {}), *visits)

    pooled = [reward for rewards in visits for reward in rewards]
    over_all = (1 - statistics.fmean(pooled)) / statistics.pstdev(pooled)
    assert found == pytest.approx([over_all / repeats] * 4, rel=1e-12)
    assert found[0] > 0


def test_rewards_that_never_differ_have_no_advantage():
    assert visited(method("dcpo", {}), [0.1] * 3, [0.1] * 5, [0.1] * 2) == [0.0, 0.0]


def test_responses_that_nobody_could_score_leave_no_trace():
    chosen, without = method("dcpo", {}), method("dcpo", {})

    found = visited(chosen, [None, None], [1, None, 0, 0], [None], [1, 1, None])

    assert found == [*visited(without, [1, 0, 0], [1, 1]), 0.0]
    assert chosen.state_dict() == without.state_dict()


def test_prompts_are_remembered_apart():
    chosen = method("dcpo", {})
    chosen.advantages([group(1, 0, index=3), group(0, 0, index=4)])

    first, second = chosen.advantages([group(1, 1, index=3), group(1, 1, index=5)])

    assert first[0].advantage > 0
    assert second[0].advantage == 0
    assert chosen.state_dict()["seen"].keys() == {"3", "4", "5"}


def test_without_smoothing_nothing_is_remembered():
    chosen = method("dcpo", {"smoothing": False})

    assert visited(chosen, [1, 0, 0, 0], [1, 1, 1, 1]) == [0.0] * 4
    assert chosen.state_dict() == {"seen": {}}


def test_what_is_remembered_survives_a_trip_through_json():
    chosen, again = method("dcpo", {}), method("dcpo", {})
    visited(chosen, [1, 0, 0.1], [1, 1, 0.7])
    visited(again, [1, 1, 1, 0])

    again.load_state_dict(json.loads(json.dumps(chosen.state_dict())))

    assert again.state_dict() == chosen.state_dict()
    assert visited(again, [0.3, 0.2]) == visited(chosen, [0.3, 0.2])


def test_the_state_is_a_copy():
    chosen = method("dcpo", {})
    visited(chosen, [1, 0])
    before = chosen.state_dict()

    visited(chosen, [1, 1])

    assert before == {"seen": {"0": [0.5, 0.25, 2, 1]}}


def test_the_means_of_responses_are_summed():
    shape = BatchShape(
        seq_lengths=torch.tensor([2, 4, 0]),
        group_offsets=torch.tensor([0, 3]),
        max_completion_tokens=8,
    )

    assert method("dcpo", {}).seq_weights(shape).tolist() == [0.5, 0.25, 1.0]
    scaled = method("dcpo", {"scale": 0.5}).seq_weights(shape)
    assert scaled.tolist() == [0.25, 0.125, 0.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ddof": 2}, "ddof: wanted 0 or 1, got 2"),
        ({"scale": 0}, "scale: wanted > 0 and finite, got 0.0"),
        ({"max_ratio": 0.5}, "max_ratio: wanted >= 1, got 0.5"),
        ({"clip_high": -1.0}, "clip_high: wanted >= 0, got -1.0"),
    ],
)
def test_an_option_that_cannot_be_names_wanted_and_got(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        method("dcpo", options)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    def given(name, steps):
        return configs.load(
            "tiny",
            {
                "run_folder": str(tmp_path / name),
                "steps": steps,
                "method": "dcpo",
                "updates_per_batch": 2,
                "checkpoint_every": 2,
                "trackers": "none",
            },
        )

    whole = train(given("whole", 4)).run_folder
    part = train(given("part", 2)).run_folder
    train(resumed_config(part, None, {"steps": "4"})[0], resume=True)

    weights = [
        load_file(run / "checkpoints/step-000004/model.safetensors") for run in (part, whole)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    told = [
        [(row["reward"], row["loss"], row["grad_norm"]) for row in metrics.read(run)[1:]]
        for run in (part, whole)
    ]
    assert told[0] == told[1]
    assert remembered(part) == remembered(whole)
    # All 25 prompts in each of four steps, and the right answers of some among them.
    assert {seen[3] for seen in remembered(whole).values()} == {4}
    assert max(seen[0] for seen in remembered(whole).values()) > 0


def remembered(run):
    (file,) = [
        file
        for file in checkpoint.latest(run).glob("*.json")
        if "method_state" in json.loads(file.read_text())
    ]
    return json.loads(file.read_text())["method_state"]["seen"]
