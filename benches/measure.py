"""How the benches measure: interleaved rounds, peak memory, the machine.

A busy machine changes its speed from second to second. So all contenders run in turn, round by
round, and what counts is each one's time over the floor's *in the same round*. On CUDA a call is
timed by events, after the L2 cache has been filled with something else.
"""

import ctypes
import gc
import hashlib
import os
import platform
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from statistics import median

import torch

from rlvr_fast.ops.workspace import release_workspace

ROOT = Path(__file__).resolve().parents[1]
COLD_BYTES = 256 << 20
"""Written before a timed CUDA call: several times the L2 of any GPU so far."""


UNITS = {"TFLOP/s": 1e12, "GB/s": 1e9}


@dataclass(frozen=True, kw_only=True)
class Call:
    """Something to time."""

    name: str
    run: Callable[[], object]
    """What it returns is freed outside of the clock."""
    work: float = 0.0
    """Flops or bytes that the task needs, by the formula in the bench; the same for everyone who
    does the same task, however much they really compute or move."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    name: str
    seconds: tuple[float, ...]
    """One per round."""
    ratio: float
    """Median over the rounds of the time over the floor's time in that round."""
    rate: float
    """`work` per second in the fastest round."""

    def row(self, rate_name: str) -> dict[str, str | float | None]:
        """Its columns of a table."""
        return {
            "": self.name,
            "min ms": 1e3 * min(self.seconds),
            "median ms": 1e3 * median(self.seconds),
            "x floor": self.ratio,
            rate_name: self.rate / UNITS[rate_name],
        }


def compare(
    calls: Sequence[Call],
    *,
    floor: str,
    rounds: int,
    device: str = "cpu",
    warm_up: int = 1,
    pedantic: Callable[..., object] | None = None,
) -> list[Timing]:
    """Times all calls in `rounds` interleaved rounds, each in another order.

    Args:
        floor: the name of the call that the others are divided by.
        warm_up: rounds before those.
        pedantic: of pytest-benchmark's fixture, which then counts whole rounds.
    """
    found: list[list[float]] = []
    clock = partial(_cuda_seconds, device) if device != "cpu" else _cpu_seconds
    one_round = partial(_one_round, [call.run for call in calls], clock, found)
    # Collecting between the calls then looks at their garbage only, not at torch and the peers.
    gc.collect()
    gc.freeze()
    if pedantic is not None:
        pedantic(one_round, rounds=rounds, warmup_rounds=warm_up)
    else:
        for _ in range(warm_up + rounds):
            one_round()
    gc.unfreeze()
    by_call = [tuple(times) for times in zip(*found[-rounds:], strict=True)]
    base = by_call[[c.name for c in calls].index(floor)]
    return [
        Timing(
            name=call.name,
            seconds=seconds,
            ratio=median(own / least for own, least in zip(seconds, base, strict=True)),
            rate=call.work / min(seconds),
        )
        for call, seconds in zip(calls, by_call, strict=True)
    ]


def _one_round(
    runs: Sequence[Callable[[], object]],
    clock: Callable[[Callable[[], object]], float],
    found: list[list[float]],
) -> None:
    """Appends the seconds of each, in their own order."""
    seconds = [0.0] * len(runs)
    for i in random.Random(len(found)).sample(range(len(runs)), len(runs)):
        gc.collect()
        seconds[i] = clock(runs[i])
    found.append(seconds)


def _cpu_seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    kept = run()
    seconds = time.perf_counter() - start
    del kept
    return seconds


def _cuda_seconds(device: str, run: Callable[[], object]) -> float:
    """By events. The write before the first one also hides the time that the launch takes."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _cold(device).zero_()
    start.record()
    kept = run()
    end.record()
    torch.cuda.synchronize(device)
    del kept
    return start.elapsed_time(end) / 1e3


@cache
def _cold(device: str) -> torch.Tensor:
    return torch.empty(COLD_BYTES, dtype=torch.uint8, device=device)


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """Most bytes during `call` above those before, with what it returns.

    On CUDA allocated ones. On the CPU resident ones (Linux only: VmHWM of this process, reset
    through `clear_refs`), with our workspace, which is given back first.
    """
    release_workspace()
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        # Freed heap pages would be used again unseen.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        kept = call()
        peak = _resident("VmHWM")
    del kept
    return max(0, peak - before)


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


def free_bytes(device: str) -> int:
    """Memory that a bench may use: what is free now."""
    if device != "cpu":
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


def gemm_rate(device: str, hidden_size: int = 1024, vocab_size: int = 16384) -> float:
    """Flops per second of a bf16 GEMM on random data: what the plan of a bench is made from."""
    rows = 256 if device == "cpu" else 8192
    a, b = (torch.randn(n, hidden_size, device=device).bfloat16() for n in (rows, vocab_size))
    clock = _cpu_seconds if device == "cpu" else partial(_cuda_seconds, device)
    seconds = min(clock(lambda: torch.mm(a, b.t())) for _ in range(4))
    return 2.0 * rows * hidden_size * vocab_size / seconds


def device_name(device: str) -> str:
    """Short, for file names: `nvidia-h200`, `amd-epyc-2-cores`."""
    name = torch.cuda.get_device_name(device) if device != "cpu" else _processor()
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return slug if device != "cpu" else f"{slug}-{len(os.sched_getaffinity(0))}-cores"


def machine(device: str = "cpu") -> str:
    """Device, cores, how the CPU multiplies bf16, torch, threads, load and commit, on one line."""
    parts = [f"{_processor()}{_model()}", f"{len(os.sched_getaffinity(0))} cores"]
    if device != "cpu":
        told = torch.cuda.get_device_properties(device)
        parts.insert(0, f"{told.name} ({told.multi_processor_count} SMs, CUDA {_cuda()})")
    else:
        known = [name for name in ("avx512_bf16", "amx_bf16") if name in _flags()]
        parts.append(f"bf16 by {'+'.join(known or ['none'])}")
    parts += [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    return ", ".join([*parts, f"{torch.get_num_threads()} threads", load(), f"commit {commit()}"])


def _cuda() -> str:
    return str(torch.version.cuda)


def _told() -> dict[str, str]:
    return dict(re.findall(r"^([\w ]+?)\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.M))


def _processor() -> str:
    return _told().get("model name", platform.machine())


def _model() -> str:
    told = _told()
    known = [
        f"{name.removeprefix('cpu ')} {told[name]}" for name in ("cpu family",) if name in told
    ]
    known += [f"model {told['model']}"] if "model" in told else []
    return f" ({', '.join(known)})" if known else ""


def _flags() -> list[str]:
    return _told().get("flags", "").split()


def load() -> str:
    """The load average of the last minute; above the number of cores somebody else is at work."""
    return f"load {os.getloadavg()[0]:.1f}"


def versions() -> dict[str, str]:
    """Of everything that takes part; what is not installed is missing."""
    names = ("torch", "triton", "numpy", "transformers", "trl", "liger_kernel", "verl")
    found = {"python": platform.python_version()}
    for name in (*names, "cut_cross_entropy", "quack_kernels"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["torch"] = str(torch.__version__)  # also names the CUDA it is for
    return found


SOURCES = ("rlvr_fast", "kernels", "csrc", "benches")


@cache
def commit() -> str:
    """The commit; where files differ from it, or git is not there, with a digest of the sources."""
    command = ["git", "describe", "--always", "--dirty=+"]
    name = "unknown+"
    if shutil.which("git"):
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        name = found.stdout.strip() or name
    if not name.endswith("+"):
        return name
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h"):
                digest.update(path.read_bytes())
    return name + digest.hexdigest()[:8]
