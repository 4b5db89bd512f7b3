"""Dataclass fields as options: built from TOML values or text, documented by their docstrings."""

import ast
import inspect
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from enum import Enum
from typing import Any, TypeVar

Table: typing.TypeAlias = Mapping[str, Any]
"""The annotation of a field that holds another set of options, set as `table.option`."""

Options = TypeVar("Options")


def build(what: str, kind: type[Options], values: Mapping[str, object]) -> Options:
    """An instance of the dataclass `kind`.

    Args:
        what: names the options in messages, such as "config field".
        kind: a dataclass with fields of type int, float, bool, str, an Enum of strings, `Table`,
            or one of these or None.
        values: by field, of the field's type or text of it, as from a command line.

    Raises:
        ValueError: for an unknown or missing field, and for a value of another type.
    """
    hints = typing.get_type_hints(kind)
    for name in values:
        check_known(what, name, _names(kind))
    for spec in _fields(kind):
        if spec.default is MISSING and spec.default_factory is MISSING and spec.name not in values:
            raise ValueError(f"{spec.name}: wanted a value, got nothing")
    return kind(**{name: _typed(name, value, hints[name]) for name, value in values.items()})


def merge(
    kind: type[Any], values: Mapping[str, object], overrides: Mapping[str, object]
) -> dict[str, object]:
    """`values` with the overrides in place; `table.option` replaces one entry of a `Table`."""
    merged = dict(values)
    tables = [name for name, hint in typing.get_type_hints(kind).items() if hint == Table]
    for name, value in overrides.items():
        table, _, option = name.partition(".")
        if option and table in tables:
            merged[table] = {**typing.cast(Table, merged.get(table, {})), option: value}
        else:
            merged[name] = value
    return merged


def parse(
    what: str, kind: type[Any], arguments: Sequence[str], *, besides: Sequence[str] = ()
) -> dict[str, str]:
    """`--field value` and `--field=value` pairs as text by field, or by a name of `besides`.

    Raises:
        ValueError: for an unknown field, a field without a value, or something else in between.
    """
    found: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        head = rest.pop(0)
        if not head.startswith("--"):
            raise ValueError(f"arguments: wanted --field value, got {head}")
        name, equals, value = head[2:].partition("=")
        check_known(what, name.partition(".")[0], [*_names(kind), *besides])
        if not equals:
            if not rest:
                raise ValueError(f"{name}: wanted a value after --{name}, got nothing")
            value = rest.pop(0)
        found[name] = value
    return found


def document(kind: type[Any]) -> dict[str, str]:
    """By field: its docstring, type and default."""
    docs: dict[str, str] = {}
    for parent in reversed(kind.__mro__[:-1]):
        tree = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for above, below in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(above, ast.AnnAssign) and isinstance(below, ast.Expr):
                docs[ast.unparse(above.target)] = " ".join(ast.literal_eval(below.value).split())
    hints = typing.get_type_hints(kind)
    return {
        spec.name: f"{docs[spec.name]} [{_type_name(hints[spec.name])}{_default(spec)}]"
        for spec in _fields(kind)
    }


def check_known(what: str, name: str, known: Iterable[str]) -> None:
    """Raises a ValueError that names the nearest of `known` unless `name` is one of them."""
    names = sorted(known)
    if name not in names:
        nearest = get_close_matches(name, names, n=1, cutoff=0.0)
        hint = f"; the nearest is {nearest[0]}" if nearest else "; there is none at all"
        raise ValueError(f"unknown {what} {name}{hint}")


def plain(value: object) -> object:
    """Text that is a TOML value becomes that value; anything else stays."""
    if not isinstance(value, str):
        return value
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value


def _fields(kind: type[Any]) -> list["Field[Any]"]:
    return [spec for spec in fields(kind) if spec.init]


def _names(kind: type[Any]) -> list[str]:
    return [spec.name for spec in _fields(kind)]


def _typed(name: str, value: object, hint: Any) -> Any:
    if hint == Table:
        if not isinstance(value, Mapping):
            raise ValueError(f"{name}: wanted a table (--{name}.OPTION VALUE), got {value!r}")
        return {key: plain(item) for key, item in value.items()}
    if isinstance(hint, types.UnionType):
        (inner,) = (kind for kind in typing.get_args(hint) if kind is not types.NoneType)
        return None if value in (None, "none") else _typed(name, value, inner)
    if issubclass(hint, Enum) and value in [member.value for member in hint]:
        return hint(value)
    if hint in (int, float, bool):
        value = plain(value.lower() if isinstance(value, str) else value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{name}: wanted {_type_name(hint)}, got {value!r}")
    return value


def _type_name(hint: Any) -> str:
    if hint == Table:
        return "table"
    if isinstance(hint, types.UnionType):
        return " or ".join(
            "none" if kind is types.NoneType else _type_name(kind) for kind in typing.get_args(hint)
        )
    if issubclass(hint, Enum):
        return " | ".join(member.value for member in hint)
    return str(hint.__name__)


def _default(spec: "Field[Any]") -> str:
    if spec.default is MISSING:
        return ""
    default = spec.default.value if isinstance(spec.default, Enum) else spec.default
    return f", default {'none' if default is None else default!r}"
