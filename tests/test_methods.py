import math
from contextlib import closing
from dataclasses import dataclass, replace

import pytest
import torch
from rewarded import FIXTURE, advantages, group

from benches import drawn
from rlvr_fast import config as configs
from rlvr_fast import objectives
from rlvr_fast.methods import METHODS, method, table
from rlvr_fast.methods.base import BatchShape
from rlvr_fast.tasks import load_task
from rlvr_fast.trainer import Trainer

SHAPE = BatchShape(
    seq_lengths=torch.tensor([2, 3, 5]),
    group_offsets=torch.tensor([0, 1, 3]),
    max_completion_tokens=8,
)


@dataclass(frozen=True, kw_only=True)
class AcrossGroups(objectives.Objective):
    def token_loss(self, t):
        return t.logp * t.logp.detach().mean()


@dataclass(frozen=True, kw_only=True)
class PerGroup(objectives.Objective):
    def token_loss(self, t):
        return t.group_mean(t.logp)


@dataclass(frozen=True, kw_only=True)
class Unknown(objectives.Objective):
    """With an operation that no kernel has."""

    def token_loss(self, t):
        return torch.erfinv(t.logp.clamp(-0.9, 0.9))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_three_steps(name, tmp_path):
    updates = 1 if METHODS[name].on_policy_only else 2
    given = {"run_folder": str(tmp_path), "updates_per_batch": updates}
    config = configs.load("tiny", given | drawn.fitting(name))
    with closing(load_task(config.task, config.task_options)) as task:
        # Half of what a random model says is right: every method finds something to learn.
        trainer = Trainer(config, replace(task, reward=drawn.right_or_wrong))
        trainer.sync()
        before = [p.detach().clone() for p in trainer.model.parameters()]

        read = [trainer.step(step)[0] for step in (1, 2, 3)]

    assert all(math.isfinite(value) for values in read for value in values.values())
    assert max(values.get("grad_norm", 0.0) for values in read) > 0
    assert not all(map(torch.equal, before, trainer.model.parameters()))


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("grpo", {}, [1.095443, -0.730295]),
        ("cispo", {}, [1.095443, -0.730295]),
        ("gspo", {}, [1.095443, -0.730295]),
        ("dr_grpo", {}, [0.6, -0.4]),
        ("reinforce", {}, [0.75, -0.5]),
        ("reinforce", {"baseline": "group_mean"}, [0.6, -0.4]),
    ],
)
def test_advantages_have_known_values(name, options, wanted):
    found = advantages(name, group(*FIXTURE), **options)

    assert found[:2] == pytest.approx(wanted, abs=2e-6)


def test_a_completion_that_nobody_could_score_has_no_advantage_and_no_influence():
    assert advantages("reinforce", group(1.0, None, 0.0)) == [1.0, 0.0, -1.0]


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("grpo", {}, [1 / 6, 1 / 9, 1 / 15]),
        ("gspo", {}, [1 / 6, 1 / 9, 1 / 15]),
        ("grpo", {"aggregation": "token_mean"}, [0.1] * 3),
        ("cispo", {}, [0.1] * 3),
        ("reinforce", {}, [0.1] * 3),
        ("dr_grpo", {}, [1 / 24] * 3),
        ("dr_grpo", {"length": 2}, [1 / 6] * 3),
    ],
)
def test_token_weights_have_known_values(name, options, wanted):
    assert method(name, options).seq_weights(SHAPE).tolist() == pytest.approx(wanted)


def test_the_table_of_all_methods_is_up_to_date():
    written = table.PATH.read_text()

    assert written == table.page(), "python -m rlvr_fast.methods.table --write"


def test_every_file_of_a_method_is_registered():
    registered = {kind.__module__.rpartition(".")[2] for kind in METHODS.values()}
    described = {
        path.stem
        for path in table.PATH.parent.glob("*.py")
        if "paper: ClassVar" in path.read_text()
    }

    assert described - {"base"} <= registered


def test_methods_are_sorted_by_name():
    assert list(METHODS) == sorted(METHODS)


@pytest.mark.parametrize(
    ("objective", "mode"),
    [
        (objectives.KL2(), "single pass"),
        (objectives.SequenceClippedSurrogate(), "single pass, tiles at sequences"),
        (objectives.Distillation(), "distillation"),
        (AcrossGroups(), "whole batch"),
        (PerGroup(), "single pass, tiles at groups"),
        (Unknown(), "single pass, objective in torch"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_the_table_says_how_an_objective_is_computed(objective, mode):
    assert table.fused(objective)[0] == mode


def test_a_pipe_ends_no_cell_of_a_table():
    row = table.described("x", METHODS["grpo"])
    piped = replace(METHODS["grpo"].paper, formula="|A| / 2")

    class Piped(METHODS["grpo"]):
        paper = piped

    (line,) = table.markdown([table.described("x", Piped)])[2:]

    assert line.replace("\\|", "").count("|") == len(row) + 1


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(ValueError, match=r"^unknown method drgrpo; the nearest is dr_grpo$"):
        method("drgrpo", {})


def test_an_unknown_option_names_the_nearest():
    message = r"^unknown option of method grpo clip_hi; the nearest is clip_high$"
    with pytest.raises(ValueError, match=message):
        method("grpo", {"clip_hi": 0.3})


def test_an_option_that_cannot_be_names_wanted_and_got():
    with pytest.raises(ValueError, match=r"^clip_low: wanted >= 0, got -0.2$"):
        method("grpo", {"clip_low": -0.2})


def test_a_method_without_a_ratio_refuses_a_second_update(tmp_path):
    given = {"method": "reinforce", "run_folder": str(tmp_path), "updates_per_batch": 2}
    config = configs.load("tiny", given)
    task = load_task(config.task, config.task_options)

    with pytest.raises(ValueError, match=r"^updates_per_batch: wanted 1 for method reinforce"):
        Trainer(config, task)
