"""Groups of rollouts of which only rewards, lengths and penalties matter."""

from dataclasses import replace

from rlvr_fast.methods import method
from rlvr_fast.methods.rollouts import Rollout
from rlvr_fast.prompts import Prompt
from rlvr_fast.tasks import Example

FIXTURE = [1, 0, 0, 1, 0]
"""Rewards whose advantages are known for every published baseline."""
LENGTHS = [2, 4, 4, 2, 8]


def group(*rewards, lengths=None, index=0):
    prompt = Prompt(index=index, example=Example("?"), ids=[5])
    plain = Rollout(
        prompt=prompt,
        gen_prompt_ids=prompt.ids,
        train_prompt_ids=prompt.ids,
        completion_ids=[6],
        text="",
        finished=True,
    )
    return [
        replace(plain, reward=reward, completion_ids=[6] * length)
        for reward, length in zip(rewards, lengths or [1] * len(rewards), strict=True)
    ]


def advantages(name, *groups, **options):
    """Flat, as `advantages` gives them."""
    found = method(name, options).advantages(list(groups))
    return [rollout.advantage for each in found for rollout in each]


def shaped(name, *groups, **options):
    """Flat, as `shape` leaves them for the optimiser."""
    chosen = method(name, options)
    found = chosen.shape(chosen.advantages(list(groups)), None)
    return [rollout.advantage for each in found for rollout in each]
