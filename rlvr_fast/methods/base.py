"""The hooks that make up a training method, with the defaults that most methods share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlvr_fast import aggregate, rewards
from rlvr_fast.methods.rollouts import Groups, Rollout
from rlvr_fast.methods.scores import Scorer
from rlvr_fast.objectives import Distillation, Objective
from rlvr_fast.ops.group_advantages import GroupNormalisation, group_advantages
from rlvr_fast.packed import Packed
from rlvr_fast.prompts import Prompt, Prompts
from rlvr_fast.rollout import Completion, Engine, SamplingParams
from rlvr_fast.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Context:
    """What the hooks of one step may use."""

    step: int
    """From 1."""
    position: int
    """Of the next prompt in the endless order of `prompts`."""
    task: Task
    prompts: Prompts
    """All training prompts."""
    prompts_per_step: int
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    sampling: SamplingParams
    """With this step's seed; `n` is the size of a group."""


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """What a token's weight may depend on: the shape of the whole optimiser batch."""

    seq_lengths: Tensor
    """`[S]` int64, scored tokens of every sequence; those without a gradient count too."""
    group_offsets: Tensor
    """`[G+1]` int64, in sequences."""
    max_completion_tokens: int


class Evidence(StrEnum):
    """What was read of a method before it was written here, from the most to the least."""

    CODE = "the authors' or a framework's code"
    PAPER = "the paper"
    DIGEST = "others' summaries of the paper"
    ABSTRACT = "the abstract"


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Where a method comes from, and how sure we are."""

    source: str
    """Such as `2503.14476, equation 8`: arXiv's number and the place, or author and year."""
    formula: str
    """What makes the method, in one line of ASCII."""
    evidence: Evidence
    reconstructed: tuple[str, ...] = ()
    """What is ours, since no source says it; each in a few words."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One published method. Its fields are its options; a subclass overrides a hook or two.

    In a step the trainer calls the hooks in the order in which they stand here.
    """

    on_policy_only: ClassVar[bool] = False
    """The objective has no importance ratio: one update per batch."""
    needs_reference: ClassVar[bool] = False
    """The objective reads `t.ref_logp`, or a scorer is asked for the reference: a frozen copy of
    the initial model is kept."""
    settings: ClassVar[Mapping[str, object]] = {}
    """Fields of the run's config that belong to the method: defaults that the config may replace.
    """
    paper: ClassVar[Paper]
    """Where the method comes from."""

    def select_prompts(self, context: Context) -> list[Prompt]:
        """The prompts of this step."""
        return context.prompts.take(context.position, context.prompts_per_step)

    def rollout(self, context: Context, prompts: Sequence[Prompt]) -> Groups:
        """One group per prompt, of the size that the prompt's example asks for, without rewards
        yet.
        """
        return sampled(context, prompts, group_sizes(context, prompts))

    def verify(self, context: Context, groups: Groups) -> Groups:
        """The same groups with a reward in every rollout."""
        flat = [rollout for group in groups for rollout in group]
        scores = iter(verified(context.task, [r.prompt for r in flat], [r.text for r in flat]))
        return [[replace(rollout, reward=next(scores)) for rollout in group] for group in groups]

    def advantages(self, groups: Groups) -> Groups:
        """The same groups with an advantage in every rollout; 0 where the reward is None."""
        values = group_advantages(
            net_rewards(groups), group_offsets(groups), normalisation=self.normalisation()
        )
        return with_advantages(groups, values)

    def shape(self, groups: Groups, scorer: Scorer) -> Groups:
        """The same groups, their advantages, masks or `extras` changed by what the policy itself
        thinks of them. Called once in a step, before its first update, perhaps while the next
        batch is collected: it changes nothing that `advantages` reads.
        """
        return groups

    def prepare(self, packs: list[Packed], scorer: Scorer, update: int) -> list[Packed]:
        """The same packs, with what the objective reads that changes from update to update.

        Args:
            packs: of this rank, whole groups unless the objective sees no further than sequences;
                sequences without a gradient may be left out.
            scorer: with the weights before this update.
            update: of `scorer.updates`, from 0.
        """
        return packs

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Told what the updates of a step reported, before the next batch is collected."""

    def normalisation(self) -> GroupNormalisation:
        """How the default `advantages` turns a group's rewards into advantages."""
        return GroupNormalisation()

    def seq_weights(self, shape: BatchShape) -> Tensor:
        """`[S]` fp32, the weight of each token of a sequence; see `aggregate`."""
        return aggregate.token_mean(shape.seq_lengths)

    def objective(self) -> Objective | Distillation:
        """What the optimiser minimises, before a KL penalty or entropy bonus of the config."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What the method remembers between steps, as JSON values; part of every checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        assert not state, f"{type(self).__name__} remembers nothing, got {sorted(state)}"

    def check_not_negative(self, *names: str) -> None:
        """Raises a ValueError for the first of these options that is below 0."""
        for name in names:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: wanted >= 0, got {getattr(self, name)}")


def group_sizes(context: Context, prompts: Sequence[Prompt]) -> list[int]:
    """How many rollouts each prompt's example asks for."""
    return [prompt.example.samples or context.sampling.n for prompt in prompts]


def sampled(context: Context, prompts: Sequence[Prompt], sizes: Sequence[int]) -> Groups:
    """One group of the engine's completions per prompt, of these sizes, each at least 1."""
    groups: dict[int, list[Rollout]] = {}
    for size in sorted(set(sizes)):
        chosen = [i for i, wanted in enumerate(sizes) if wanted == size]
        found = context.engine.generate(
            [prompts[i].ids for i in chosen], replace(context.sampling, n=size)
        )
        for i, completions in zip(chosen, found, strict=True):
            groups[i] = [as_rollout(context, prompts[i], each) for each in completions]
    return [groups[i] for i in range(len(prompts))]


def as_rollout(context: Context, prompt: Prompt, completion: Completion) -> Rollout:
    """A completion of the prompt as it stands."""
    return Rollout(
        prompt=prompt,
        gen_prompt_ids=prompt.ids,
        train_prompt_ids=prompt.ids,
        completion_ids=completion.token_ids,
        text=str(context.tokenizer.decode(completion.token_ids, skip_special_tokens=True)),
        finished=completion.finished,
        rollout_logp=completion.logp,
    )


def written(context: Context, prompt: Prompt, text: str) -> Rollout:
    """A completion by another author: the text and an end-of-sequence token.

    It has no `rollout_logp`, and `off_policy` in its metadata. Like any completion it is cut off
    at the sampling's `max_tokens`, and its text with it.

    Raises:
        ValueError: for a tokenizer without an end-of-sequence token.
    """
    tokenizer, most = context.tokenizer, context.sampling.max_tokens
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(
            "model: wanted one whose tokenizer has an end-of-sequence token, since the method "
            "trains on given texts, got none"
        )
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], int(end)]
    rollout = as_rollout(
        context, prompt, Completion(token_ids=ids[:most], logp=[], finished=len(ids) <= most)
    )
    return replace(rollout, rollout_logp=None, metadata={"off_policy": True})


def verified(task: Task, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float | None]:
    """The task's rewards for one text per prompt; answers to chats are messages, as in TRL."""
    names = {name for prompt in prompts for name in prompt.example.columns}
    return rewards.score(
        task.reward,
        [prompt.example.prompt for prompt in prompts],
        [
            text
            if isinstance(prompt.example.prompt, str)
            else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ],
        {name: [prompt.example.columns.get(name) for prompt in prompts] for name in sorted(names)},
    )


def group_offsets(groups: Groups) -> Tensor:
    """`[G+1]` int64."""
    return torch.tensor([0, *accumulate(len(group) for group in groups)])


def net_rewards(groups: Groups) -> Tensor:
    """`[S]` fp32: rewards less penalties, NaN where nobody could score."""
    flat = [rollout for group in groups for rollout in group]
    net = [float("nan") if r.reward is None else r.reward - r.penalty for r in flat]
    return torch.tensor(net, dtype=torch.float32)


def with_advantages(groups: Groups, advantages: Tensor) -> Groups:
    """The same groups, each rollout with its own of `advantages [S]`."""
    advantage = iter(advantages.tolist())
    return [[replace(rollout, advantage=next(advantage)) for rollout in g] for g in groups]
