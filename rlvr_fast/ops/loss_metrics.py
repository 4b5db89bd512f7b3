"""Metrics of a loss as sums and extrema on the device, read once per optimiser step."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rlvr_fast.tracing.tokens import TokenFields


@dataclass(frozen=True, kw_only=True)
class LossMetrics:
    """0-dim fp32 tensors over the scored, unmasked tokens; merge micro-batches, then read once."""

    tokens: Tensor
    rows: Tensor
    """All rows, masked and skipped ones too."""
    skipped: Tensor
    """Rows that were not multiplied, because their gradient is exactly zero."""
    entropy: Tensor
    """Sum, nats."""
    kl: Tensor
    """Sum of `r - 1 - log r` with `r = pi / pi_old`: an estimate of KL(pi_old || pi), nats."""
    ratio: Tensor
    """Sum of the importance ratios."""
    ratio_squared: Tensor
    ratio_min: Tensor
    ratio_max: Tensor
    clipped_low: Tensor
    """Tokens with negative advantage whose gradient is exactly zero."""
    clipped_high: Tensor
    """Tokens with positive advantage whose gradient is exactly zero."""

    @staticmethod
    def merge(parts: Sequence["LossMetrics"]) -> "LossMetrics":
        """The metrics of all parts together, still on the device."""
        joined = {
            f.name: torch.stack([getattr(p, f.name) for p in parts]) for f in fields(parts[0])
        }
        return LossMetrics(
            **{
                name: x.amin()
                if name == "ratio_min"
                else x.amax()
                if name == "ratio_max"
                else x.sum()
                for name, x in joined.items()
            }
        )

    def read(self) -> dict[str, float]:
        """Plain numbers: means per token, extrema, `ess`, the effective sample size in (0, 1], and
        `skipped`, the share of rows that were not multiplied.

        Waits for the device once.
        """
        names = [f.name for f in fields(self)]
        values = torch.stack([getattr(self, name).float() for name in names]).tolist()
        raw = dict(zip(names, values, strict=True))
        count = max(raw["tokens"], 1.0)
        empty = raw["tokens"] == 0
        return {
            "tokens": raw["tokens"],
            "skipped": raw["skipped"] / max(raw["rows"], 1.0),
            "entropy": raw["entropy"] / count,
            "kl": raw["kl"] / count,
            "ratio_mean": 1.0 if empty else raw["ratio"] / count,
            "ratio_min": 1.0 if empty else raw["ratio_min"],
            "ratio_max": 1.0 if empty else raw["ratio_max"],
            "clip_low": raw["clipped_low"] / count,
            "clip_high": raw["clipped_high"] / count,
            "ess": 1.0 if empty else raw["ratio"] ** 2 / (count * raw["ratio_squared"]),
        }


def loss_metrics(
    logp: Tensor, entropy: Tensor, dlogp: Tensor, fields: TokenFields, *, skipped: int = 0
) -> LossMetrics:
    """From the results of the scored rows; `skipped` counts the others. No host sync."""
    kept = fields.weight != 0
    old_logp = logp if fields.old_logp is None else torch.where(kept, fields.old_logp, logp)
    log_ratio = (logp - old_logp).clamp(-20.0, 20.0)
    ratio = log_ratio.exp()
    one = ratio.new_ones(1)
    zero_gradient = kept & (dlogp == 0)
    advantage = logp.new_zeros(()) if fields.advantage is None else fields.advantage

    def total(x: Tensor) -> Tensor:
        return torch.where(kept, x, torch.zeros_like(x)).sum()

    return LossMetrics(
        tokens=kept.sum().to(logp.dtype),
        rows=logp.new_full((), len(logp) + skipped),
        skipped=logp.new_full((), skipped),
        entropy=total(entropy),
        kl=total(ratio - 1 - log_ratio),
        ratio=total(ratio),
        ratio_squared=total(ratio**2),
        ratio_min=torch.cat(
            [torch.where(kept, ratio, ratio.new_full((), torch.inf)), one * torch.inf]
        ).amin(),
        ratio_max=torch.cat([torch.where(kept, ratio, ratio.new_zeros(())), one * 0]).amax(),
        clipped_low=(zero_gradient & (advantage < 0)).sum().to(logp.dtype),
        clipped_high=(zero_gradient & (advantage > 0)).sum().to(logp.dtype),
    )
