"""Linear layers whose weights lie as oneDNN reads them, for products with few rows on the CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

_ROWS = 64  # oneDNN asks how many a product will have; it serves any number.


def supported(weight: Tensor) -> bool:
    """Whether oneDNN multiplies by such a weight on this machine."""
    return (
        weight.is_cpu
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class LaidOut:
    """Layers that read one input, as one product without gradients.

    A plain weight is rearranged at every product, which tells when few rows share the work.

    Args:
        weights: `[F, D]` each, `supported`. They are copied.
        biases: `[F]` each, or None.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        joined = torch.cat([weight.detach() for weight in weights])
        self._weight = torch.ops.mkldnn._reorder_linear_weight(joined, _ROWS)
        self._bias = None
        if any(bias is not None for bias in biases):
            parts = zip(weights, biases, strict=True)
            self._bias = torch.cat(
                [w.new_zeros(len(w)) if b is None else b.detach() for w, b in parts]
            )

    def __call__(self, x: Tensor) -> Tensor:
        """The layers' outputs for `x` `[..., D]` bf16, side by side; bf16."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, "none", [], ""
        )
        return product
