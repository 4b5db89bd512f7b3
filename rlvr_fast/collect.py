"""One batch of rollouts: sampled, verified, given advantages; refilled where none has a signal."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlvr_fast.config import Overlong, TrainConfig
from rlvr_fast.methods.base import Context, Method
from rlvr_fast.methods.rollouts import Group, Groups, Rollout, as_values, from_values
from rlvr_fast.parallel import ALONE, World, everybodys
from rlvr_fast.prompts import Prompts
from rlvr_fast.rollout import Engine, SamplingParams
from rlvr_fast.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a step trains on, and what it threw away to get there."""

    groups: Groups
    """With rewards and advantages."""
    dropped: Groups
    """Without a signal; others were sampled in their place."""
    position: int
    """In the endless order of prompts, after this batch."""
    seconds: Mapping[str, float]
    """By part: generate, verify."""

    def metrics(self) -> dict[str, float]:
        """Means over all that was sampled; rewards over what somebody could score."""
        sampled = [*self.groups, *self.dropped]
        flat = [rollout for group in sampled for rollout in group]
        rewards = [rollout.reward for rollout in flat if rollout.reward is not None]
        found = {
            "reward": fmean(rewards) if rewards else float("nan"),
            "unscored": float(len(flat) - len(rewards)),
            "sequences": float(len(flat)),
            "length": fmean(len(rollout.completion_ids) for rollout in flat),
            "finished": fmean(rollout.finished for rollout in flat),
            "groups_with_signal": fmean(has_signal(group) for group in sampled),
        }
        if self.dropped:
            found["groups_dropped"] = float(len(self.dropped))
        if any(rollout.penalty for rollout in flat):
            found["penalty"] = fmean(rollout.penalty for rollout in flat)
        return found

    def to_values(self) -> dict[str, Any]:
        """As JSON values; `from_values` inverts it, bit for bit."""
        plain = {
            name: [[as_values(rollout) for rollout in group] for group in getattr(self, name)]
            for name in ("groups", "dropped")
        }
        return {**plain, "position": self.position, "seconds": self.seconds}

    @staticmethod
    def from_values(values: Mapping[str, Any], prompts: Prompts) -> "Batch":
        """Of the same `prompts`."""
        groups, dropped = (
            [[from_values(rollout, prompts) for rollout in group] for group in values[name]]
            for name in ("groups", "dropped")
        )
        return Batch(
            groups=groups,
            dropped=dropped,
            position=values["position"],
            seconds=values["seconds"],
        )


class Collector:
    """Makes batches with the engine's present weights. Their prompts follow a seeded order."""

    def __init__(
        self,
        config: TrainConfig,
        method: Method,
        task: Task,
        prompts: Prompts,
        tokenizer: PreTrainedTokenizerBase,
        engine: Engine,
        *,
        world: World = ALONE,
    ) -> None:
        self._config, self._method, self._task = config, method, task
        self._prompts, self._tokenizer, self._engine = prompts, tokenizer, engine
        self._world = world

    def batch(self, step: int, position: int) -> Batch:
        """The batch of a step (from 1), with prompts from `position` on.

        With `refill_rounds` groups whose advantages are all zero are replaced, as whole groups, by
        those of further prompts, until the batch is full or the rounds are over. If no group at
        all has a signal, the batch is what was sampled first.
        """
        seconds = {"generate": 0.0, "verify": 0.0}
        groups: Groups = []
        dropped: Groups = []
        wanted = self._config.prompts_per_step
        for round_ in range(1 + self._config.refill_rounds):
            context = self.context(step, position, round_, wanted - len(groups))
            found = self._collected(context, seconds)
            position += len(found)
            if not self._config.refill_rounds:
                return Batch(groups=found, dropped=[], position=position, seconds=seconds)
            groups += [group for group in found if has_signal(group)]
            dropped += [group for group in found if not has_signal(group)]
            if len(groups) >= wanted:
                break
        if not groups:
            groups, dropped = dropped[:wanted], dropped[wanted:]
        return Batch(groups=groups, dropped=dropped, position=position, seconds=seconds)

    def context(self, step: int, position: int, round_: int, prompts: int) -> Context:
        """What the method's hooks may use, in one round of a step."""
        config = self._config
        return Context(
            step=step,
            position=position,
            task=self._task,
            prompts=self._prompts,
            prompts_per_step=prompts,
            tokenizer=self._tokenizer,
            engine=self._engine,
            sampling=SamplingParams(
                temperature=config.temperature,
                max_tokens=config.max_completion_tokens,
                n=config.samples_per_prompt,
                seed=sampling_seed(config.seed, step, round_, self._world.rank),
            ),
        )

    def _collected(self, context: Context, seconds: dict[str, float]) -> Groups:
        with timed(seconds, "generate"):
            prompts = self._world.share(self._method.select_prompts(context))
            groups = self._method.rollout(context, prompts) if prompts else []
        with timed(seconds, "verify"):
            groups = self._method.verify(context, groups) if groups else []
            # From here on all ranks have the same batch, and do the same with it.
            groups = everybodys(self._world, groups, self._prompts)
            groups = [[self._cut_off(rollout) for rollout in group] for group in groups]
            return self._method.advantages(groups)

    def _cut_off(self, rollout: Rollout) -> Rollout:
        config, length = self._config, len(rollout.completion_ids)
        match config.overlong:
            case Overlong.MASK if not rollout.finished:
                return replace(rollout, loss_mask=[0] * length)
            case Overlong.PENALTY:
                # 2503.14476, equation 13, whose buffer is a fifth of the limit
                limit = config.max_completion_tokens
                buffer = config.overlong_buffer or max(1, limit // 5)
                return replace(rollout, penalty=max(0.0, (length - (limit - buffer)) / buffer))
        return rollout


def has_signal(group: Group) -> bool:
    """Some token that is trained has an advantage other than zero."""
    return any(rollout.scored_tokens and not rollout.zero_advantage for rollout in group)


def sampling_seed(*numbers: int) -> int:
    """Another one for other numbers; the same for the same, on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds that the block takes."""
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
