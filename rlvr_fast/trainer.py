"""The training loop, to be read from top to bottom; `run` is what surrounds it."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlvr_fast import checkpoint, models
from rlvr_fast.config import TrainConfig
from rlvr_fast.devices import DTYPES, device
from rlvr_fast.evaluate import evaluate
from rlvr_fast.methods import method
from rlvr_fast.methods.base import Context
from rlvr_fast.methods.rollouts import Groups
from rlvr_fast.metrics import RunLog
from rlvr_fast.optimise import Optimiser
from rlvr_fast.prompts import Prompts
from rlvr_fast.rollout import SamplingParams
from rlvr_fast.rollout.embedded import EmbeddedEngine
from rlvr_fast.tasks import Task


class Trainer:
    """Everything that lives as long as a run."""

    def __init__(self, config: TrainConfig, task: Task) -> None:
        """Loads the model and builds an engine with the same weights."""
        self.config, self.task = config, task
        self.method = method(config.method, config.method_options)
        if self.method.on_policy_only and config.updates_per_batch > 1:
            raise ValueError(
                f"updates_per_batch: wanted 1 for method {config.method}, which has no importance "
                f"ratio, got {config.updates_per_batch}"
            )
        place = device(config.device)
        path = models.resolve(config.model)
        self.model, self.tokenizer = _on(place, path)
        reference = None
        if config.kl_coef > 0:
            reference = _on(place, path)[0].requires_grad_(False)
        self.optimiser = Optimiser(
            config, self.method, self.model, reference, vocab_size=len(self.tokenizer)
        )
        self.engine = EmbeddedEngine(path, dtype=DTYPES[config.engine_precision], device=place)
        self.prompts, self.evaluation = (
            Prompts(examples, self.tokenizer, system_prompt=config.system_prompt, seed=config.seed)
            for examples in (task.train, task.evaluation[: config.eval_prompts])
        )
        kind = "training" if task.evaluation is task.train else "held-out"
        self.evaluated_on = f"{len(self.evaluation)} {kind} prompts"

    def restore(self) -> int:
        """Takes up the newest checkpoint; gives the steps done, 0 without one."""
        folder = checkpoint.latest(Path(self.config.run_folder))
        if folder is None:
            return 0
        progress = checkpoint.restore(folder, self.model, self.optimiser.adamw)
        self.method.load_state_dict(progress.method_state)
        return progress.step

    def run(self, done: int, log: RunLog) -> None:
        """All steps after `done`, with evaluation, log and checkpoints where they are due."""
        config = self.config
        self.sync()
        if done == 0:
            log.doing("evaluate")
            log.write(0, self.evaluate())
        elif done >= config.steps:
            log.say(f"step {done} of {config.steps} is done already: nothing to train")
        for step in range(done + 1, config.steps + 1):
            log.doing("train")
            values, groups = self.step(step)
            if step == config.steps or (config.eval_every and step % config.eval_every == 0):
                log.doing("evaluate")
                values |= self.evaluate()
            log.write_completions(step, groups)
            log.write(step, values)
            if step == config.steps or step % config.checkpoint_every == 0:
                log.doing("save")
                self.save(step)

    def step(self, step: int) -> tuple[dict[str, float], Groups]:
        """One training step, from 1: its metrics and rollouts."""
        seconds: dict[str, float] = {}
        with _timed(seconds, "total"):
            context = self.context(step, reseed(self.config.seed, step))
            with _timed(seconds, "generate"):
                prompts = self.method.select_prompts(context)
                groups = self.method.rollout(context, prompts)
                if self.config.engine_sleeps:
                    self.engine.sleep()
            with _timed(seconds, "verify"):
                groups = self.method.verify(context, groups)
            with _timed(seconds, "update"):
                groups = self.method.advantages(groups)
                update = self.optimiser.update(groups, step)
            with _timed(seconds, "sync"):
                self.sync()
        values = rollout_metrics(groups) | update
        tokens = values["length"] * values["sequences"]
        values["tokens_per_second"] = tokens / seconds["total"]
        return values | {f"seconds_{name}": value for name, value in seconds.items()}, groups

    def context(self, step: int, seed: int) -> Context:
        """What the method's hooks may use in this step."""
        config = self.config
        return Context(
            step=step,
            task=self.task,
            prompts=self.prompts,
            prompts_per_step=config.prompts_per_step,
            tokenizer=self.tokenizer,
            engine=self.engine,
            sampling=SamplingParams(
                temperature=config.temperature,
                max_tokens=config.max_completion_tokens,
                n=config.samples_per_prompt,
                seed=seed,
            ),
        )

    def sync(self) -> None:
        """The engine generates with the trainer's weights from here on."""
        if self.config.engine_sleeps:
            self.engine.wake()
        # Tied weights under both names: an engine may keep them apart.
        named = self.model.named_parameters(remove_duplicate=False)
        self.engine.load_weights((name, parameter.detach()) for name, parameter in named)

    def evaluate(self) -> dict[str, float]:
        """Greedy, on the evaluation prompts."""
        found = evaluate(
            self.engine,
            self.tokenizer,
            self.task,
            list(self.evaluation),
            SamplingParams(temperature=0.0, max_tokens=self.config.max_completion_tokens),
        )
        return {
            "eval_reward": found.reward,
            "eval_length": found.length,
            "eval_finished": found.finished,
            "eval_unscored": float(found.unscored),
        }

    def save(self, step: int) -> None:
        """Writes a checkpoint of the state after `step`."""
        progress = checkpoint.Progress(step=step, method_state=self.method.state_dict())
        checkpoint.save(
            Path(self.config.run_folder),
            progress,
            self.model,
            self.optimiser.adamw,
            keep=self.config.keep_checkpoints,
        )

    def export(self) -> Path:
        """Writes `run_folder/model` in the config's `precision`."""
        folder = Path(self.config.run_folder)
        return checkpoint.export(folder, self.model, self.tokenizer, DTYPES[self.config.precision])


def reseed(seed: int, step: int) -> int:
    """Seeds every random generator from both numbers; gives the seed of the step's sampling."""
    mixed = int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)
    return mixed


def rollout_metrics(groups: Groups) -> dict[str, float]:
    """Means over the step's rollouts; rewards over those that somebody could score."""
    flat = [rollout for group in groups for rollout in group]
    rewards = [rollout.reward for rollout in flat if rollout.reward is not None]
    return {
        "reward": fmean(rewards) if rewards else float("nan"),
        "unscored": float(len(flat) - len(rewards)),
        "sequences": float(len(flat)),
        "length": fmean(len(rollout.completion_ids) for rollout in flat),
        "finished": fmean(rollout.finished for rollout in flat),
        "groups_with_signal": fmean(
            not all(rollout.zero_advantage for rollout in group) for group in groups
        ),
    }


def _on(place: str, path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = models.load(path, dtype=torch.float32)
    return torch.nn.Module.to(model, place), tokenizer


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
