"""The fused row kernel against the composition it replaces: autograd from loss to logits."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from rlvr_fast import objectives as losses
from rlvr_fast.ops import logprobs
from rlvr_fast.ops.fused_rows import GroupRewards, fused_rows
from rlvr_fast.ops.group_advantages import GroupNormalisation, Scale, group_advantages
from rlvr_fast.tracing.objective import Objective
from rlvr_fast.tracing.tokens import TokenFields, Tokens
from rlvr_fast.tracing.trace import trace

nan, inf = float("nan"), float("inf")
SURROGATE = losses.ClippedSurrogate(clip_high=0.28)
EVERYTHING = losses.DynamicClipSurrogate() + losses.KL3(coef=0.04) + losses.EntropyBonus(coef=0.1)
# Every logit in one lane; smaller than a block; one past a block; Qwen's without padding.
VOCABULARIES = {"one token": 1, "tiny": 50, "one past a block": 4097, "unpadded Qwen": 151_665}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRANSFORMS = {"plain": (1.0, 0.0), "softcap": (0.5 / 1.3, 20 / 1.3)}
NUM_TOKENS = 4


@pytest.fixture(autouse=True)
def _no_files_at_home(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("RLVR_FAST_CACHE", str(tmp_path_factory.getbasetemp() / "objectives"))


def rows(vocab_size: int = 50, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    targets = torch.randint(0, vocab_size, (NUM_TOKENS,))
    return (torch.randn(NUM_TOKENS, vocab_size) * 3).to(dtype), targets


def fields_near(logits: Tensor, targets: Tensor, scale: float = 1.0, cap: float = 0.0):
    logp = logprobs.reference(logits.float(), targets, scale, cap)[0]
    return TokenFields(
        weight=torch.tensor([1.0, 0.25, 2.0, 0.5]),
        old_logp=logp + torch.randn(NUM_TOKENS) * 0.1,
        ref_logp=logp + torch.randn(NUM_TOKENS) * 0.3,
        advantage=torch.randn(NUM_TOKENS),
        extras={},
    )


def fused(logits, targets, fields, objective=SURROGATE, *, groups=None, scale=1.0, cap=0.0,
          out=None):  # fmt: skip
    traced = trace(objective)
    return fused_rows(
        logits, targets, fields, groups, objective, traced, scale=scale, cap=cap, out=out
    )


def composed(logits, targets, fields, objective, scale=1.0, cap=0.0) -> tuple[Tensor, Tensor]:
    """The results and d(loss)/d(logits) in the precision of `logits`, all by autograd."""
    leaf = logits.detach().requires_grad_()
    logp, entropy = logprobs.reference(leaf, targets, scale, cap)[:2]
    cast = {name: getattr(fields, name).to(leaf.dtype)
            for name in ("weight", "old_logp", "ref_logp", "advantage")}  # fmt: skip
    tokens = Tokens(logp, entropy, TokenFields(**cast, extras=fields.extras))
    loss = torch.where(tokens.kept, objective.token_loss(tokens), 0.0)
    dlogp, dentropy, dlogits = torch.autograd.grad(
        (fields.weight * loss).sum(), (logp, entropy, leaf), materialize_grads=True,
        allow_unused=True,
    )  # fmt: skip
    results = [logp, entropy, loss, dlogp, dentropy, tokens.advantage]
    return torch.stack(results).detach(), dlogits


@pytest.mark.parametrize("vocab_size", VOCABULARIES.values(), ids=VOCABULARIES.keys())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "cap"), TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_rows_are_as_exact_as_the_composition(vocab_size, dtype, scale, cap, as_exact_as_torch):
    logits, targets = rows(vocab_size, dtype)
    fields = fields_near(logits, targets, scale, cap)
    truth, gradient = composed(logits.double(), targets, fields, EVERYTHING, scale, cap)
    plain, _ = composed(logits.float(), targets, fields, EVERYTHING, scale, cap)
    out = torch.empty_like(logits)
    results = fused(logits, targets, fields, EVERYTHING, scale=scale, cap=cap, out=out)
    for ours, torchs, exact in zip(results, plain, truth, strict=True):
        as_exact_as_torch(ours, torchs, exact)
    as_exact_as_torch(out, gradient.to(dtype), gradient)


def test_masked_rows_are_zero_whatever_their_fields_hold():
    logits, targets = rows()
    clean = fields_near(logits, targets)
    weight = torch.tensor([1.0, 0.0, 0.0, 0.0])
    garbage = torch.tensor([0.0, nan, inf, -inf])
    dirty = TokenFields(
        weight=weight,
        old_logp=clean.old_logp + garbage,
        ref_logp=clean.ref_logp + garbage,
        advantage=clean.advantage + garbage,
        extras={},
    )
    outs = torch.empty(2, *logits.shape)
    spoilt, plain = (
        fused(logits, targets, fields, EVERYTHING, out=out)
        for fields, out in zip((dirty, replace(clean, weight=weight)), outs, strict=True)
    )
    assert torch.equal(spoilt, plain)
    assert torch.equal(*outs)
    assert not spoilt[2:, 1:].any()
    assert not outs[0][1:].any()
    assert spoilt[:2, 1:].all()


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's, on purpose
def test_a_masked_row_may_even_hold_broken_logits():
    logits, targets = rows()
    fields = replace(fields_near(logits, targets), weight=torch.tensor([1.0, 0.0, 1.0, 1.0]))
    logits[1, 7] = nan
    results = fused(logits, targets, fields, EVERYTHING + losses.KL2(), out=logits)
    assert not results[2:, 1].any()
    assert not logits[1].any()


@pytest.mark.parametrize("scale", Scale)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_rewards_are_normalised_on_the_way(scale, index_dtype):
    logits, targets = rows()
    fields = fields_near(logits, targets)
    normalisation = GroupNormalisation(scale=scale, ddof=0, eps=1e-3)
    rewards = torch.tensor([1.0, 0.0, 0.25, 7.0, 7.0, nan, 1.0])
    group_offsets = torch.tensor([0, 3, 5, 7])
    seq_of_token = torch.tensor([2, 0, 4, 5], dtype=index_dtype)
    groups = GroupRewards(
        rewards=rewards,
        group_offsets=group_offsets,
        seq_of_token=seq_of_token,
        group_of_seq=torch.tensor([0, 0, 0, 1, 1, 2, 2], dtype=index_dtype),
        normalisation=normalisation,
    )
    advantage = group_advantages(rewards, group_offsets, normalisation=normalisation)
    given = replace(fields, advantage=advantage[seq_of_token.long()])
    ours = fused(logits, targets, replace(fields, advantage=None), groups=groups)
    torch.testing.assert_close(ours, fused(logits, targets, given), rtol=1e-6, atol=0)
    assert ours[2].any()


def test_without_old_logp_every_ratio_is_one():
    logits, targets = rows()
    fields = fields_near(logits, targets)
    logp = fused(logits, targets, fields)[0]
    ours = fused(logits, targets, replace(fields, old_logp=None))
    assert torch.equal(ours, fused(logits, targets, replace(fields, old_logp=logp)))
    assert torch.equal(ours[2], -fields.advantage)
    assert torch.equal(ours[3], -fields.advantage * fields.weight)


@dataclass(frozen=True, kw_only=True)
class Scheduled(Objective):
    """Two extras, read in another order than the caller gives them in."""

    strength: float = 2.0

    def token_loss(self, t: Tokens) -> Tensor:
        return self.strength * t.extras["hint"] * t.logp + t.extras["bonus"] * t.entropy


def test_extras_are_found_by_name():
    logits, targets = rows()
    bonus, hint = torch.randn(2, NUM_TOKENS)
    fields = TokenFields(
        weight=torch.ones(NUM_TOKENS), extras={"unread": hint, "hint": hint, "bonus": bonus}
    )
    out = torch.empty_like(logits)
    results = fused(logits, targets, fields, Scheduled(), out=out)
    torch.testing.assert_close(results[2], 2 * hint * results[0] + bonus * results[1])
    assert torch.equal(results[3], 2 * hint)
    assert torch.equal(results[4], bonus)
    assert out.any(1).all()


@pytest.mark.parametrize(
    ("objective", "name"),
    [
        (SURROGATE, r"advantage \(or rewards"),
        (losses.KL1(), "ref_logp"),
        (Scheduled(), r"extras\['bonus'\]"),
    ],
)
def test_a_missing_field_is_named(objective, name):
    logits, targets = rows()
    fields = TokenFields(weight=torch.ones(NUM_TOKENS), extras={})
    with pytest.raises(ValueError, match=f"this objective reads {name}"):
        fused(logits, targets, fields, objective)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_may_overwrite_the_logits(dtype):
    logits, targets = rows(4097, dtype)
    fields, separate = fields_near(logits, targets), torch.empty_like(logits)
    apart = fused(logits, targets, fields, EVERYTHING, out=separate)
    in_place = fused(logits, targets, fields, EVERYTHING, out=logits)
    assert torch.equal(in_place, apart)
    assert torch.equal(logits, separate)


def test_each_row_may_shrink_to_a_narrower_gradient_in_place():
    logits, targets = rows(4097)
    fields = fields_near(logits, targets)
    separate = torch.empty_like(logits, dtype=torch.bfloat16)
    fused(logits, targets, fields, out=separate)
    front = logits.view(torch.bfloat16)[:, :4097]
    fused(logits, targets, fields, out=front)
    assert torch.equal(front, separate)


def test_without_out_only_the_results_are_made():
    logits, targets = rows()
    before, fields = logits.clone(), fields_near(logits, targets)
    assert torch.equal(fused(logits, targets, fields), fused(logits, targets, fields, out=logits))
    assert not torch.equal(logits, before)


def test_rows_may_lie_any_distance_apart():
    wide, targets = rows(64)
    logits, targets = wide[:, :50], targets.clamp(max=49)
    fields, out = fields_near(logits, targets), torch.full((NUM_TOKENS, 77), 9.0)
    plain = torch.empty_like(logits)
    strided = fused(logits, targets, fields, out=out[:, 3:53])
    assert torch.equal(strided, fused(logits.contiguous(), targets, fields, out=plain))
    assert torch.equal(out[:, 3:53], plain)
    assert (out[:, :3] == 9).all()
    assert (out[:, 53:] == 9).all()


@pytest.mark.parametrize("bad", [nan, inf])
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's, on purpose
def test_a_row_that_overflowed_is_seen_and_stays_alone(bad):
    logits, targets = rows()
    fields = fields_near(logits, targets)
    clean, broken = torch.empty_like(logits), torch.empty_like(logits)
    fused(logits, targets, fields, EVERYTHING, out=clean)
    logits[1, 7] = bad
    results = fused(logits, targets, fields, EVERYTHING, out=broken)
    assert results[:3, 1].isnan().all()
    assert broken[1].isnan().all()
    assert torch.equal(broken[[0, 2, 3]], clean[[0, 2, 3]])


def test_no_rows_are_fine():
    none = torch.empty(0)
    fields = TokenFields(weight=none, advantage=none, extras={})
    assert fused(torch.empty(0, 50), none.long(), fields).shape == (6, 0)
