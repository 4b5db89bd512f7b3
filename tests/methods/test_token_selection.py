"""Methods that choose tokens by comparing all of a batch: 80/20, Clip-Cov and KL-Cov."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from known import (
    ADVANTAGE,
    BACKENDS,
    ENTROPY,
    LENGTHS,
    LOGP,
    SEQUENCE_MEAN,
    TOKEN_MEAN,
    assert_known,
    f1,
    fields_of,
    on_rows,
)
from rollouts import rollout_of

from rlvr_fast import config as configs
from rlvr_fast import models
from rlvr_fast.methods import method
from rlvr_fast.methods.batch_tokens import covariances, token_advantages
from rlvr_fast.methods.high_entropy import HighEntropy
from rlvr_fast.methods.scores import Scores
from rlvr_fast.objectives import ClippedSurrogate, Objective
from rlvr_fast.optimise import Optimiser
from rlvr_fast.tracing.level import Level, level
from rlvr_fast.tracing.trace import trace

NAMES = ["high_entropy", "clip_cov", "kl_cov"]


F1 = [[rollout_of([4, 5, 6], advantage=1.0), rollout_of([4, 5], advantage=-1.0)]]


@dataclass
class Given:
    """A scorer that says what it was told; `logp` and `entropy` are of all tokens, end to end."""

    logp: list[float]
    entropy: list[float]
    step: int = 1
    steps: int = 1
    updates: int = 2

    def rollouts(self, groups, **settings):
        flat = [each for group in groups for each in group]
        lengths = [len(each.completion_ids) for each in flat]
        logp, entropy = (torch.tensor(x).split(lengths) for x in (self.logp, self.entropy))
        nothing = torch.zeros(0)
        found = iter([Scores(p, h, *[nothing] * 5) for p, h in zip(logp, entropy, strict=True)])
        return [[next(found) for _ in group] for group in groups]


def shaped(chosen, groups=F1, *, logp=LOGP, entropy=ENTROPY, **given):
    return chosen.shape(groups, Given(logp, entropy, **given))


def advantages(groups):
    return token_advantages(groups).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_80_20_has_the_published_values(backend):
    """Source: `known_values.py`, F1: one token of five is kept, and the surrogate clips it."""
    chosen = method("high_entropy", {})

    kept = advantages(shaped(chosen))

    assert kept == [0, 0, 1, 0, 0]
    found = f1(chosen.objective(), backend, TOKEN_MEAN, advantage=kept)
    assert_known(found, -0.256, [0.0] * 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kl_cov_has_the_published_values(backend):
    """Source: `known_values.py`, F1: the first token has the highest covariance."""
    chosen = method("kl_cov", {})

    groups = shaped(chosen)

    held = [x for each in groups[0] for x in each.extras["held"]]
    assert held == [1, 0, 0, 0, 0]
    found = f1(chosen.objective(), backend, TOKEN_MEAN, extras={"held": held})
    assert_known(found, -0.157377, [-0.044281, -0.134064, -0.329744, 0.180967, 0.329744])


def test_covariances_have_the_published_values():
    found = covariances(F1, torch.tensor(LOGP, dtype=torch.float64))

    wanted = torch.tensor([0.048, -0.032, -0.512, -0.552, -0.192], dtype=torch.float64)
    torch.testing.assert_close(found, wanted)


def test_clip_cov_leaves_out_one_candidate_and_no_other():
    """The bounds keep tokens 1 and 2 of the fixture."""
    chosen = method("clip_cov", {"cov_low": -0.1, "cov_high": 0.1})

    drawn = {tuple(advantages(shaped(chosen, step=step))) for step in range(1, 9)}

    assert drawn == {(0, 1, 1, -1, -1), (1, 0, 1, -1, -1)}
    assert shaped(chosen, step=3) == shaped(chosen, step=3)


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [(-0.1, 0.1, [0, 0, 1, -1, -1]), (-0.1, 0.0, [1, 0, 1, -1, -1]), (0.0, 0.1, [0, 1, 1, -1, -1])],
)
def test_clip_cov_with_a_share_of_1_leaves_out_all_between_the_bounds(low, high, wanted):
    chosen = method("clip_cov", {"cov_low": low, "cov_high": high, "share": 1.0})

    assert advantages(shaped(chosen)) == wanted


def test_clip_cov_without_a_candidate_leaves_out_nothing():
    assert advantages(shaped(method("clip_cov", {}))) == ADVANTAGE


@pytest.mark.parametrize("backend", BACKENDS)
def test_clip_cov_is_the_clipped_surrogate_but_for_what_is_left_out(backend):
    chosen = method("clip_cov", {"cov_low": 0.0, "cov_high": 1.0, "clip_low": 0.2,
                                 "clip_high": 0.2})  # fmt: skip

    found = f1(chosen.objective(), backend, TOKEN_MEAN, advantage=advantages(shaped(chosen)))

    # As published for PPO, less the first token's min(r, 1.2) / 5, which has no gradient.
    assert_known(found, -0.103352 + 0.24, [0, -0.134064, 0, 0.180967, 0.329744])


@pytest.mark.parametrize(
    ("name", "off"), [("high_entropy", {"share": 1.0}), ("clip_cov", {"share": 0.0})]
)
def test_what_chooses_nothing_asks_for_no_scores(name, off):
    assert method(name, off).shape(F1, scorer=None) == F1


@pytest.mark.parametrize(("options", "updates"), [({"share": 0.0}, 2), ({}, 1)])
def test_kl_cov_asks_for_no_scores_where_it_could_not_act(options, updates):
    (group,) = shaped(method("kl_cov", options), logp=None, updates=updates)

    assert [each.extras["held"] for each in group] == [[0, 0, 0], [0, 0]]


def test_80_20_with_every_token_is_dapos_surrogate():
    assert method("high_entropy", {"share": 1.0}).objective() == ClippedSurrogate(clip_high=0.28)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kl_cov_with_nothing_held_is_the_surrogate_without_a_clip(backend):
    objective = method("kl_cov", {}).objective()
    plain = ClippedSurrogate(clip_low=1e9, clip_high=1e9)

    found = f1(objective, backend, SEQUENCE_MEAN, extras={"held": [0.0] * 5})

    wanted = f1(plain, backend, SEQUENCE_MEAN)
    assert found.loss == pytest.approx(wanted.loss, rel=1e-6)
    torch.testing.assert_close(found.dlogits, wanted.dlogits, rtol=1e-6, atol=1e-7)


def test_kl_cov_acts_only_once_the_policy_has_moved():
    fields = replace(
        fields_of(TOKEN_MEAN, torch.float64, extras={"held": [1.0] * 5}), old_logp=None
    )
    stats = torch.stack([torch.tensor(LOGP).double(), *torch.zeros(3, 5).double()])

    still = on_rows(method("kl_cov", {}).objective(), stats, fields)

    assert still.dlogp.tolist() == pytest.approx([-0.2] * 3 + [0.2] * 2)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_that_the_policy_did_not_write_are_not_compared(name):
    """They would be the first choice of all three, and would move the means and the quantile."""
    chosen = method(name, {} if name != "clip_cov" else {"cov_low": 0.0})
    written = rollout_of([4, 5, 6, 9], advantage=1.0, loss_mask=[1, 1, 1, 0])

    plain = shaped(chosen)
    found = shaped(
        chosen,
        [[written, F1[0][1]]],
        logp=[*LOGP[:3], 50.0, *LOGP[3:]],
        entropy=[*ENTROPY[:3], 50.0, *ENTROPY[3:]],
    )

    if name == "kl_cov":
        assert found[0][0].extras["held"] == [*plain[0][0].extras["held"], 0]
        assert found[0][1].extras == plain[0][1].extras
    else:
        assert found[0][0].advantage[:3] == plain[0][0].advantage
        assert found[0][1].advantage == plain[0][1].advantage


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_a_scored_token_chooses_nothing(name):
    groups = [[replace(each, loss_mask=[0] * len(each.completion_ids)) for each in F1[0]]]

    (found,) = method(name, {}).shape(groups, Given([], []))

    assert [each.loss_mask for each in found] == [[0, 0, 0], [0, 0]]


@pytest.mark.parametrize("name", NAMES)
def test_the_objective_runs_in_the_single_pass(name):
    objective = method(name, {}).objective()

    assert level(objective) is Level.TOKEN
    assert trace(objective) is not None


@dataclass(frozen=True, kw_only=True)
class AllAtOnce(Objective):
    """80/20 as the paper has it: the quantile is in the objective, of all tokens that it sees."""

    def token_loss(self, t):
        threshold = torch.quantile(t.entropy.detach()[t.kept], 0.8)
        loss = ClippedSurrogate(clip_high=0.28).token_loss(t)
        return torch.where(t.entropy >= threshold, loss, torch.zeros_like(loss))


@dataclass(frozen=True, kw_only=True)
class WholeBatch(HighEntropy):
    def shape(self, groups, scorer):
        return groups

    def objective(self):
        return AllAtOnce()


def test_80_20_is_what_one_pass_over_the_whole_batch_would_choose():
    torch.manual_seed(0)
    groups = [
        [
            rollout_of(
                torch.randint(4, 99, (n,)).tolist(), prompt_ids=[5, 6, 7], advantage=float(a)
            )
            for a, n in group
        ]
        for group in ([(1, 5), (-1, 3), (0, 4)], [(2, 6), (-2, 1)])
    ]
    plain, cut = WholeBatch(), HighEntropy()

    wanted, _ = updated(plain, groups)
    found, passes = updated(cut, groups, tokens_per_microbatch=12)

    assert passes > 1
    assert wanted.norm() > 0
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


def updated(chosen, groups, **settings):
    """The gradient of an update that does not happen, and in how many passes it was found."""
    config = configs.load("tiny", {"entropy_coef": 0.0, **settings})
    model, tokenizer = models.load(models.resolve("tiny"))
    made = Optimiser(config, chosen, model, vocab_size=len(tokenizer))
    made.apply = lambda: 0.0
    read = made.update(groups, step=1)
    return torch.cat([p.grad.flatten() for p in model.parameters()]), read["microbatches"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("high_entropy", {"share": 0.0}, r"^share: wanted a number in \(0, 1\], got 0.0$"),
        ("clip_cov", {"share": 1.5}, r"^share: wanted a number in \[0, 1\], got 1.5$"),
        ("clip_cov", {"cov_low": 5.0}, r"^cov_high: wanted more than cov_low, 5.0, got 5.0$"),
        ("kl_cov", {"share": float("nan")}, r"^share: wanted a number in \[0, 1\], got nan$"),
        ("kl_cov", {"coef": -1.0}, r"^coef: wanted >= 0, got -1.0$"),
    ],
)
def test_options_that_cannot_be_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        method(name, options)


def test_the_lengths_of_the_fixture_are_those_of_the_groups():
    assert [len(each.completion_ids) for each in F1[0]] == LENGTHS.tolist()
    assert np.quantile(ENTROPY, 0.8) == pytest.approx(1.0)
