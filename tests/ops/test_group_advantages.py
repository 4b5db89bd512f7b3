"""`group_advantages` over all backends, against fp64 NumPy written from the formulas."""

import numpy as np
import pytest
import torch
from torch import Tensor

from rlvr_fast.ops import group_advantages as op
from rlvr_fast.ops.group_advantages import GroupNormalisation, Scale

nan = float("nan")
GROUPS = {
    "unequal sizes, one empty": [[0.0, 1.0, 0.0], [], [0.1, 0.7], [2.0, -1.0, 0.5, 3.0, 3.0]],
    "one past a block": [[float(i % 7) for i in range(65)], [1.0, 0.0]],
    "unscored members": [[nan, 1.0, 0.0, nan], [nan, nan], [0.3, nan, 0.9]],
    "one scored member": [[5.0], [nan, 2.0]],
    "large rewards, small spread": [[1e6, 1e6 + 1, 1e6 + 2], [-1e4, -1e4 + 0.125]],
    "no group": [],
}
KINDS = [
    GroupNormalisation(scale=scale, ddof=ddof, eps=eps)
    for scale, ddof, eps in [
        (Scale.STD, 1, 1e-6),
        (Scale.STD, 0, 1e-2),
        (Scale.NONE, 1, 1e-6),
        (Scale.LEAVE_ONE_OUT, 1, 1e-6),
    ]
]
backends = pytest.mark.parametrize("backend", op.BACKENDS)
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda k: f"{k.scale.name}-{k.ddof}")


def packed(groups: list[list[float]]) -> tuple[Tensor, Tensor]:
    offsets = np.cumsum([0, *map(len, groups)])
    rewards = torch.tensor([r for group in groups for r in group], dtype=torch.float32)
    return rewards, torch.from_numpy(offsets.astype(np.int64))


def by_hand(groups: list[list[float]], kind: GroupNormalisation) -> Tensor:
    found = []
    for group in groups:
        rewards = np.array(group, dtype=np.float32).astype(np.float64)
        scored = rewards[~np.isnan(rewards)]
        for reward in rewards:
            if np.isnan(reward) or len(scored) < 2 or np.ptp(scored) == 0:
                found.append(0.0)
            elif kind.scale is Scale.LEAVE_ONE_OUT:
                found.append(reward - (scored.sum() - reward) / (len(scored) - 1))
            elif kind.scale is Scale.STD:
                spread = scored.std(ddof=kind.ddof) + kind.eps
                found.append((reward - scored.mean()) / spread)
            else:
                found.append(reward - scored.mean())
    return torch.tensor(found, dtype=torch.float64)


def run(backend: str, rewards: Tensor, offsets: Tensor, kind: GroupNormalisation) -> Tensor:
    return op.BACKENDS[backend](rewards, offsets, kind.scale.value, kind.ddof, kind.eps)


@backends
@kinds
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
def test_advantages_follow_the_formula(backend, kind, groups, as_exact_as_torch):
    rewards, offsets = packed(groups)
    ours = run(backend, rewards, offsets, kind)
    plain = op.reference(rewards, offsets, kind.scale.value, kind.ddof, kind.eps)
    assert ours.dtype == torch.float32
    as_exact_as_torch(ours, plain, by_hand(groups, kind))


@backends
@kinds
@pytest.mark.parametrize("reward", [0.1, 0.7, -1e7, 3e-8])
def test_equal_rewards_teach_exactly_nothing(backend, kind, reward):
    # The mean of several times 0.1 is not 0.1 in fp32.
    rewards, offsets = packed([[reward] * 7, [reward] * 70, [reward, nan, reward, reward]])
    assert not run(backend, rewards, offsets, kind).any()


@backends
@kinds
def test_a_group_does_not_see_its_neighbours(backend, kind):
    groups = [torch.randn(n).tolist() for n in (3, 70, 1, 8)]
    together = run(backend, *packed(groups), kind)
    alone = torch.cat([run(backend, *packed([group]), kind) for group in groups])
    assert torch.equal(together, alone)


def test_the_public_function_normalises_by_the_sample_deviation():
    ours = op.group_advantages(*packed([[0.0, 0.0, 1.0]]))
    expected = torch.tensor([-1, -1, 2]) / 3 / (3**-0.5 + 1e-6)
    torch.testing.assert_close(ours, expected)


def test_half_precision_rewards_give_fp32_advantages():
    rewards, offsets = packed([[0.0, 0.5, 1.0]])
    assert torch.equal(
        op.group_advantages(rewards.half(), offsets), op.group_advantages(rewards, offsets)
    )


@pytest.mark.parametrize(
    ("rewards", "offsets", "message"),
    [
        (torch.zeros(2, 2), torch.tensor([0, 2]), r"rewards: wanted floating point \[S\]"),
        (torch.zeros(2, dtype=torch.int64), torch.tensor([0, 2]), "rewards: wanted floating"),
        (torch.zeros(2), torch.tensor([0.0, 2.0]), "group_offsets: wanted int64"),
        (torch.zeros(2), torch.tensor([0, 3]), "wanted ascending from 0 to 2, got"),
        (torch.zeros(2), torch.tensor([0, 2, 1, 2]), "wanted ascending from 0 to 2, got"),
    ],
    ids=["a matrix", "whole numbers", "float offsets", "too far", "descending"],
)
def test_wrong_arguments_are_named(rewards, offsets, message):
    with pytest.raises(ValueError, match=message):
        op.group_advantages(rewards, offsets)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="ddof: wanted 0 or 1, got 2"):
        GroupNormalisation(ddof=2)
    with pytest.raises(ValueError, match="eps: wanted finite and not negative, got -1"):
        GroupNormalisation(eps=-1)
