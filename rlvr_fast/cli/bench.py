"""`rlvr-fast bench`: the bench suite of the source checkout."""

import os
import subprocess
import sys
from pathlib import Path

USAGE = "bench [methods [NAME ...]] [--out FOLDER] [--only PART] [--minutes N] [--quick]"


def run(arguments: list[str]) -> int:
    benches = Path(__file__).parents[2] / "benches"
    if not (benches / "suite.py").exists():
        raise ValueError(
            f"bench: wanted the source checkout, whose benches are at {benches}, got none there"
        )
    path = os.pathsep.join([str(benches.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "benches.suite", *arguments]
    return subprocess.call(command, env=os.environ | {"PYTHONPATH": path})
