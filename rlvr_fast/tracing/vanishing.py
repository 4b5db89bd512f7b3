"""Whether an objective's gradient is exactly zero where the advantage is."""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
from torch import Tensor, fx

from rlvr_fast.tracing.objective import Objective
from rlvr_fast.tracing.tokens import TokenFields, Tokens
from rlvr_fast.tracing.trace import AnyExtra, core_graph
from rlvr_fast.tracing.triton_source import FILLS, IDENTITIES, ZEROS, NotPointwise

ZERO_IF_FIRST_IS = {*IDENTITIES, "abs", "div", "neg", "relu", "sgn", "sign", "sqrt", "tanh"}
ZERO_IF_ALL_ARE = {"add", "maximum", "minimum", "sub"}
_SIZE = 3


@lru_cache(maxsize=1024)
def vanishes(objective: Objective) -> bool:
    """True if the gradient of every token is exactly zero where all advantages it sees are.

    Those it sees are its own, and for an objective that calls `t.seq_sum`, `t.group_sum` and their
    kin those of its sequence or group. Found by following the zeros through the traced
    gradient, so for all values of the other fields that are finite. An objective that cannot be
    followed gives False.
    """
    with torch.inference_mode(False), torch.enable_grad():
        try:
            graph = core_graph(_gradients(objective), [(_SIZE,)] * 6)
        except NotPointwise:
            return False
    zero: set[fx.Node] = set()
    for index, node in enumerate(graph.graph.nodes):
        if node.op == "placeholder":
            if index == _ADVANTAGE:
                zero.add(node)
        elif node.op == "output":
            return all(x is None or x in zero for x in node.args[0])
        elif _is_zero(graph, node, zero):
            zero.add(node)
    raise AssertionError("a graph without an output")


_ADVANTAGE = 5
"""Which argument of the function below."""


def _gradients(objective: Objective) -> Callable[..., tuple[Tensor | None, ...]]:
    """Of the token losses with respect to logp and entropy; segment means become scalings."""

    def run(logp: Tensor, entropy: Tensor, old: Tensor, ref: Tensor, rollout: Tensor,
            advantage: Tensor) -> tuple[Tensor | None, ...]:  # fmt: skip
        logp, entropy = (x.detach().requires_grad_() for x in (logp, entropy))
        fields = TokenFields(
            weight=torch.ones(_SIZE),
            old_logp=old,
            ref_logp=ref,
            rollout_logp=rollout,
            advantage=advantage,
            extras={},
        )
        loss = objective.token_loss(_LinearSegments(logp, entropy, fields))
        if not loss.requires_grad:
            return (None,)
        return torch.autograd.grad(loss, (logp, entropy), torch.ones_like(loss), allow_unused=True)

    return run


class _LinearSegments(Tokens):
    """Its sums keep zeros zero, as those over segments do; any extra is there by name."""

    @property
    def extras(self) -> Mapping[str, Tensor]:
        return AnyExtra(lambda _: self.logp.detach() * 0.5)

    def seq_sum(self, x: Tensor) -> Tensor:
        return x * 2.0

    seq_mean = seq_max = group_sum = group_mean = seq_sum


def _is_zero(graph: fx.GraphModule, node: fx.Node, zero: set[fx.Node]) -> bool:
    """From what is known of its arguments."""

    def known(x: object) -> bool:
        return x in zero if isinstance(x, fx.Node) else isinstance(x, int | float) and x == 0

    if node.op == "get_attr":
        value = getattr(graph, str(node.target))
        return isinstance(value, Tensor) and not value.any()
    name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
    if name in ZEROS:
        return True
    if name in FILLS:
        return known(node.args[FILLS[name]])
    if name == "mul":
        return any(known(x) for x in node.args) and all(_finite(x) for x in node.args)
    if name == "where":
        return known(node.args[1]) and known(node.args[2])
    if name in ZERO_IF_ALL_ARE:
        return all(known(x) for x in node.args)
    return name in ZERO_IF_FIRST_IS and known(node.args[0])


def _finite(x: object) -> bool:
    return not isinstance(x, float) or math.isfinite(x)
