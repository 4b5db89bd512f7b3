"""Prints a traced objective as one Triton device function, and loads it from a cache file.

Every torch tensor becomes a Triton tensor, every Python number a float literal.
"""

import hashlib
import importlib.util
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

IDENTITIES = {"alias", "clone", "detach", "expand", "lift_fresh_copy", "_to_copy"}
FILLS = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}
"""Which argument is the value."""
ZEROS, ONES = {"zeros", "zeros_like", "new_zeros"}, {"ones", "ones_like", "new_ones"}
CONSTANTS = {*FILLS, *ZEROS, *ONES}
ARITHMETIC = {
    "abs": "tl.abs({0})",
    "add": "{0} + {1}",
    "cos": "tl.cos({0})",
    "div": "{0} / {1}",
    "erf": "tl.erf({0})",
    "exp": "tl.exp({0})",
    "exp2": "tl.exp2({0})",
    "expm1": "expm1({0})",
    "log": "tl.log({0})",
    "log1p": "log1p({0})",
    "log2": "tl.log2({0})",
    "maximum": "maximum({0}, {1})",
    "minimum": "minimum({0}, {1})",
    "mul": "{0} * {1}",
    "neg": "-{0}",
    "reciprocal": "1.0 / {0}",
    "relu": "maximum({0}, 0.0)",
    "rsqrt": "1.0 / tl.sqrt_rn({0})",
    "sgn": "sign({0})",
    "sigmoid": "sigmoid({0})",
    "sign": "sign({0})",
    "sin": "tl.sin({0})",
    "sqrt": "tl.sqrt_rn({0})",
    "sub": "{0} - {1}",
    "tanh": "tanh({0})",
}
COMPARISONS = {
    "eq": "{0} == {1}",
    "ge": "{0} >= {1}",
    "gt": "{0} > {1}",
    "isinf": "tl.abs({0}) == float('inf')",
    "isnan": "{0} != {0}",
    "le": "{0} <= {1}",
    "lt": "{0} < {1}",
    "ne": "{0} != {1}",
}
LOGIC = {
    "bitwise_and": "{0} & {1}",
    "bitwise_not": "{0} == 0",
    "bitwise_or": "{0} | {1}",
    "logical_and": "{0} & {1}",
    "logical_not": "{0} == 0",
    "logical_or": "{0} | {1}",
}
HARMLESS = {"dtype", "layout", "device", "pin_memory", "memory_format", "implicit", "non_blocking"}
"""Keyword arguments that say nothing the result's own dtype and shape do not."""

HEADER = """\
import triton
import triton.language as tl

from rlvr_fast.kernels.pointwise import expm1, log1p, maximum, minimum, sigmoid, sign, tanh


@triton.jit
def objective(logp, entropy, old_logp, advantage, fields, scalars):
"""


class NotPointwise(Exception):
    """What was traced does not fit into a kernel: it runs between two, as plain torch."""


def printed(graph: fx.GraphModule, parameters: Sequence[str]) -> str:
    """Source of a module with one device function, `objective`.

    Args:
        graph: of core aten ops, pure; returns the loss and two gradients, None for zero.
        parameters: for each placeholder, its Triton expression in the function.

    Raises:
        NotPointwise: for an op outside the table, or one that is not pointwise over `[T]`.
    """
    printer = _Printer(graph)
    names = iter(parameters)
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            printer.declare(node, next(names))
        elif node.op == "output":
            results = (printer.operand(x) if x is not None else _full(0.0) for x in node.args[0])
            printer.lines.append(f"return {', '.join(results)}")
        else:
            printer.define(node)
    return HEADER + "".join(f"    {line}\n" for line in printer.lines)


class _Printer:
    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph = graph
        self._names: dict[fx.Node, str] = {}
        self.lines: list[str] = []

    def declare(self, node: fx.Node, expression: str) -> None:
        if node.users:
            self._assign(node, expression)

    def define(self, node: fx.Node) -> None:
        kind = "get_attr" if node.op == "get_attr" else _name(node.target)
        if kind in IDENTITIES and _dtype(node) == _dtype(node.args[0]):
            _check_shape(node)
            self._names[node] = self._names[node.args[0]]  # type: ignore[index]
        else:
            # torch's derivatives choose among whole numbers; what these meet promotes them.
            whole = _dtype(node) == torch.int64 and (kind in CONSTANTS or kind == "where")
            self._assign(node, self._expression(kind, node), whole=whole)

    def operand(self, x: Any, dtype: torch.dtype | None = None) -> str:
        """A tensor's name, or a literal; a bool that torch promotes is cast."""
        if not isinstance(x, fx.Node):
            return _literal(x)
        promoted = dtype == torch.float32 and _dtype(x) == torch.bool
        return f"{self._names[x]}.to(tl.float32)" if promoted else self._names[x]

    def _assign(self, node: fx.Node, expression: str, *, whole: bool = False) -> None:
        _check_shape(node)
        if not whole and _dtype(node) not in (torch.float32, torch.bool):
            raise NotPointwise(f"{node.name} is {_dtype(node)}")
        self._names[node] = f"v{len(self._names)}"
        self.lines.append(f"{self._names[node]} = {expression}")

    def _expression(self, kind: str, node: fx.Node) -> str:
        alpha = node.kwargs.get("alpha", 1)
        if alpha != 1 or set(node.kwargs) - HARMLESS - {"alpha"}:
            raise NotPointwise(f"{kind} with {node.kwargs}")
        args, dtype = node.args, _dtype(node)
        if kind in CONSTANTS:
            return _full(args[FILLS[kind]] if kind in FILLS else kind in ONES, dtype)
        if kind == "get_attr":
            return _full(self._constant(node), dtype)
        if kind == "_to_copy" and dtype == torch.float32:
            return self.operand(args[0], dtype)
        if kind == "where" and len(args) == 3:
            chosen = ", ".join(self.operand(x, dtype) for x in args[1:])
            return f"tl.where({self.operand(args[0])}, {chosen})"
        if kind == "pow" and isinstance(args[1], int | float):
            return _power(self.operand(args[0]), float(args[1]))
        if kind == "clamp":
            return self._clamp(*args)
        if kind in ARITHMETIC and dtype == torch.float32:
            return ARITHMETIC[kind].format(*(self.operand(x, dtype) for x in args))
        if kind in COMPARISONS:
            return COMPARISONS[kind].format(*(self.operand(x, torch.float32) for x in args))
        if kind in LOGIC and all(isinstance(x, fx.Node) and _dtype(x) == torch.bool for x in args):
            return LOGIC[kind].format(*(self.operand(x) for x in args))
        raise NotPointwise(f"{node.target} is outside the table")

    def _clamp(self, x: Any, low: Any = None, high: Any = None) -> str:
        result = self.operand(x)
        if low is not None:
            result = f"maximum({result}, {self.operand(low)})"
        if high is not None:
            result = f"minimum({result}, {self.operand(high)})"
        return result

    def _constant(self, node: fx.Node) -> float:
        value = getattr(self._graph, str(node.target))
        if not isinstance(value, Tensor) or value.dim():
            raise NotPointwise(f"{node.name} is no 0-dim tensor")
        return float(value)


def _name(target: Any) -> str:
    """`aten.add.Tensor` to `add`; other overloads than these mean something else."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return str(target.overloadpacket.__name__)
    raise NotPointwise(f"{target} is no aten op")


def _check_shape(node: fx.Node) -> None:
    """Only `[T]` and 0-dim values; the batch is the first placeholder's."""
    batch = next(iter(node.graph.nodes)).meta["val"].shape
    if node.meta["val"].shape not in ((), batch):
        raise NotPointwise(f"{node.name} is {list(node.meta['val'].shape)}")


def _dtype(x: Any) -> torch.dtype:
    dtype = x.meta["val"].dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def _literal(x: Any) -> str:
    if not isinstance(x, bool | int | float):
        raise NotPointwise(f"{x!r} is no number")
    return repr(float(x)) if math.isfinite(x) else f'float("{float(x)}")'


def _full(value: Any, dtype: torch.dtype = torch.float32) -> str:
    if dtype == torch.bool:
        return f"tl.full((), {int(bool(value))}, tl.int1)"
    return f"tl.full((), {_literal(value)}, tl.float32)"


def _power(x: str, exponent: float) -> str:
    if exponent == int(exponent) and 1 <= abs(exponent) <= 8:
        product = " * ".join([x] * int(abs(exponent)))
        return product if exponent > 0 else f"1.0 / ({product})"
    if exponent == 0.5:
        return f"tl.sqrt_rn({x})"
    if exponent == int(exponent):
        raise NotPointwise(f"power {exponent}")
    return f"tl.exp({exponent} * tl.log({x}))"


def content_key(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:24]


@cache
def device_function(source: str) -> Callable[..., Any]:
    """The `@triton.jit` function of a printed module, from its cache file."""
    key = content_key(source)
    folder = Path(os.environ.get("RLVR_FAST_CACHE") or "~/.cache/rlvr_fast/objectives")
    path = folder.expanduser() / f"objective_{key}.py"
    _write_once(path, source)
    spec = importlib.util.spec_from_file_location(f"rlvr_fast_objective_{key}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Callable[..., Any] = module.objective
    return function


def _write_once(path: Path, source: str) -> None:
    """Processes may race: each writes a file of its own (mode 0600), and a rename is atomic."""
    if path.exists() and path.read_text() == source:
        return
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w") as file:
        file.write(source)
    os.replace(temporary, path)
