"""The training loop, to be read from top to bottom; `run` is what surrounds it."""

import random
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlvr_fast import checkpoint, lora, memory, models, parallel
from rlvr_fast.ahead import Ahead
from rlvr_fast.collect import Batch, Collector, sampling_seed, timed
from rlvr_fast.config import EngineName, TrainConfig
from rlvr_fast.devices import DTYPES, device, keep_freed_memory
from rlvr_fast.engines import make_engine
from rlvr_fast.evaluate import evaluate
from rlvr_fast.methods import method
from rlvr_fast.methods.base import Method
from rlvr_fast.methods.rollouts import Groups
from rlvr_fast.metrics import RunLog
from rlvr_fast.optimise import Optimiser, needs_reference
from rlvr_fast.parallel import Shared, World
from rlvr_fast.prompts import Prompts
from rlvr_fast.rollout import SamplingParams
from rlvr_fast.tasks import Task


class Trainer:
    """Everything that lives as long as a run."""

    def __init__(self, config: TrainConfig, task: Task, world: World | None = None) -> None:
        """Loads the model and builds an engine with the same weights; without a world, alone."""
        self.config, self.task = config, task
        self.method = method(config.method, config.method_options)
        if self.method.on_policy_only and config.updates_per_batch > 1:
            raise ValueError(
                f"updates_per_batch: wanted 1 for method {config.method}, which has no importance "
                f"ratio, got {config.updates_per_batch}"
            )
        self.world = world or World(device=device(config.device))
        place = self.world.device
        if place == "cpu":
            keep_freed_memory()
        path = models.resolve(config.model)
        # What adapters leave as it is needs no more bits than the passes use.
        kept = DTYPES[config.precision] if config.lora_rank else torch.float32
        self.model, self.tokenizer = _on(place, path, kept)
        reference = None
        if config.lora_rank:
            lora.wrap(
                self.model,
                rank=config.lora_rank,
                alpha=config.lora_alpha,
                targets=config.lora_targets,
                seed=config.seed,
            )
        elif needs_reference(config, self.method):
            reference = _on(place, path, torch.float32)[0].requires_grad_(False)
        if config.split_weights:
            parallel.split(self.model, self.world)
        self.optimiser = Optimiser(
            config,
            self.method,
            self.model,
            reference,
            vocab_size=len(self.tokenizer),
            world=self.world,
        )
        self.engine = make_engine(
            _engine(config, self.world),
            path,
            config.engine_options,
            dtype=DTYPES[config.engine_precision],
            head_dtype=None if config.head_precision is None else DTYPES[config.head_precision],
            device=place,
        )
        encoded = partial(Prompts, tokenizer=self.tokenizer, system_prompt=config.system_prompt)
        self.prompts = encoded(task.train, seed=config.seed, weights=task.weights)
        self.evaluation = encoded(task.evaluation[: config.eval_prompts])
        self.ahead = Ahead(
            Collector(
                config,
                self.method,
                task,
                self.prompts,
                self.tokenizer,
                self.engine,
                world=self.world,
            ).batch
        )
        self.position = 0
        """Of the next batch in the endless order of prompts."""
        kind = "training" if task.evaluation is task.train else "held-out"
        self.evaluated_on = f"{len(self.evaluation)} {kind} prompts"

    def restore(self) -> int:
        """Takes up the newest checkpoint; gives the steps done, 0 without one."""
        folder = checkpoint.latest(Path(self.config.run_folder))
        if folder is None:
            return 0
        progress = checkpoint.restore(folder, self.model, self.optimiser.adamw)
        self.method.load_state_dict(progress.method_state)
        self.position = progress.position
        if progress.pending is not None:
            self.ahead.put_back(Batch.from_values(progress.pending, self.prompts))
        return progress.step

    def run(self, done: int, log: RunLog) -> None:
        """All steps after `done`, with evaluation, log and checkpoints where they are due."""
        config = self.config
        if not parallel.is_split(self.model):
            prompt_tokens = len(self.prompts[0].ids)
            needed = memory.estimate(config, self.model, prompt_tokens=prompt_tokens)
            for line in needed.lines(config):
                log.say(line)
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
        config, seconds = self.config, dict[str, float]()
        with timed(seconds, "total"):
            reseed(config.seed, step)
            with timed(seconds, "wait"), memory.explained("generate"):
                batch = self.ahead.take(step, self.position)
            self.position = batch.position
            if config.engine_sleeps:
                self.engine.sleep()
            if config.pipeline and step < config.steps:
                with timed(seconds, "sync"):
                    self.sync()
                self.ahead.start(step + 1, self.position)
            with timed(seconds, "update"), memory.explained("update"):
                update = self.optimiser.update(batch.groups, step)
            if type(self.method).observe is not Method.observe:
                self.ahead.wait()  # The batch in the making reads what the method remembers.
                self.method.observe(update)
            if not config.pipeline or step == config.steps:
                with timed(seconds, "sync"):
                    self.sync()
        values = batch.metrics() | update
        tokens = values["length"] * values["sequences"]
        values["tokens_per_second"] = tokens / seconds["total"]
        seconds |= batch.seconds
        return values | {f"seconds_{name}": value for name, value in seconds.items()}, batch.groups

    def sync(self) -> None:
        """The engine generates with the trainer's weights from here on."""
        if self.config.engine_sleeps:
            self.engine.wake()
        named = lora.named_weights(self.model)
        self.engine.load_weights((name, parallel.whole(tensor)) for name, tensor in named)

    def evaluate(self) -> dict[str, float]:
        """Greedy, on the evaluation prompts, with the trainer's weights."""
        if self.ahead.wait() is not None:
            self.sync()
        found = evaluate(
            self.engine if self.world.size == 1 else Shared(self.engine, self.world),
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
            **{f"eval_reward/{tag}": part.reward for tag, part in found.tasks.items()},
        }

    def save(self, step: int) -> None:
        """Writes a checkpoint of the state after `step`."""
        pending = self.ahead.wait()
        progress = checkpoint.Progress(
            step=step,
            method_state=self.method.state_dict(),
            position=self.position,
            pending=None if pending is None else pending.to_values(),
        )
        checkpoint.save(
            Path(self.config.run_folder),
            progress,
            self.model,
            self.optimiser.adamw,
            keep=self.config.keep_checkpoints,
            world=self.world,
        )

    def close(self) -> None:
        """Ends what the engine has started."""
        self.ahead.close()
        self.engine.close()

    def export(self) -> Path:
        """Writes `run_folder/model` in the config's `precision`."""
        folder = Path(self.config.run_folder)
        dtype = DTYPES[self.config.precision]
        return checkpoint.export(folder, self.model, self.tokenizer, dtype, world=self.world)


def _engine(config: TrainConfig, world: World) -> EngineName:
    """Which engine; under torchrun each rank generates in process."""
    if world.size == 1:
        return config.engine
    # vLLM would have to be told which GPU is its own.
    here = [EngineName.EMBEDDED] + [EngineName.VLLM] * (world.device == "cpu")
    if config.engine not in (EngineName.AUTO, *here):
        wanted = " or ".join(here)
        raise ValueError(
            f"engine: wanted {wanted} under torchrun on {world.device}, got {config.engine}"
        )
    return here[0] if config.engine is EngineName.AUTO else config.engine


def reseed(seed: int, step: int) -> None:
    """Seeds every random generator of this process from both numbers."""
    mixed = sampling_seed(seed, step)
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def _on(
    place: str, path: str, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = models.load(path, dtype=dtype)
    return torch.nn.Module.to(model, place), tokenizer
