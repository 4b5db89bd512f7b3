"""Scores of whole batches of rollouts, for methods that look before they train; see `Scorer`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from torch import Tensor

from rlvr_fast import parallel
from rlvr_fast.config import TrainConfig
from rlvr_fast.methods.rollouts import Groups
from rlvr_fast.methods.scores import Scores
from rlvr_fast.microbatch import microbatches
from rlvr_fast.ops.token_statistics import TokenStatistics
from rlvr_fast.packed import Packed, Sample, pack
from rlvr_fast.policy import Policy

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class PolicyScorer:
    """A `Scorer` of a step, over the trainer's own models."""

    config: TrainConfig
    policy: Policy
    reference: Policy | None
    step: int

    @property
    def steps(self) -> int:
        return self.config.steps

    @property
    def temperature(self) -> float:
        return self.config.temperature

    @property
    def updates(self) -> int:
        return self.config.updates_per_batch

    def rollouts(
        self,
        groups: Groups,
        *,
        reference: bool = False,
        min_p: float = 0.0,
        temperature: float | None = None,
    ) -> list[list[Scores]]:
        def read(packed: Packed) -> list[Scores]:
            found = self._statistics(
                packed, reference=reference, min_p=min_p, temperature=temperature
            )
            columns = [getattr(found, name).float().cpu() for name in Scores._fields]
            split = [column.split(packed.scored.seq_lengths.tolist()) for column in columns]
            return [Scores(*values) for values in zip(*split, strict=True)]

        return self._each(_samples(groups), read)

    def prompts(self, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        def read(packed: Packed) -> list[Tensor]:
            logp = self._statistics(packed).logp.float().cpu()
            return list(logp.split(packed.scored.seq_lengths.tolist()))

        samples = [[Sample(prompt_ids=ids[:1], completion_ids=ids[1:])] for ids in prompts]
        return [found for (found,) in self._each(samples, read)]

    def hidden(self, groups: Groups, reduce: Callable[[Tensor], Value]) -> list[list[Value]]:
        def read(packed: Packed) -> list[Value]:
            hidden = parallel.scoring(self.policy.model, self.policy.hidden)(packed).float()
            return [reduce(each) for each in hidden.split(packed.scored.seq_lengths.tolist())]

        return self._each(_samples(groups), read)

    def statistics(
        self, packed: Packed, *, reference: bool = False, min_p: float = 0.0
    ) -> TokenStatistics:
        return self._statistics(packed, reference=reference, min_p=min_p)

    def _statistics(
        self,
        packed: Packed,
        *,
        reference: bool = False,
        min_p: float = 0.0,
        temperature: float | None = None,
    ) -> TokenStatistics:
        chosen = self.policy
        if reference:
            assert self.reference is not None, "wanted a method with needs_reference"
            chosen = self.reference
        read = partial(chosen.statistics, min_p=min_p, temperature=temperature)
        return parallel.scoring(chosen.model, read)(packed)

    def _each(
        self, samples: list[list[Sample]], read: Callable[[Packed], list[Value]]
    ) -> list[list[Value]]:
        """`read` of packs within the config's budget, its results where their samples are."""
        share, found = self.config.share_prompts, dict[int, Value]()
        cut = microbatches(samples, self.config.tokens_per_microbatch, share_prompts=share)
        for groups in cut:
            packed = pack(groups, share_prompts=share).to(self.policy.model.device)
            for sample, value in zip(_flat(groups), read(packed), strict=True):
                found[id(sample)] = value
        return [[found[id(sample)] for sample in group] for group in samples]


def _flat(groups: Sequence[Sequence[Sample]]) -> Iterator[Sample]:
    return (sample for group in groups for sample in group)


def _samples(groups: Groups) -> list[list[Sample]]:
    return [
        [
            Sample(prompt_ids=rollout.train_prompt_ids, completion_ids=rollout.completion_ids)
            for rollout in group
        ]
        for group in groups
    ]
