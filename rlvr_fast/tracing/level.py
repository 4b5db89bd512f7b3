"""How far one token's loss looks: what a tile must hold for its coefficients to be exact."""

from collections.abc import Mapping
from enum import Enum
from functools import lru_cache

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from rlvr_fast.tracing.objective import Objective
from rlvr_fast.tracing.tokens import TokenFields, Tokens

aten = torch.ops.aten

SHAPE_ONLY = {
    aten.alias.default,
    aten.clone.default,
    aten.detach.default,
    aten.expand.default,
    aten.full.default,
    aten.full_like.default,
    aten.lift_fresh_copy.default,
    aten.new_full.default,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.ones.default,
    aten.ones_like.default,
    aten.scalar_tensor.default,
    aten.zeros.default,
    aten.zeros_like.default,
}
"""Ops that aten does not tag as pointwise, but through which no token sees another."""


class Level(Enum):
    """From the least to the most that a tile must hold."""

    TOKEN = 0
    SEQUENCE = 1
    GROUP = 2
    BATCH = 3


def level(objective: Objective) -> Level:
    """Finds out by running the objective on symbolic tokens; cached per value.

    An objective that cannot be followed (it branches on data, or reduces by other means than the
    `t.seq_...` and `t.group_...` of `Tokens`) is of `Level.BATCH`: exact, and slower.

    Raises:
        ValueError: for an objective that cannot be hashed.
    """
    try:
        return _level(objective)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        raise ValueError(
            f"objective: wanted a frozen dataclass, got unhashable {type(objective).__name__}"
        ) from error


@lru_cache(maxsize=1024)
def _level(objective: Objective) -> Level:
    recorder = _Recorder()
    # Code that depends on how many tokens there are differs between two sizes.
    graphs = [_pointwise_graph(objective, recorder, size) for size in (2, 3)]
    return recorder.level if graphs[0] is not None and graphs[0] == graphs[1] else Level.BATCH


def _pointwise_graph(objective: Objective, recorder: "_Recorder", size: int) -> str | None:
    """The traced forward code, or None if it is not pointwise."""

    def token_loss(x: Tensor) -> Tensor:
        return objective.token_loss(_SymbolicTokens(x, recorder))

    try:
        traced = make_fx(token_loss)(torch.ones(size))
    except (RuntimeError, ValueError):
        return None
    for node in traced.graph.nodes:
        if node.op == "call_function" and not _pointwise(node.target):
            return None
        if node.op == "get_attr" and getattr(traced, node.target).dim():
            return None
    return traced.code.replace(f"[{size}]", "[size]")


def _pointwise(op: object) -> bool:
    return isinstance(op, torch._ops.OpOverload) and (
        torch.Tag.pointwise in op.tags or op in SHAPE_ONLY
    )


class _Recorder:
    """Remembers the largest segment that an objective reduced over."""

    level = Level.TOKEN

    def saw(self, level: Level) -> None:
        self.level = max(self.level, level, key=lambda each: each.value)


class _AnyExtras(Mapping[str, Tensor]):
    def __init__(self, x: Tensor) -> None:
        self._x = x

    def __getitem__(self, name: str) -> Tensor:
        return self._x * 1.0

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(())

    def __len__(self) -> int:
        return 0


class _SymbolicTokens(Tokens):
    """Has every field; its reductions are pointwise placeholders that leave a note."""

    def __init__(self, x: Tensor, recorder: _Recorder) -> None:
        fields = TokenFields(
            weight=x, old_logp=x, ref_logp=x, rollout_logp=x, advantage=x, extras=_AnyExtras(x)
        )
        super().__init__(x * 1.0, x * 1.0, fields)
        self._recorder = recorder

    @property
    def extras(self) -> Mapping[str, Tensor]:
        return self._fields.extras

    def seq_sum(self, x: Tensor) -> Tensor:
        self._recorder.saw(Level.SEQUENCE)
        return x * 1.0

    seq_mean = seq_max = seq_sum

    def group_sum(self, x: Tensor) -> Tensor:
        self._recorder.saw(Level.GROUP)
        return x * 1.0

    group_mean = group_sum
