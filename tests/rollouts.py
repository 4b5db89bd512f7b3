"""Rollouts of which only what a test says matters, and groups of them."""

from dataclasses import replace

import torch

from rlvr_fast.methods.rollouts import Rollout
from rlvr_fast.prompts import Prompt
from rlvr_fast.tasks import Example


def rollout_of(completion_ids, *, prompt_ids=(5,), index=0, **given):
    """One that ended by itself; `given` are its other fields."""
    prompt = Prompt(index=index, example=Example("?"), ids=list(prompt_ids))
    plain = Rollout(
        prompt=prompt,
        gen_prompt_ids=prompt.ids,
        train_prompt_ids=prompt.ids,
        completion_ids=completion_ids,
        text="",
        finished=True,
    )
    return replace(plain, **given)


def mixed_groups():
    """Unequal in size, length and advantage, of the tiny model's vocabulary; one has no signal."""
    draw = torch.Generator().manual_seed(0)

    def ids(count):
        return torch.randint(4, 100, (count,), generator=draw).tolist()

    def completed(prompt, index, advantage):
        length = int(torch.randint(1, 9, (), generator=draw))
        return rollout_of(
            ids(length),
            prompt_ids=prompt,
            index=index,
            rollout_logp=[-4.0] * length,
            reward=advantage,
            advantage=advantage,
        )

    groups = []
    for g, advantages in enumerate([[0.5, -1.0, 0.0, 2.0], [0.0, 0.0], [1.5, -0.5, 0.0]]):
        prompt = ids(3 + 5 * g)
        groups.append([completed(prompt, g, advantage) for advantage in advantages])
    return groups
