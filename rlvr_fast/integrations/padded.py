"""Objectives on padded `[B, T]` tensors, the form in which other trainers hand out log-probs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlvr_fast.methods import METHODS, method
from rlvr_fast.objectives import Distillation, Objective
from rlvr_fast.tracing.tokens import Segments, TokenFields, Tokens

LOSSES = (
    "bnpo",
    "cispo",
    "dapo",
    "dcpo",
    "dhpo",
    "dppo_tv",
    "dr_grpo",
    "gmpo",
    "gpg",
    "grpo",
    "gspo",
    "gspo_token",
    "luspo",
    "maxrl",
    "noisy_verifier",
    "nsr",
    "opo",
    "ppo",
    "reinforce",
    "reinforce_pp",
    "rloo",
    "sapo",
    "vespo",
)
"""Methods whose loss needs only log-probabilities, advantages and masks. The others sample, score
or choose tokens by hooks that only our own trainer calls. Each of these losses is proportional to
its advantages, so that a trainer may put weights into them."""


@dataclass(frozen=True, kw_only=True)
class PaddedTokens:
    """`[B, T]` each; a row is one sequence. What stands where the mask is 0 is never read.

    Raises:
        ValueError: for tensors of different shapes, or that are not `[B, T]`.
    """

    logp: Tensor
    """Under the policy being trained, nats; differentiable."""
    advantage: Tensor
    mask: Tensor
    """Not 0 where the token counts."""
    old_logp: Tensor
    """At the start of the update, or of the sampler where a trainer has no other."""
    ref_logp: Tensor | None = None
    """For objectives that read `t.ref_logp`; with None they raise a ValueError."""
    rollout_logp: Tensor | None = None
    """For objectives that read `t.rollout_logp`; with None they raise a ValueError."""

    def __post_init__(self) -> None:
        wanted = self.logp.shape
        for name in ("logp", "advantage", "mask", "old_logp", "ref_logp", "rollout_logp"):
            value = getattr(self, name)
            if value is not None and (value.shape != wanted or value.dim() != 2):
                raise ValueError(
                    f"{name}: wanted [B, T] like logp {list(wanted)}, got {list(value.shape)}"
                )


class PaddedLoss(NamedTuple):
    """What `padded_loss` returns: `[B, T]` fp32 each, 0 where the mask is 0."""

    token_loss: Tensor
    """Before any mean, sum or weight; differentiable."""
    kl: Tensor
    """`old_logp - logp`."""
    clipped: Tensor
    """1 where the advantage is not 0 and the gradient is, 0 elsewhere."""


def objective_of(name: str, options: Mapping[str, object]) -> Objective:
    """What the method of that name minimises, with these options of it.

    Raises:
        ValueError: for a method that is not one of `LOSSES`, or an unknown option or value.
    """
    if name in METHODS and name not in LOSSES:
        raise ValueError(
            f"method: wanted one whose loss is all it needs ({', '.join(LOSSES)}), got {name}, "
            "whose other hooks only the trainer of rlvr_fast calls"
        )
    objective = method(name, options).objective()
    assert not isinstance(objective, Distillation)
    return objective


def padded_loss(objective: Objective, tokens: PaddedTokens) -> PaddedLoss:
    """The objective of each token.

    Args:
        objective: of the level of tokens or sequences.
        tokens: padded; nothing waits for the device.

    Returns:
        See `PaddedLoss`.

    Raises:
        ValueError: for an objective that reads something which `tokens` does not have, such as
            entropies or groups.
    """
    kept = tokens.mask != 0
    loss = torch.where(kept, _token_loss(objective, tokens, kept), 0.0)
    with torch.no_grad():
        kl = torch.where(kept, tokens.old_logp - tokens.logp, 0.0).float()
    clipped = torch.zeros_like(kl)
    if loss.requires_grad and tokens.logp.requires_grad:
        (slope,) = torch.autograd.grad(loss.sum(), tokens.logp, retain_graph=True)
        clipped = (kept & (tokens.advantage != 0) & (slope == 0)).float()
    return PaddedLoss(loss, kl, clipped)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """`[]`, the mean of `values [B, T]`, which are 0 where the mask is, over the others."""
    return values.sum() / (mask != 0).sum().clamp(min=1)


class _WithoutEntropy(Tokens):
    @property
    def entropy(self) -> Tensor:
        raise ValueError("this objective reads entropy: wanted a trainer that passes it, got none")

    @entropy.setter
    def entropy(self, _: Tensor) -> None:
        """`Tokens` sets what it is given."""


def _token_loss(objective: Objective, tokens: PaddedTokens, kept: Tensor) -> Tensor:
    rows, columns = kept.shape

    def flat(value: Tensor | None) -> Tensor | None:
        # Padding may be inf or NaN, of which even a masked gradient would stay NaN.
        return None if value is None else torch.where(kept, value, 0.0).float().reshape(-1)

    logp = flat(tokens.logp)
    assert logp is not None
    fields = TokenFields(
        weight=kept.float().reshape(-1),
        old_logp=flat(tokens.old_logp),
        ref_logp=flat(tokens.ref_logp),
        rollout_logp=flat(tokens.rollout_logp),
        advantage=flat(tokens.advantage),
        extras={},
    )
    row = torch.arange(rows, device=kept.device)[:, None].expand(rows, columns).reshape(-1)
    seq = Segments(index=row, count=rows, kept=kept.reshape(-1))
    found = objective.token_loss(_WithoutEntropy(logp, logp, fields, seq))
    return found.reshape(rows, columns)
