"""`rlvr-fast methods`: what can be trained, a line each; or one method with every option."""

import inspect
from typing import TYPE_CHECKING

from rlvr_fast import options
from rlvr_fast.cli.common import say, wants_help

if TYPE_CHECKING:
    from rlvr_fast.methods.base import Method

USAGE = "methods [NAME]"


def run(arguments: list[str]) -> int:
    if wants_help(arguments):
        say(f"rlvr-fast {USAGE}")
        return 0
    if len(arguments) > 1:
        raise ValueError(f"methods: wanted at most one name, got {' '.join(arguments)}")
    from rlvr_fast.methods import METHODS
    from rlvr_fast.methods.table import summary

    if arguments:
        options.check_known("method", arguments[0], METHODS)
        say(_described(METHODS[arguments[0]]))
        return 0
    width = max(map(len, METHODS))
    for name, kind in METHODS.items():
        mark = "*" if kind.paper.reconstructed else " "
        say(f"{name:<{width}} {mark} {summary(kind)}")
    say("\n* some of it is ours, since no source says it: rlvr-fast methods NAME")
    return 0


def _described(kind: "type[Method]") -> str:
    from rlvr_fast.methods.table import summary

    paper = kind.paper
    ours = [f"Ours, since no source says it: {each}" for each in paper.reconstructed]
    settings = [f"--{name} {value} unless you say otherwise" for name, value in
                kind.settings.items()]  # fmt: skip
    return "\n".join(
        [
            summary(kind),
            "",
            inspect.getdoc(kind) or "",
            "",
            f"Source: {paper.source}; read: {paper.evidence}",
            *ours,
            *settings,
            *(
                f"  --method_options.{option}: {text}"
                for option, text in options.document(kind).items()
            ),
        ]
    )
