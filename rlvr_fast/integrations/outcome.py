"""Advantages of our methods from rewards, masks and group names, for other trainers' batches."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from rlvr_fast.integrations.padded import LOSSES
from rlvr_fast.methods import method
from rlvr_fast.methods.base import Method
from rlvr_fast.methods.rollouts import Groups, Rollout
from rlvr_fast.methods.scores import Scorer
from rlvr_fast.prompts import Prompt
from rlvr_fast.tasks import Example

ADVANTAGES = tuple(name for name in LOSSES if name != "dcpo")
"""Methods whose advantages follow from one batch. DCPO's remember each prompt's earlier steps,
which no estimator of another trainer is told."""


def advantage_method(name: str, options: Mapping[str, object]) -> Method:
    """The method of that name, for `outcome_advantages`.

    Raises:
        ValueError: for a method that is not one of `ADVANTAGES`, or an unknown option or value.
    """
    if name not in ADVANTAGES:
        raise ValueError(f"method: wanted one of {', '.join(ADVANTAGES)}, got {name}")
    return method(name, options)


def outcome_advantages(
    chosen: Method, rewards: Tensor, mask: Tensor, groups: Sequence[Hashable]
) -> Tensor:
    """The method's own advantages, on the tokens of each sequence.

    Args:
        chosen: see `advantage_method`.
        rewards: `[B]`, one per sequence; NaN: nobody could score it.
        mask: `[B, T]`, not 0 where the policy wrote the token.
        groups: B names; sequences of equal names are a group, wherever they stand.

    Returns:
        `[B, T]` fp32 on the device of the rewards, 0 where the mask is 0.

    Raises:
        ValueError: for shapes that do not agree.
    """
    if rewards.dim() != 1 or mask.dim() != 2 or not len(rewards) == len(mask) == len(groups):
        raise ValueError(
            f"rewards, mask, groups: wanted [B], [B, T] and B names, got {list(rewards.shape)}, "
            f"{list(mask.shape)} and {len(groups)}"
        )
    kept = (mask != 0).cpu()
    places: dict[Hashable, list[int]] = {}
    for row, name in enumerate(groups):
        places.setdefault(name, []).append(row)
    values, lengths = rewards.tolist(), kept.sum(1).tolist()
    batch: Groups = [
        [_rollout(index, values[row], lengths[row]) for row in rows]
        for index, rows in enumerate(places.values())
    ]
    scorer = cast(Scorer, None)  # The `shape` of `ADVANTAGES` asks it for nothing.
    shaped = chosen.shape(chosen.advantages(batch), scorer)
    found = torch.zeros(kept.shape)
    for rows, group in zip(places.values(), shaped, strict=True):
        for row, rollout in zip(rows, group, strict=True):
            given = rollout.advantage
            assert given is not None
            own = torch.as_tensor(given, dtype=torch.float32)
            found[row, kept[row]] = own.expand(lengths[row])
    return found.to(rewards.device)


def _rollout(index: int, reward: float, length: int) -> Rollout:
    prompt = Prompt(index=index, example=Example(prompt=""), ids=[])
    rollout = Rollout(
        prompt=prompt,
        gen_prompt_ids=(),
        train_prompt_ids=(),
        completion_ids=range(length),
        text="",
        finished=True,
        reward=reward,
    )
    return replace(rollout, reward=None) if reward != reward else rollout
