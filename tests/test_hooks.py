"""When a method's hooks run, what reaches its objective, and which settings are its own."""

import json
import threading
import time
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import ClassVar

import pytest
import torch
from rollouts import rollout_of

from rlvr_fast import config as configs
from rlvr_fast import models
from rlvr_fast.config import Overlong
from rlvr_fast.methods import METHODS, method
from rlvr_fast.methods.grpo import GRPO
from rlvr_fast.optimise import Optimiser
from rlvr_fast.packed import Sample, pack
from rlvr_fast.run import resumed_config, train
from rlvr_fast.tracing.objective import Objective
from rlvr_fast.tracing.tokens import TokenFields, Tokens

AHEAD = {"pipeline": True, "mismatch_correction": "token_truncate"}


@dataclass(frozen=True, kw_only=True)
class Recording(GRPO):
    """Notes its calls, and remembers what it observes; that changes its advantages."""

    calls: list = field(default_factory=list, init=False, repr=False, compare=False)
    memory: dict = field(default_factory=dict, init=False, repr=False, compare=False)
    seen: list = field(default_factory=list, init=False, repr=False, compare=False)
    updated: threading.Event = field(
        default_factory=threading.Event, init=False, repr=False, compare=False
    )

    def advantages(self, groups):
        if threading.current_thread() is not threading.main_thread():
            # The optimiser is done with the batch before, and would go on.
            assert self.updated.wait(60)
            time.sleep(0.05)
        scale = 1 + self.memory.get("grad_norm", 0.0)
        self.memory["batches"] = self.memory.get("batches", 0) + 1
        self.calls.append("advantages")
        groups = super().advantages(groups)
        return [
            [replace(rollout, advantage=rollout.advantage * scale) for rollout in group]
            for group in groups
        ]

    def shape(self, groups, scorer):
        self.updated.clear()
        self.calls.append(f"shape {scorer.step} of {scorer.steps}")
        return groups

    def prepare(self, packs, scorer, update):
        logp = torch.cat([scorer.statistics(packed).logp for packed in packs])
        self.seen.append((packs, logp))
        self.calls.append(f"prepare {update} of {scorer.updates}")
        if update == scorer.updates - 1:
            self.updated.set()
        return [replace(packed, scored=with_mark(packed.scored, update)) for packed in packs]

    def observe(self, metrics):
        self.memory["grad_norm"] = metrics["grad_norm"]
        self.calls.append("observe")

    def state_dict(self):
        return dict(self.memory)

    def load_state_dict(self, state):
        self.memory.update(state)


def with_mark(scored, update):
    return replace(scored, extras={**scored.extras, f"mark {update}": scored.weight})


@pytest.fixture
def recordings(monkeypatch):
    """All that are made, in the order of their making."""
    made = []

    @dataclass(frozen=True, kw_only=True)
    class Listed(Recording):
        def __post_init__(self):
            super().__post_init__()
            made.append(self)

    monkeypatch.setitem(METHODS, "recording", Listed)
    return made


def given(folder, **overrides):
    return configs.load(
        "tiny",
        {
            "run_folder": str(folder), "method": "recording", "steps": 4, "checkpoint_every": 2,
            "keep_checkpoints": 3, "updates_per_batch": 2, "trackers": "none",
            "prompts_per_step": 6, "samples_per_prompt": 4, "eval_prompts": 2, **overrides,
        },
    )  # fmt: skip


def test_hooks_run_in_their_order_in_every_step(tmp_path, recordings):
    train(given(tmp_path / "run"))

    (made,) = recordings
    steps = [
        ["advantages", f"shape {step} of 4", "prepare 0 of 2", "prepare 1 of 2", "observe"]
        for step in (1, 2, 3, 4)
    ]
    assert made.calls == [*chain(*steps)]


def test_ahead_a_step_is_observed_after_the_next_batch_is_made(tmp_path, recordings):
    train(given(tmp_path / "run", **AHEAD))

    (made,) = recordings
    updates = ["prepare 0 of 2", "prepare 1 of 2"]
    steps = [
        [f"shape {step} of 4", *updates, *["advantages"] * (step < 4), "observe"]
        for step in (1, 2, 3, 4)
    ]
    assert made.calls == ["advantages", *chain(*steps)]


def test_prepare_has_the_weights_and_packs_of_its_update(tmp_path, recordings):
    train(given(tmp_path / "run", steps=1))

    (first, before), (second, after) = recordings[0].seen
    assert all(packed.scored.old_logp is None for packed in first)
    old = torch.cat([packed.scored.old_logp for packed in second])
    torch.testing.assert_close(before, old, rtol=0, atol=1e-5)
    assert (after - old).abs().max() > 1e-4
    assert all("mark 0" in packed.scored.extras for packed in second)


@pytest.mark.parametrize("ahead", [{}, AHEAD], ids=["in turn", "ahead"])
def test_what_a_method_observes_and_remembers_survives_a_restart(tmp_path, recordings, ahead):
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(given(whole, **ahead))
    train(given(part, **ahead))
    (part / "checkpoints/step-000004").rename(tmp_path / "gone")

    train(resumed_config(part, None, {})[0], resume=True)

    assert recordings[-1].calls.count("observe") == 2
    for name in ("model/model.safetensors", "checkpoints/step-000004/optimizer.safetensors"):
        assert (part / name).read_bytes() == (whole / name).read_bytes()
    states = [
        json.loads((run / "checkpoints/step-000004/state.json").read_text())["method_state"]
        for run in (whole, part)
    ]
    assert states[0] == states[1]
    assert states[0]["batches"] == 4


@dataclass(frozen=True, kw_only=True)
class Gated(Objective):
    def token_loss(self, t):
        return -t.extras["gate"] * t.advantage * t.logp


@dataclass(frozen=True, kw_only=True)
class Gating(GRPO):
    def objective(self):
        return Gated()


def rollouts(**changes):
    """Five in two groups; the middle one of the first has no advantage."""
    draw, groups = torch.Generator().manual_seed(0), []
    for index, advantages in enumerate([[1.0, 0.0, -1.0], [0.5, -0.5]]):
        groups.append([])
        for advantage in advantages:
            length = int(torch.randint(2, 6, (), generator=draw))
            groups[-1].append(
                rollout_of(
                    torch.randint(4, 90, (length,), generator=draw).tolist(),
                    prompt_ids=[5 + index, 9, 33],
                    index=index,
                    advantage=advantage,
                    **{name: made(length) for name, made in changes.items()},
                )
            )
    return groups


def optimiser(chosen, **overrides):
    model, tokenizer = models.load(models.resolve("tiny"))
    config = configs.load("tiny", {"entropy_coef": 0, **overrides})
    return Optimiser(config, chosen, model, vocab_size=len(tokenizer))


@pytest.mark.parametrize("budget", [1, 9, 8192])
def test_extras_stay_beside_their_tokens_through_dropping_and_cutting(budget):
    groups = rollouts()
    for group in groups:
        group[:] = [
            replace(r, extras={"gate": [float(x) for x in r.completion_ids], "one": r.advantage})
            for r in group
        ]
    made = optimiser(Gating(), tokens_per_microbatch=budget)

    packs = made.packs(made.samples(groups))

    assert sum(packed.scored.num_sequences for packed in packs) == 4
    for packed in packs:
        scored = packed.scored
        assert scored.extras["gate"].tolist() == scored.targets.tolist()
        assert torch.equal(scored.extras["one"], scored.advantage)
    assert sum(float(made.backward(packed).loss) for packed in packs) != 0


@pytest.mark.parametrize("budget", [1, 8192])
def test_teachers_prompts_stay_with_their_completions(budget):
    groups = [
        [replace(r, teacher_prompt_ids=[7] * len(r.completion_ids)) for r in group]
        for group in rollouts()
    ]
    made = optimiser(GRPO(), tokens_per_microbatch=budget)

    packs = made.packs(made.samples(groups))

    assert sum(packed.scored.num_sequences for packed in packs) == 4
    for packed in packs:
        assert torch.equal(packed.teacher.scored.targets, packed.scored.targets)
        assert torch.equal(packed.teacher.scored.weight, packed.scored.weight)
        first = packed.teacher.hidden_index[packed.scored.seq_offsets[:-1]]
        # The last token of a prompt of as many sevens as its completion has tokens.
        assert torch.equal(
            packed.teacher.position_ids[first] + 1, packed.scored.seq_lengths
        )  # fmt: skip


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({}, r"^extras\['gate'\]: wanted it on every sample or on none, got 1 without it$"),
        ({"gate": [1.0]}, r"^extras\['gate'\]: wanted one value per completion token, 2, got 1$"),
        (
            {"gate": torch.ones(2)},
            r"^extras\['gate'\]: wanted a number or one per completion token, got Tensor$",
        ),
    ],
)
def test_extras_that_do_not_fit_name_themselves(second, message):
    samples = [
        Sample(prompt_ids=[5], completion_ids=[6, 7], extras=extras)
        for extras in ({"gate": 0.5}, second)
    ]

    with pytest.raises(ValueError, match=message):
        pack([samples])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, r"^teacher_prompt_ids: wanted them on every sample or on none, got 1 without$"),
        ([], r"^teacher_prompt_ids: wanted at least one token, got none$"),
    ],
)
def test_teachers_prompts_that_do_not_fit_name_themselves(prompt, message):
    samples = [
        Sample(prompt_ids=[5], completion_ids=[6, 7], teacher_prompt_ids=ids)
        for ids in ([5, 4], prompt)
    ]

    with pytest.raises(ValueError, match=message):
        pack([samples])


@dataclass(frozen=True, kw_only=True)
class Settled(GRPO):
    settings: ClassVar = {"entropy_coef": 0.5, "refill_rounds": 3, "overlong": "mask"}


def test_a_methods_settings_fill_in_what_nobody_named(monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS, "settled", Settled)
    file = tmp_path / "run.toml"
    file.write_text('model = "tiny"\ntask = "addition"\nmethod = "settled"\nentropy_coef = 0.0\n')

    plain = configs.load(str(file))
    named = configs.load(str(file), {"refill_rounds": "0", "overlong": "keep"})
    other = configs.load(str(file), {"method": "grpo"})

    assert (plain.entropy_coef, plain.refill_rounds, plain.overlong) == (0, 3, Overlong.MASK)
    assert (named.entropy_coef, named.refill_rounds, named.overlong) == (0, 0, Overlong.KEEP)
    assert (other.refill_rounds, other.overlong) == (0, Overlong.KEEP)
    for config in (plain, named, other):
        assert configs.from_values(configs.to_values(config)) == config


@pytest.mark.parametrize("name", METHODS)
def test_every_methods_settings_are_fields_of_a_config(name):
    required = {"model": "tiny", "task": "addition", "run_folder": "x", "method": name}

    config = configs.from_values(required | {"overlong_buffer": 1})

    assert method(config.method, {}).settings.keys() <= configs.to_values(config).keys()


def divergence(p, q):
    return (p * (p.log() - q.log())).sum()


@pytest.mark.parametrize(
    ("estimate", "truth"),
    [
        ("k1", lambda p, q: 0 * p.sum()),
        ("k2", divergence),
        ("k3", lambda p, q: divergence(q, p)),
    ],
)
def test_the_gradient_of_a_kl_estimate_is_what_enumeration_says(estimate, truth):
    """Of three tokens, on policy: none, that of the reverse KL, and that of the forward KL."""
    overrides = {"kl_coef": 0.3, "kl_estimate": estimate}
    objective = optimiser(GRPO(), **overrides).objective
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.2, 0.1, 0.4], dtype=torch.float64).softmax(0)
    logp = logits.log_softmax(0)
    nothing = torch.zeros(3, dtype=torch.float64)
    fields = TokenFields(
        weight=nothing + 1, old_logp=logp.detach(), ref_logp=reference.log(), advantage=nothing,
        extras={},
    )  # fmt: skip

    loss = (logp.exp().detach() * objective.token_loss(Tokens(logp, nothing, fields))).sum()

    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(0.3 * truth(logp.exp(), reference), logits)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
