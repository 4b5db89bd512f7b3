"""Corrections and measures of the sampler's mismatch, against numbers computed without us."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlvr_fast import aggregate, objectives
from rlvr_fast.config.corrections import MismatchCorrection, MismatchReduction
from rlvr_fast.mismatch import Corrected, mismatch
from rlvr_fast.objectives import Objective
from rlvr_fast.ops.fused_rows import fused_rows
from rlvr_fast.ops.logprobs import reference as row_reference
from rlvr_fast.ops.objective_rows import Segmentation, evaluate
from rlvr_fast.ops.policy_loss import policy_loss
from rlvr_fast.packed import Sample, pack
from rlvr_fast.scored import ScoredTokens
from rlvr_fast.tracing.level import Level, level
from rlvr_fast.tracing.tokens import TokenFields, Tokens
from rlvr_fast.tracing.trace import trace
from rlvr_fast.tracing.vanishing import vanishes

nan, inf = float("nan"), float("inf")
MODES = [mode for mode in MismatchCorrection if mode is not MismatchCorrection.NONE]
TOKEN_MODES = [mode for mode in MODES if not mode.by_sequence]
SEQUENCE_MODES = [mode for mode in MODES if mode.by_sequence]
SURROGATE = objectives.ClippedSurrogate(clip_low=0.2, clip_high=0.28)

LENGTHS = torch.tensor([3, 2])
NEW = [-0.8, -0.9, -1.5, -0.4, -0.7]
OLD = [-1.0, -0.5, -2.0, -0.3, -1.2]
ROLLOUT = [-1.1, -0.5, -2.6, -0.3, -1.0]
ADVANTAGE = [1.0, 1.0, 1.0, -1.0, -1.0]

# The numbers are those of METHODS.md's script, which knows nothing of torch.
KNOWN = {
    "truncated at 1.5": ("token_truncate", 0.0, 1.5, -0.337097,
                         [-0.269972, -0.134064, 0, 0.180967, 0.269972]),
    "masked outside .5 to 1.5": ("token_mask", 0.5, 1.5, 0.046903,
                                 [-0.269972, -0.134064, 0, 0.180967, 0.269972]),
    "sequences outside .5 to 2": ("sequence_mask", 0.5, 2.0, 0.418135,
                                  [0, 0, 0, 0.148164, 0.269972]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_files_at_home(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("RLVR_FAST_CACHE", str(tmp_path_factory.getbasetemp() / "objectives"))


def corrected(mode: str, objective: Objective = SURROGATE, **settings: object) -> Corrected:
    return Corrected(objective=objective, correction=MismatchCorrection(mode), **settings)


def fields_of(**values: list[float]) -> TokenFields:
    tensors = {name: torch.tensor(x, dtype=torch.float64) for name, x in values.items()}
    return TokenFields(**({"weight": torch.ones(5, dtype=torch.float64)} | tensors), extras={})


def view(logp: list[float], fields: TokenFields) -> Tokens:
    cut = Segmentation(seq=torch.tensor([0, 3, 5]))
    given = torch.tensor(logp, dtype=torch.float64)
    return cut.view(given, torch.ones(5, dtype=torch.float64), fields, slice(0, 5))


def factors(objective: Corrected, logp: list[float], fields: TokenFields) -> list[float]:
    return objective.factor(objective.ratio(view(logp, fields))).tolist()


@pytest.mark.parametrize("case", KNOWN)
def test_losses_and_gradients_are_the_known_ones(case):
    mode, floor, cap, loss, gradient = KNOWN[case]
    weight = aggregate.token_mean(LENGTHS).repeat_interleave(LENGTHS).tolist()
    fields = fields_of(weight=weight, old_logp=OLD, rollout_logp=ROLLOUT, advantage=ADVANTAGE)
    stats = torch.stack([torch.tensor(NEW, dtype=torch.float64)] + [torch.ones(5).double()] * 3)

    cut = Segmentation(seq=torch.tensor([0, 3, 5]))
    found = evaluate(corrected(mode, floor=floor, cap=cap), stats, fields, cut, slice(0, 5))

    assert float((fields.weight * found.token_loss).sum()) == pytest.approx(loss, abs=1e-6)
    assert found.dlogp.tolist() == pytest.approx(gradient, abs=1e-6)


def stock(mode: str, low: float | None, high: float) -> Tensor:
    """TRL 1.16's `vllm_importance_sampling_mode`, after its documentation: padded rows, a mask."""
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    gap = torch.zeros(2, 3)
    gap[mask.bool()] = torch.tensor(OLD) - torch.tensor(ROLLOUT)
    ratio = torch.exp(gap.sum(1, keepdim=True) if mode.startswith("sequence") else gap)
    if mode.endswith("truncate"):
        ratio = torch.clamp(ratio, min=low, max=high)
    else:
        ratio = ratio.masked_fill((ratio < (low or -inf)) | (ratio > high), 0.0)
    return (ratio * mask)[mask.bool()]


@pytest.mark.parametrize(("low", "high"), [(None, 3.0), (None, 1.5), (0.9, 1.7), (0.5, 2.0)])
@pytest.mark.parametrize("mode", MODES)
def test_the_factors_are_those_of_stock_trl(mode, low, high):
    fields = fields_of(old_logp=OLD, rollout_logp=ROLLOUT)

    found = factors(corrected(mode, floor=low or 0.0, cap=high), NEW, fields)

    assert found == pytest.approx(stock(mode, low, high).tolist(), rel=1e-5)


@pytest.mark.parametrize("reduction", MismatchReduction)
@pytest.mark.parametrize("mode", MODES)
def test_no_factor_is_ever_above_the_cap(mode, reduction):
    ends = torch.tensor([0.0, -1e-8, -1e-3, -1.0, -60.0, -200.0])
    old, rollout = torch.cartesian_prod(ends, ends).T
    fields = TokenFields(
        weight=torch.ones(36), old_logp=old, rollout_logp=rollout, advantage=old, extras={}
    )
    for cap in (1e-3, 1.0, 2.0, 1e6):
        objective = corrected(mode, cap=cap, floor=cap / 4, reduction=reduction)
        for cut in (torch.arange(37), torch.tensor([0, 5, 36])):
            tokens = Segmentation(seq=cut).view(old, old, fields, slice(0, 36))

            factor = objective.factor(objective.ratio(tokens))

            assert (factor <= torch.tensor(cap)).all()
            assert ((factor >= cap / 4) | (objective.correction.masks & (factor == 0))).all()


@pytest.mark.parametrize("mode", SEQUENCE_MODES)
def test_only_the_mean_of_log_ratios_ignores_the_length(mode):
    def factor(length: int, reduction: MismatchReduction) -> float:
        old = torch.full((length,), -1.0)
        fields = TokenFields(
            weight=torch.ones(length), old_logp=old, rollout_logp=old - 0.02, extras={}
        )
        cut = Segmentation(seq=torch.tensor([0, length]))
        objective = corrected(mode, cap=2.0, reduction=reduction)
        return float(
            objective.factor(objective.ratio(cut.view(old, old, fields, slice(0, length))))[0]
        )

    by_sum, by_mean = ([factor(n, kind) for n in (1, 10, 100)] for kind in MismatchReduction)

    assert by_mean == pytest.approx([math.exp(0.02)] * 3, rel=1e-5)
    beyond = 0.0 if mode is MismatchCorrection.SEQUENCE_MASK else 2.0
    assert by_sum == pytest.approx([math.exp(0.02), math.exp(0.2), beyond], rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_masked_tokens_take_no_part_whatever_they_hold(mode):
    weight = [1.0, 0.0, 1.0, 0.0, 1.0]
    clean = fields_of(weight=weight, old_logp=OLD, rollout_logp=ROLLOUT, advantage=ADVANTAGE)
    garbage = torch.tensor([0.0, nan, 0.0, -inf, 0.0])
    dirty = replace(
        clean, old_logp=clean.old_logp + garbage, rollout_logp=clean.rollout_logp + garbage
    )

    found = [factors(corrected(mode), NEW, fields) for fields in (clean, dirty)]

    assert found[0] == found[1]
    if mode.by_sequence:
        assert found[0][0] == pytest.approx(math.exp(0.7))


def test_a_sampler_without_a_number_is_masked_or_seen():
    fields = fields_of(old_logp=OLD, rollout_logp=[nan, *ROLLOUT[1:]])

    masked, truncated = (
        factors(corrected(mode), NEW, fields)[0] for mode in ("token_mask", "token_truncate")
    )

    assert masked == 0
    assert math.isnan(truncated)


def test_no_gradient_flows_through_the_factor():
    objective = corrected("token_truncate", objectives.PolicyGradient(), cap=5.0)
    fields = fields_of(rollout_logp=ROLLOUT, advantage=ADVANTAGE)
    stats = torch.stack([torch.tensor(NEW, dtype=torch.float64)] + [torch.ones(5).double()] * 3)

    found = evaluate(objective, stats, fields, Segmentation(), slice(0, 5))

    ratio = (torch.tensor(NEW) - torch.tensor(ROLLOUT)).exp()
    assert found.dlogp.tolist() == pytest.approx((-ratio * torch.tensor(ADVANTAGE)).tolist())


@pytest.mark.parametrize("mode", MODES)
def test_a_zero_advantage_still_means_a_zero_gradient(mode):
    assert vanishes(corrected(mode))
    assert vanishes(corrected(mode, objectives.PolicyGradient()))
    assert not vanishes(corrected(mode) + objectives.KL3())
    assert not vanishes(corrected(mode, objectives.KL2()))


@pytest.mark.parametrize("mode", MODES)
def test_the_correction_looks_as_far_as_its_ratio(mode):
    wanted = Level.SEQUENCE if mode.by_sequence else Level.TOKEN
    assert level(corrected(mode)) is wanted
    assert (trace(corrected(mode)) is None) is mode.by_sequence


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("mode", TOKEN_MODES)
def test_the_kernel_corrects_as_plain_torch_does(mode, on_policy, as_exact_as_torch):
    objective = corrected(mode, floor=0.6, cap=1.5) + objectives.EntropyBonus(coef=0.1)
    logits, targets = torch.randn(8, 50) * 3, torch.randint(0, 50, (8,))
    logp = row_reference(logits, targets, 1.0, 0.0)[0]
    near = logp + torch.tensor([0, 0.1, -0.1, 0.3, 0.9, -0.9, 60, -60])
    fields = TokenFields(
        weight=torch.rand(8) + 0.1,
        old_logp=None if on_policy else logp + 0.1 * torch.randn(8),
        rollout_logp=near,
        advantage=torch.randn(8),
        extras={},
    )
    traced = trace(objective)
    out = torch.empty_like(logits)

    ours = fused_rows(logits, targets, fields, None, objective, traced, scale=1.0, cap=0.0, out=out)

    exact, plain = (composed(logits.to(dtype), targets, fields, objective) for dtype in
                    (torch.float64, torch.float32))  # fmt: skip
    as_exact_as_torch(ours[2], plain[0], exact[0])
    as_exact_as_torch(out, plain[1], exact[1])
    assert ours[2].any()


def composed(
    logits: Tensor, targets: Tensor, fields: TokenFields, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Token losses and d(loss)/d(logits), all by autograd, in the precision of the logits."""
    leaf = logits.detach().requires_grad_()
    logp, entropy = row_reference(leaf, targets, 1.0, 0.0)[:2]
    names = [name for name in ("old_logp", "rollout_logp", "advantage", "weight")
             if getattr(fields, name) is not None]  # fmt: skip
    cast = {name: getattr(fields, name).to(leaf.dtype) for name in names}
    loss = objective.token_loss(Tokens(logp, entropy, TokenFields(**cast, extras={})))
    (gradient,) = torch.autograd.grad((cast["weight"] * loss).sum(), leaf)
    return loss.detach(), gradient


def test_other_bounds_compile_nothing_new():
    first, second = (trace(corrected("token_mask", cap=cap)) for cap in (2.0, 4.0))
    assert first is second
    assert trace(corrected("token_truncate")).key != first.key


@pytest.mark.parametrize("mode", MODES)
def test_one_pass_on_policy_equals_two_with_the_old_log_probabilities(mode):
    hidden = torch.randn(9, 8, requires_grad=True)
    weight = torch.randn(30, 8, requires_grad=True)
    tokens = ScoredTokens(
        targets=torch.randint(0, 30, (9,)),
        weight=torch.tensor([1.0, 1, 1, 0, 1, 1, 1, 1, 1]),
        seq_offsets=torch.tensor([0, 4, 4, 9]),
        advantage=torch.tensor([1.0, 0.5, -1.0]),
        rollout_logp=-3 * torch.rand(9),
    )
    objective = corrected(mode, cap=2.0, floor=0.1, reduction=MismatchReduction.MEAN)

    fused = policy_loss(hidden, weight, tokens, objective, logits_budget=30 * 4 * 5)
    known = replace(tokens, old_logp=fused.logp)
    twice = policy_loss(hidden, weight, known, objective)

    torch.testing.assert_close(fused.loss, twice.loss)
    ours, theirs = (torch.autograd.grad(out.loss, (hidden, weight)) for out in (fused, twice))
    torch.testing.assert_close(ours, theirs)
    assert ours[0].any()


def packs() -> tuple[list, list[Tensor]]:
    """Two packs of unequal sizes with a masked token, and the trainer's log-probabilities."""
    long = Sample(
        prompt_ids=[1],
        completion_ids=[2, 3, 4],
        loss_mask=[1, 0, 1],
        advantage=1.0,
        rollout_logp=[-1.0, nan, -2.0],
    )
    short = Sample(prompt_ids=[1], completion_ids=[5], advantage=1.0, rollout_logp=[-0.5])
    return [pack([[long]]), pack([[short]])], [
        torch.tensor([-0.9, -3.0, -3.0]),
        torch.tensor([-0.5]),
    ]


def test_the_mismatch_is_one_mean_over_all_unmasked_tokens():
    gap = [0.1, -1.0, 0.0]
    w = [math.exp(g) for g in gap]

    found = mismatch(*packs())

    assert found == pytest.approx(
        {
            "mismatch_mean": 1.1 / 3,
            "mismatch_max": 1.0,
            "mismatch_kl": sum(r - 1 - g for r, g in zip(w, gap, strict=True)) / 3,
            "mismatch_ratio_max": w[0],
            "mismatch_ess": sum(w) ** 2 / (3 * sum(r * r for r in w)),
        },
        rel=1e-6,
    )


@pytest.mark.parametrize(
    ("mode", "settings", "name", "share"),
    [
        ("token_mask", {"floor": 0.5}, "masked", 1 / 3),
        ("token_truncate", {"cap": 1.05}, "capped", 1 / 3),
        ("token_truncate", {"cap": 1.05, "floor": 0.5}, "capped", 2 / 3),
        ("sequence_mask", {"floor": 0.5}, "masked", 2 / 3),
        ("sequence_mask", {"floor": 0.5, "reduction": MismatchReduction.MEAN}, "masked", 0.0),
        ("sequence_truncate", {"cap": 0.9}, "capped", 1 / 3),
    ],
)
def test_the_share_of_changed_tokens_is_told(mode, settings, name, share):
    found = mismatch(*packs(), corrected(mode, **settings))

    assert found[f"mismatch_{name}"] == pytest.approx(share)


def test_without_the_samplers_log_probabilities_there_is_nothing_to_tell():
    sample = Sample(prompt_ids=[1], completion_ids=[2], advantage=1.0)

    assert mismatch([pack([[sample]])], [torch.zeros(1)]) == {}
    assert mismatch([], []) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cap": 0.0}, r"^mismatch_cap: wanted > 0 and finite, got 0.0$"),
        ({"cap": inf}, r"^mismatch_cap: wanted > 0 and finite, got inf$"),
        ({"cap": nan}, r"^mismatch_cap: wanted > 0 and finite, got nan$"),
        ({"floor": -0.1}, r"^mismatch_floor: wanted >= 0 and < mismatch_cap, 3.0, got -0.1$"),
        ({"floor": 3.0}, r"^mismatch_floor: wanted >= 0 and < mismatch_cap, 3.0, got 3.0$"),
    ],
)
def test_bounds_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        corrected("token_mask", **settings)
    with pytest.raises(ValueError, match=r"^correction: wanted one by token or by sequence, got"):
        corrected("none")
