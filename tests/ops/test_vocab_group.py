"""`policy_loss` over slices of the vocabulary: three real processes, of which two form a group.

Run as a program, this file is one of those processes.
"""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import accumulate

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rlvr_fast import objectives
from rlvr_fast.integrations.verl import linear_cross_entropy
from rlvr_fast.objectives import Objective, Tokens
from rlvr_fast.ops import logprobs as row_op
from rlvr_fast.ops.linear_logprobs import linear_logprobs
from rlvr_fast.ops.policy_loss import policy_loss, reference
from rlvr_fast.ops.transform import LogitTransform
from rlvr_fast.ops.vocab_shard import combined
from rlvr_fast.packed import ScoredTokens

SLICES = {2: [17, 16], 3: [13, 13, 14]}
LENGTHS, HIDDEN = [5, 0, 9, 1, 6], 8
SETTINGS = {"temperature": 0.7, "softcap": 9.0, "logit_scale": 1.5}


@dataclass(frozen=True, kw_only=True)
class GroupCentred(Objective):
    """Looks at its whole group, and differentiates through that."""

    def token_loss(self, t: Tokens) -> Tensor:
        return (t.logp - t.group_mean(t.logp)) ** 2


OBJECTIVES: dict[str, Objective] = {
    "token": objectives.ClippedSurrogate() + objectives.EntropyBonus(coef=0.3),
    "sequence": objectives.SequenceClippedSurrogate(clip_low=0.02, clip_high=0.02),
    "group": GroupCentred() + objectives.EntropyBonus(coef=0.1),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    size: int
    """Ranks of the group."""
    objective: str = "token"
    dtype: torch.dtype = torch.float64
    rows_per_tile: int = 1000
    options: tuple[tuple[str, object], ...] = ()
    spread: float = 1.0
    """Of the logits."""
    skip: bool = False
    """Half the sequences have advantage 0, under an objective that vanishes with it."""

    @property
    def loss(self) -> Objective:
        return objectives.ClippedSurrogate() if self.skip else OBJECTIVES[self.objective]

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.objective} {kind}, {self.size} ranks, {self.rows_per_tile} rows"


CASES = [
    Case(size=size, objective=objective, rows_per_tile=rows)
    for size in SLICES
    for objective in OBJECTIVES
    for rows in (1000, 4)
]
WIDE = Case(size=3)
NARROW = [Case(size=2, dtype=torch.float32), Case(size=3, dtype=torch.bfloat16)]
SURE = Case(size=3, dtype=torch.float32, spread=30.0)
SKIPPED = Case(size=2, skip=True)
ADDED = Case(size=2, options=(("weight_grad", True),))
INVARIANT = [
    Case(size=2, dtype=torch.float32, rows_per_tile=rows, options=(("batch_invariant", True),))
    for rows in (1000, 4)
]
WAYS = ["whole gradient", "gradient of the slice, for verl"]
ALL = [*CASES, WIDE, *NARROW, SURE, SKIPPED, ADDED, *INVARIANT]


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, ScoredTokens]:
    """hidden, the whole weight and bias, tokens: the same in every process."""
    draw = torch.Generator().manual_seed(7)
    count, vocab = sum(LENGTHS), sum(SLICES[case.size])
    shapes = ((count, HIDDEN), (vocab, HIDDEN), (vocab,))
    hidden, weight, bias = (
        torch.randn(shape, generator=draw).to(case.dtype).requires_grad_() for shape in shapes
    )
    weight = (case.spread * weight.detach()).requires_grad_()
    noise, keep = (torch.rand(count, generator=draw) for _ in range(2))
    advantage = torch.randn(len(LENGTHS), generator=draw)
    tokens = ScoredTokens(
        targets=torch.randint(0, vocab, (count,), generator=draw),
        weight=noise * (keep > 0.25),
        seq_offsets=torch.tensor([0, *accumulate(LENGTHS)]),
        group_offsets=torch.tensor([0, 2, 4, 5]),
        old_logp=-3.0 - noise,
        advantage=advantage * torch.tensor([1.0, 1, 0, 0, 1]) if case.skip else advantage,
    )
    if case is SURE:
        likeliest = (hidden @ weight.t() + bias).argmax(1)
        tokens = replace(tokens, targets=likeliest)
    return hidden, weight, bias, tokens


def options(case: Case) -> dict[str, object]:
    return {} if case is SURE else SETTINGS


def sliced(case: Case, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """One rank's results."""
    hidden, weight, bias, tokens = inputs(case)
    rank, lengths = dist.get_rank(group), SLICES[case.size]
    start = sum(lengths[:rank])
    rows = slice(start, start + lengths[rank])
    weight, bias = (x.detach()[rows].clone().requires_grad_() for x in (weight, bias))
    given = dict(case.options)
    if "weight_grad" in given:
        given["weight_grad"] = torch.ones_like(weight)
    # Room for one row more of a smaller slice than of the largest, which decides for all.
    budget = (case.rows_per_tile + 1) * min(lengths) * case.dtype.itemsize
    if case.dtype == torch.bfloat16:
        given["logits_dtype"] = torch.bfloat16
    out = policy_loss(
        hidden, weight, tokens, case.loss, bias=bias, logits_budget=budget, vocab_group=group,
        **options(case), **given,
    )  # fmt: skip
    (out.loss if "weight_grad" in given else 3 * out.loss).backward()
    return {
        "loss": out.loss.detach(),
        "logp": out.logp,
        "entropy": out.entropy,
        "metrics": torch.tensor(list(out.metrics.read().values())),
        "hidden": hidden.grad,
        "weight": given.get("weight_grad", weight.grad),
        "bias": bias.grad,
    }


def scored(group: dist.ProcessGroup, size: int, way: str) -> dict[str, Tensor]:
    """One rank's scores and the gradients of a loss of both."""
    case = Case(size=size, rows_per_tile=4)
    hidden, weight, _, tokens = inputs(case)
    rank, lengths = dist.get_rank(group), SLICES[size]
    weight = weight.detach()[sum(lengths[:rank]) :][: lengths[rank]].clone().requires_grad_()
    if way == "whole gradient":
        budget = 5 * min(lengths) * case.dtype.itemsize
        logp, entropy = linear_logprobs(
            hidden, weight, tokens.targets, temperature=0.7, logits_budget=budget,
            vocab_group=group,
        )  # fmt: skip
    else:
        logp, entropy = linear_cross_entropy(hidden, weight, tokens.targets, 0.7, "none", group)
    both(logp, entropy).backward()
    return {
        "logp": logp.detach(), "entropy": entropy.detach(), "hidden": hidden.grad,
        "weight": weight.grad,
    }  # fmt: skip


def both(logp: Tensor, entropy: Tensor) -> Tensor:
    factor = torch.arange(len(logp)).to(logp.dtype)
    return (factor * logp).sum() + (entropy * factor.cos()).sum()


def refused(group: dist.ProcessGroup) -> list[str]:
    """What is said to inputs that do not fit; all ranks hear it, so that none is left waiting."""
    rank, tokens = dist.get_rank(group), ScoredTokens(
        targets=torch.tensor([6]), weight=torch.ones(1)
    )  # fmt: skip
    ones, said = torch.ones, []
    for hidden, weight, scored in (
        (ones(1 + rank, 4), ones(3, 4), tokens),
        (ones(1, 4 + rank), ones(3, 4 + rank), tokens),
        (ones(1, 4), ones(3 * rank, 4), tokens),
        (ones(1, 4), ones(3, 4), replace(tokens, targets=torch.tensor([9]))),
    ):
        try:
            policy_loss(hidden, weight, scored, objectives.PolicyGradient(), vocab_group=group)
        except ValueError as error:
            said.append(str(error))
    return said


def main(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=3, init_method=f"file://{store}")
    groups = {2: dist.new_group([0, 1]), 3: dist.group.WORLD}
    found = [sliced(case, groups[case.size]) for case in ALL if rank < case.size]
    scores = {
        (size, way): scored(group, size, way)
        for size, group in groups.items()
        for way in WAYS
        if rank < size
    }
    torch.save((found, refused(groups[3]), outside(groups[2], rank), scores), out)
    dist.destroy_process_group()


def outside(group: dist.ProcessGroup, rank: int) -> str:
    if rank < 2:
        return ""
    try:
        policy_loss(
            torch.ones(1, 4), torch.ones(3, 4),
            ScoredTokens(targets=torch.tensor([0]), weight=torch.ones(1)),
            objectives.PolicyGradient(), vocab_group=group,
        )  # fmt: skip
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """By rank: results by case, and what was refused."""
    folder = tmp_path_factory.mktemp("ranks")
    outs = [folder / f"{rank}.pt" for rank in range(3)]
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder / "store"), str(out)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank, out in enumerate(outs)
    ]
    try:
        assert [each.wait(timeout=120) for each in running] == [0, 0, 0]
    finally:
        for each in running:
            each.kill()
    loaded = [torch.load(out) for out in outs]
    results = []
    for rank, (found, *_) in enumerate(loaded):
        results.append(dict(zip([c for c in ALL if rank < c.size], found, strict=True)))
    return results, [said for _, said, *_ in loaded], loaded[2][2], [each[3] for each in loaded]


def truth(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """By autograd, of the whole vocabulary in one process."""
    hidden, weight, bias, tokens = inputs(case)
    hidden, weight, bias = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight, bias))
    transform = LogitTransform(**options(case))
    loss = reference(hidden, weight, tokens, case.loss, bias=bias, transform=transform)
    found = torch.autograd.grad(3 * loss, (hidden, weight, bias))
    stats = row_op.reference(
        hidden @ weight.t() + bias, tokens.targets, transform.scale, transform.cap
    )
    names = ("loss", "logp", "entropy", "hidden", "weight", "bias")
    return dict(zip(names, (loss.detach(), *stats.detach()[:2], *found), strict=True))


def joined(processes, case: Case, name: str) -> Tensor:
    """The slices of all ranks; of what every rank has, the first one's."""
    parts = [results[case][name] for results in processes[0][: case.size]]
    return torch.cat(parts) if name in ("weight", "bias") else parts[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_slices_give_what_the_whole_vocabulary_gives(processes, case):
    wanted = truth(case, torch.float64)

    found = {name: joined(processes, case, name) for name in wanted}

    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_rank_has_the_same_bits(processes, case):
    names = ("loss", "logp", "entropy", "metrics", "hidden")

    first, *others = ([results[case][n] for n in names] for results in processes[0][: case.size])

    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("case", NARROW, ids=str)
def test_slices_are_as_exact_as_plain_torch_in_the_same_dtype(processes, case, as_exact_as_torch):
    plain, wanted = truth(case, case.dtype), truth(case, torch.float64)

    for name in ("hidden", "weight", "bias"):
        as_exact_as_torch(joined(processes, case, name), plain[name], wanted[name])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", SLICES)
def test_scores_and_their_gradients_are_those_of_the_whole_vocabulary(processes, size, way):
    hidden, weight, _, tokens = inputs(Case(size=size))
    stats = row_op.reference(hidden @ weight.t(), tokens.targets, 1 / 0.7, 0.0)
    d_hidden, d_weight = torch.autograd.grad(both(*stats[:2]), (hidden, weight))

    found = [each[size, way] for each in processes[3][:size]]

    for rank in found:
        for name, wanted in zip(("logp", "entropy"), stats.detach()[:2], strict=True):
            torch.testing.assert_close(rank[name], wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.cat([rank["weight"] for rank in found]), d_weight)
    parts = [rank["hidden"] for rank in found]
    if way == "whole gradient":
        assert all(torch.equal(part, parts[0]) for part in parts)
        torch.testing.assert_close(parts[0], d_hidden)
    else:  # Megatron adds the parts up.
        torch.testing.assert_close(sum(parts), d_hidden)


def test_a_sure_token_keeps_the_last_digits_of_its_logp(processes):
    logp, wanted = joined(processes, SURE, "logp"), truth(SURE, torch.float64)["logp"]

    assert wanted.max() > -1e-8
    assert (logp <= 0).all()
    torch.testing.assert_close(logp.double(), wanted, rtol=1e-4, atol=1e-30)


def test_the_metrics_are_those_of_one_process(processes):
    hidden, weight, bias, tokens = inputs(WIDE)

    alone = policy_loss(hidden, weight, tokens, WIDE.loss, bias=bias, **SETTINGS).metrics.read()

    assert joined(processes, WIDE, "metrics").tolist() == pytest.approx(list(alone.values()))


def test_skipped_rows_are_scored_at_once(processes):
    wanted = truth(SKIPPED, torch.float64)

    metrics = joined(processes, SKIPPED, "metrics")

    assert metrics[1] > 0.3  # skipped
    for name, value in wanted.items():
        torch.testing.assert_close(joined(processes, SKIPPED, name), value, rtol=1e-9, atol=1e-12)


def test_the_gradient_of_a_slice_is_added_to_what_is_given(processes):
    wanted = truth(ADDED, torch.float64)["weight"] / 3 + 1

    torch.testing.assert_close(joined(processes, ADDED, "weight"), wanted, rtol=1e-9, atol=1e-12)


def test_batch_invariant_results_do_not_depend_on_the_tiles(processes):
    whole, cut = (joined(processes, case, "logp") for case in INVARIANT)

    assert torch.equal(whole, cut)


def test_inputs_that_do_not_fit_are_refused_on_every_rank(processes):
    _, said, outsider, _ = processes

    assert said[0] == said[1] == said[2]
    assert said[0] == [
        "hidden: wanted the same [T, D] on every rank, got [[1, 4], [2, 4], [3, 4]]",
        "hidden: wanted the same [T, D] on every rank, got [[1, 4], [1, 5], [1, 6]]",
        "weight: wanted at least one row on every rank, got [0, 3, 6]",
        "targets: wanted ids in [0, 9), got 9 to 9",
    ]
    assert outsider.startswith("vocab_group: wanted a group that this rank belongs to")


@pytest.mark.parametrize("backend", row_op.GRAD_BACKENDS)
@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_the_gradient_of_a_slice_is_a_slice_of_the_gradient(backend, cap):
    logits, targets = 3 * torch.randn(6, 40), torch.tensor([0, 12, 13, 20, 30, 39])
    stats = row_op.reference(logits, targets, 1.3, cap)
    dlogp, dentropy = torch.randn(2, 6)
    whole, parts = torch.empty_like(logits), []
    row_op.reference_grad(logits, targets, stats, dlogp, dentropy, 1.3, cap, whole)

    for start, end in ((0, 13), (13, 30), (30, 40)):
        part = logits[:, start:end].contiguous()
        inside = (targets >= start) & (targets < end)
        ids = torch.where(inside, targets - start, -1)
        parts.append(torch.empty_like(part))
        row_op.GRAD_BACKENDS[backend](part, ids, stats, dlogp, dentropy, 1.3, cap, parts[-1])

    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in Triton's interpreter
@pytest.mark.parametrize("backend", row_op.BACKENDS)
def test_a_slice_that_is_masked_altogether_has_no_weight(backend):
    logits, targets = torch.randn(5, 40), torch.tensor([0, 5, 9, 12, 12])
    logits[:, 13:26] = -torch.inf
    wanted = row_op.reference(logits, targets, 1.0, 0.0)

    stats = [
        row_op.BACKENDS[backend](part.contiguous(), targets.clamp(max=part.shape[1] - 1), 1.0, 0.0)
        for part in logits.split([13, 13, 14], 1)
    ]
    held = torch.tensor([True, False, False])[:, None].expand(3, 5)

    torch.testing.assert_close(combined(torch.stack(stats), held), wanted)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
