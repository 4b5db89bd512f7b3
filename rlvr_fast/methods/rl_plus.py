"""Groups with demonstrations, weighed by multiple importance sampling (RL-PLUS, 2508.00222).

The released code was read; where the paper has a uniform policy it has the constant 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from rlvr_fast import aggregate
from rlvr_fast.methods.base import (
    BatchShape,
    Context,
    Evidence,
    Method,
    Paper,
    group_sizes,
    sampled,
    written,
)
from rlvr_fast.methods.rollouts import Groups
from rlvr_fast.objectives import Objective, importance_ratio
from rlvr_fast.ops.group_advantages import GroupNormalisation, Scale
from rlvr_fast.prompts import Prompt
from rlvr_fast.tasks import Example
from rlvr_fast.tracing.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class MixedAuthorSurrogate(Objective):
    """`-r A` for the policy's own tokens, `-m A (1 - sg[p])^exponent` for another author's.

    Nobody knows the author's policy. It is taken to be `q = (p_old + flat) / 2`, and
    `m = 2 p / (p_old + q)` is the balance between it and the old policy. `t.extras["off_policy"]`
    is 0 for own tokens.
    """

    exponent: float = 0.5
    flat: float = 1.0

    def token_loss(self, t: Tokens) -> Tensor:
        probability, old = torch.exp(t.logp), torch.exp(t.old_logp)
        balance = 2 * probability / (1.5 * old + 0.5 * self.flat)
        if self.exponent:
            # A log-probability of 0 may be rounded up.
            balance = balance * (1 - probability.detach()).clamp(min=0) ** self.exponent
        own = importance_ratio(t.logp, t.old_logp)
        return -torch.where(t.extras["off_policy"] != 0, balance, own) * t.advantage


@dataclass(frozen=True, kw_only=True)
class RLPlus(Method):
    """The last rollouts of each group are solutions from the task, verified like all others.

    Advantage reward - group mean, demonstrations included; no clip; token losses are summed,
    divided by a constant length and averaged over sequences. Demonstrated tokens that the policy
    is sure of already are left alone.

    The old policy is the one at the start of the update, on demonstrations too. They have no
    sampler's log-probabilities, and then the whole batch is trained without them: there are no
    mismatch metrics, and mismatch_correction has to be none.
    """

    paper: ClassVar[Paper] = Paper(
        source="2508.00222",
        formula="-r A; demonstrations -2p / (1.5 p_old + 0.5) A (1 - sg[p])^0.5; A = R - mean(R)",
        evidence=Evidence.CODE,
        reconstructed=("demonstrations are cut off at max_completion_tokens",),
    )
    settings: ClassVar[Mapping[str, object]] = {"entropy_coef": 0.001}

    demonstrations: int = 1
    """Rollouts of each group that are replaced by a solution; 0: none."""
    column: str = "solution"
    """The task's column that holds the solution: a text or whole number; a list of them where
    demonstrations are more than 1."""
    exponent: float = 0.5
    """Of 1 - p, by which demonstrated tokens are weighed; gamma of the paper. 0: all the same."""
    flat: float = 1.0
    """The density that stands for all that is unknown of the author."""
    length: int | None = None
    """The constant; none: max_completion_tokens."""

    def __post_init__(self) -> None:
        self.check_not_negative("demonstrations", "exponent")
        if not 0 < self.flat < float("inf"):
            raise ValueError(f"flat: wanted > 0 and finite, got {self.flat}")

    def rollout(self, context: Context, prompts: Sequence[Prompt]) -> Groups:
        sizes = group_sizes(context, prompts)
        if min(sizes) <= self.demonstrations:
            raise ValueError(
                f"demonstrations: wanted fewer than the samples of a prompt, {min(sizes)}, "
                f"got {self.demonstrations}"
            )
        texts = [self._solutions(context.task.name, prompt.example) for prompt in prompts]
        own = sampled(context, prompts, [size - self.demonstrations for size in sizes])
        return [
            [
                *(replace(each, extras={"off_policy": 0.0}) for each in group),
                *(
                    replace(written(context, prompt, text), extras={"off_policy": 1.0})
                    for text in solutions
                ),
            ]
            for prompt, group, solutions in zip(prompts, own, texts, strict=True)
        ]

    def normalisation(self) -> GroupNormalisation:
        return GroupNormalisation(scale=Scale.NONE)

    def seq_weights(self, shape: BatchShape) -> Tensor:
        length = shape.max_completion_tokens if self.length is None else self.length
        return aggregate.constant_length(shape.seq_lengths, length=length)

    def objective(self) -> Objective:
        return MixedAuthorSurrogate(exponent=self.exponent, flat=self.flat)

    def _solutions(self, task: str, example: Example) -> list[str]:
        if not self.demonstrations:
            return []
        value = example.columns.get(self.column)
        values = value if isinstance(value, list) else [value]
        texts = [str(each) for each in values if isinstance(each, str) or type(each) is int]
        if len(texts) < max(self.demonstrations, len(values)):
            raise ValueError(
                f"column: wanted {self.demonstrations} solutions in column {self.column!r} of "
                f"every example of task {task}, got {value!r}"
            )
        return texts[: self.demonstrations]
