"""SkyRL: policy losses for its registry, read at its commit a9564572.

In the entry point, before `initialize_ray`:

    from rlvr_fast.integrations import skyrl
    skyrl.register("rlvr_fast_dapo", "dapo", {"clip_high": 0.3})

and `trainer.algorithm.policy_loss_type=rlvr_fast_dapo`. SkyRL divides the advantages by the counts
of `loss_reduction` before they reach a loss, and its `off_policy_correction` is applied here as in
its own losses.
"""

from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from rlvr_fast.integrations.padded import PaddedTokens, masked_mean, objective_of, padded_loss
from rlvr_fast.objectives import Objective

UTILS = "skyrl.backends.skyrl_train.utils.ppo_utils"


def register(name: str, method: str, options: Mapping[str, object] | None = None) -> None:
    """Makes the loss of a method a `policy_loss_type`, in this process and Ray's.

    Args:
        name: in SkyRL's config.
        method: one of `padded.LOSSES`.
        options: of the method; SkyRL's `eps_clip_low` and its kin are not read.

    Raises:
        ImportError: without SkyRL.
        ValueError: for a method without such a loss, an unknown option, or a name that is taken.
    """
    loss = partial(policy_loss, objective_of(method, options or {}))
    import_module(UTILS).PolicyLossRegistry.register(name, loss)


def policy_loss(
    objective: Objective,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The sum of the token losses, as SkyRL calls it once the objective is bound.

    Args:
        objective: see `padded.padded_loss`.
        log_probs, old_log_probs, advantages, loss_mask, rollout_logprobs: `[B, T]`.
        config: SkyRL's algorithm config.

    Returns:
        The loss and `clip_ratio`, `ppo_kl` and SkyRL's metrics of its correction.

    Raises:
        ImportError: without SkyRL.
        ValueError: for tensors of other shapes.
    """
    mask = torch.ones_like(log_probs) if loss_mask is None else loss_mask
    found = padded_loss(
        objective,
        PaddedTokens(
            logp=log_probs,
            advantage=advantages,
            mask=mask,
            old_logp=old_log_probs,
            rollout_logp=rollout_logprobs,
        ),
    )
    utils = import_module(UTILS)
    corrected, kept, metrics = utils.apply_off_policy_correction(
        found.token_loss, old_log_probs, rollout_logprobs, mask, config.off_policy_correction
    )
    own = {
        "clip_ratio": masked_mean(found.clipped, mask).item(),
        "ppo_kl": masked_mean(found.kl, mask).item(),
    }
    return utils.reduce_loss(corrected, kept), {**own, **metrics}
