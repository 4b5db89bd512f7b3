"""What holds for the objective of every registered method, on every backend."""

import math
from functools import cache

import pytest
import torch
from every import SHORT_SEED, collected, every_method, optimiser

from rlvr_fast.objectives import Objective
from rlvr_fast.ops import logprobs
from rlvr_fast.ops.fused_rows import fused_rows
from rlvr_fast.ops.objective_rows import Segmentation, evaluate
from rlvr_fast.scoring import PolicyScorer
from rlvr_fast.tracing.level import level
from rlvr_fast.tracing.tokens import TokenFields
from rlvr_fast.tracing.trace import trace

VOCABULARY = 30


@pytest.fixture(autouse=True)
def _no_files_at_home(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("RLVR_FAST_CACHE", str(tmp_path_factory.getbasetemp() / "objectives"))


@cache
def rows_of(name):
    """The objective as it is minimised, and the tokens of a batch with all that it reads."""
    made = optimiser(name)
    scorer = PolicyScorer(config=made._config, policy=made.policy, reference=made.reference, step=1)
    few = collected(made, SHORT_SEED, longest=3)  # Triton's interpreter takes long for a row.
    groups = made._method.shape(made._method.advantages(few), scorer)
    (packed,) = made._method.prepare(made.packs(made.samples(groups)), scorer, 0)
    return made.objective, packed.scored


def on_backend(backend, objective, scored, logits, fields):
    """Weighted token losses and their sum's gradient with respect to the logits; fp64 or fp32."""
    wide = torch.float64 if backend == "reference" else torch.float32
    logits = logits.to(wide)
    fields = TokenFields(
        extras={key: value.to(wide) for key, value in scored.extras.items()},
        **{key: value.to(wide) for key, value in fields.items()},
    )
    targets, out = scored.targets % VOCABULARY, torch.empty_like(logits)
    traced = trace(objective) if backend == "triton" else None
    if traced is not None:
        rows = fused_rows(
            logits, targets, fields, None, objective, traced, scale=1.0, cap=0.0, out=out
        )
        return fields.weight * rows[2], out
    stats = logprobs.BACKENDS[backend](logits, targets, 1.0, 0.0)
    cut = Segmentation.of(scored, level(objective))
    said = evaluate(objective, stats, fields, cut, slice(0, len(logits)))
    logprobs.GRAD_BACKENDS[backend](
        logits, targets, stats, said.dlogp, said.dentropy, 1.0, 0.0, out
    )
    return fields.weight * said.token_loss, out


def given_fields(scored, **logps):
    own = {"weight": scored.weight, "advantage": scored.advantage, **logps}
    return {key: value for key, value in own.items() if value is not None}


def scored_rows(name):
    objective, scored = rows_of(name)
    if not isinstance(objective, Objective):
        pytest.skip("reads two distributions, not the log-probability of a token")
    return objective, scored


@every_method
def test_the_backends_agree_on_losses_and_gradients(name):
    objective, scored = scored_rows(name)
    logits = 3 * torch.randn(scored.num_tokens, VOCABULARY)
    logp = logprobs.reference(logits, scored.targets % VOCABULARY, 1.0, 0.0)[0]
    near = {key: (logp + 0.4 * torch.randn(len(logp))).clamp(max=-1e-3)
            for key in ("old_logp", "ref_logp", "rollout_logp")}  # fmt: skip
    fields = given_fields(scored, **near)

    wanted = on_backend("reference", objective, scored, logits, fields)

    for backend in ("cpp", "triton"):
        found = on_backend(backend, objective, scored, logits, fields)
        for own, exact in zip(found, wanted, strict=True):
            assert exact.norm() > 0
            assert (own - exact).norm() <= 1e-5 * exact.norm()


@every_method
@pytest.mark.parametrize("backend", logprobs.BACKENDS)
def test_log_ratios_of_60_and_an_entropy_of_0_leave_everything_finite(name, backend):
    objective, scored = scored_rows(name)
    logits, old = extremes(scored.targets % VOCABULARY)
    turned = {"old_logp": old, "ref_logp": old.roll(1), "rollout_logp": old.roll(2)}

    losses, gradient = on_backend(
        backend, objective, scored, logits, given_fields(scored, **turned)
    )

    assert losses.isfinite().all()
    assert gradient.isfinite().all()


def extremes(targets):
    """Rows in turn: sure of the target, sure of another token, unsure; before it was otherwise."""
    row = torch.arange(len(targets))
    logits = torch.randn(len(targets), VOCABULARY)
    likely, unlikely = (row % 3 == kind for kind in (0, 1))
    logits[row[likely], targets[likely]] = 120.0
    logits[row[unlikely], targets[unlikely]] = -60.0
    logits[row[unlikely], (targets[unlikely] + 1) % VOCABULARY] = 60.0
    old = torch.where(unlikely, -1e-3, -60.0)
    old[::5] = 0.0
    return logits, old


def test_the_extremes_are_what_they_say():
    targets = torch.arange(20)
    logits, old = extremes(targets)

    logp, entropy = logprobs.reference(logits.double(), targets, 1.0, 0.0)[:2]

    gap = logp - old
    assert gap.max() == pytest.approx(60, abs=1)
    assert gap.min() < -60
    assert (entropy < 1e-10).sum() == math.ceil(20 / 3) * 2
