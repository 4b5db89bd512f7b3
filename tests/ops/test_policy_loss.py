"""`policy_loss` against its reference in fp64, and the invariances a user relies on."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from rlvr_fast import objectives
from rlvr_fast.objectives import Objective, Tokens
from rlvr_fast.ops import policy_rows
from rlvr_fast.ops.linear_logprobs import linear_logprobs
from rlvr_fast.ops.policy_loss import PolicyLossOutput, policy_loss, reference
from rlvr_fast.ops.transform import LogitTransform
from rlvr_fast.packed import ScoredTokens
from rlvr_fast.tracing.trace import trace

HIDDEN, VOCAB = 8, 33
SETTINGS = {"temperature": 0.7, "softcap": 9.0, "logit_scale": 1.5}


@dataclass(frozen=True, kw_only=True)
class GroupCentred(Objective):
    """Looks at its whole group, and differentiates through that."""

    def token_loss(self, t: Tokens) -> Tensor:
        return (t.logp - t.group_mean(t.logp)) ** 2


@dataclass(frozen=True, kw_only=True)
class BatchCentred(Objective):
    """Reduces by other means than the ones offered, so it needs the whole batch at once."""

    def token_loss(self, t: Tokens) -> Tensor:
        return (t.logp - t.logp.mean()) * t.advantage


OBJECTIVES: dict[str, Objective] = {
    "reinforce": objectives.PolicyGradient(),
    "clipped": objectives.ClippedSurrogate(clip_low=0.1, clip_high=0.15),
    "dual clip": objectives.ClippedSurrogate(dual_clip=1.05),
    "dynamic": objectives.DynamicClipSurrogate(clip_low=0.02, clip_high=0.03),
    "capped weight": objectives.CappedWeight(cap=1.1),
    "sequence": objectives.SequenceClippedSurrogate(clip_low=0.02, clip_high=0.02),
    "kl": objectives.KL1() + objectives.KL2() + objectives.KL3(),
    "with entropy": objectives.ClippedSurrogate() + objectives.EntropyBonus(coef=0.3),
    "group": GroupCentred(),
    "batch": BatchCentred(),
}
every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())


def head(
    num_tokens: int, dtype: torch.dtype, hidden_size: int = HIDDEN
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight, bias."""
    shapes = ((num_tokens, hidden_size), (VOCAB, hidden_size), (VOCAB,))
    hidden, weight, bias = (torch.randn(s).to(dtype).requires_grad_() for s in shapes)
    return hidden, weight, bias


def scored(hidden: Tensor, weight: Tensor, bias: Tensor, lengths: list[int]) -> ScoredTokens:
    """Off-policy tokens of groups of two, a quarter of them masked."""
    num_tokens = sum(lengths)
    targets = torch.randint(0, VOCAB, (num_tokens,))
    own = linear_logprobs(
        hidden.double(), weight.double(), targets, bias=bias.double(), **SETTINGS
    ).logp.detach()
    return ScoredTokens(
        targets=targets,
        weight=torch.rand(num_tokens) * (torch.rand(num_tokens) > 0.25),
        seq_offsets=torch.tensor([0, *torch.tensor(lengths).cumsum(0)]),
        group_offsets=torch.tensor([*range(0, len(lengths), 2), len(lengths)]),
        old_logp=(own + 0.2 * torch.randn(num_tokens)).float(),
        ref_logp=(own + 0.2 * torch.randn(num_tokens)).float(),
        advantage=torch.randn(len(lengths)),
    )


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(3 * loss, leaves))


@every_objective
@pytest.mark.parametrize("rows_per_tile", [1000, 12, 4, 1])
def test_loss_and_gradients_equal_the_reference_in_fp64(objective, rows_per_tile):
    inputs = head(31, torch.float64)
    tokens = scored(*inputs, [5, 0, 9, 1, 16])
    hidden, weight, bias = inputs
    out = policy_loss(
        hidden,
        weight,
        tokens,
        objective,
        bias=bias,
        logits_budget=rows_per_tile * VOCAB * 8,
        **SETTINGS,
    )
    truth = reference(
        hidden, weight, tokens, objective, bias=bias, transform=LogitTransform(**SETTINGS)
    )
    torch.testing.assert_close(out.loss, truth, rtol=1e-10, atol=1e-12)
    for ours, exact in zip(gradients(out.loss, *inputs), gradients(truth, *inputs), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-12)


@every_objective
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows_per_tile", [1000, 9])
def test_it_is_as_exact_as_plain_torch_in_the_same_dtype(
    objective, dtype, rows_per_tile, as_exact_as_torch
):
    inputs = head(31, dtype)
    tokens = scored(*inputs, [5, 0, 9, 1, 16])

    def run(cast: torch.dtype, ours: bool) -> list[Tensor]:
        h, w, b = (x.detach().to(cast).requires_grad_() for x in inputs)
        if ours:
            budget = rows_per_tile * VOCAB * dtype.itemsize
            out = policy_loss(h, w, tokens, objective, bias=b, logits_budget=budget, **SETTINGS)
            return gradients(out.loss, h, w, b)
        transform = LogitTransform(**SETTINGS)
        loss = reference(h, w, tokens, objective, bias=b, transform=transform)
        return gradients(loss, h, w, b)

    for ours, plain, truth in zip(
        run(dtype, True), run(dtype, False), run(torch.float64, False), strict=True
    ):
        as_exact_as_torch(ours, plain, truth)


def test_the_loss_passes_gradcheck():
    hidden, weight, bias = head(3, torch.float64, hidden_size=2)
    tokens = scored(hidden, weight, bias, [2, 1])
    objective = objectives.ClippedSurrogate() + objectives.EntropyBonus(coef=0.1)

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return 3 * policy_loss(h, w, tokens, objective, bias=b, logits_budget=2 * VOCAB * 8).loss

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
def test_the_on_policy_ratio_is_exactly_one(temperature):
    hidden, weight, _ = head(31, torch.bfloat16)
    tokens = ScoredTokens(
        targets=torch.randint(0, VOCAB, (31,)), weight=torch.ones(31), advantage=torch.randn(31)
    )

    def metrics(given: ScoredTokens) -> dict[str, float]:
        objective = objectives.ClippedSurrogate()
        out = policy_loss(hidden, weight, given, objective, temperature=temperature)
        return out.metrics.read()

    logp = linear_logprobs(hidden, weight, tokens.targets, temperature=temperature).logp.detach()
    for given in (tokens, replace(tokens, old_logp=logp)):
        found = metrics(given)
        assert found["ratio_min"] == found["ratio_max"] == found["ess"] == 1.0
        assert found["kl"] == found["clip_low"] == found["clip_high"] == 0.0


@every_objective
def test_the_order_of_sequences_changes_nothing(objective):
    inputs = head(20, torch.float64)
    tokens = scored(*inputs, [3, 5, 8, 4])
    order = torch.cat([torch.arange(8, 20), torch.arange(0, 8)])
    assert tokens.old_logp is not None
    assert tokens.ref_logp is not None
    assert tokens.advantage is not None
    swapped = ScoredTokens(
        targets=tokens.targets[order],
        weight=tokens.weight[order],
        seq_offsets=torch.tensor([0, 8, 12, 15, 20]),
        group_offsets=tokens.group_offsets,
        old_logp=tokens.old_logp[order],
        ref_logp=tokens.ref_logp[order],
        advantage=tokens.advantage[[2, 3, 0, 1]],
    )
    hidden, weight, _ = inputs
    plain = gradients(policy_loss(hidden, weight, tokens, objective).loss, hidden, weight)
    moved = gradients(policy_loss(hidden[order], weight, swapped, objective).loss, hidden, weight)
    for a, b in zip(plain, moved, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@every_objective
def test_micro_batches_add_up_to_the_whole(objective):
    if objective is OBJECTIVES["batch"]:
        pytest.skip("reduces over the batch it is given, by its own definition")
    inputs = head(20, torch.float64)
    tokens = scored(*inputs, [3, 5, 8, 4])
    hidden, weight, _ = inputs
    whole = gradients(policy_loss(hidden, weight, tokens, objective).loss, hidden, weight)
    parts = [part(tokens, slice(0, 8), slice(0, 2)), part(tokens, slice(8, 20), slice(2, 4))]
    losses = [
        policy_loss(hidden[rows], weight, piece, objective).loss
        for rows, piece in zip((slice(0, 8), slice(8, 20)), parts, strict=True)
    ]
    for a, b in zip(whole, gradients(sum(losses), hidden, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def part(tokens: ScoredTokens, rows: slice, sequences: slice) -> ScoredTokens:
    assert tokens.seq_offsets is not None
    assert tokens.old_logp is not None
    assert tokens.ref_logp is not None
    assert tokens.advantage is not None
    offsets = tokens.seq_offsets[sequences.start : sequences.stop + 1]
    return ScoredTokens(
        targets=tokens.targets[rows],
        weight=tokens.weight[rows],
        seq_offsets=offsets - offsets[0],
        group_offsets=torch.tensor([0, 2]),
        old_logp=tokens.old_logp[rows],
        ref_logp=tokens.ref_logp[rows],
        advantage=tokens.advantage[sequences],
    )


@every_objective
def test_whatever_lies_in_masked_tokens_changes_nothing(objective):
    if objective is OBJECTIVES["batch"]:
        pytest.skip("its own mean counts masked tokens")
    hidden, weight, bias = head(20, torch.float64)
    tokens = scored(hidden, weight, bias, [3, 5, 8, 4])
    masked = tokens.weight == 0
    assert masked.any()
    assert tokens.advantage is not None
    garbage = torch.full((20,), torch.nan)
    poisoned = replace(
        tokens,
        old_logp=torch.where(masked, garbage, tokens.old_logp),
        ref_logp=torch.where(masked, -garbage / 0, tokens.ref_logp),
        advantage=torch.where(masked, garbage, tokens.expand(tokens.advantage)),
    )
    plain, spoiled = (policy_loss(hidden, weight, t, objective) for t in (tokens, poisoned))
    assert torch.equal(plain.loss, spoiled.loss)
    for a, b in zip(*(gradients(o.loss, hidden, weight) for o in (plain, spoiled)), strict=True):
        assert torch.equal(a, b)


@every_objective
@pytest.mark.parametrize("shift", [-60.0, 60.0])
def test_extreme_log_ratios_stay_finite(objective, shift):
    hidden, weight, bias = head(20, torch.float32)
    tokens = scored(hidden, weight, bias, [3, 5, 8, 4])
    assert tokens.old_logp is not None
    far = replace(tokens, old_logp=tokens.old_logp + shift, ref_logp=tokens.old_logp - shift)
    out = policy_loss(hidden, weight, far, objective)
    assert torch.isfinite(out.loss)
    assert all(torch.isfinite(g).all() for g in gradients(out.loss, hidden, weight))


def test_rewards_alone_are_normalised_by_group():
    hidden, weight, bias = head(20, torch.float64)
    tokens = scored(hidden, weight, bias, [3, 5, 8, 4])
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0])
    half = 0.5 / (0.5**0.5 + 1e-6)
    by_hand = replace(tokens, advantage=torch.tensor([half, -half, 0.0, 0.0]))
    by_op = replace(tokens, advantage=None, rewards=rewards)
    objective = objectives.ClippedSurrogate()
    a, b = (policy_loss(hidden, weight, t, objective).loss for t in (by_hand, by_op))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows_per_tile", [1000, 7])
@pytest.mark.parametrize("given", ["advantage", "rewards"])
def test_one_kernel_and_two_sweeps_agree(monkeypatch, rows_per_tile, given):
    hidden, weight, bias = head(20, torch.float32)
    tokens = scored(hidden, weight, bias, [3, 5, 8, 4])
    if given == "rewards":
        rewards = torch.tensor([1.0, 0.0, torch.nan, 1.0])
        tokens = replace(tokens, advantage=None, rewards=rewards)
    objective = objectives.DynamicClipSurrogate() + objectives.EntropyBonus(coef=0.1)

    def run() -> tuple[PolicyLossOutput, list[Tensor]]:
        budget = rows_per_tile * VOCAB * 4
        out = policy_loss(
            hidden, weight, tokens, objective, bias=bias, logits_budget=budget, **SETTINGS
        )
        return out, gradients(out.loss, hidden, weight, bias)

    sweeps, expected = run()
    monkeypatch.setattr(policy_rows, "fusible", lambda objective, device: trace(objective))
    kernel, found = run()
    torch.testing.assert_close(kernel.loss, sweeps.loss, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(kernel.logp, sweeps.logp)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert kernel.metrics.read() == pytest.approx(sweeps.metrics.read(), rel=1e-4)


def test_no_tokens_give_zero_loss_with_gradients_attached():
    hidden, weight, bias = head(0, torch.float32)
    tokens = ScoredTokens(
        targets=torch.zeros(0, dtype=torch.int64), weight=torch.zeros(0), advantage=torch.zeros(0)
    )
    out = policy_loss(hidden, weight, tokens, objectives.ClippedSurrogate(), bias=bias)
    out.loss.backward()
    assert out.loss == 0
    assert (weight.grad == 0).all()
    assert out.metrics.read()["tokens"] == 0


def test_frozen_operands_and_no_grad_skip_their_gemms(monkeypatch):
    hidden, weight, bias = head(20, torch.float32)
    tokens = scored(hidden, weight, bias, [20])

    def gemms(h: Tensor, w: Tensor) -> int:
        with torch.profiler.profile() as profile:
            policy_loss(h, w, tokens, objectives.PolicyGradient())
        return sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm"))

    assert gemms(hidden, weight) == 3
    assert gemms(hidden, weight.detach()) == 2
    assert gemms(hidden.detach(), weight) == 2
    assert gemms(hidden.detach(), weight.detach()) == 1
    with torch.no_grad():
        assert gemms(hidden, weight) == 1


def test_a_sequence_longer_than_a_tile_costs_one_more_gemm_per_tile_and_nothing_else_does():
    hidden, weight, bias = head(20, torch.float32)
    tokens = scored(hidden, weight, bias, [4, 4, 12])
    objective = objectives.SequenceClippedSurrogate()

    def gemms(rows_per_tile: int) -> int:
        with torch.profiler.profile() as profile:
            budget = rows_per_tile * VOCAB * 4
            policy_loss(hidden, weight, tokens, objective, logits_budget=budget)
        return sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm"))

    assert gemms(20) == 3
    assert gemms(12) == 3 + 3
    assert gemms(8) == 3 + 2 * 4


def test_bf16_inputs_accumulate_the_weight_gradient_in_fp32(as_exact_as_torch):
    hidden, weight, _ = head(512, torch.bfloat16)
    tokens = ScoredTokens(
        targets=torch.randint(0, VOCAB, (512,)), weight=torch.ones(512), advantage=torch.randn(512)
    )
    objective = objectives.PolicyGradient()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = gradients(reference(*exact, tokens, objective), exact[1])[0]

    def error(rows_per_tile: int) -> float:
        budget = rows_per_tile * VOCAB * 2
        out = policy_loss(hidden, weight, tokens, objective, logits_budget=budget)
        return ((gradients(out.loss, weight)[0].double() - truth).norm() / truth.norm()).item()

    assert error(16) < 1.5 * error(512)


def test_under_autocast_fp32_master_weights_get_fp32_gradients():
    hidden, weight, bias = head(20, torch.float32)
    tokens = scored(hidden, weight, bias, [20])
    with torch.autocast("cpu", torch.bfloat16):
        out = policy_loss(hidden, weight, tokens, objectives.ClippedSurrogate(), bias=bias)
    found = gradients(out.loss, hidden, weight, bias)
    assert {g.dtype for g in found} == {torch.float32}
    truth = gradients(
        policy_loss(hidden, weight, tokens, objectives.ClippedSurrogate(), bias=bias).loss,
        hidden,
        weight,
        bias,
    )
    for a, b in zip(found, truth, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


def test_tied_embeddings_add_up():
    weight = torch.randn(VOCAB, HIDDEN, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, VOCAB, (9,))
    tokens = ScoredTokens(targets=ids.roll(-1), weight=torch.ones(9), advantage=torch.randn(9))
    objective = objectives.PolicyGradient()
    ours = gradients(policy_loss(weight[ids], weight, tokens, objective).loss, weight)[0]
    exact = gradients(reference(weight[ids], weight, tokens, objective), weight)[0]
    torch.testing.assert_close(ours, exact)


def test_logp_and_entropy_come_along_detached():
    hidden, weight, bias = head(20, torch.float32)
    tokens = scored(hidden, weight, bias, [20])
    out: PolicyLossOutput = policy_loss(hidden, weight, tokens, objectives.ClippedSurrogate())
    alone = linear_logprobs(hidden, weight, tokens.targets)
    torch.testing.assert_close(out.logp, alone.logp)
    torch.testing.assert_close(out.entropy, alone.entropy)
    assert not out.logp.requires_grad
    assert (out.logp <= 0).all()


def test_a_retained_graph_gives_the_same_gradients_again():
    hidden, weight, bias = head(4, torch.float32)
    out = policy_loss(
        hidden, weight, scored(hidden, weight, bias, [4]), objectives.PolicyGradient()
    )
    first, second = (
        torch.autograd.grad(out.loss, (hidden, weight), retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_clipped_share_counts_tokens_whose_gradient_vanished():
    hidden, weight, _ = head(4, torch.float32)
    targets = torch.randint(0, VOCAB, (4,))
    logp = linear_logprobs(hidden, weight, targets).logp.detach()
    tokens = ScoredTokens(
        targets=targets,
        weight=torch.ones(4),
        old_logp=logp - torch.tensor([1.0, 1.0, -1.0, 0.0]),
        advantage=torch.tensor([1.0, -1.0, -1.0, 1.0]),
    )
    found = policy_loss(hidden, weight, tokens, objectives.ClippedSurrogate()).metrics.read()
    assert found["clip_high"] == 0.25
    assert found["clip_low"] == 0.25
    assert found["ratio_max"] == pytest.approx(2.71828, rel=1e-4)


@pytest.mark.parametrize(
    ("objective", "change", "message"),
    [
        (objectives.ClippedSurrogate(), {"advantage": None}, "this objective reads advantage"),
        (objectives.KL3(), {}, "this objective reads ref_logp"),
        (objectives.SequenceClippedSurrogate(), {}, "this objective reads seq_offsets"),
    ],
)
def test_a_missing_field_is_named(objective, change, message):
    hidden, weight, _ = head(4, torch.float32)
    tokens = ScoredTokens(
        targets=torch.zeros(4, dtype=torch.int64), weight=torch.ones(4), advantage=torch.ones(4)
    )
    with pytest.raises(ValueError, match=message):
        policy_loss(hidden, weight, replace(tokens, **change), objective)


def test_a_token_loss_of_another_shape_is_refused():
    class Scalar(Objective):
        def token_loss(self, t: Tokens) -> Tensor:
            return t.logp.sum()

    hidden, weight, bias = head(4, torch.float32)
    with pytest.raises(ValueError, match=r"Scalar.token_loss: wanted \[4\], got \[\]"):
        policy_loss(hidden, weight, scored(hidden, weight, bias, [4]), Scalar())
