"""`rlvr-fast show`: completions of a step, side by side."""

import shutil
import sys
from pathlib import Path

from rlvr_fast.cli.common import Parser, say

USAGE = "show RUN [--step N] [--against RUN2] [--prompts K] [--width W] [--lines L]"


def run(arguments: list[str]) -> int:
    parser = Parser("rlvr-fast show", description="Shows completions of a step, best first.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--step", type=int, help="default: the last one")
    parser.add_argument("--against", type=Path, metavar="RUN2", help="the same prompts of this run")
    parser.add_argument("--prompts", type=int, default=4, help="at most so many; default: 4")
    parser.add_argument("--width", type=int, help="of a line; default: the terminal's")
    parser.add_argument("--lines", type=int, default=24, help="of a completion; default: 24")
    chosen = parser.parse_args(arguments)
    from rlvr_fast import show

    layout = show.Layout(
        width=shutil.get_terminal_size((100, 24)).columns if chosen.width is None else chosen.width,
        lines=chosen.lines,
        prompts=chosen.prompts,
    )
    if chosen.against is None:
        page = show.page(chosen.run, chosen.step, layout)
    else:
        page = show.comparison(chosen.run, chosen.against, chosen.step, layout)
    encoding = sys.stdout.encoding or "ascii"
    say(page.encode(encoding, "backslashreplace").decode(encoding))
    return 0
