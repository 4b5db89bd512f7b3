import json
import random
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlvr_fast import checkpoint, metrics
from rlvr_fast import config as configs
from rlvr_fast.checkpoint import Progress
from rlvr_fast.run import resumed_config, train
from rlvr_fast.tasks import load_task
from rlvr_fast.trainer import Trainer

STEPS = 5

MOMENTS = {
    "before the first checkpoint": ("optimise", "learning_rate", 2, None),
    "between two checkpoints": ("optimise", "learning_rate", 4, "step-000002"),
    "while a checkpoint is written": ("checkpoint", "save_file", 5, "step-000002"),
    "while a checkpoint is flushed": ("checkpoint", "_flush", 10, "step-000002"),
    "while an old one is deleted": ("checkpoint", "_discard", 1, "step-000005"),
}
"""Module and function whose n-th call is the process's last act, and the checkpoint it leaves."""

DYING = """
import importlib, json, os, signal, sys
from rlvr_fast import cli, trainer

def run(module, name, calls, arguments):
    module = importlib.import_module("rlvr_fast." + module)
    original, left = getattr(module, name), [calls]
    def dying(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(module, name, dying)
    os._exit(cli.main(arguments))

for moment in json.loads(sys.argv[1]):
    pid = os.fork()  # After the imports, before torch has started a thread.
    if pid == 0:
        run(*moment)
    # Flushed: the next child would print what is left in the buffer, too.
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def given(folder, **overrides):
    """Every kind of state: momentum, a schedule, updates off policy, a checkpoint every 2 steps."""
    return {
        "run_folder": str(folder),
        "steps": STEPS,
        "method": "grpo",
        "updates_per_batch": 2,
        "schedule": "linear",
        "checkpoint_every": 2,
        "trackers": "none",
        **overrides,
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return train(configs.load("tiny", given(tmp_path_factory.mktemp("whole") / "run"))).run_folder


def assert_same_run(found, wanted):
    for name in ("model", "optimizer"):
        file = f"checkpoints/step-{STEPS:06d}/{name}.safetensors"
        mine, theirs = load_file(found / file), load_file(wanted / file)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    exported = "model/model.safetensors"
    assert (found / exported).read_bytes() == (wanted / exported).read_bytes()
    assert without_times(found) == without_times(wanted)
    texts = "completions.jsonl"
    assert (found / texts).read_text() == (wanted / texts).read_text()


def without_times(folder):
    return [
        {name: value for name, value in row.items() if "second" not in name}
        for row in metrics.read(folder)
    ]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run for each of `MOMENTS`."""
    runs = {moment: tmp_path_factory.mktemp("killed") / "run" for moment in MOMENTS}
    work = [
        [*MOMENTS[moment][:3], ["train", "tiny", *(f"--{k}={v}" for k, v in given(run).items())]]
        for moment, run in runs.items()
    ]
    command = [sys.executable, "-c", DYING, json.dumps(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    codes = [line for line in done.stdout.splitlines() if line.lstrip("-").isdigit()]
    assert codes == [str(-signal.SIGKILL)] * len(MOMENTS), done.stderr
    return runs


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_resumes_to_the_same_bits(moment, killed, uninterrupted):
    run, left = killed[moment], MOMENTS[moment][-1]
    newest = checkpoint.latest(run)
    assert (newest and newest.name) == left

    config, changed = resumed_config(run, None, {})
    train(config, resume=True)

    assert changed == []
    assert_same_run(run, uninterrupted)
    assert not list(run.rglob("*.partial"))


def test_a_finished_run_goes_on_with_more_steps_as_if_never_stopped(tmp_path):
    constant = {"schedule": "constant"}
    whole = train(configs.load("tiny", given(tmp_path / "whole", **constant))).run_folder
    part = tmp_path / "part"
    train(configs.load("tiny", given(part, steps=3, **constant)))

    config, changed = resumed_config(part, None, {"steps": str(STEPS)})
    train(config, resume=True)

    assert changed == ["steps: 3 -> 5"]
    file = "model/model.safetensors"
    assert (part / file).read_bytes() == (whole / file).read_bytes()
    assert [row["step"] for row in metrics.read(part)] == list(range(STEPS + 1))


def test_a_run_with_adapters_resumes_to_the_same_bits_and_saves_little(tmp_path):
    pytest.importorskip("peft", reason="adapters need it; the test extra installs it")
    adapters = {"schedule": "constant", "lora_rank": 2, "kl_coef": 0.01}
    whole = train(configs.load("tiny", given(tmp_path / "whole", **adapters))).run_folder
    part = tmp_path / "part"
    train(configs.load("tiny", given(part, steps=3, **adapters)))

    train(resumed_config(part, None, {"steps": str(STEPS)})[0], resume=True)

    newest = f"checkpoints/step-{STEPS:06d}"
    saved = part / newest / "model.safetensors"
    for name in ("model/model", "adapter/adapter_model", f"{newest}/model", f"{newest}/optimizer"):
        file = f"{name}.safetensors"
        assert (part / file).read_bytes() == (whole / file).read_bytes()
    assert saved.stat().st_size < 0.3 * (part / "model/model.safetensors").stat().st_size


def test_a_finished_run_that_is_resumed_trains_nothing_and_stays_as_it_was(uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_text()

    done = train(resumed_config(uninterrupted, None, {})[0], resume=True)

    assert done.steps == STEPS
    assert (uninterrupted / "metrics.jsonl").read_text() == before


def test_a_line_that_was_left_half_written_is_dropped(uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')

    train(resumed_config(run, None, {})[0], resume=True)

    assert without_times(run) == without_times(uninterrupted)


def test_a_changed_meaning_is_refused_field_by_field(uninterrupted):
    message = r"^resume: wanted the run's own config, got seed: 0 -> 1; learning_rate: .* -> 0.5$"
    with pytest.raises(ValueError, match=message):
        resumed_config(uninterrupted, None, {"seed": "1", "learning_rate": "0.5", "steps": "9"})


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^run: wanted a folder with a config.json, got"):
        resumed_config(tmp_path, None, {})


def test_a_folder_in_use_is_refused(tmp_path):
    again = checkpoint.hold(tmp_path)

    with checkpoint.hold(tmp_path), pytest.raises(ValueError, match="no other process trains in"):
        again.__enter__()


def trainer(folder):
    config = configs.load("tiny", given(folder))
    with closing(load_task(config.task, config.task_options)) as task:
        return Trainer(config, task)


def test_a_checkpoint_holds_weights_optimiser_method_state_and_generators(tmp_path):
    first = trainer(tmp_path)
    first.sync()
    first.step(1)
    progress = Progress(step=1, method_state={"seen": [1, 2]}, position=7)
    folder = checkpoint.save(tmp_path, progress, first.model, first.optimiser.adamw, keep=1)
    drawn = [random.random(), np.random.rand(), float(torch.rand(()))]

    second = trainer(tmp_path)
    restored = checkpoint.restore(folder, second.model, second.optimiser.adamw)

    assert restored == progress
    assert [random.random(), np.random.rand(), float(torch.rand(()))] == drawn
    for mine, theirs in zip(second.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        states = [t.optimiser.adamw.state[p] for t, p in ((second, mine), (first, theirs))]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run = trainer(tmp_path)

    for step in (2, 4, 1_000_000):
        progress = Progress(step=step, method_state={}, position=0)
        checkpoint.save(tmp_path, progress, run.model, run.optimiser.adamw, keep=2)

    names = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000004", "step-1000000"]
    assert checkpoint.latest(tmp_path).name == "step-1000000"


def test_a_disk_that_is_full_costs_the_new_checkpoint_only(tmp_path):
    config = configs.load("tiny", given(tmp_path / "run"))
    progress = Progress(step=1, method_state={}, position=0)
    with closing(Trainer(config, load_task(config.task, {}))) as trainer:
        state = (trainer.model, trainer.optimiser.adamw)
        first = checkpoint.save(tmp_path / "run", progress, *state, keep=1)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # Of any file.
        try:
            with pytest.raises(OSError, match=r"step-000002 could not be written.*too large"):
                checkpoint.save(tmp_path / "run", replace(progress, step=2), *state, keep=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

        assert checkpoint.latest(tmp_path / "run") == first
        assert [each.name for each in first.parent.iterdir()] == [first.name]
        assert checkpoint.restore(first, *state).step == 1


def test_a_checkpoint_holds_no_pickle(uninterrupted):
    files = {file.suffix for file in (uninterrupted / "checkpoints").rglob("*") if file.is_file()}

    assert files == {".json", ".safetensors"}


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run = trainer(tmp_path)
    progress = Progress(step=1, method_state={}, position=0)
    folder = checkpoint.save(tmp_path, progress, run.model, run.optimiser.adamw, keep=1)
    run.model.resize_token_embeddings(64)

    with pytest.raises(ValueError, match=r"wanted the tensors of this model, got others$"):
        checkpoint.restore(folder, run.model, run.optimiser.adamw)
