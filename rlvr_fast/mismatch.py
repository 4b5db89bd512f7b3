"""The sampler computes the same model a little differently: how much, and how to make up for it.

An engine rounds elsewhere than the trainer, may be a step behind it, and so samples from another
distribution than the one whose gradient is taken. The importance ratio

    w = exp(old_logp - rollout_logp)

with `old_logp`, the trainer's log-probability at the start of the update, makes the expectation
right again, for each token or for a sequence as a whole. Unbounded it would have too much variance:
it is truncated at a cap, or masked outside of two bounds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from rlvr_fast.config.corrections import MismatchCorrection, MismatchReduction, check_bounds
from rlvr_fast.objectives import MAX_LOG_RATIO, Objective
from rlvr_fast.ops.objective_rows import Segmentation, token_fields
from rlvr_fast.packed import Packed
from rlvr_fast.tracing.level import Level
from rlvr_fast.tracing.tokens import Tokens

__all__ = ["Corrected", "MismatchCorrection", "MismatchReduction", "mismatch"]


@dataclass(frozen=True, kw_only=True)
class Corrected(Objective):
    """`factor(w)` times another objective's token loss; no gradient flows through the factor.

    Truncated, the factor is `clip(w, floor, cap)`; masked, it is `w` within the two bounds and 0
    outside. A sequence has one `w`, of the sum or the mean of its unmasked tokens' log-ratios. The
    factor acts on the numerator only: the tokens' weights, and so all denominators, still count
    what is masked.

    By token it is pointwise and stays inside the kernel. On policy, with no `old_logp`, it reads
    the trainer's log-probability from the very pass that it corrects.

    Raises:
        ValueError: for bounds other than `0 <= floor < cap`, both finite; for the correction none.
    """

    objective: Objective
    correction: MismatchCorrection
    cap: float = 3.0
    floor: float = 0.0
    reduction: MismatchReduction = MismatchReduction.SUM
    """Looked at by sequence only."""

    def __post_init__(self) -> None:
        check_bounds(self.floor, self.cap)
        if self.correction is MismatchCorrection.NONE:
            raise ValueError("correction: wanted one by token or by sequence, got none")

    def token_loss(self, t: Tokens) -> Tensor:
        return self.factor(self.ratio(t)) * self.objective.token_loss(t)

    def ratio(self, t: Tokens) -> Tensor:
        """`w`, `[T]`; all tokens of a sequence have the same one where it is by sequence."""
        gap = t.old_logp - t.rollout_logp
        if self.correction.by_sequence:
            total = self.reduction is MismatchReduction.SUM
            gap = t.seq_sum(gap) if total else t.seq_mean(gap)
        return torch.exp(gap.clamp(max=MAX_LOG_RATIO))

    def factor(self, ratio: Tensor) -> Tensor:
        """What `w` becomes, in `[0, cap]`. A `w` that is not a number is masked, or stays one."""
        if not self.correction.masks:
            return ratio.clamp(self.floor, self.cap)
        within = (ratio >= self.floor) & (ratio <= self.cap)
        return torch.where(within, ratio, torch.zeros_like(ratio))


Together: TypeAlias = Callable[[Tensor], Tensor]
"""From one rank's values `[n]` to those of all."""


def mismatch(
    packs: Sequence[Packed],
    logps: Sequence[Tensor],
    corrected: Corrected | None = None,
    *,
    together: Together = torch.clone,
) -> dict[str, float]:
    """How far the sampler's log-probabilities are from the trainer's, over all unmasked tokens.

    Args:
        packs: with or without `rollout_logp`; without, the result is empty.
        logps: `[T]` each, nats, under the weights at the start of the update.
        corrected: adds what it does to the ratios.
        together: of the ranks that each have some of the packs; alone nothing to do.

    Returns:
        `mismatch_mean` and `_max` of the absolute difference, nats; `_kl`, the k3 estimate of
        KL(sampler || trainer), nats; of the tokens' ratios `_ratio_max` and `_ess`, the effective
        sample size `(sum w)^2 / (n sum w^2)` in (0, 1]; and `_masked` or `_capped`, the share of
        tokens whose factor is not their ratio. Log-ratios count as at most 20 either way.

    Waits for the device once.
    """
    gaps, changed = [], []
    for packed, logp in zip(packs, logps, strict=True):
        rollout_logp, kept = packed.scored.rollout_logp, packed.scored.weight != 0
        if rollout_logp is None:
            return {}
        gaps.append((logp - rollout_logp)[kept])
        if corrected is not None:
            ratio = corrected.ratio(_view(packed, logp))
            changed.append((corrected.factor(ratio) != ratio)[kept])
    if not gaps:
        return {}
    gap = together(torch.cat(gaps)).double().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if not len(gap):
        return {}
    ratio = gap.exp()
    found = {
        "mean": gap.abs().mean(),
        "max": gap.abs().amax(),
        "kl": (gap.expm1() - gap).mean(),
        "ratio_max": ratio.amax(),
        "ess": ratio.mean() ** 2 / (ratio**2).mean(),
    }
    if corrected is not None:
        name = "masked" if corrected.correction.masks else "capped"
        found[name] = together(torch.cat(changed).double()).mean()
    values = torch.stack(list(found.values())).tolist()
    return {f"mismatch_{name}": value for name, value in zip(found, values, strict=True)}


def _view(packed: Packed, logp: Tensor) -> Tokens:
    """The pack as an objective sees it on policy."""
    scored = packed.scored
    cut = Segmentation.of(scored, Level.SEQUENCE)
    fields = token_fields(scored, None)
    return cut.view(logp, torch.zeros_like(logp), fields, slice(0, scored.num_tokens))
