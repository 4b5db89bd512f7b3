"""`rlvr-fast methods`: what can be trained, with every option."""

import sys

from rlvr_fast import options
from rlvr_fast.cli.common import say, wants_help

USAGE = "methods"


def run(arguments: list[str]) -> int:
    if arguments and not wants_help(arguments):
        raise ValueError(f"methods: wanted no arguments, got {arguments[0]}")
    from rlvr_fast.methods import METHODS

    for name, kind in METHODS.items():
        module = sys.modules[kind.__module__]
        say(f"{name}: {module.__doc__}")
        for option, text in options.document(kind).items():
            say(f"  --method_options.{option}: {text}")
    return 0
