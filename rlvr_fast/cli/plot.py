"""`rlvr-fast plot`: one picture of one or more runs."""

from pathlib import Path

from rlvr_fast.cli.common import Parser, say

USAGE = "plot RUN... [--out FILE.png] [--smooth N] [--group true]"


def run(arguments: list[str]) -> int:
    parser = Parser("rlvr-fast plot", description="Draws one or more runs into one picture.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--out",
        type=Path,
        help=".png, .pdf or .svg; default: plot.png in the run's folder, for several runs here",
    )
    parser.add_argument(
        "--smooth", type=int, help="steps of the running mean; default: a 40th of all; 1: none"
    )
    parser.add_argument(
        "--group",
        choices=["true", "false"],
        default="false",
        help="draw runs that only differ by their seed as their mean, in a band of all of them",
    )
    chosen = parser.parse_args(arguments)
    from rlvr_fast import curves, plot

    lines = curves.lines(curves.load(chosen.runs), group=chosen.group == "true")
    out = chosen.out or (chosen.runs[0] if len(chosen.runs) == 1 else Path()) / "plot.png"
    say(str(plot.draw(lines, out, smooth=chosen.smooth)))
    return 0
