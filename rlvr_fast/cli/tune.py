"""`rlvr-fast tune`: measures block sizes and logits budgets for this machine."""

from pathlib import Path

from rlvr_fast.cli.common import Parser, say

USAGE = "tune [--device cuda|cpu] [--minutes N] [--out FILE]"


def run(arguments: list[str]) -> int:
    parser = Parser("rlvr-fast tune", description="Measures block sizes and logits budgets.")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--minutes", type=float, default=10.0, help="to spend; default: 10")
    parser.add_argument("--out", type=Path, help="a JSON file; default: the one that is looked up")
    chosen = parser.parse_args(arguments)
    from rlvr_fast import autotune, devices, tuning

    path = chosen.out or tuning.user_file()
    tuning.load(path)  # a foreign file is no surprise after minutes
    found = autotune.tune(devices.device(chosen.device), chosen.minutes, progress=say)
    tuning.save(found.table(), path)
    say(f"\n{found.markdown()}\n\nwritten: {path}")
    return 0
