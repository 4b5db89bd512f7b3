"""Measures the launch options and logits budgets that `rlvr_fast.tuning` looks up.

On CUDA the row kernels, by vocabulary, dtype and kernel; on the CPU whole calls of `policy_loss`.
Candidates take turns, so that a slow minute of the machine is slow for all of them.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from rlvr_fast import tuning
from rlvr_fast.kernels.launch import latest
from rlvr_fast.objectives import ClippedSurrogate
from rlvr_fast.ops import logprobs
from rlvr_fast.ops.fused_rows import fused_rows
from rlvr_fast.ops.policy_loss import policy_loss
from rlvr_fast.scored import ScoredTokens
from rlvr_fast.tracing.tokens import TokenFields
from rlvr_fast.tracing.trace import trace
from rlvr_fast.tuning import Table, Values

HEADS = ((576, 49_152), (1024, 151_936), (2048, 128_256))
"""D, V of the heads measured on the CPU."""
CPU_TOKENS = 2048
BUDGETS = [{"logits_budget": mib << 20} for mib in (12, 24, 48, 96, 192, 384)]

VOCABS = (32_000, 49_152, 128_256, 151_936)
TILE_BYTES = 1 << 29
ROW_LAUNCHES = [
    {"BLOCK_V": block, "num_warps": warps}
    for block in (1024, 2048, 4096, 8192)
    for warps in (4, 8, 16, 32)
    if 4 <= block // (32 * warps) <= 32  # logits a thread: fewer are narrow loads, more spill
]
KERNEL_NAMES = {
    "statistics": "logprobs_fwd_kernel",
    "gradient": "logprobs_bwd_kernel",
    "fused": "policy_loss_kernel",
}

ROUNDS = 5
GAIN = 1.05
"""How much faster than the default a candidate has to be: equal ones differed by 2 %."""


@dataclass(frozen=True)
class Case:
    """One entry of the table."""

    entry: str
    candidates: Sequence[Values]
    prepare: Callable[[], Callable[[], object]]
    """Gives what is to be timed, after making its inputs."""
    kernel: str | None = None


@dataclass(frozen=True)
class Choice:
    entry: str
    best: Values
    """Empty: the default."""
    default_seconds: float
    best_seconds: float


@dataclass(frozen=True)
class Tuned:
    device: str
    choices: list[Choice]

    def table(self) -> Table:
        """What beats the default, as `tuning.save` takes it."""
        return {self.device: {choice.entry: choice.best for choice in self.choices if choice.best}}

    def markdown(self) -> str:
        lines = [f"| {self.device} | best | default, ms | best, ms | times as fast |"]
        lines.append("|---|---|---|---|---|")
        for choice in self.choices:
            best = ", ".join(f"{name} {shown(value)}" for name, value in choice.best.items())
            times = choice.default_seconds, choice.best_seconds
            cells = [f"{1e3 * seconds:.3g}" for seconds in times] + [f"{times[0] / times[1]:.2f}"]
            lines.append(f"| {choice.entry} | {best or 'default'} | {' | '.join(cells)} |")
        return "\n".join(lines)


def tune(
    device: torch.device | str,
    minutes: float = 10.0,
    *,
    progress: Callable[[str], object] = lambda line: None,
    cases: Sequence[Case] | None = None,
) -> Tuned:
    """Measures every case on `device`; writes nothing.

    Args:
        device: a CUDA device or the CPU.
        minutes: shared among the cases. Each candidate is timed at least once, so it may take more.
        progress: gets a line per case.
        cases: default those of the device.

    Raises:
        ValueError: for another device, or no time at all.
    """
    device = torch.device(device)
    if device.type != "cpu" and not (device.type == "cuda" and torch.cuda.is_available()):
        raise ValueError(f"device: wanted cpu, or cuda where there is one, got {device}")
    if not minutes > 0:
        raise ValueError(f"minutes: wanted more than 0, got {minutes}")
    if cases is None:
        cases = [*(cuda_cases(device) if device.type == "cuda" else cpu_cases())]
    name, end, choices = tuning.device_name(device), time.perf_counter() + 60 * minutes, []
    for number, case in enumerate(cases):
        left = end - time.perf_counter()
        choices.append(_choose(case, device, name, left / (len(cases) - number)))
        progress(f"{number + 1} of {len(cases)}: {case.entry}: {choices[-1].best or 'default'}")
    return Tuned(name, choices)


def cpu_cases() -> Iterator[Case]:
    for hidden_size, vocab_size in HEADS:
        entry = tuning.budget_entry(hidden_size, vocab_size)
        logits = 4 * CPU_TOKENS * vocab_size  # bytes, in fp32
        several_tiles = [b for b in BUDGETS if b["logits_budget"] < logits]
        yield Case(entry, several_tiles, partial(_head, hidden_size, vocab_size))


def cuda_cases(device: torch.device) -> Iterator[Case]:
    for kernel, name in KERNEL_NAMES.items():
        for dtype in (torch.float32, torch.bfloat16):
            for vocab_size in VOCABS:
                entry = tuning.row_entry(kernel, vocab_size, dtype)
                prepare = partial(_rows, kernel, vocab_size, dtype, device)
                yield Case(entry, ROW_LAUNCHES, prepare, name)


def shown(value: int) -> str:
    return f"{value >> 20} MiB" if value >= 1 << 20 else str(value)


def _head(hidden_size: int, vocab_size: int) -> Callable[[], object]:
    """Forward and backward of a bf16 head, as the trainer calls it."""
    hidden, weight = (
        torch.randn(n, hidden_size, dtype=torch.bfloat16).requires_grad_()
        for n in (CPU_TOKENS, vocab_size)
    )
    ones = torch.ones(CPU_TOKENS)
    targets = torch.randint(vocab_size, (CPU_TOKENS,))
    tokens = ScoredTokens(targets=targets, weight=ones, advantage=ones)

    def run() -> object:
        loss = policy_loss(hidden, weight, tokens, ClippedSurrogate()).loss
        return torch.autograd.grad(loss, (hidden, weight))

    return run


def _rows(
    kernel: str, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], object]:
    """A tile; the fused kernel leaves bf16 gradients at the front of its rows."""
    rows = TILE_BYTES // (vocab_size * dtype.itemsize)
    logits = torch.randn(rows, vocab_size, device=device, dtype=dtype)
    targets = torch.randint(vocab_size, (rows,), device=device)
    ones = torch.ones(rows, device=device)
    if kernel == "statistics":
        return partial(logprobs.triton, logits, targets, 1.0, 0.0)
    if kernel == "gradient":
        stats = logprobs.triton(logits, targets, 1.0, 0.0)
        arguments: tuple[Any, ...] = (stats, ones, None, 1.0, 0.0, logits)
        return partial(logprobs.triton_grad, logits, targets, *arguments)
    fields = TokenFields(weight=ones, advantage=ones, extras={})
    objective = ClippedSurrogate()
    traced = trace(objective)
    assert traced is not None
    return partial(
        fused_rows,
        logits,
        targets,
        fields,
        None,
        objective,
        traced,
        scale=1.0,
        cap=0.0,
        out=logits.view(torch.bfloat16)[:, :vocab_size],
    )


def _choose(case: Case, device: torch.device, name: str, seconds: float) -> Choice:
    end = time.perf_counter() + seconds
    run = case.prepare()
    run()  # pays for what only a first call does
    candidates: list[Values] = [{}, *case.candidates]
    times: list[list[float]] = [[] for _ in candidates]
    for number in range(ROUNDS):
        for values, taken in zip(candidates, times, strict=True):
            if len(taken) < number:
                continue
            with tuning.using({name: {case.entry: values}}):
                if device.type == "cpu":
                    taken.append(_cpu_seconds(run))
                elif not (number == 0 and _spills(run, case.kernel) and values):
                    taken.append(_cuda_seconds(run, device))
        if time.perf_counter() > end:
            break
    medians = [median(taken) if taken else float("inf") for taken in times]
    best = min(range(len(candidates)), key=medians.__getitem__)
    if medians[best] * GAIN > medians[0]:
        best = 0
    return Choice(case.entry, candidates[best], medians[0], medians[best])


def _spills(run: Callable[[], object], kernel: str | None) -> bool:
    """Compiles, and tells whether registers went to local memory."""
    run()
    return kernel is not None and latest[kernel].n_spills > 0


def _cpu_seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _cuda_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one of ten launches in a row: the host is ahead of the device after the first."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        run()
        begin.record()
        for _ in range(10):
            run()
        end.record()
        end.synchronize()
    return float(begin.elapsed_time(end)) / 1e4
