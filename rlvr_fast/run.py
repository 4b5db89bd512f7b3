"""A whole training run in its folder: started, resumed, summed up."""

from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from rlvr_fast import checkpoint, metrics, parallel, trackers
from rlvr_fast import config as configs
from rlvr_fast.config import FREE_ON_RESUME, TrainConfig
from rlvr_fast.devices import device
from rlvr_fast.metrics import RunLog, Silence
from rlvr_fast.tasks import load_task
from rlvr_fast.trackers import TrackedRun
from rlvr_fast.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a finished run reports; every number is in `metrics.jsonl` too."""

    run_folder: Path
    steps: int
    reward_before: float | None
    """Greedy, on the evaluation prompts, before the first step."""
    reward_after: float | None
    """The same after the last step."""
    evaluated_on: str
    """Held-out or training prompts, and how many."""
    sampled_first: float | None
    """Mean reward of the completions of step 1; None if nobody could score them."""
    sampled_last: float | None


def train(config: TrainConfig, *, resume: bool = False) -> Summary:
    """A whole run: evaluation, training steps, checkpoints, export to `run_folder/model`.

    Args:
        config: see `TrainConfig`.
        resume: go on from the newest checkpoint of `config.run_folder`, or from step 0 if there
            is none yet. On the CPU the result is the same, bit for bit, as without interruption.

    Raises:
        ValueError: for a run folder in use (or that holds a run, unless `resume`), and for what a
            model, task or method refuses.
        FloatingPointError: for a gradient that is not finite; checkpoints are as they were.
    """
    folder = Path(config.run_folder)
    if not resume and (folder / "config.json").exists():
        raise ValueError(f"run_folder: wanted one without a run (or --resume it), got {folder}")
    wanted = trackers.available(trackers.names(config.trackers))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with (
        parallel.join(device(config.device)) as world,
        closing(load_task(config.task, config.task_options)) as task,
        closing(Trainer(config, task, world)) as trainer,
        checkpoint.hold(folder) if world.leads else nullcontext(),
    ):
        if world.leads:
            checkpoint.write_config(folder, config)
        world.barrier()  # Nobody looks for checkpoints before the leader has cleared up.
        done = trainer.restore() if resume else 0
        log: RunLog = Silence()
        if world.leads:
            tracked = TrackedRun(folder=folder, values=configs.to_values(config), step=done)
            log = RunLog(config, step=done, trackers=trackers.start(wanted, tracked))
        with log:
            trainer.run(done, log)
        trainer.export()
        world.barrier()  # The summary is read from what the leader has written.
    return summary(folder, trainer.evaluated_on)


def resumed_config(
    run_folder: Path, name: str | None, overrides: dict[str, str]
) -> tuple[TrainConfig, list[str]]:
    """The config to go on with, and one line for each field that differs from the run's own.

    Args:
        run_folder: of the run.
        name: a config to take instead of the run's own, as for `config.load`; None: its own.
        overrides: as for `config.load`.

    Raises:
        FileNotFoundError: where there is no run.
        ValueError: for a changed field that `FREE_ON_RESUME` does not list.
    """
    own = configs.from_values(checkpoint.read_config(run_folder))
    base = own if name is None else configs.load(name)
    new = configs.from_values(configs.to_values(base), {"run_folder": str(run_folder), **overrides})
    changed = configs.changes(own, new)
    locked = [line for field, line in changed.items() if field not in FREE_ON_RESUME]
    if locked:
        raise ValueError(f"resume: wanted the run's own config, got {'; '.join(locked)}")
    return new, list(changed.values())


def summary(folder: Path, evaluated_on: str) -> Summary:
    """From what the run's `metrics.jsonl` says; None for what it does not."""
    rows = metrics.read(folder)
    evaluated = [row["eval_reward"] for row in rows if "eval_reward" in row] or [None]
    trained = [row["reward"] for row in rows if "reward" in row] or [None]
    return Summary(
        run_folder=folder,
        steps=max((row["step"] for row in rows), default=0),
        reward_before=evaluated[0],
        reward_after=evaluated[-1],
        evaluated_on=evaluated_on,
        sampled_first=trained[0],
        sampled_last=trained[-1],
    )
