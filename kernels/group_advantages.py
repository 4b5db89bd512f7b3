"""Rewards of a group, centred and scaled: `(R - mean) factor`, with the group's own

    factor = 1 / (std + eps)      STD, std = sqrt(sum (R - mean)^2 / (n - ddof))
    factor = 1                    NONE
    factor = n / (n - 1)          LEAVE_ONE_OUT: the mean is over the others

n counts the rewards that are not NaN; NaN rewards get 0. A group without a difference to learn
from (n < 2, or all rewards equal) has factor 0: a rounded mean leaves no residue to divide.
"""

import triton
import triton.language as tl

STD = tl.constexpr(0)
NONE = tl.constexpr(1)
LEAVE_ONE_OUT = tl.constexpr(2)
BLOCK_S = tl.constexpr(64)


@triton.jit
def group_scale(rewards_ptr, begin, end, ddof, eps, KIND: tl.constexpr):
    """The mean and the factor of the sequences from `begin` to `end`."""
    s = tl.arange(0, BLOCK_S)
    count = tl.zeros([BLOCK_S], tl.float32)
    total = tl.zeros([BLOCK_S], tl.float32)
    low = tl.full([BLOCK_S], float("inf"), tl.float32)
    high = tl.full([BLOCK_S], float("-inf"), tl.float32)
    for start in range(begin, end, BLOCK_S):
        reward = load_rewards(rewards_ptr, start + s, end)
        scored = reward == reward
        count += scored.to(tl.float32)
        total += tl.where(scored, reward, 0.0)
        low = tl.where(reward < low, reward, low)
        high = tl.where(reward > high, reward, high)
    n = tl.sum(count, axis=0)
    mean = tl.sum(total, axis=0) / tl.where(n == 0, 1.0, n)

    factor = 1.0
    if KIND == STD:
        squares = tl.zeros([BLOCK_S], tl.float32)
        for start in range(begin, end, BLOCK_S):
            reward = load_rewards(rewards_ptr, start + s, end)
            d = tl.where(reward == reward, reward - mean, 0.0)
            squares += d * d
        variance = tl.sum(squares, axis=0) / tl.where(n < 2, 1.0, n - ddof)
        factor = 1.0 / (tl.sqrt_rn(variance) + eps)
    elif KIND == LEAVE_ONE_OUT:
        factor = n / tl.where(n < 2, 1.0, n - 1)
    equal = tl.max(high, axis=0) <= tl.min(low, axis=0)
    return mean, tl.where((n < 2) | equal, 0.0, factor)


@triton.jit
def load_rewards(rewards_ptr, s, end):
    """NaN past the end: not scored."""
    return tl.load(rewards_ptr + s, mask=s < end, other=float("nan")).to(tl.float32)


@triton.jit
def normalised(reward, mean, factor):
    return tl.where(reward == reward, (reward - mean) * factor, 0.0)


@triton.jit
def group_advantages_kernel(
    rewards_ptr,  # [S]
    group_offsets_ptr,  # [G+1]
    advantages_ptr,  # [S]
    ddof,  # float: a whole number would be compiled in
    eps,
    KIND: tl.constexpr,
):
    g = tl.program_id(0)
    begin = tl.load(group_offsets_ptr + g)
    end = tl.load(group_offsets_ptr + g + 1)
    mean, factor = group_scale(rewards_ptr, begin, end, ddof, eps, KIND)
    for start in range(begin, end, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        reward = load_rewards(rewards_ptr, s, end)
        tl.store(advantages_ptr + s, normalised(reward, mean, factor), mask=s < end)
