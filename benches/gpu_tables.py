"""Tables of a GPU run: ceilings, the pieces of the pass, tile budgets, published bars, tuning."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
from torch import Tensor

from benches import measure
from benches.cases import MOST_ROUNDS, run_case
from benches.contenders import EVERYBODY, OURS, ours
from benches.measure import Call, Timing
from benches.other_cases import rounds_for
from benches.parts import Case, Machine, main_shape
from benches.peers import attempt
from benches.problems import problem
from benches.report import Entry, Row, Table
from rlvr_fast.objectives import ClippedSurrogate
from rlvr_fast.ops.fused_rows import fused_rows
from rlvr_fast.ops.logprobs import row_grad, row_stats
from rlvr_fast.ops.tiled_head import add_product
from rlvr_fast.tracing.tokens import TokenFields
from rlvr_fast.tracing.trace import trace


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A published time of forward and backward on a comparable GPU."""

    name: str
    shape: tuple[int, int, int]
    """T, D, V."""
    milliseconds: tuple[float, float]
    """From and to."""
    source: str


BARS = [
    Bar(
        name="QuACK, plain CE",
        shape=(16384, 4096, 128256),
        milliseconds=(73.7, 73.7),
        source="Liger-Kernel pull request 1356, H200",
    ),
    Bar(
        name="Liger scaled CE (Hopper), logp and entropy without a loss",
        shape=(32000, 4096, 131072),
        milliseconds=(218.7, 229.5),
        source="Liger-Kernel pull requests on its Hopper head, H200",
    ),
]
TUNING_SECONDS = 20.0
"""A case of the tuner, most of it for compiling its candidates."""
TINY = (48, 64, 512)
"""T, D, V of a rehearsal."""


def bars_part(on: Machine, *, rehearse: bool) -> Iterator[Case]:
    for bar in BARS:
        shape = TINY if rehearse else bar.shape
        yield Case(name=bar.name, run=partial(against_bar, bar, shape, on.device))


def against_bar(bar: Bar, shape: tuple[int, int, int], device: str, seconds: float) -> Entry:
    """Ours at the shape of a published number."""
    given = problem(*shape, device=device)
    contenders = [EVERYBODY[OURS], EVERYBODY[f"{OURS}, bf16 logits"]]
    found = run_case(given, contenders, seconds=seconds)
    low, high = bar.milliseconds
    told = f"{low} ms" if low == high else f"{low} to {high} ms"
    note = f"published: {bar.name}: {told} at T={bar.shape[0]}, D={bar.shape[1]}, V={bar.shape[2]}"
    table = found.tables[0]
    notes = [*table.notes, f"{note} ({bar.source})"]
    return Entry(
        tables=[Table(title=table.title, rows=table.rows, notes=notes)],
        facts={**found.facts, "published ms": bar.milliseconds},
        seconds=found.seconds,
        left_out=found.left_out,
    )


def ceilings(device: str, size: int, seconds: float) -> Entry:
    """A large copy and a large GEMM: what everything else is compared with."""
    a, b, c = (torch.randn(size, size, device=device).bfloat16() for _ in range(3))
    source = torch.randn(8 * size, size, device=device)
    copy = torch.empty_like(source)
    calls = [
        Call(name="GEMM", run=lambda: torch.mm(a, b.t(), out=c), work=2.0 * size**3),
        Call(name="copy", run=lambda: copy.copy_(source), work=2.0 * source.nbytes),
    ]
    rounds = MOST_ROUNDS[device]
    gemm, moved = measure.compare(calls, floor="GEMM", rounds=rounds, device=device)
    rows: list[Row] = [
        {"": f"bf16 GEMM, {size} cubed", "TFLOP/s": gemm.rate / 1e12, "GB/s": None},
        {"": f"copy of {source.nbytes / 1e9:.1f} GB", "TFLOP/s": None, "GB/s": moved.rate / 1e9},
    ]
    return Entry(
        tables=[Table(title="Ceilings", rows=rows)],
        seconds={gemm.name: gemm.seconds, moved.name: moved.seconds},
    )


def budgets(on: Machine, seconds: float) -> Entry:
    """policy_loss by the bytes of logits alive at once."""
    given = problem(*main_shape(on), device=on.device)
    sizes = [1 << power for power in (range(27, 35) if on.device != "cpu" else (20, 21))]
    contenders = [ours(f"{size >> 20} MiB of logits", logits_budget=size) for size in sizes]
    return run_case(given, contenders, seconds=seconds, title=f"Tile budgets: {given.title}")


def clipped(on: Machine, seconds: float) -> Entry:
    """policy_loss with half of the rows clipped: are they worth counting?"""
    given = problem(*main_shape(on), device=on.device)
    far = torch.arange(given.num_tokens, device=given.old_logp.device) % 2 == 0
    sign = given.token_advantage.sign()
    old_logp = torch.where(far, given.old_logp - 5 * sign, given.old_logp)
    contenders = [ours(OURS), ours("skip_clipped", skip_clipped=True)]
    title = f"Half of the rows clipped: {given.title}"
    return run_case(replace(given, old_logp=old_logp), contenders, seconds=seconds, title=title)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What one tile of the pass works on."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    narrow: Tensor
    """`[t, V]` bf16 logits."""
    wide: Tensor
    """`[t, V]` fp32 logits."""
    gradient: Tensor
    """`[t, V]` bf16."""
    d_hidden: Tensor
    d_weight: Tensor
    """`[V, D]` fp32."""
    fields: TokenFields


def pieces(on: Machine, rows: int | None, seconds: float) -> Entry:
    """Every piece of the pass on one tile of `rows`: its rate, and its share of a whole call.

    GB/s counts two reads of the logits and one write of the gradients; the second read may come
    from the cache. `share` is the piece's time over all tiles, over that of policy_loss.
    """
    tokens, hidden_size, vocab_size = main_shape(on)
    rows = rows or max(1, min(tokens, (2 << 30) // (6 * vocab_size)))
    given = problem(tokens, hidden_size, vocab_size, device=on.device)
    tile = make_tile(on.device, rows, hidden_size, vocab_size)
    whole = Call(name=OURS, run=EVERYBODY[OURS].build(given), work=3 * given.gemm_flops)
    calls = [whole, *tile_gemms(tile), *tile_sweeps(tile)]
    left_out = []
    for call in list(calls):
        _, reason = attempt(call.run)
        if reason:
            calls.remove(call)
            left_out.append(f"{call.name}: {reason}")
    flops = 6 * given.gemm_flops
    rounds = rounds_for(flops, on.device, seconds=seconds, rate=on.rate)
    timings = measure.compare(calls, floor=OURS, rounds=rounds, device=on.device)
    table_rows = [_piece_row(timing, tokens / rows) for timing in timings]
    title = f"Pieces of the pass: {given.title}, tiles of {rows} rows"
    return Entry(
        tables=[Table(title=title, rows=table_rows)],
        facts={"T": tokens, "D": hidden_size, "V": vocab_size, "rows": rows},
        seconds={t.name: t.seconds for t in timings},
        left_out=left_out,
    )


def _piece_row(timing: Timing, tiles: float) -> Row:
    sweep = "sweep" in timing.name
    return {
        "": timing.name,
        "median ms": 1e3 * median(timing.seconds),
        "TFLOP/s": None if sweep else timing.rate / 1e12,
        "GB/s": timing.rate / 1e9 if sweep else None,
        "share": None if timing.name == OURS else timing.ratio * tiles,
    }


def make_tile(device: str, rows: int, hidden_size: int, vocab_size: int) -> Tile:
    given = problem(max(rows, 8), hidden_size, vocab_size, device=device)
    hidden, weight = given.hidden.detach()[:rows], given.weight.detach()
    narrow = hidden @ weight.t()
    random = torch.randn(3, rows, device=device)
    return Tile(
        hidden=hidden,
        weight=weight,
        targets=given.targets[:rows],
        narrow=narrow,
        wide=narrow.float(),
        gradient=torch.empty_like(narrow),
        d_hidden=torch.empty_like(hidden),
        d_weight=torch.zeros(vocab_size, hidden_size, device=device),
        fields=TokenFields(
            weight=random[0].abs(), old_logp=-random[1].abs(), advantage=random[2], extras={}
        ),
    )


def tile_gemms(tile: Tile) -> list[Call]:
    rows, (vocab_size, hidden_size) = len(tile.hidden), tile.weight.shape
    flops = 2.0 * rows * hidden_size * vocab_size

    def wide_logits() -> object:
        kind = {"out_dtype": torch.float32} if tile.hidden.is_cuda else {}
        return torch.mm(tile.hidden, tile.weight.t(), **kind)

    def d_weight() -> None:
        add_product(tile.d_weight, tile.gradient, tile.hidden, first=False)

    named: dict[str, Callable[[], object]] = {
        "logits, fp32 out": wide_logits,
        "logits, bf16 out": lambda: torch.mm(tile.hidden, tile.weight.t(), out=tile.narrow),
        "d_hidden": lambda: torch.mm(tile.gradient, tile.weight, out=tile.d_hidden),
        "d_weight added in fp32": d_weight,
        "d_weight, bf16": lambda: torch.mm(tile.gradient.t(), tile.hidden),
    }
    tile.gradient.copy_(tile.narrow)
    return [Call(name=name, run=run, work=flops) for name, run in named.items()]


def tile_sweeps(tile: Tile) -> list[Call]:
    objective = ClippedSurrogate(clip_high=0.28)
    traced = trace(objective)
    stats = row_stats(tile.wide, tile.targets, 1.0, 0.0)
    dlogp = torch.randn(len(tile.targets), device=tile.hidden.device)

    def fused(logits: Tensor, out: Tensor | None) -> Callable[[], object]:
        settings = {"scale": 1.0, "cap": 0.0, "out": out}
        return lambda: fused_rows(
            logits, tile.targets, tile.fields, None, objective, traced, **settings
        )

    def grad() -> None:
        row_grad(tile.wide, tile.targets, stats, dlogp, None, 1.0, 0.0, tile.gradient)

    count = float(tile.narrow.numel())
    return [
        Call(name="fused sweep, fp32", run=fused(tile.wide, tile.gradient), work=10 * count),
        Call(name="fused sweep, bf16", run=fused(tile.narrow, tile.gradient), work=6 * count),
        Call(name="fused sweep, fp32, forward only", run=fused(tile.wide, None), work=4 * count),
        Call(
            name="statistics sweep, fp32",
            run=lambda: row_stats(tile.wide, tile.targets, 1.0, 0.0),
            work=4 * count,
        ),
        Call(name="gradient sweep, fp32", run=grad, work=6 * count),
    ]


def tuned(on: Machine, seconds: float) -> Entry:
    """Launch options by measurement; nothing is written where the package looks them up."""
    from rlvr_fast import autotune, tuning

    cases = list(autotune.cuda_cases(torch.device(on.device)))
    # The kernel and the vocabulary of the tables first: compiling all takes many minutes.
    first = [tuning.row_entry("fused", 151_936, d) for d in (torch.float32, torch.bfloat16)]
    cases.sort(key=lambda case: (case.entry not in first, "fused" not in case.entry))
    chosen = cases[: max(1, int(seconds / TUNING_SECONDS))]
    found = autotune.tune(on.device, seconds / 60, cases=chosen)
    rows: list[Row] = [
        {
            "": choice.entry,
            "best": ", ".join(f"{k} {v}" for k, v in choice.best.items()) or "default",
            "default ms": 1e3 * choice.default_seconds,
            "best ms": 1e3 * choice.best_seconds,
        }
        for choice in found.choices
    ]
    return Entry(
        tables=[Table(title="Tuning", rows=rows)],
        facts={"tuned": found.table()},
        left_out=[f"{case.entry}: no time" for case in cases[len(chosen) :]],
    )
