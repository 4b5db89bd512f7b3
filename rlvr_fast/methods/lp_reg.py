"""Keeps unlikely but sensible tokens alive in wrong answers (Lp-Reg, 2510.03222)."""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rlvr_fast.methods.base import Evidence, Method, Paper
from rlvr_fast.methods.batch_tokens import (
    end_to_end,
    scored,
    token_advantages,
    with_token_extras,
)
from rlvr_fast.methods.rollouts import Groups
from rlvr_fast.methods.scores import Scorer
from rlvr_fast.objectives import Objective, Tokens, importance_ratio

RARE, PROXY = "rare", "proxy_logp"
MAX_GAP = 10.0
"""Of the log-ratio in k3, nats, as in the authors' code."""


class Scope(StrEnum):
    """Among which tokens the least likely ones are found."""

    NEGATIVE = "negative"
    BATCH = "batch"


@dataclass(frozen=True, kw_only=True)
class ProxyRegularisedSurrogate(Objective):
    """`-min(r, max_ratio) A`; a rare token below its proxy `-r A + coef (exp(d) - d - 1)`.

    `d = proxy_logp - logp`, clamped to +-10. A token is rare where the extra `rare` is 1 and its
    advantage negative; it is below its proxy where d > 0.
    """

    coef: float = 1.0
    max_ratio: float = 10.0

    def token_loss(self, t: Tokens) -> Tensor:
        ratio = importance_ratio(t.logp, t.old_logp)
        gap = (t.extras[PROXY] - t.logp).clamp(-MAX_GAP, MAX_GAP)
        # Products, not a choice between two losses: their gradient is seen to vanish with A.
        chosen = t.extras[RARE] * torch.relu(torch.sign(gap)) * torch.relu(torch.sign(-t.advantage))
        counted = ratio.clamp(max=self.max_ratio)
        counted = torch.where(chosen > 0, ratio, counted)
        return self.coef * chosen * (torch.exp(gap) - gap - 1) - counted * t.advantage


@dataclass(frozen=True, kw_only=True)
class LpReg(Method):
    """Surrogate with an upper bound only; KL to a filtered policy on the rarest negative tokens.

    The proxy is the policy before the first update, at the sampling temperature, without tokens
    below `min_p` times the likeliest, renormalised. Of the tokens in `scope` the least likely `rho`
    are rare; those with a negative advantage that the proxy keeps are pulled towards it while they
    are below it. Mean over all tokens; advantages are GRPO's.

    `scope` negative is the authors' code, over the whole batch instead of each micro-batch: of the
    tokens with a negative advantage the `rho` least likely, none if that is a single one. `batch`
    is the paper: tokens less likely than the `rho` quantile of all.

    The KL is the code's k3 of the sampled token. The paper's, over the whole vocabulary, is not
    offered: after the first update it would take a second set of logits for the old policy.

    Takes one scoring forward of the batch in each step, on each rank.
    """

    paper: ClassVar[Paper] = Paper(
        source="2510.03222, equation 6",
        formula="-min(r, 10) A + 1[rare, A < 0, kept] k3(log proxy - logp)",
        evidence=Evidence.CODE,
        reconstructed=("which tokens are rare is decided before the first update of a batch",),
    )

    coef: float = 1.0
    """Of the KL; beta of the paper."""
    rho: float = 0.01
    """The share that is rare, in [0, 1]; 0.01 for the paper's 14B model, 0.005 for its 32B."""
    min_p: float = 0.02
    """The proxy keeps tokens of at least so many times the greatest probability, in [0, 1]."""
    max_ratio: float = 10.0
    """The ratio counts up to this; there is no lower bound."""
    scope: Scope = Scope.NEGATIVE
    """The least likely of the tokens with a negative advantage, or of the whole batch."""

    def __post_init__(self) -> None:
        self.check_not_negative("coef", "max_ratio")
        for name in ("rho", "min_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: wanted a number in [0, 1], got {getattr(self, name)}")

    def shape(self, groups: Groups, scorer: Scorer) -> Groups:
        scores = scorer.rollouts(groups, min_p=self.min_p)
        logp = end_to_end(scores, lambda each: each.logp)
        top = end_to_end(scores, lambda each: each.max_prob)
        mass = end_to_end(scores, lambda each: each.kept_mass)
        bound = top.log() + (math.log(self.min_p) if self.min_p else -math.inf)
        rare = self._rare(logp, scored(groups), token_advantages(groups) < 0) & (logp >= bound)
        groups = with_token_extras(groups, RARE, rare.float())
        return with_token_extras(groups, PROXY, logp - mass.log())

    def objective(self) -> Objective:
        return ProxyRegularisedSurrogate(coef=self.coef, max_ratio=self.max_ratio)

    def _rare(self, logp: Tensor, counted: Tensor, negative: Tensor) -> Tensor:
        rare = torch.zeros_like(counted)
        if self.scope is Scope.BATCH:
            if counted.any():
                rare = logp.exp() < float(np.quantile(logp[counted].exp().numpy(), self.rho))
            return rare & counted & negative
        candidates = (counted & negative).nonzero().squeeze(1)
        wanted = int(self.rho * len(candidates))
        if wanted > 1:
            rare[candidates[logp[candidates].argsort(stable=True)[:wanted]]] = True
        return rare
