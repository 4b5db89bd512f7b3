import json

import pytest

from rlvr_fast import config as configs
from rlvr_fast import metrics
from rlvr_fast.methods.rollouts import Rollout
from rlvr_fast.metrics import RunLog
from rlvr_fast.progress import Progress
from rlvr_fast.prompts import Prompt
from rlvr_fast.tasks import Example

STEP = {"reward": 0.5, "length": 10.0, "tokens_per_second": 100.0, "seconds_update": 3.0}


def tiny(folder, **overrides):
    folder.mkdir(exist_ok=True)
    return configs.load("tiny", {"run_folder": str(folder), "steps": 4, **overrides})


class Recorder:
    """A tracker, as anybody could write one."""

    def __init__(self):
        self.steps, self.failed = {}, None

    def log(self, step, values):
        self.steps[step] = dict(values)

    def close(self, *, failed):
        self.failed = failed


def group(rewards, advantages=None, task=""):
    example = Example("1+1=", task=task)
    return [
        Rollout(
            prompt=Prompt(index=0, example=example, ids=[1]),
            gen_prompt_ids=[1],
            train_prompt_ids=[1],
            completion_ids=[5, 6],
            text=f"text {i}",
            finished=True,
            reward=reward,
            advantage=(advantages or [0.0] * len(rewards))[i],
        )
        for i, reward in enumerate(rewards)
    ]


def completions(folder, groups, count):
    with RunLog(tiny(folder, log_completions=count), step=0) as log:
        log.write_completions(1, groups)
    return metrics.read_completions(folder)


def test_a_resumed_run_knows_how_long_its_evaluations_took(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(
        Progress.__init__, "__kwdefaults__", {"earlier": None, "clock": lambda: now[0]}
    )
    config = tiny(tmp_path, steps=3)
    with RunLog(config, step=0) as log:
        log.doing("evaluate")
        now[0] += 40
        log.write(0, {"eval_reward": 0.0})
        log.write(1, STEP)

    with RunLog(config, step=1) as log:
        log.doing("train")
        now[0] += 2
        log.write(2, STEP)

    assert metrics.read(tmp_path)[0]["seconds_evaluate"] == 40
    assert "step 2/3, 0:02 so far, 0:42 left, reward 0.500" in capsys.readouterr().err


def test_numbers_go_to_the_file_and_to_every_tracker(tmp_path):
    recorders = [Recorder(), Recorder()]

    with RunLog(tiny(tmp_path), step=0, trackers=recorders) as log:
        log.doing("train")
        log.write(1, {**STEP, "loss": float("nan")})

    assert metrics.read(tmp_path) == [{"step": 1, **STEP, "loss": None}]
    for each in recorders:
        assert each.steps[1] == pytest.approx({**STEP, "loss": float("nan")}, nan_ok=True)
        assert each.failed is False


def test_trackers_hear_of_a_run_that_failed(tmp_path):
    recorder = Recorder()

    with pytest.raises(FloatingPointError), RunLog(tiny(tmp_path), step=0, trackers=[recorder]):
        raise FloatingPointError

    assert recorder.failed is True


def test_a_resume_removes_later_steps_and_half_a_line(tmp_path):
    rows = "".join(json.dumps({"step": step}) + "\n" for step in range(5))
    (tmp_path / "metrics.jsonl").write_text(rows + '{"step": 5, "rew')
    (tmp_path / "completions.jsonl").write_text(rows)

    with RunLog(tiny(tmp_path), step=2) as log:
        log.write(3, STEP)

    assert [row["step"] for row in metrics.read(tmp_path)] == [0, 1, 2, 3]
    assert [row["step"] for row in metrics.read_completions(tmp_path)] == [0, 1, 2]


def test_a_completion_says_where_it_stood_and_what_became_of_it(tmp_path):
    groups = [group([0.0, 1.0], [-1.0, [0.5, 1.5]], task="sums")]

    rows = completions(tmp_path, groups, 8)

    assert rows[1] == {
        "step": 1, "group": 0, "sample": 1, "task": "sums", "prompt": "1+1=",
        "completion": "text 1", "reward": 1.0, "advantage": 1.0, "tokens": 2, "finished": True,
    }  # fmt: skip


def test_a_group_is_written_by_its_best_and_worst_before_the_others(tmp_path):
    groups = [group([0.2, None, 0.9, 0.1]), group([0.0, 0.0, 0.0]), group([None, None, 0.5])]

    def chosen(count):
        rows = completions(tmp_path / str(count), groups, count)
        return [(row["group"], row["sample"]) for row in rows]

    assert chosen(1) == [(0, 2)]
    assert chosen(3) == [(0, 2), (0, 3), (1, 0)]
    assert chosen(6) == [(0, 2), (0, 3), (1, 0), (1, 2), (2, 0), (2, 2)]
    assert chosen(8) == [(0, 0), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (2, 0), (2, 2)]
    assert len(chosen(99)) == 10
    assert chosen(0) == []


def test_what_is_no_run_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^run: wanted a folder with a config.json, got "):
        metrics.check_run(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^run: wanted steps in .*metrics.jsonl, got none yet$"):
        metrics.check_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("no json\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl: wanted one JSON object a line, got: "):
        metrics.check_run(tmp_path)
