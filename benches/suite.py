"""`rlvr-fast bench`: every part that fits this machine, into a folder of results.

    python -m benches.suite [--out FOLDER] [--only PART] [--minutes N] [--quick]
    python -m benches.suite methods [NAME ...] [the same options]

The second measures what each method costs and what it learns, see `bench_methods.py`. Writes
`<device>-<date>.json` and `.md` after every case and the plots at the end. A stopped run goes on
where it was, as long as the sources are the same.
"""

import argparse
import datetime
import gc
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benches import bench_methods, measure
from benches.parts import PARTS, QUICK, SCALES, Case, Machine, Part
from benches.peers import attempt
from benches.report import Entry, Results
from rlvr_fast.methods import METHODS
from rlvr_fast.options import check_known

FOLDER = Path(__file__).parent / "results"
MINUTES, METHODS_MINUTES = 10.0, 60.0
LEAST_SECONDS = 1.0
ALSO = "python -m pytest benches/bench_trainer.py compares a training step with TRL's (minutes)"


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 if a case failed as a whole."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    of_methods = given[:1] == ["methods"]
    chosen = (method_options() if of_methods else options()).parse_args(given[of_methods:])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = today() + "-methods" * of_methods + "-quick" * chosen.quick
    results = Results(chosen.out, device, name)
    scale = (QUICK if chosen.quick else SCALES)[device]
    machine = Machine(device=device, scale=scale, rate=measure.gemm_rate(device))
    say(f"{results.data['machine']}; GEMM {machine.rate / 1e12:.2f} TFLOP/s")
    known = PARTS
    if of_methods:
        size = bench_methods.QUICK if chosen.quick else bench_methods.FULL
        known = bench_methods.parts(chosen.names, size)
    parts = {name: known[name] for name in chosen.only or known}
    run_parts(results, machine, parts, seconds=60 * chosen.minutes)
    finish(results)
    say(ALSO)
    return int(any(e["failed"] for e in results.entries.values()))


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "rlvr-fast bench",
        description="Measures every part that fits this machine. A stopped run goes on where it "
        "was, as long as the sources are the same.",
        epilog=f"Parts: {', '.join(PARTS)}. `rlvr-fast bench methods [NAME ...]` measures what "
        "each method costs and learns instead.",
    )
    return with_common(parser, list(PARTS), MINUTES)


def method_options() -> argparse.ArgumentParser:
    parts = list(bench_methods.parts([], bench_methods.FULL))
    parser = argparse.ArgumentParser(
        "rlvr-fast bench methods",
        description="Measures what each method costs over the baseline and what it learns on the "
        "tiny task.",
        epilog=f"Parts: {', '.join(parts)}.",
    )
    parser.add_argument("names", nargs="*", type=method_name, metavar="NAME", help="default: all")
    return with_common(parser, parts, METHODS_MINUTES)


def method_name(name: str) -> str:
    try:
        check_known("method", name, METHODS)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def with_common(
    parser: argparse.ArgumentParser, parts: Sequence[str], minutes: float
) -> argparse.ArgumentParser:
    """With the options that both have."""
    parser.add_argument(
        "--out", type=Path, default=FOLDER, metavar="FOLDER", help=f"default: {FOLDER}"
    )
    parser.add_argument(
        "--only", action="append", choices=parts, metavar="PART", help="may be repeated"
    )
    parser.add_argument(
        "--minutes", type=float, default=minutes, metavar="N", help=f"about; default: {minutes:.0f}"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, a minute")
    return parser


def run_parts(
    results: Results, machine: Machine, parts: Mapping[str, tuple[Part, float]], *, seconds: float
) -> None:
    """Each part gets its share of the time that is left, each case an equal part of that."""
    deadline = time.monotonic() + seconds
    shares = [share for _, share in parts.values()]
    for i, (name, (make, share)) in enumerate(parts.items()):
        part_seconds = (deadline - time.monotonic()) * share / sum(shares[i:])
        run_cases(results, name, list(make(machine)), seconds=part_seconds)


def run_cases(results: Results, part: str, cases: Sequence[Case], *, seconds: float) -> None:
    """Whatever is not in the results yet; saves after every case."""
    deadline = time.monotonic() + seconds
    for i, case in enumerate(cases):
        key = f"{part}: {case.name}"
        if results.done(key):
            say(f"{key}: done before")
            continue
        shares = sum(other.share for other in cases[i:])
        share = case.share / shares if shares else 1 / (len(cases) - i)
        run_one(results, key, case, share * (deadline - time.monotonic()))


def run_one(results: Results, key: str, case: Case, seconds: float) -> None:
    """A case that raises is recorded, and the run goes on."""
    if seconds < LEAST_SECONDS:
        entry = Entry(left_out=["no time left"])
        results.save(key, entry, skipped=True)
        say(f"{key}: no time left")
        return
    start = time.monotonic()
    entry, reason = attempt(lambda: case.run(seconds))
    if reason:
        entry = Entry(failed=reason)
    results.save(key, entry, skipped=not entry.tables)
    release()
    for table in entry.tables:
        say(f"\n{table.markdown()}")
    for line in entry.left_out:
        say(f"left out: {line}")
    say(f"{key}: {reason or 'done'}, {time.monotonic() - start:.0f} of {seconds:.0f} s\n")


def release() -> None:
    """Gives freed GPU memory back to whoever comes next."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def finish(results: Results) -> None:
    """Draws the plots; without matplotlib says so."""
    drawn, reason = attempt(results.plots)
    say(f"plots left out: {reason}" if reason else f"plots: {len(drawn)}")
    say(f"results: {results.path} and .md beside it")


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
