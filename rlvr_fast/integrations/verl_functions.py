"""Policy losses and advantage estimators with the signatures of verl 0.9."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import lru_cache, partial
from importlib import import_module
from typing import Any, TypeAlias

from torch import Tensor

from rlvr_fast.integrations.outcome import advantage_method, outcome_advantages
from rlvr_fast.integrations.padded import PaddedTokens, masked_mean, objective_of, padded_loss
from rlvr_fast.methods import METHODS
from rlvr_fast.methods.base import Method
from rlvr_fast.objectives import Objective

Options: TypeAlias = Mapping[str, object]
PolicyLoss: TypeAlias = Callable[..., tuple[Tensor, dict[str, Tensor]]]
Estimator: TypeAlias = Callable[..., tuple[Tensor, Tensor]]


def policy_loss(method: str, options: Options | None = None) -> PolicyLoss:
    """A policy loss as verl calls it, by our objective and verl's aggregation.

    Args:
        method: one of `padded.LOSSES`.
        options: of the method, before what `actor_options` finds.

    Returns:
        A function of `(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config,
        rollout_is_weights)` that returns the loss and `actor/ppo_kl`, `actor/pg_clipfrac`.

    Raises:
        ValueError: for a method without such a loss, or an unknown option.
    """
    objective_of(method, options or {})
    return partial(_policy_loss, method, dict(options or {}))


def actor_options(method: str, config: Any) -> dict[str, object]:
    """Options of the method that verl's actor config has fields for, read as verl reads them.

    `clip_ratio_low`, `clip_ratio_high` and `clip_ratio_c` bound the ratio; the first two are the
    bounds of the probability for `dppo_tv`, of the log-ratio for `gmpo`, and `1 + clip_ratio_high`
    caps the weight of `cispo`. `tau_pos` and `tau_neg` belong to `sapo`. `dcpo` bounds another
    quantity and keeps its own.
    """
    low, high = (
        config.clip_ratio if value is None else value
        for value in (config.clip_ratio_low, config.clip_ratio_high)
    )
    most = config.get("clip_ratio_c", 3.0)
    special: dict[str, dict[str, object]] = {
        "cispo": {"cap": 1.0 + high},
        "dcpo": {},
        "dppo_tv": {"increase": high, "decrease": low, "cap": most},
        "sapo": {
            "temperature_positive": config.get("tau_pos", 1.0),
            "temperature_negative": config.get("tau_neg", 1.05),
        },
    }
    known = {"clip_low": low, "clip_high": high, "dual_clip": most}
    own = {each.name for each in fields(METHODS[method])}
    found = special.get(method, {name: value for name, value in known.items() if name in own})
    return {name: float(str(value)) for name, value in found.items()}


def estimator(method: str, options: Options | None = None) -> Estimator:
    """An advantage estimator as verl calls it: outcome rewards, groups by prompt.

    Returns:
        A function of `(token_level_rewards, response_mask, config, index)` that returns the
        advantages `[B, T]` twice, the second time as returns.

    Raises:
        ValueError: for a method whose advantages need more than one batch, or an unknown option.
    """
    return partial(_estimator, advantage_method(method, options or {}))


def _policy_loss(
    method: str,
    options: dict[str, object],
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    if config is None:
        raise ValueError("config: wanted verl's ActorConfig, got None")
    core = import_module("verl.trainer.ppo.core_algos")
    values = {**actor_options(method, config), **options}
    found = padded_loss(
        _objective(method, tuple(sorted(values.items()))),
        PaddedTokens(
            logp=log_prob, advantage=advantages, mask=response_mask, old_logp=old_log_prob
        ),
    )
    weight = 1.0 if rollout_is_weights is None else rollout_is_weights
    loss = core.agg_loss(
        loss_mat=found.token_loss * weight,
        loss_mask=response_mask,
        loss_agg_mode=loss_agg_mode,
        **config.global_batch_info,
    )
    return loss, {
        "actor/ppo_kl": masked_mean(found.kl, response_mask),
        "actor/pg_clipfrac": masked_mean(found.clipped, response_mask),
    }


@lru_cache(maxsize=64)
def _objective(method: str, options: tuple[tuple[str, object], ...]) -> Objective:
    return objective_of(method, dict(options))


def _estimator(
    chosen: Method,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    config: Any = None,
    index: Iterable[Any] | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    if index is None:
        raise ValueError("index: wanted the prompt of each sequence (uid), got None")
    rewards = token_level_rewards.sum(-1)
    found = outcome_advantages(chosen, rewards, response_mask, list(index))
    return found, found
