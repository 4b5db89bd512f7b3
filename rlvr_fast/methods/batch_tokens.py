"""All tokens of a batch end to end, for methods that choose some of them by comparing all."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlvr_fast.methods.rollouts import Groups, Rollout
from rlvr_fast.methods.scores import Scores


def end_to_end(scores: Sequence[Sequence[Scores]], read: Callable[[Scores], Tensor]) -> Tensor:
    """`[N]` fp64 of every completion token, scored or not, in the order of the groups."""
    found = [read(each).double() for group in scores for each in group]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


def token_advantages(groups: Groups) -> Tensor:
    """`[N]` fp64."""

    def values(rollout: Rollout) -> Sequence[float]:
        given = rollout.advantage
        assert given is not None, "wanted rollouts with advantages"
        return given if isinstance(given, Sequence) else [given] * len(rollout.completion_ids)

    return torch.tensor([x for g in groups for r in g for x in values(r)], dtype=torch.float64)


def scored(groups: Groups) -> Tensor:
    """`[N]` bool, False where the policy did not write the token."""

    def values(rollout: Rollout) -> list[bool]:
        if rollout.loss_mask is None:
            return [True] * len(rollout.completion_ids)
        return [bool(x) for x in rollout.loss_mask]

    return torch.tensor([x for g in groups for r in g for x in values(r)], dtype=torch.bool)


def with_token_advantages(groups: Groups, values: Tensor) -> Groups:
    """The same groups, each rollout with its own of `values [N]` as advantages."""
    return _each(groups, values, lambda rollout, own: replace(rollout, advantage=own))


def with_token_extras(groups: Groups, name: str, values: Tensor) -> Groups:
    """The same groups, each rollout with its own of `values [N]` among its extras."""
    return _each(
        groups, values, lambda rollout, own: replace(rollout, extras={**rollout.extras, name: own})
    )


def covariances(groups: Groups, logp: Tensor) -> Tensor:
    """`[N]`, `(A - mean A) (logp - mean logp)` with the means of the scored tokens; -inf elsewhere.

    2505.22617, whose methods leave out or hold back the tokens where it is high.
    """
    advantage, counted = token_advantages(groups), scored(groups)
    found = (advantage - advantage[counted].mean()) * (logp - logp[counted].mean())
    return found.masked_fill(~counted, -torch.inf)


def _each(
    groups: Groups, values: Tensor, change: Callable[[Rollout, list[float]], Rollout]
) -> Groups:
    lengths = [len(rollout.completion_ids) for group in groups for rollout in group]
    own = iter(values.split(lengths))
    return [[change(rollout, next(own).tolist()) for rollout in group] for group in groups]
