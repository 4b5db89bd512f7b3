"""NeMo-RL: a `LossFunction` for `grpo_train` and its kin, read at commit 7ea279ab.

In a copy of `examples/run_grpo.py`, after `setup`:

    from rlvr_fast.integrations import nemo_rl
    loss_fn = nemo_rl.policy_loss("dapo", {"clip_high": 0.3})
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from rlvr_fast.integrations.padded import PaddedTokens, objective_of, padded_loss
from rlvr_fast.objectives import Objective

PER_TOKEN = ("ppo_kl", "pg_clipfrac", "token_mult_prob_error", "gen_kl_error")
"""Metrics; NeMo-RL's training loops read the last two."""
INTERFACES = "nemo_rl.algorithms.loss.interfaces"


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """The mean of the token losses over the batch, or over each sequence first."""

    objective: Objective
    loss_type: Any
    """NeMo-RL's `LossType`: over what the mean goes."""
    input_type: Any
    """NeMo-RL's `LossInputType.LOGPROB`."""
    metric_normalizations: Mapping[str, Any]
    """What each metric is divided by."""
    use_fused_linear_logprobs: bool = False
    """NeMo-RL's own head gives log-probabilities in place of logits."""

    def __call__(
        self,
        next_token_logprobs: Tensor,
        data: Mapping[str, Tensor],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss and metrics of one micro-batch, to be summed over all of them.

        Args:
            next_token_logprobs: `[B, T - 1]`.
            data: `token_mask`, `advantages`, `prev_logprobs`, `generation_logprobs`, `[B, T]`
                each and of the token itself; `sample_mask [B]`.
            global_valid_seqs: of all micro-batches and ranks.
            global_valid_toks: of all micro-batches and ranks.
        """
        samples = data["sample_mask"]
        mask = data["token_mask"][:, 1:] * samples[:, None]
        old, rollout = data["prev_logprobs"][:, 1:], data["generation_logprobs"][:, 1:]
        found = padded_loss(
            self.objective,
            PaddedTokens(
                logp=next_token_logprobs,
                advantage=data["advantages"][:, 1:],
                mask=mask,
                old_logp=old,
                rollout_logp=rollout,
            ),
        )
        if self.loss_type.value == "token_level":
            loss = found.token_loss.sum() / global_valid_toks
        else:
            of_sequence = found.token_loss.sum(1) / mask.sum(1).clamp(min=1)
            loss = of_sequence.sum() / global_valid_seqs
        gap = torch.where(mask != 0, old - rollout, 0.0)
        error = torch.where(mask != 0, gap.abs().exp(), 0.0)
        per_token = (found.kl, found.clipped, error, gap.exp() - gap - 1)
        means = [(values.sum() / global_valid_toks).item() for values in per_token]
        return loss, {
            "loss": loss.item(),
            "num_valid_samples": samples.sum().item(),
            **dict(zip(PER_TOKEN, means, strict=True)),
        }


def policy_loss(
    method: str, options: Mapping[str, object] | None = None, *, token_level: bool = True
) -> PolicyLoss:
    """The loss of a method, for NeMo-RL.

    Args:
        method: one of `padded.LOSSES`.
        options: of the method.
        token_level: mean over all tokens; else over each sequence's, then over sequences.

    Raises:
        ImportError: without NeMo-RL.
        ValueError: for a method without such a loss, or an unknown option.
    """
    interfaces = import_module(INTERFACES)
    tokens, sequences = (interfaces.MetricNormalizer[n] for n in ("TOKENS", "SEQUENCES"))
    kind = interfaces.LossType["TOKEN_LEVEL" if token_level else "SEQUENCE_LEVEL"]
    return PolicyLoss(
        objective=objective_of(method, options or {}),
        loss_type=kind,
        input_type=interfaces.LossInputType["LOGPROB"],
        metric_normalizations={
            "loss": tokens if token_level else sequences,
            **dict.fromkeys(PER_TOKEN, tokens),
            "num_valid_samples": interfaces.MetricNormalizer["NONE"],
        },
    )
