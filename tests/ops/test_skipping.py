"""Rows without a gradient are not multiplied, and nobody can tell by the results."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlvr_fast import objectives
from rlvr_fast.ops import policy_rows
from rlvr_fast.ops.active_rows import mark_active
from rlvr_fast.ops.linear_logprobs import linear_logprobs
from rlvr_fast.ops.policy_loss import PolicyLossOutput, policy_loss, reference
from rlvr_fast.scored import ScoredTokens
from rlvr_fast.tracing.trace import trace

HIDDEN, VOCAB = 8, 33
LENGTHS = [3, 5, 8, 4, 0, 6, 7, 2]
SURROGATE = objectives.ClippedSurrogate()
SEQUENCE = objectives.SequenceClippedSurrogate(clip_low=0.5, clip_high=0.5)


def head(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    shapes = ((sum(LENGTHS), HIDDEN), (VOCAB, HIDDEN))
    hidden, weight = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)
    return hidden, weight


def scored(hidden: Tensor, weight: Tensor) -> ScoredTokens:
    """Four groups of two; the first and third have equal rewards. Some tokens are masked."""
    num_tokens = sum(LENGTHS)
    targets = torch.randint(0, VOCAB, (num_tokens,))
    logp = linear_logprobs(hidden, weight, targets).logp.detach()
    return ScoredTokens(
        targets=targets,
        weight=torch.rand(num_tokens) * (torch.rand(num_tokens) > 0.2),
        seq_offsets=torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)]),
        group_offsets=torch.tensor([0, 2, 4, 6, 8]),
        old_logp=(logp + 0.1 * torch.randn(num_tokens)).float(),
        rewards=torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0]),
    )


def gradients(out: PolicyLossOutput, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(3 * out.loss, leaves)


@pytest.mark.parametrize("objective", [SURROGATE, SEQUENCE], ids=["token", "sequence"])
@pytest.mark.parametrize("rows_per_tile", [1000, 4])
def test_the_gradients_are_those_of_the_reference(objective, rows_per_tile):
    hidden, weight = head()
    tokens = scored(hidden, weight)
    out = policy_loss(hidden, weight, tokens, objective, logits_budget=rows_per_tile * VOCAB * 8)
    truth = reference(hidden, weight, tokens, objective)
    torch.testing.assert_close(out.loss, truth)
    exact = torch.autograd.grad(3 * truth, (hidden, weight))
    for ours, wanted in zip(gradients(out, hidden, weight), exact, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)


def test_only_rows_with_a_gradient_are_multiplied():
    hidden, weight = head()
    tokens = scored(hidden, weight)
    active = mark_active(tokens, SURROGATE).active
    assert active is not None
    assert 0 < active.sum() < len(active) / 2

    def rows(objective: objectives.Objective) -> list[int]:
        with torch.profiler.profile(record_shapes=True) as profile:
            policy_loss(hidden, weight, tokens, objective)
        shapes = [e.input_shapes for e in profile.events() if e.name == "aten::mm"]
        return [shape[0][0] for shape in shapes if shape[0][1] == HIDDEN]

    assert rows(SURROGATE) == [int(active.sum())]
    assert rows(objectives.EntropyBonus()) == [int((tokens.weight != 0).sum())]


def test_the_share_skipped_is_reported():
    hidden, weight = head()
    tokens = scored(hidden, weight)
    active = mark_active(tokens, SURROGATE).active
    assert active is not None
    read = policy_loss(hidden, weight, tokens, SURROGATE).metrics.read()
    assert read["skipped"] == pytest.approx(1 - float(active.float().mean()))
    assert read["tokens"] == active.sum()
    everything = policy_loss(hidden, weight, tokens, SURROGATE, score_all=True).metrics.read()
    assert everything["skipped"] == 0
    assert everything["tokens"] == (tokens.weight != 0).sum()


@pytest.mark.parametrize("score_all", [False, True])
def test_logp_and_entropy_of_skipped_rows_are_there_when_asked_for(score_all):
    hidden, weight = head()
    tokens = scored(hidden, weight)
    out = policy_loss(hidden, weight, tokens, SURROGATE, score_all=score_all)
    alone = linear_logprobs(hidden, weight, tokens.targets)
    torch.testing.assert_close(out.logp, alone.logp.detach())
    torch.testing.assert_close(out.entropy, alone.entropy.detach())
    assert not out.logp.requires_grad


def test_asking_for_skipped_rows_after_the_weights_changed_says_so():
    hidden, weight = head()
    out = policy_loss(hidden, weight, scored(hidden, weight), SURROGATE)
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="before the optimiser's step"):
        out.logp  # noqa: B018


def test_metrics_of_all_rows_are_those_without_skipping(monkeypatch):
    hidden, weight = head()
    tokens = scored(hidden, weight)
    found = policy_loss(hidden, weight, tokens, SURROGATE, score_all=True).metrics.read()
    monkeypatch.setattr(ScoredTokens, "active_rows", None)
    plain = policy_loss(hidden, weight, tokens, SURROGATE).metrics.read()
    assert found == pytest.approx(plain)


def test_a_caller_may_know_more_than_the_op():
    hidden, weight = head()
    tokens = scored(hidden, weight)
    known = replace(tokens, active=torch.arange(tokens.num_tokens) < 6)
    out = policy_loss(hidden, weight, known, objectives.EntropyBonus())
    d_hidden, _ = gradients(out, hidden, weight)
    assert not d_hidden[6:].any()
    assert d_hidden[:6].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_clipped_rows_are_left_out_of_the_gradient_gemms(dtype):
    hidden, weight = head(dtype)
    tokens = scored(hidden, weight)
    assert tokens.old_logp is not None
    far = torch.where(torch.arange(tokens.num_tokens) % 2 == 0, -2.0, 0.0)
    tokens = replace(
        tokens,
        old_logp=tokens.old_logp + far,
        rewards=None,
        advantage=torch.ones(tokens.num_tokens),
        weight=torch.ones(tokens.num_tokens),
    )

    def run() -> tuple[tuple[Tensor, ...], list[int]]:
        with torch.profiler.profile(record_shapes=True) as profile:
            out = policy_loss(hidden, weight, tokens, SURROGATE)
        shapes = [e.input_shapes for e in profile.events() if e.name == "aten::mm"]
        return gradients(out, hidden, weight), [s[0][0] for s in shapes if s[0][1] == VOCAB]

    compacted, rows = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_rows, "WORTH_COMPACTING", -1.0)
        plain, all_rows = run()
    assert all_rows == [tokens.num_tokens]
    assert rows[0] < 0.8 * tokens.num_tokens
    for a, b in zip(compacted, plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rows_per_tile", [1000, 8])
def test_the_count_of_clipped_rows_may_come_a_tile_later(rows_per_tile, monkeypatch):
    """The loop of CUDA, with the kernel in the interpreter."""
    hidden, weight = head(torch.float32)
    tokens = scored(hidden, weight)
    assert tokens.old_logp is not None
    far = torch.where(torch.arange(tokens.num_tokens) % 3 == 0, 0.0, -2.0)
    ones = torch.ones(tokens.num_tokens)
    tokens = replace(
        tokens, old_logp=tokens.old_logp + far, rewards=None, advantage=ones, weight=ones
    )
    monkeypatch.setattr(policy_rows, "fusible", lambda objective, device: trace(objective))
    budget = rows_per_tile * VOCAB * 4

    def run(skip_clipped: bool) -> tuple[tuple[Tensor, ...], list[int]]:
        with torch.profiler.profile(record_shapes=True) as profile:
            out = policy_loss(
                hidden, weight, tokens, SURROGATE, logits_budget=budget, skip_clipped=skip_clipped
            )
        shapes = [e.input_shapes for e in profile.events() if e.name == "aten::mm"]
        gemms = [s[0][0] for s in shapes if s[0][1] == VOCAB and s[1][1] == HIDDEN]
        return (out.loss, *gradients(out, hidden, weight)), gemms

    (own, few), (plain, every) = run(True), run(False)
    assert sum(every) == tokens.num_tokens
    assert sum(few) < 0.5 * tokens.num_tokens
    assert rows_per_tile == 1000 or len(few) > 2
    for a, b in zip(own, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_all_rows_without_a_gradient_give_zeros():
    hidden, weight = head()
    tokens = replace(scored(hidden, weight), rewards=torch.ones(8))
    out = policy_loss(hidden, weight, tokens, SURROGATE)
    out.loss.backward()
    assert out.loss == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()
    assert out.metrics.read()["skipped"] == 1.0
    assert out.metrics.read()["ess"] == 1.0


def test_tokens_keep_their_sequences_when_some_are_left_out():
    hidden, weight = head()
    tokens = replace(scored(hidden, weight), rewards=None, advantage=torch.arange(8.0))
    rows = torch.tensor([0, 2, 3, 9, 10, 19, 34])
    part = tokens.select(rows)
    assert part.seq_offsets is not None
    assert part.seq_offsets.tolist() == [0, 2, 3, 5, 6, 6, 6, 6, 7]
    assert part.advantage is not None
    assert part.advantage.tolist() == [0, 0, 1, 2, 2, 3, 7]
    assert torch.equal(part.targets, tokens.targets[rows])
    assert part.num_sequences == 8


def test_marking_wants_tokens_on_the_cpu():
    tokens = ScoredTokens(
        targets=torch.zeros(2, dtype=torch.int64, device="meta"),
        weight=torch.zeros(2, device="meta"),
    )
    with pytest.raises(ValueError, match="wanted them on the CPU, got meta"):
        mark_active(tokens, SURROGATE)


def test_active_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"active: wanted bool \[2\] on the CPU"):
        ScoredTokens(
            targets=torch.zeros(2, dtype=torch.int64),
            weight=torch.zeros(2),
            active=torch.ones(3, dtype=torch.bool),
        )
