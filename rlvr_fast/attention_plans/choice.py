"""Which arrangement of a pack's attention runs: decided by the tensors that reach the layers."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from rlvr_fast.attention_plans import cpp, layout
from rlvr_fast.attention_plans.cpp import CppPlan, plan_cpp
from rlvr_fast.attention_plans.layout import Plan
from rlvr_fast.attention_plans.rectangles import BlockPlan, plan_blocks
from rlvr_fast.attention_plans.varlen import VarlenPlan, installed, plan_varlen, takes
from rlvr_fast.packed import Packed


def plan_pack(packed: Packed) -> Plan:
    """The attention of a pack: variable-length kernels on CUDA where they run, C++ on a CPU for the
    kinds of heads that it takes, else rectangles.
    """
    return _PackPlan(packed=packed)


@dataclass(frozen=True, kw_only=True)
class _PackPlan:
    """Arranges the pack in the first layer: only there dtype and head size are known for sure."""

    packed: Packed

    @cached_property
    def longest(self) -> int:
        return layout.longest(layout.stretches(self.packed))

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, dropout: float
    ) -> Tensor:
        plan = self._chosen(query, key, value, dropout)
        return plan.attend(layer, query, key, value, scale=scale, dropout=dropout)

    def _chosen(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Plan:
        if takes(query, value, dropout):
            return self._varlen
        return self._cpp if cpp.takes(query, key, value, dropout) else self._blocks

    @cached_property
    def _varlen(self) -> VarlenPlan:
        kernel = installed()
        assert kernel is not None
        return plan_varlen(self.packed, kernel)

    @cached_property
    def _cpp(self) -> CppPlan:
        return plan_cpp(self.packed)

    @cached_property
    def _blocks(self) -> BlockPlan:
        return plan_blocks(self.packed)
