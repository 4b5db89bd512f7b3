"""Everything that needs a GPU, in one command: checks, tables, profile, tuning.

    python benches/gpu_suite.py [--out FOLDER] [--minutes 8] [--only PART]
    python benches/gpu_suite.py --rehearse

The project need not be installed and nothing is compiled ahead: a temporary package is made of
links to the checkout. Results are saved after every step; a stopped run goes on where it was, as
long as the sources are the same. Exit code 1 if a check failed.

A rehearsal runs every step at tiny shapes on the CPU, the kernels in Triton's interpreter, so that
a mistake in this suite is found where there is no GPU.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 8.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benches" / "results")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="in all, about")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--only", action="append", default=[], metavar="PART", help="or `checks`")
    chosen = parser.parse_args(arguments)
    if chosen.rehearse:
        # Triton reads it when it is imported.
        os.environ["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        make_importable(Path(folder))
        from benches import gpu_run

        return gpu_run.run(
            chosen.out, minutes=chosen.minutes, rehearse=chosen.rehearse, only=chosen.only
        )


def make_importable(folder: Path) -> None:
    """`benches` from the checkout; `rlvr_fast` from there too where it is not installed.

    The package keeps its kernels beside it in the checkout, as `kernels/`.
    """
    found = importlib.util.find_spec("rlvr_fast")
    if found is None or found.origin is None:
        package = folder / "rlvr_fast"
        package.mkdir()
        for path in (ROOT / "rlvr_fast").iterdir():
            (package / path.name).symlink_to(path)
        (package / "kernels").symlink_to(ROOT / "kernels")
        # No GPU needs the extension; what a rehearsal does on the CPU may, and there it was built.
        for place in [] if found is None else found.submodule_search_locations or []:
            for built in Path(place).glob("_C.*.so"):
                (package / built.name).symlink_to(built)
        sys.path.insert(0, str(folder))
    sys.path.append(str(ROOT))


if __name__ == "__main__":
    sys.exit(main())
