"""What a step of training collects: groups of rollouts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

from rlvr_fast.prompts import Prompt


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One completion of one prompt; hooks of a `Method` fill in what comes later."""

    prompt: Prompt
    gen_prompt_ids: Sequence[int]
    """What the engine completed; a hint, say, may be in it."""
    train_prompt_ids: Sequence[int]
    """What the completion is trained to follow."""
    completion_ids: Sequence[int]
    text: str
    """The completion, decoded without special tokens."""
    finished: bool
    """Ended by itself; False when cut off."""
    rollout_logp: Sequence[float] | None = None
    """Nats, one per completion token, as the sampler reported them; None: another author's text."""
    loss_mask: Sequence[int] | None = None
    """One per completion token, 0 where the policy did not write it; None: it wrote all."""
    reward: float | None = None
    """What the verifier said; None: nobody could score it."""
    penalty: float = 0.0
    """Taken off the reward before it becomes an advantage: for length, say."""
    advantage: float | Sequence[float] | None = None
    """One number, or one per completion token."""
    extras: Mapping[str, float | Sequence[float]] = field(default_factory=dict)
    """What else the method's objective reads, as `t.extras[name]`: one number, or one per
    completion token; the same names on every rollout."""
    teacher_prompt_ids: Sequence[int] | None = None
    """For distillation: what the teacher sees before the completion."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """A method's own: parent, branch position, off-policy flag, task tag, parts of the reward."""

    @property
    def scored_tokens(self) -> int:
        """Completion tokens that the policy wrote."""
        return (
            len(self.completion_ids) if self.loss_mask is None else sum(map(bool, self.loss_mask))
        )

    @property
    def zero_advantage(self) -> bool:
        """Every token's advantage is exactly 0."""
        if isinstance(self.advantage, Sequence):
            return not any(self.advantage)
        return self.advantage == 0


def as_values(rollout: Rollout) -> dict[str, Any]:
    """As JSON values, its prompt as an index; `from_values` inverts it."""
    values = {each.name: getattr(rollout, each.name) for each in fields(rollout)}
    return values | {"prompt": rollout.prompt.index}


def from_values(values: Mapping[str, Any], prompts: Sequence[Prompt]) -> Rollout:
    """What `as_values` gave, with the prompt of that index."""
    return Rollout(**{**values, "prompt": prompts[values["prompt"]]})


Group: TypeAlias = list[Rollout]
"""All rollouts of one prompt."""
Groups: TypeAlias = list[Group]
