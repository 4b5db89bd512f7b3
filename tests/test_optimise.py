from dataclasses import replace

import pytest
import torch
from rollouts import mixed_groups, rollout_of

from rlvr_fast import config as configs
from rlvr_fast import models
from rlvr_fast.devices import DTYPES
from rlvr_fast.methods import method
from rlvr_fast.optimise import Optimiser, learning_rate
from rlvr_fast.rollout import SamplingParams
from rlvr_fast.rollout.embedded import EmbeddedEngine


def optimiser(name="grpo", **overrides):
    config = configs.load("tiny", {"method": name, "entropy_coef": 0.0, **overrides})
    path = models.resolve("tiny")
    reference = models.load(path)[0] if config.kl_coef else None
    model, tokenizer = models.load(path)
    chosen = method(name, config.method_options)
    return Optimiser(config, chosen, model, reference, vocab_size=len(tokenizer))


def gradient(optimiser, groups):
    """Of one batch, as one vector."""
    for packed in optimiser.packs(optimiser.samples(groups)):
        optimiser.backward(packed)
    found = torch.cat([p.grad.flatten() for p in optimiser.model.parameters()])
    optimiser.adamw.zero_grad()
    return found


def assert_same(found, wanted):
    assert float((found - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "reinforce", "cispo", "gspo"])
def test_dropping_sequences_without_gradient_changes_no_gradient(name, monkeypatch):
    groups, made = mixed_groups(), optimiser(name)
    dropped, counts = gradient(made, groups), [sum(map(len, made.samples(groups)))]

    monkeypatch.setattr("rlvr_fast.optimise.vanishes", lambda objective: False)
    counts.append(sum(map(len, made.samples(groups))))

    assert counts == [5, 9]
    assert_same(dropped, gradient(made, groups))


def test_dropped_sequences_still_count_in_the_denominators():
    groups = mixed_groups()
    lengths = [rollout.scored_tokens for group in groups for rollout in group]

    by_token, by_sequence = (
        [sample for group in optimiser(name).samples(groups) for sample in group]
        for name in ("reinforce", "grpo")
    )

    assert [s.token_weight for s in by_token] == pytest.approx([1 / sum(lengths)] * 5)
    assert [s.token_weight * len(s.completion_ids) for s in by_sequence] == pytest.approx(
        [1 / 9] * 5
    )


@pytest.mark.parametrize("budget", [1, 15, 22])
@pytest.mark.parametrize("name", ["grpo", "reinforce", "gspo"])
def test_the_microbatch_budget_changes_no_gradient(name, budget):
    whole, cut = optimiser(name), optimiser(name, tokens_per_microbatch=budget)
    groups = mixed_groups()

    assert len(cut.packs(cut.samples(groups))) > 1
    assert_same(gradient(cut, groups), gradient(whole, groups))


def test_the_order_of_groups_and_rollouts_changes_no_gradient():
    plain = optimiser(tokens_per_microbatch=20)
    groups = mixed_groups()
    turned = [group[::-1] for group in groups[::-1]]

    assert_same(gradient(plain, turned), gradient(plain, groups))


def test_sharing_prompts_changes_no_gradient():
    shared, repeated = optimiser(share_prompts=True), optimiser(share_prompts=False)

    assert_same(gradient(shared, mixed_groups()), gradient(repeated, mixed_groups()))


def test_masked_tokens_count_in_no_mean_and_have_no_gradient():
    groups = mixed_groups()
    first = groups[0][0]
    longer = replace(
        first,
        completion_ids=[*first.completion_ids, 7, 8],
        rollout_logp=[*first.rollout_logp, -4.0, -4.0],
        loss_mask=[1] * len(first.completion_ids) + [0, 0],
    )

    masked = gradient(optimiser(), [[longer, *groups[0][1:]], *groups[1:]])

    assert_same(masked, gradient(optimiser(), groups))


@pytest.mark.parametrize("setting", ["kl_coef", "entropy_coef"])
def test_a_term_without_advantage_keeps_every_sequence(setting):
    penalised = optimiser(**{setting: 0.1})

    assert sum(map(len, penalised.samples(mixed_groups()))) == 9


def test_the_entropy_bonus_changes_the_gradient_and_raises_the_entropy():
    groups = [[replace(rollout, advantage=0.0) for rollout in group] for group in mixed_groups()]
    bonus = optimiser(entropy_coef=1.0, updates_per_batch=2, learning_rate=1e-3)

    before, after = (bonus.update(groups, step=1)["entropy"] for _ in range(2))

    assert after > before


def test_the_kl_to_the_reference_starts_at_zero_and_the_penalty_holds_it_down():
    free, held = (
        optimiser(kl_coef=kl_coef, learning_rate=1e-3, updates_per_batch=3)
        for kl_coef in (1e-9, 10.0)
    )

    started, _ = (o.update(mixed_groups(), step=1)["ref_kl"] for o in (free, held))
    drifted, kept = (o.update(mixed_groups(), step=2)["ref_kl"] for o in (free, held))

    assert abs(started) < 1e-6
    assert 0 <= kept < 0.5 * drifted


def test_only_updates_after_the_first_are_off_policy():
    one, two = optimiser(), optimiser(updates_per_batch=2, learning_rate=1e-2)

    first, second = one.update(mixed_groups(), step=1), two.update(mixed_groups(), step=1)

    assert first["ratio_min"] == first["ratio_max"] == 1
    assert second["ratio_min"] < 1 < second["ratio_max"]


def test_old_log_probabilities_are_those_of_the_first_pass():
    groups = mixed_groups()
    two = optimiser("cispo", updates_per_batch=2, learning_rate=1e-2)
    alone = optimiser("cispo", learning_rate=1e-2)
    (packed,) = alone.packs(alone.samples(groups))
    old = alone.backward(packed).logp
    alone.apply()
    alone.backward(replace(packed, scored=replace(packed.scored, old_logp=old)))
    alone.apply()

    two.update(groups, step=1)

    for mine, theirs in zip(two.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_old_log_probabilities_are_those_of_every_token_however_the_batch_is_cut():
    """Also of tokens without a gradient: masked ones, and those whose advantage is 0."""
    groups = mixed_groups()
    first = groups[0][0]
    length = len(first.completion_ids)
    groups[0][0] = replace(
        first, advantage=[0.0, *[1.0] * (length - 1)], loss_mask=[1] * (length - 1) + [0]
    )
    whole, cut = (optimiser(updates_per_batch=2, learning_rate=1e-3, **budget)
                  for budget in ({}, {"tokens_per_microbatch": 20}))  # fmt: skip
    seen = []
    measure = cut.backward
    cut.backward = lambda packed: seen.append(packed) or measure(packed)

    ours, theirs = (each.update(groups, step=1) for each in (cut, whole))

    half = len(seen) // 2
    assert half > 1
    for before, after in zip(seen[:half], seen[half:], strict=True):
        assert before.scored.old_logp is None
        fresh = optimiser(updates_per_batch=2)
        torch.testing.assert_close(after.scored.old_logp, fresh.backward(before).logp)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


CORRECTIONS = {
    "token_truncate": {"mismatch_cap": 1.2},
    "token_mask": {"mismatch_cap": 1.2, "mismatch_floor": 0.7},
    "sequence_truncate": {"mismatch_cap": 1.2},
    "sequence_mask": {"mismatch_cap": 1.5, "mismatch_floor": 0.5, "mismatch_reduction": "mean"},
}


@pytest.mark.parametrize("mode", CORRECTIONS)
def test_a_correction_is_a_weight_of_each_token(mode):
    """The oracle: the same factors, made beforehand from the trainer's logp, on the advantages."""
    groups, plain = mixed_groups(), optimiser("reinforce")
    made = optimiser("reinforce", mismatch_correction=mode, **CORRECTIONS[mode])
    settings = CORRECTIONS[mode]
    low, high = settings.get("mismatch_floor", 0.0), settings["mismatch_cap"]
    by_hand = []
    for group in groups:
        by_hand.append([])
        for rollout in group:
            (packed,) = plain.packs(plain.samples([[replace(rollout, advantage=1.0)]]))
            gap = plain.backward(packed).logp + 4.0
            if mode.startswith("sequence"):
                total = gap.mean() if "mismatch_reduction" in settings else gap.sum()
                gap = total.expand(len(gap))
            ratio = gap.exp()
            inside = (ratio >= low) & (ratio <= high)
            factor = ratio * inside if mode.endswith("mask") else ratio.clamp(low, high)
            by_hand[-1].append(replace(rollout, advantage=(rollout.advantage * factor).tolist()))
    plain.adamw.zero_grad()

    assert_same(gradient(made, groups), gradient(plain, by_hand))


def test_a_correction_reaches_no_penalty_and_tells_its_share():
    groups = [[replace(rollout, rollout_logp=[-60.0] * len(rollout.rollout_logp))
               for rollout in group] for group in mixed_groups()]  # fmt: skip
    masked = optimiser(mismatch_correction="token_mask", entropy_coef=0.1)
    only_penalty = optimiser(entropy_coef=0.1)
    no_signal = [[replace(rollout, advantage=0.0) for rollout in group] for group in groups]

    assert_same(gradient(masked, groups), gradient(only_penalty, no_signal))
    assert masked.update(groups, step=1)["mismatch_masked"] == 1
    assert "mismatch_masked" not in only_penalty.update(groups, step=1)


def test_a_correction_without_the_samplers_log_probabilities_is_refused():
    groups = [
        [replace(rollout, rollout_logp=None) for rollout in group] for group in mixed_groups()
    ]

    with pytest.raises(ValueError, match="this objective reads rollout_logp: wanted it"):
        optimiser(mismatch_correction="token_truncate").update(groups, step=1)


def test_fp32_logits_on_both_sides_bring_sampler_and_trainer_together(tmp_path):
    """What all logits have in common is lost in the softmax, and so is what bf16 rounds with it."""
    folder = models.tiny(tmp_path / "tiny")
    shifted = models.load(folder)[0]
    with torch.no_grad():
        shifted.get_input_embeddings().weight.add_(0.5)
    shifted.save_pretrained(folder)

    rounded, exact = (measured_mismatch(folder, head) for head in ("bf16", "fp32"))

    assert exact["mismatch_mean"] < 0.1 * rounded["mismatch_mean"]
    assert exact["mismatch_kl"] < 0.1 * rounded["mismatch_kl"]


def measured_mismatch(folder, head):
    given = {"method": "reinforce", "precision": "bf16", "head_precision": head}
    config = configs.load("tiny", given)
    model, tokenizer = models.load(folder)
    engine = EmbeddedEngine(folder, head_dtype=DTYPES[config.head_precision])
    prompts = [[10 + n, 20, 30] for n in range(4)]
    found = engine.generate(prompts, SamplingParams(max_tokens=8, n=4))
    groups = [
        [
            rollout_of(
                completion.token_ids, prompt_ids=ids, rollout_logp=completion.logp, advantage=1.0
            )
            for completion in completions
        ]
        for ids, completions in zip(prompts, found, strict=True)
    ]
    made = Optimiser(config, method("reinforce", {}), model, vocab_size=len(tokenizer))
    return made.update(groups, step=1)


def test_the_head_precision_is_that_of_the_logits_of_policy_and_reference():
    found = {}
    for head in ("bf16", "fp32"):
        made = optimiser(precision="bf16", head_precision=head, kl_coef=0.1, temperature=0.05)
        (packed,) = made.packs(made.samples(mixed_groups()))
        packed = made._with_reference(packed)
        found[head] = torch.stack([made.backward(packed).logp, packed.scored.ref_logp])
    rounding = (found["bf16"] - found["fp32"]).abs()

    assert (rounding.amax(1) > 1e-3).all()
    torch.testing.assert_close(found["bf16"], found["fp32"], rtol=0, atol=0.2)


def test_bf16_logits_of_fp32_products_are_refused():
    with pytest.raises(ValueError, match=r"^head_precision: wanted fp32 or none with precision"):
        optimiser(precision="fp32", head_precision="bf16")


def test_the_mismatch_to_the_sampler_is_measured():
    trained = optimiser("reinforce")
    exact = trained.packs(trained.samples(mixed_groups()))
    logp = torch.cat([trained.backward(packed).logp for packed in exact])

    read = trained.update(mixed_groups(), step=1)

    gap = (logp + 4.0).double()
    assert read["mismatch_mean"] == pytest.approx(float(gap.abs().mean()), rel=1e-4)
    assert read["mismatch_max"] == pytest.approx(float(gap.abs().max()), rel=1e-4)
    assert read["mismatch_kl"] == pytest.approx(float((gap.exp() - 1 - gap).mean()), rel=1e-3)


def test_a_batch_without_any_gradient_changes_no_weight():
    idle = optimiser()
    before = [p.detach().clone() for p in idle.model.parameters()]
    groups = [[replace(rollout, advantage=0.0) for rollout in group] for group in mixed_groups()]

    read = idle.update(groups, step=1)

    assert read == {"learning_rate": idle._config.learning_rate, "microbatches": 0.0}
    assert all(map(torch.equal, before, idle.model.parameters()))


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_touches_a_weight():
    broken = optimiser()
    before = [p.detach().clone() for p in broken.model.parameters()]
    groups = [[replace(r, advantage=float("inf")) for r in group] for group in mixed_groups()]

    with pytest.raises(FloatingPointError, match=r"^gradient norm: wanted a finite number"):
        broken.update(groups, step=1)

    assert all(map(torch.equal, before, broken.model.parameters()))


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
    ],
)
def test_the_learning_rate_warms_up_and_follows_its_schedule(schedule, rates):
    given = {"steps": 6, "warmup_steps": 2, "learning_rate": 1.0, "schedule": schedule}
    config = configs.load("tiny", given)

    assert [learning_rate(config, step) for step in range(1, 7)] == pytest.approx(rates, rel=1e-5)
