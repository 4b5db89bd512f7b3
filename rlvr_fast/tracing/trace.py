"""From an objective in plain torch to one graph of its token loss and both gradients."""

import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from rlvr_fast.tracing.objective import Objective
from rlvr_fast.tracing.tokens import TokenFields, Tokens
from rlvr_fast.tracing.triton_source import NotPointwise, content_key, printed

FIELDS = ("old_logp", "advantage", "ref_logp", "rollout_logp")
"""The optional fields of `TokenFields` that are not extras."""


@dataclass(frozen=True, kw_only=True)
class Traced:
    """What a kernel needs to know of an objective; shared by all of the same structure."""

    graph: fx.GraphModule
    """(logp, entropy, weight, `FIELDS`, `extras`, scalars) to (loss, dlogp, dentropy or None).

    Its constants may have the number of tokens it was traced with, which is 3.
    """
    source: str
    """Of the Triton module; see `triton_source.device_function`."""
    key: str
    """A hash of `source`."""
    reads: tuple[str, ...]
    """Which of `FIELDS` it reads, in their order."""
    extras: tuple[str, ...]
    """Names of the extras it reads."""
    reads_entropy: bool
    """False if the gradient with respect to the entropy is 0 whatever the values."""
    literal: bool
    """Its floats are part of the source, because it computes with them in Python."""

    @property
    def other_fields(self) -> tuple[str, ...]:
        """Fields of `reads` that the kernel knows nothing special about."""
        return tuple(name for name in self.reads if name not in ("old_logp", "advantage"))

    def scalars(self, objective: Objective) -> tuple[float, ...]:
        """The floats of an objective of this structure, in the kernel's order."""
        return () if self.literal else tuple(_floats(objective))


_SIZE = 3
_traced: dict[Hashable, Traced | None] = {}
_literal: set[Hashable] = set()
"""Structures whose floats are part of the source."""
_FAILURES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What Python code may raise that is given tensors in the place of floats."""


def trace(objective: Objective) -> Traced | None:
    """Traces an objective, once per structure: its types, nesting and all fields but floats.

    Returns:
        None if the objective is not pointwise over tokens (it calls `seq_sum`, `group_sum`
        or their kin, or an op the kernels do not know), or has a field that cannot be hashed.
    """
    try:
        structure = _structure(objective)
        hash(structure)
    except (NotPointwise, TypeError):
        return None
    if structure not in _traced:
        _traced[structure] = _trace(objective, literal=False)
        if _traced[structure] is None and _trace(objective, literal=True) is not None:
            _literal.add(structure)
    if structure not in _literal:
        return _traced[structure]
    with_values = (structure, tuple(_floats(objective)))
    if with_values not in _traced:
        _traced[with_values] = _trace(objective, literal=True)
    return _traced[with_values]


def _trace(objective: Objective, *, literal: bool) -> Traced | None:
    """With the floats as arguments, or as literals."""
    with torch.inference_mode(False), torch.enable_grad():
        try:
            extras = _extras_read(objective)
            # Code that depends on the number of tokens differs between two numbers.
            traced, other = (_traced_at(size, objective, extras, literal) for size in (_SIZE, 5))
        except NotPointwise:
            return None
        same = traced.source == other.source and _agrees(traced, objective)
    return traced if same else None


def _traced_at(size: int, objective: Objective, extras: tuple[str, ...], literal: bool) -> Traced:
    count = 0 if literal else len(tuple(_floats(objective)))
    shapes = [(size,)] * (3 + len(FIELDS) + len(extras)) + [()] * count
    graph = core_graph(_with_gradients(objective, extras, literal), shapes)
    used = [bool(node.users) for node in graph.graph.nodes if node.op == "placeholder"]
    reads = tuple(name for name, use in zip(FIELDS, used[3:], strict=False) if use)
    others = [name for name in FIELDS[2:] if name in reads]
    source = printed(
        graph,
        [
            *("logp", "entropy", "fields[0]", "old_logp", "advantage"),
            *(f"fields[{others.index(x) + 1}]" if x in others else "" for x in FIELDS[2:]),
            *(f"fields[{i + 1 + len(others)}]" for i in range(len(extras))),
            *(f"scalars[{i}]" for i in range(count)),
        ],
    )
    (results,) = next(iter(reversed(graph.graph.nodes))).args
    return Traced(
        graph=graph,
        source=source,
        key=content_key(source),
        reads=reads,
        extras=extras,
        reads_entropy=results[2] is not None,
        literal=literal,
    )


def _with_gradients(
    objective: Objective, extras: tuple[str, ...], literal: bool
) -> Callable[..., tuple[Tensor | None, ...]]:
    def run(*values: Tensor) -> tuple[Tensor | None, ...]:
        logp, entropy = (x.detach().requires_grad_() for x in values[:2])
        first = 3 + len(FIELDS)
        named = dict(zip(extras, values[first:], strict=False))
        tokens = _EveryField((logp, entropy, *values[2:first]), named.__getitem__)
        scalars = iter(values[first + len(extras) :])
        loss = (objective if literal else _with_floats(objective, scalars)).token_loss(tokens)
        if loss.shape != logp.shape:
            raise NotPointwise(f"a loss of {list(loss.shape)}")
        if not loss.requires_grad:
            return loss, None, None
        ones = torch.ones_like(loss)
        return loss, *torch.autograd.grad(loss, (logp, entropy), ones, allow_unused=True)

    return run


def core_graph(function: Callable[..., Any], shapes: Sequence[tuple[int, ...]]) -> fx.GraphModule:
    """Of core aten ops, without mutation, from a function that may differentiate.

    Raises:
        NotPointwise: for a function that fails on symbolic values.
    """
    values = [torch.ones(shape) for shape in shapes]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with_mutation = make_fx(function)(*values)
        except _FAILURES as error:
            # It ran on numbers (`_extras_read`), so that this is about tracing.
            raise NotPointwise(str(error)) from error
        # Functionalisation refuses autograd: it comes second.
        core: Any = core_aten_decompositions()
        graph = make_fx(torch.func.functionalize(with_mutation), decomposition_table=core)(*values)
    graph.graph.eliminate_dead_code()
    return graph


def _agrees(traced: Traced, objective: Objective) -> bool:
    """Code may ask whether a field is a float, which under tracing it is not."""
    count = 3 + len(FIELDS) + len(traced.extras)
    tokens = [torch.linspace(-1.0, 1.5, _SIZE).roll(i) * 0.9**i for i in range(count)]
    ours = traced.graph(*tokens, *map(torch.tensor, traced.scalars(objective)))
    wanted = _with_gradients(objective, traced.extras, True)(*tokens)
    return all(
        x is y or (x is not None and y is not None and torch.allclose(x, y, 1e-3, equal_nan=True))
        for x, y in zip(ours, wanted, strict=True)
    )


def _extras_read(objective: Objective) -> tuple[str, ...]:
    """Runs the objective on numbers, so that an author's mistake is raised as what it is."""
    names = set()

    def lookup(name: str) -> Tensor:
        names.add(name)
        return torch.ones(3)

    objective.token_loss(_EveryField([torch.ones(3)] * (3 + len(FIELDS)), lookup))
    return tuple(sorted(names))


class _EveryField(Tokens):
    """Has all fields, and any extra by name; no sequences and no groups."""

    def __init__(self, values: Sequence[Tensor], extra: Callable[[str], Tensor]) -> None:
        logp, entropy, weight, *fields = values
        named = dict(zip(FIELDS, fields, strict=True))
        super().__init__(logp, entropy, TokenFields(weight=weight, extras={}, **named))
        self._extra = extra

    @property
    def extras(self) -> Mapping[str, Tensor]:
        return AnyExtra(lambda name: torch.where(self.kept, self._extra(name), 0.0))

    def seq_sum(self, x: Tensor) -> Tensor:
        raise NotPointwise("a sum over tokens")

    seq_mean = seq_max = group_sum = group_mean = seq_sum


class AnyExtra(Mapping[str, Tensor]):
    """Answers to names, not to questions about which there are."""

    def __init__(self, lookup: Callable[[str], Tensor]) -> None:
        self._lookup = lookup

    def __getitem__(self, name: str) -> Tensor:
        return self._lookup(name)

    def __iter__(self) -> Iterator[str]:
        raise NotPointwise("the names of all extras")

    def __len__(self) -> int:
        raise NotPointwise("the number of extras")

    def __contains__(self, name: object) -> bool:
        raise NotPointwise("whether there is an extra")

    def get(self, name: str, default: Any = None) -> Any:
        raise NotPointwise("whether there is an extra")


def _structure(value: Any) -> Hashable:
    """Everything about a value except its floats."""
    if isinstance(value, float):
        return float
    if isinstance(value, tuple):
        return (type(value), *map(_structure, value))
    if is_dataclass(value) and not isinstance(value, type):
        return (type(value), *(_structure(getattr(value, f.name)) for f in fields(value)))
    if isinstance(value, Tensor):
        raise NotPointwise("a tensor whose values may change")
    return (type(value), value)


def _floats(value: Any) -> Iterator[float]:
    """The floats of nested dataclasses and tuples, depth first."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, tuple):
        yield from chain.from_iterable(map(_floats, value))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from chain.from_iterable(_floats(getattr(value, f.name)) for f in fields(value))


def _with_floats(value: Any, scalars: Iterator[Tensor]) -> Any:
    """A copy with tensors in the place of its floats, which no `__post_init__` gets to see."""
    if isinstance(value, float):
        return next(scalars)
    if isinstance(value, tuple):
        return tuple(_with_floats(x, scalars) for x in value)
    if is_dataclass(value) and not isinstance(value, type):
        copy = object.__new__(type(value))
        for f in fields(value):
            object.__setattr__(copy, f.name, _with_floats(getattr(value, f.name), scalars))
        return copy
    return value
