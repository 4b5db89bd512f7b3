"""What methods learn on the tiny task: a run for each seed, several at once."""

import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from os import sched_getaffinity
from statistics import fmean

import torch

from benches import drawn
from benches.peers import attempt
from benches.report import Entry, Row, Table
from rlvr_fast import config as configs
from rlvr_fast.methods import METHODS
from rlvr_fast.tasks import load_task
from rlvr_fast.trainer import Trainer

LAST = 10
"""Steps at the end of a run over which rewards are averaged."""
NOTES = (
    "A random two-layer model learns 25 sums by heart, an answer being one token; nothing is held "
    "out. It shows that a method trains, and about how fast at this learning rate and entropy "
    "bonus, which are the config's for all and tuned for none.",
    "What looks at a whole sequence sees one token here: the method is then what it reduces to.",
    "A method without an importance ratio makes one update per batch, all others two.",
    "A difference within the spread of the seeds is none, and no difference says which method is "
    "better on a real task.",
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one seed gave."""

    sampled: list[float]
    """Mean reward of the completions of each step."""
    greedy: float
    """Mean reward of the most likely answers after the last step."""
    updates: int
    """Per batch."""
    moved: float
    """Share of the steps that changed a weight: in the others nothing had a gradient."""
    seconds: float


def learning(names: Sequence[str], steps: int, seeds: int, device: str) -> Entry:
    """A row for each method. On the CPU a run has one thread, and there is one for each core."""
    workers = len(sched_getaffinity(0)) if device == "cpu" else 1
    rows: list[Row] = []
    left_out: list[str] = []
    curves: dict[str, list[list[float]]] = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        started = {
            name: [pool.submit(learn, name, seed, steps) for seed in range(seeds)] for name in names
        }
        for name, futures in started.items():
            runs, reason = attempt(partial(_results, futures))
            if reason:
                left_out.append(f"{name}: {reason}")
            else:
                rows.append(_row(name, runs))
                curves[name] = [run.sampled for run in runs]
    title = f"Learning: mean reward on the config tiny, {steps} steps, {seeds} seeds"
    return Entry(
        tables=[Table(title=title, rows=rows, notes=NOTES)],
        facts={"sampled": curves},
        left_out=left_out,
    )


def learn(name: str, seed: int, steps: int) -> Run:
    """One run, without log and checkpoints."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        updates = 1 if METHODS[name].on_policy_only else 2
        fixed = {"run_folder": folder, "seed": seed, "steps": steps, "updates_per_batch": updates}
        config = configs.load("tiny", fixed | drawn.fitting(name))
        with (
            closing(load_task(config.task, config.task_options)) as task,
            closing(Trainer(config, task)) as trainer,
        ):
            start = time.perf_counter()
            trainer.sync()
            rows = [trainer.step(step)[0] for step in range(1, steps + 1)]
            return Run(
                sampled=[row["reward"] for row in rows],
                moved=fmean("grad_norm" in row for row in rows),
                greedy=trainer.evaluate()["eval_reward"],
                updates=updates,
                seconds=time.perf_counter() - start,
            )


def _results(runs: Sequence[Future[Run]]) -> list[Run]:
    return [run.result() for run in runs]


def _row(name: str, runs: Sequence[Run]) -> Row:
    greedy = [run.greedy for run in runs]
    return {
        "": name,
        "greedy": fmean(greedy),
        "least": min(greedy),
        "greatest": max(greedy),
        f"sampled, last {LAST}": fmean(fmean(run.sampled[-LAST:]) for run in runs),
        "sampled, all": fmean(fmean(run.sampled) for run in runs),
        "updates per batch": float(runs[0].updates),
        "% steps with a gradient": 100 * fmean(run.moved for run in runs),
        "s a run": fmean(run.seconds for run in runs),
    }
