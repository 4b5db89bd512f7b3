"""One rollout per prompt, a remembered baseline, entropy in the advantage (MSSR, 2512.18215).

Differs from GRPO in where the baseline comes from: not from other completions of the prompt in the
same step but from a Beta distribution of its success rate, which forgets. Advantages are whitened
over the batch, and every token's is raised by how unsure the policy was there.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlvr_fast.advantages import whitened
from rlvr_fast.methods.base import Evidence, Method, Paper, net_rewards, with_advantages
from rlvr_fast.methods.rollouts import Groups
from rlvr_fast.objectives import Objective, Tokens, clipped, importance_ratio


@dataclass(frozen=True, kw_only=True)
class EntropyShapedSurrogate(Objective):
    """The clipped surrogate of `A + min(|A| / divisor, coef sg[H])`; `H` in nats, `coef` >= 0.

    With a divisor above 1 no advantage changes its sign, and one of 0 stays 0.
    """

    coef: float = 0.4
    divisor: float = 2.0
    clip_low: float = 0.2
    clip_high: float = 0.2

    def token_loss(self, t: Tokens) -> Tensor:
        raised = torch.minimum(t.advantage.abs() / self.divisor, self.coef * t.entropy.detach())
        ratio = importance_ratio(t.logp, t.old_logp)
        return clipped(ratio, t.advantage + raised, 1 - self.clip_low, 1 + self.clip_high)


@dataclass(frozen=True, kw_only=True)
class MSSR(Method):
    """`R - a / (a + b)`, whitened over the batch; then `a <- eta a + R`, `b <- eta b + 1 - R`.

    `a` and `b` belong to a prompt, start as 1 and are part of every checkpoint; rewards are in
    [0, 1]. `eta` falls from `memory_high` towards `memory_low` as the mean KL of the last `window`
    steps nears `kl_target`, so that a policy that moves forgets faster. That KL is the one to the
    reference if the run keeps one (`kl_coef`), else the one between the updates of a batch, which
    is 0 with one update. Mean over all tokens.

    The summary that we know prints the two constants of the entropy term the other way round, 2 on
    the entropy and 0.4 below |A|, which can turn a negative advantage positive; their source, whose
    coefficient is 0.4 and divisor 2, cannot. It also prints a lower branch of eta that is least at
    KL 0, against its own words; `as_printed` is that.
    """

    paper: ClassVar[Paper] = Paper(
        source="2512.18215",
        formula="A = whiten(R - a / (a + b)); A + min(|A| / 2, 0.4 sg[H]), clipped surrogate",
        evidence=Evidence.DIGEST,
        reconstructed=(
            "the bounds of eta, which a related method uses",
            "entropy_coef and divisor exchanged",
            "eta falls with the KL throughout",
            "which KL is meant",
        ),
    )
    settings: ClassVar[Mapping[str, object]] = {"samples_per_prompt": 1}

    memory_low: float = 0.875
    """The least eta, in [0, 1]."""
    memory_high: float = 0.96
    """The greatest eta, in [0, 1]."""
    kl_target: float = 0.01
    """At this mean KL and above eta is least; nats per token, > 0."""
    window: int = 20
    """Steps whose KL is averaged."""
    as_printed: bool = False
    """Below kl_target eta rises with the KL instead, from memory_low to memory_high."""
    entropy_coef: float = 0.4
    """Of the entropy in the advantage; 0: none."""
    divisor: float = 2.0
    """At most |A| / divisor is added, > 0."""
    clip_low: float = 0.2
    """The ratio counts down to 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio counts up to 1 + clip_high."""
    _counts: dict[str, tuple[float, float]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _kls: deque[float] = field(default_factory=deque, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.check_not_negative("memory_low", "entropy_coef", "clip_low", "clip_high")
        if not self.memory_low <= self.memory_high <= 1:
            raise ValueError(
                f"memory_high: wanted between memory_low, {self.memory_low}, and 1, "
                f"got {self.memory_high}"
            )
        for name in ("kl_target", "divisor", "window"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: wanted > 0, got {getattr(self, name)}")

    def advantages(self, groups: Groups) -> Groups:
        flat = [rollout for group in groups for rollout in group]
        rewards = net_rewards(groups)
        values = torch.tensor([self._value(rollout.prompt.index) for rollout in flat])
        lengths = torch.tensor([rollout.scored_tokens for rollout in flat])
        for group in groups:
            self._count(group[0].prompt.index, net_rewards([group]))
        return with_advantages(groups, whitened(rewards - values, lengths))

    def observe(self, metrics: Mapping[str, float]) -> None:
        self._kls.append(max(metrics.get("ref_kl", metrics.get("kl", 0.0)), 0.0))
        while len(self._kls) > self.window:
            self._kls.popleft()

    def objective(self) -> Objective:
        return EntropyShapedSurrogate(
            coef=self.entropy_coef,
            divisor=self.divisor,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"counts": {k: list(ab) for k, ab in self._counts.items()}, "kls": list(self._kls)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._counts.clear()
        self._counts.update({k: (a, b) for k, (a, b) in state["counts"].items()})
        self._kls.clear()
        self._kls.extend(state["kls"])

    def eta(self) -> float:
        """What remains of a count after each visit."""
        near = fmean(self._kls) / self.kl_target if self._kls else 0.0
        span = self.memory_high - self.memory_low
        if self.as_printed and near <= 1:
            return self.memory_low + near * span
        return self.memory_high - min(near, 1.0) * span

    def _value(self, index: int) -> float:
        a, b = self._counts.get(str(index), (1.0, 1.0))
        return a / (a + b)

    def _count(self, index: int, rewards: Tensor) -> None:
        """Counts the group as one visit, by its mean."""
        scored = rewards[~rewards.isnan()]
        if len(scored):
            mean, eta = float(scored.mean()), self.eta()
            a, b = self._counts.get(str(index), (1.0, 1.0))
            self._counts[str(index)] = (eta * a + mean, eta * b + 1 - mean)
