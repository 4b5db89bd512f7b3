"""Attention of a pack on the CPU, in C++: rows stay where they lie, and trunks are shared."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rlvr_fast.attention_plans import layout
from rlvr_fast.ops.pack_attention import pack_attention, supported
from rlvr_fast.packed import Packed


@dataclass(frozen=True, kw_only=True)
class CppPlan:
    """The attention of one pack, see `plan_cpp`."""

    stretches: NDArray[np.int64]
    """`[S, 5]`"""
    longest: int

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, dropout: float
    ) -> Tensor:
        assert dropout == 0
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return pack_attention(q, k, v, self.stretches, scale=scale)[None]


def plan_cpp(packed: Packed) -> CppPlan:
    """Plans the attention of a pack."""
    stretches = list(layout.stretches(packed))
    return CppPlan(stretches=np.array(stretches, dtype=np.int64), longest=layout.longest(stretches))


def takes(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether there is C++ for such tensors."""
    return not dropout and supported(query, key, value)
