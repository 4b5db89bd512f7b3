"""Groups of rollouts of which only rewards, lengths and penalties matter."""

from rollouts import rollout_of

from rlvr_fast.methods import method

FIXTURE = [1, 0, 0, 1, 0]
"""Rewards whose advantages are known for every published baseline."""
LENGTHS = [2, 4, 4, 2, 8]


def group(*rewards, lengths=None, index=0):
    lengths = lengths or [2] * len(rewards)
    return [
        rollout_of([6] * length, index=index, reward=reward)
        for reward, length in zip(rewards, lengths, strict=True)
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
