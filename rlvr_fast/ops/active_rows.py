"""Rows without a gradient are never multiplied: which ones that is known of before any GEMM."""

from dataclasses import replace

from torch import Tensor

from rlvr_fast.ops.group_advantages import DEFAULT, GroupNormalisation, group_advantages
from rlvr_fast.ops.objective_rows import Segmentation, segments
from rlvr_fast.scored import ScoredTokens
from rlvr_fast.tracing.level import Level, level
from rlvr_fast.tracing.objective import Objective
from rlvr_fast.tracing.vanishing import vanishes


def mark_active(
    tokens: ScoredTokens, objective: Objective, *, normalisation: GroupNormalisation = DEFAULT
) -> ScoredTokens:
    """The same tokens with `active` filled in: False where the gradient is exactly zero.

    That is where the weight is 0; and, if the objective's gradient vanishes with the advantage,
    where all the advantages that the token's loss looks at are 0. Call it on the CPU before the
    tokens move to a GPU, where looking would mean waiting.

    Args:
        tokens: on the CPU.
        objective, normalisation: as for `policy_loss`.

    Returns:
        A copy; `active` stays as it is where it was False before.

    Raises:
        ValueError: for tokens on another device.

    Cost: O(T); tracing the objective once takes a tenth of a second.
    """
    if tokens.targets.device.type != "cpu":
        raise ValueError(f"tokens: wanted them on the CPU, got {tokens.targets.device}")
    needed = level(objective)
    if needed is Level.BATCH:
        return tokens
    active = tokens.weight != 0
    advantage = advantages(tokens, normalisation)
    if advantage is not None:
        counts = active & (advantage != 0)
        if bool((counts != active).any()) and vanishes(objective):
            active = _anywhere(counts, tokens, needed)
    return replace(tokens, active=active if tokens.active is None else active & tokens.active)


def advantages(tokens: ScoredTokens, normalisation: GroupNormalisation) -> Tensor | None:
    """`[T]`: the tokens' own advantage, or their rewards normalised by group, or None."""
    advantage = tokens.advantage
    if advantage is None:
        offsets = tokens.segments.group_offsets
        if tokens.rewards is None or offsets is None:
            return None
        offsets = offsets.to(tokens.rewards.device, non_blocking=True)
        advantage = group_advantages(tokens.rewards, offsets, normalisation=normalisation)
    return advantage if len(advantage) == tokens.num_tokens else tokens.expand(advantage)


def _anywhere(counts: Tensor, tokens: ScoredTokens, needed: Level) -> Tensor:
    """Spread over the segment that an objective of this level looks at."""
    if needed is Level.TOKEN:
        return counts
    cut = Segmentation.of(tokens, needed)
    found = segments(
        cut.group if needed is Level.GROUP and cut.group is not None else cut.seq,
        slice(0, tokens.num_tokens),
        counts,
    )
    kept = tokens.weight != 0
    return kept if found is None else kept & (found.sum(counts.float()) > 0)
