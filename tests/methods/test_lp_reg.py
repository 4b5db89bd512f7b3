"""Lp-Reg: rare tokens of wrong answers are pulled back to the filtered policy."""

import math
from dataclasses import dataclass

import pytest
import torch
from known import BACKENDS, TOKEN_MEAN, f1
from rollouts import rollout_of

from rlvr_fast.methods import method
from rlvr_fast.methods.scores import Scores
from rlvr_fast.objectives import ClippedSurrogate
from rlvr_fast.ops.token_statistics import token_statistics
from rlvr_fast.tracing.level import Level, level
from rlvr_fast.tracing.trace import trace
from rlvr_fast.tracing.vanishing import vanishes

ROW = [0.5, 0.3, 0.15, 0.049, 0.001]
"""The published example's probabilities."""


@dataclass
class Rows:
    """A scorer whose policy has the same row of probabilities before every token."""

    row: list[float]

    def rollouts(self, groups, *, min_p=0.0):
        def scores(ids):
            logits = torch.tensor(self.row).log().expand(len(ids), -1).contiguous()
            found = token_statistics(logits, torch.tensor(ids), min_p=min_p)
            return Scores(*(getattr(found, name) for name in Scores._fields))

        return [[scores(each.completion_ids) for each in group] for group in groups]


def shaped(groups, **options):
    """Of all tokens end to end: which are rare, and the proxy's log-probabilities."""
    found = method("lp_reg", options).shape(groups, Rows(ROW))
    flat = [each for group in found for each in group]
    return tuple([x for each in flat for x in each.extras[name]] for name in ("rare", "proxy_logp"))


ALL_RARE = {"rare": [1.0] * 5}
WRONG = [-1.0] * 5


def pulled(backend, logp, proxy, **options):
    """Five equal tokens with a negative advantage, on policy."""
    return f1(
        method("lp_reg", options).objective(),
        backend,
        TOKEN_MEAN,
        extras={**ALL_RARE, "proxy_logp": [proxy] * 5},
        advantage=WRONG,
        logp=[logp] * 5,
        old=[logp] * 5,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_published_example(backend):
    """Source: papers-b, entry 20: threshold .01, Z .999, d .89709, k3 .55536, gradient -1.45245."""
    _, (*_, proxy, dropped) = shaped([[rollout_of([0, 1, 2, 3, 4], advantage=-1.0)]])

    found = pulled(backend, math.log(0.02), proxy)

    assert proxy == pytest.approx(-3.01493, abs=5e-6)
    assert dropped == pytest.approx(math.log(0.001 / 0.999), abs=5e-6)
    assert found.loss == pytest.approx(1 + 0.55536, abs=2e-5)
    assert (5 * found.dlogp).tolist() == pytest.approx([1 - 1.45245] * 5, abs=2e-5)


def test_on_policy_the_pull_is_that_of_what_the_proxy_leaves_out():
    """d is -log Z = .0010005 where nothing has moved."""
    _, proxy = shaped([[rollout_of([0, 1, 2, 3], advantage=-1.0)]])

    gaps = [p - math.log(q) for p, q in zip(proxy, ROW, strict=False)]

    assert gaps == pytest.approx([0.0010005] * 4, abs=1e-6)


def test_the_rarest_tokens_of_wrong_answers_are_chosen_and_never_a_dropped_one():
    """Of 8 negative tokens half are rare: both of id 3, which the proxy keeps, and two of id 4."""
    right, wrong = (
        rollout_of([3, 3, 4, 2], advantage=1.0),
        rollout_of([0, 3, 4, 2, 0, 4, 3, 1], advantage=-1.0),
    )

    rare, _ = shaped([[right, wrong]], rho=0.5)

    assert rare == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0]


def test_a_single_candidate_is_left_alone():
    """As in the authors' code: 0.2 of 8 tokens is one, of 10 tokens two."""
    few, more = ([[rollout_of([0] * n + [3, 3], advantage=-1.0)]] for n in (6, 8))

    assert [sum(shaped(groups, rho=0.2)[0]) for groups in (few, more)] == [0, 2]


def test_over_the_whole_batch_the_quantile_counts_right_answers_too():
    right, wrong = rollout_of([3, 3, 3, 3], advantage=1.0), rollout_of([2, 0, 3, 0], advantage=-1.0)

    batch, _ = shaped([[right, wrong]], rho=0.7, scope="batch")
    negative, _ = shaped([[right, wrong]], rho=0.7, scope="negative")

    assert batch == [0, 0, 0, 0, 0, 0, 1, 0]
    assert negative == [0, 0, 0, 0, 1, 0, 1, 0]


def test_tokens_that_the_policy_did_not_write_are_not_chosen():
    wrong = rollout_of([3, 3, 3, 0, 0], advantage=-1.0, loss_mask=[0, 1, 1, 1, 1])

    for scope in ("batch", "negative"):
        rare, _ = shaped([[wrong]], rho=0.55, scope=scope)
        assert rare == [0, 1, 1, 0, 0]


def test_min_p_of_0_keeps_the_policy_as_it_is():
    _, proxy = shaped([[rollout_of([0, 1, 2, 3, 4], advantage=-1.0)]], min_p=0.0)

    assert proxy == pytest.approx([math.log(p) for p in ROW], abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_pull_and_with_a_far_bound_it_is_the_plain_surrogate(backend):
    objective = method("lp_reg", {"coef": 0.0, "max_ratio": 1e6}).objective()
    extras = {**ALL_RARE, "proxy_logp": [0.0] * 5}

    found = f1(objective, backend, TOKEN_MEAN, extras=extras)

    wanted = f1(ClippedSurrogate(clip_low=1e9, clip_high=1e9), backend, TOKEN_MEAN)
    assert found.loss == pytest.approx(wanted.loss, rel=1e-6)
    torch.testing.assert_close(found.dlogits, wanted.dlogits, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_ratio_counts_up_to_its_bound_but_for_rare_tokens(backend):
    """exp(0.5) = 1.65 is above 1.5, for tokens 3 and 5; the fifth is rare and below its proxy."""
    objective = method("lp_reg", {"coef": 0.0, "max_ratio": 1.5}).objective()
    extras = {"rare": [0.0] * 4 + [1.0], "proxy_logp": [-0.1] * 5}

    found = f1(objective, backend, TOKEN_MEAN, extras=extras)

    wanted = [-0.244281, -0.134064, 0, 0.180967, 0.329744]
    assert found.dlogp.tolist() == pytest.approx(wanted, abs=3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["positive advantages", "a policy above its proxy", "not rare"])
def test_nobody_else_is_pulled(backend, what):
    extras = {**ALL_RARE, "proxy_logp": [-0.1] * 5}
    advantage = WRONG
    if what == "positive advantages":
        advantage = [1.0] * 5
    elif what == "not rare":
        extras["rare"] = [0.0] * 5
    else:
        extras["proxy_logp"] = [-5.0] * 5

    strong, none = (
        f1(method("lp_reg", {"coef": coef}).objective(), backend, TOKEN_MEAN, extras=extras,
           advantage=advantage)
        for coef in (100.0, 0.0)
    )  # fmt: skip

    assert strong.loss == none.loss
    assert torch.equal(strong.dlogits, none.dlogits)


def test_the_pull_is_bounded_far_below_the_proxy():
    found = pulled("reference", -60.0, -1.0)

    assert found.loss == pytest.approx(1 + math.exp(10) - 11)
    assert (5 * found.dlogp).tolist() == pytest.approx([1.0] * 5)


def test_it_runs_in_the_single_pass_and_skips_what_has_no_advantage():
    objective = method("lp_reg", {}).objective()

    assert level(objective) is Level.TOKEN
    assert trace(objective) is not None
    assert vanishes(objective)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 1.5}, r"^rho: wanted a number in \[0, 1\], got 1.5$"),
        ({"min_p": -0.1}, r"^min_p: wanted a number in \[0, 1\], got -0.1$"),
        ({"coef": -1.0}, r"^coef: wanted >= 0, got -1.0$"),
        ({"scope": "token"}, r"^scope: wanted .*negative.*batch.*got"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        method("lp_reg", options)
