"""How the attention of a pack is computed: who sees whom, and the kernels that run it."""

from rlvr_fast.attention_plans.choice import plan_pack as plan_pack
from rlvr_fast.attention_plans.cpp import CppPlan as CppPlan
from rlvr_fast.attention_plans.cpp import plan_cpp as plan_cpp
from rlvr_fast.attention_plans.layout import Plan as Plan
from rlvr_fast.attention_plans.rectangles import BlockPlan as BlockPlan
from rlvr_fast.attention_plans.rectangles import plan_blocks as plan_blocks
from rlvr_fast.attention_plans.varlen import VarlenPlan as VarlenPlan
from rlvr_fast.attention_plans.varlen import plan_varlen as plan_varlen
