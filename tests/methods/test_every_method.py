"""What holds for every registered method, whatever it is: nothing here knows one by name."""

import json
import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from benches import drawn
from rlvr_fast import config as configs
from rlvr_fast import models
from rlvr_fast.methods import METHODS, method
from rlvr_fast.methods.rollouts import as_values
from rlvr_fast.objectives import Objective
from rlvr_fast.ops import logprobs
from rlvr_fast.ops.fused_rows import fused_rows
from rlvr_fast.ops.objective_rows import Segmentation, evaluate
from rlvr_fast.optimise import Optimiser
from rlvr_fast.scoring import PolicyScorer
from rlvr_fast.tasks import Example
from rlvr_fast.tracing.level import Level, level
from rlvr_fast.tracing.tokens import TokenFields
from rlvr_fast.tracing.trace import trace

EXAMPLES = [
    Example(prompt, columns=drawn.COLUMNS, samples=samples)
    for prompt, samples in (("3+4=", 4), ("12+30=", 3), ("1+2+3+4+5=", 3))
]
SEED, NEXT_SEED, SHORT_SEED = 9, 11, 2
"""Of completions some of which are right and some wrong, whatever the prompt."""
VOCABULARY = 30
NAN = float("nan")
every_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(autouse=True)
def _no_files_at_home(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("RLVR_FAST_CACHE", str(tmp_path_factory.getbasetemp() / "objectives"))


@cache
def model_and_tokenizer():
    """Of random weights large enough for log-probabilities that differ."""
    model, tokenizer = models.load(models.resolve("tiny"))
    moved(model, seed=1)
    return model, tokenizer


@cache
def reference():
    model, _ = models.load(models.resolve("tiny"))
    moved(model, seed=2)
    return model.requires_grad_(False)


@torch.no_grad()
def moved(model, *, seed, by=0.1):
    draw = torch.Generator().manual_seed(seed)
    weights = parameters_to_vector(model.parameters())
    vector_to_parameters(
        weights + by * torch.randn(len(weights), generator=draw), model.parameters()
    )


def optimiser(name, **overrides):
    kind = METHODS[name]
    values = {
        "model": "tiny",
        "task": "addition",
        "method": name,
        "method_options": drawn.needed_options(kind),
        "run_folder": "unused",
        "precision": "fp32",
        "max_completion_tokens": 8,
        "updates_per_batch": 1 if kind.on_policy_only else 2,
    }
    config = configs.from_values(values, overrides)
    model, tokenizer = model_and_tokenizer()
    chosen = method(name, config.method_options)
    return Optimiser(config, chosen, model, reference(), vocab_size=len(tokenizer))


def collected(made, seed=SEED, longest=7):
    tokenizer = model_and_tokenizer()[1]
    on = drawn.context(EXAMPLES, tokenizer, samples=3, lengths=(1, longest), seed=seed)
    return drawn.verified(made._method, on)


def gradients(made, groups):
    """`[updates, parameters]`, the weights drifting between updates as in every other call."""
    model, found = made.model, []
    before = parameters_to_vector(model.parameters()).detach()

    def apply():
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        made.adamw.zero_grad()
        moved(model, seed=len(found), by=0.01)
        return 0.0

    made.apply = apply
    try:
        made.update(groups, step=1)
    finally:
        vector_to_parameters(before, model.parameters())
        made.adamw.zero_grad()
    return torch.stack(found)


@cache
def usual_gradients(name):
    made = optimiser(name)
    return gradients(made, made._method.advantages(collected(made)))


def assert_usual(name, found):
    wanted = usual_gradients(name)
    assert wanted.norm(dim=1).min() > 0
    assert ((found - wanted).norm(dim=1) <= 1e-5 * wanted.norm(dim=1)).all()


@every_method
@pytest.mark.parametrize("budget", [1, 20])
def test_how_a_batch_is_cut_changes_no_gradient(name, budget):
    """With a budget of 1 each sequence is a pass of its own, or each group where one is whole."""
    made = optimiser(name, tokens_per_microbatch=budget, share_prompts=budget > 1)
    passes = []
    backward = made.backward
    made.backward = lambda packed: passes.append(packed) or backward(packed)

    found = gradients(made, made._method.advantages(collected(made)))

    assert len(passes) > len(found) or made._level is Level.BATCH
    assert_usual(name, found)


@every_method
def test_the_order_of_groups_and_completions_changes_no_gradient(name):
    made = optimiser(name)

    turned = [group[::-1] for group in collected(made)[::-1]]

    assert_usual(name, gradients(made, made._method.advantages(turned)))


@every_method
def test_masked_tokens_change_no_gradient_whatever_their_fields_hold(name):
    made = optimiser(name)
    groups = [[with_masked_tokens(rollout) for rollout in group] for group in collected(made)]

    groups = [[spoiled(rollout) for rollout in g] for g in made._method.advantages(groups)]

    assert_usual(name, gradients(made, groups))


def with_masked_tokens(rollout):
    """The same, and two tokens that the policy did not write."""

    def longer(value, more):
        return [*value, more, more] if isinstance(value, list | tuple) else value

    length = len(rollout.completion_ids)
    return replace(
        rollout,
        completion_ids=[*rollout.completion_ids, 7, 8],
        loss_mask=longer(rollout.loss_mask or [1] * length, 0),
        rollout_logp=longer(rollout.rollout_logp, NAN),
        advantage=longer(rollout.advantage, NAN),
        extras={key: longer(value, NAN) for key, value in rollout.extras.items()},
    )


def spoiled(rollout):
    """NaN wherever a masked token has a field of its own."""

    def without(value):
        if not isinstance(value, list | tuple):
            return value
        return [x if keep else NAN for x, keep in zip(value, rollout.loss_mask, strict=True)]

    return replace(
        rollout,
        advantage=without(rollout.advantage),
        extras={key: without(value) for key, value in rollout.extras.items()},
    )


@every_method
def test_what_a_method_remembers_survives_a_checkpoint(name):
    kept = optimiser(name)
    metrics = kept_weights(kept, kept._method.advantages(collected(kept)))
    kept._method.observe(metrics)
    fresh = optimiser(name)

    fresh._method.load_state_dict(json.loads(json.dumps(kept._method.state_dict())))

    found, wanted = (
        [
            [as_values(rollout) for rollout in group]
            for group in made._method.advantages(collected(made, NEXT_SEED))
        ]
        for made in (fresh, kept)
    )
    assert found == wanted
    assert fresh._method.state_dict() == kept._method.state_dict()


def kept_weights(made, groups):
    """What an update reports; the weights are as before."""
    made.apply = lambda: made.adamw.zero_grad() or 1.0
    return made.update(groups, step=1)


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
