"""prime-rl: a custom loss for `[trainer.loss]`, read at its commit 559b4477.

    [trainer.loss]
    type = "custom"
    import_path = "rlvr_fast.integrations.prime_rl.loss"
    kwargs = { method = "dapo", clip_high = 0.3 }

prime-rl has no log-probabilities from the start of the update: the sampler's take their place, so
that the ratio corrects for the sampler too.
"""

from functools import lru_cache
from importlib import import_module
from typing import Any

from rlvr_fast.integrations.padded import PaddedTokens, masked_mean, objective_of, padded_loss
from rlvr_fast.objectives import Objective


def loss(inputs: Any, *, method: str = "dapo", **options: Any) -> Any:
    """The sum over the tokens of one sequence, which prime-rl divides by the tokens of the batch.

    Args:
        inputs: prime-rl's `LossInputs`, `[t]` each.
        method: one of `padded.LOSSES`.
        options: of the method.

    Returns:
        prime-rl's `LossOutputs` with the metrics `ppo_kl` and `pg_clipfrac`.

    Raises:
        ImportError: without prime-rl.
        ValueError: for a method without such a loss, or an unknown option.
    """
    objective = _objective(method, tuple(sorted(options.items())))
    mask = inputs.loss_mask[None]
    ref = inputs.ref_logprobs
    found = padded_loss(
        objective,
        PaddedTokens(
            logp=inputs.trainer_logprobs[None],
            advantage=inputs.advantages[None],
            mask=mask,
            old_logp=inputs.inference_logprobs[None],
            rollout_logp=inputs.inference_logprobs[None],
            ref_logp=None if ref is None else ref[None],
        ),
    )
    token_loss = found.token_loss[0]
    if inputs.loss_weights is not None:
        token_loss = token_loss * inputs.loss_weights
    return import_module("prime_rl.trainer.rl.loss").LossOutputs(
        loss=token_loss.sum(),
        metrics={
            "ppo_kl": masked_mean(found.kl, mask),
            "pg_clipfrac": masked_mean(found.clipped, mask),
        },
    )


@lru_cache(maxsize=16)
def _objective(method: str, options: tuple[tuple[str, Any], ...]) -> Objective:
    return objective_of(method, dict(options))
