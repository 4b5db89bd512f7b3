"""What happens to a logit between the GEMM and the softmax."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LogitTransform:
    """`cap(logit_scale x) / temperature`, `cap(u) = softcap tanh(u / softcap)`, in fp32.

    Raises:
        ValueError: for a value that is not positive and finite.
    """

    temperature: float = 1.0
    """The sampler's."""
    softcap: float | None = None
    """Gemma 2's final-logit softcap, in logits; None for none."""
    logit_scale: float = 1.0
    """Multiplies the logits first (Granite and Cohere scale theirs)."""

    def __post_init__(self) -> None:
        for name in ("temperature", "softcap", "logit_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}: wanted positive and finite, got {value}")

    @property
    def scale(self) -> float:
        """Of the raw logit where the softcap, if any, is flat."""
        return self.logit_scale / self.temperature

    @property
    def cap(self) -> float:
        """The bound of the transformed logit, 0 for none: `x -> cap tanh(scale x / cap)`."""
        return 0.0 if self.softcap is None else self.softcap / self.temperature


def transformed(logits: Tensor, scale: float, cap: float) -> Tensor:
    """The definition: fp32, or fp64 if the logits are."""
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    return cap * torch.tanh(scaled / cap) if cap else scaled
