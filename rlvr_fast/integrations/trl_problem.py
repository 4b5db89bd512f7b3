"""From TRL's settings and inputs to what `policy_loss` minimises over which tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlvr_fast.integrations import trl_objectives as objectives
from rlvr_fast.integrations.trl_layout import Layout
from rlvr_fast.objectives import Objective
from rlvr_fast.ops.active_rows import mark_active
from rlvr_fast.scored import ScoredTokens
from rlvr_fast.tracing.level import Level, level


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What replaces the loss type, where something does."""

    objective: Objective | None
    """None: the loss type's own."""
    normaliser: str | None
    """The loss type whose weights the tokens have; None: the trainer's."""


def problem(
    trainer: Any, goal: Goal, rows: Layout, inputs: Mapping[str, Any], chosen: Tensor | None
) -> tuple[Objective, ScoredTokens]:
    """Objective and tokens, on the CPU, with the rows marked that have no gradient.

    Args:
        trainer: a `GRPOTrainer`; its settings are read as they are now.
        goal: see there.
        inputs: of `_compute_loss`.
        chosen: `[B, C]`, which tokens have a policy gradient and a bonus; None: all.
    """
    tokens = ScoredTokens(
        targets=rows.targets,
        weight=rows.gather(_weights(trainer, goal.normaliser or trainer.loss_type, rows, inputs)),
        seq_offsets=rows.seq_offsets,
        old_logp=_gathered(rows, inputs, "old_per_token_logps"),
        ref_logp=_gathered(rows, inputs, "ref_per_token_logps"),
        rollout_logp=_gathered(rows, inputs, "sampling_per_token_logps"),
        advantage=rows.gather(inputs["advantages"]),
        extras=_sampler_ratio(trainer, goal, rows, inputs),
    )
    objective = goal.objective or objectives.surrogate(
        trainer, from_sampler=objectives.SAMPLER in tokens.extras
    )
    objective, tokens = _masked(trainer, objective, tokens)
    factor = _factor(trainer, goal, rows, inputs, chosen)
    if factor is not None:
        objective = objectives.Scaled(objective=objective)
        tokens = _with_extra(tokens, objectives.FACTOR, factor)
    bonus = _bonus(trainer, rows, chosen)
    if bonus is None and trainer.beta == 0.0:
        if factor is not None and level(objective) is Level.TOKEN:
            tokens = replace(tokens, active=factor != 0)
        return objective, mark_active(tokens, objective)
    if trainer.beta != 0.0:
        objective = objective + objectives.penalty(trainer)
    if bonus is not None:
        objective = objective + objectives.WeightedEntropy()
        tokens = _with_extra(tokens, objectives.ENTROPY, bonus / tokens.weight)
    return objective, mark_active(tokens, objective)


def _masked(
    trainer: Any, objective: Objective, tokens: ScoredTokens
) -> tuple[Objective, ScoredTokens]:
    """Without sequences that left the sampler, if the trainer masks them."""
    threshold = trainer.off_policy_mask_threshold
    sampled = tokens.old_logp if tokens.rollout_logp is None else tokens.rollout_logp
    if threshold is None or sampled is None:
        return objective, tokens
    masked = objectives.CloseEnough(objective=objective, threshold=threshold)
    return masked, replace(tokens, rollout_logp=sampled)


def _with_extra(tokens: ScoredTokens, name: str, value: Tensor) -> ScoredTokens:
    return replace(tokens, extras={**tokens.extras, name: value})


def _weights(trainer: Any, normaliser: str, rows: Layout, inputs: Mapping[str, Any]) -> Tensor:
    """`[B]` fp32, of each token of a sequence."""
    accumulation = _accumulation(trainer)
    items = float(inputs["num_items_in_batch"].clamp(min=1)) / trainer.accelerator.num_processes
    if is_training(trainer):
        # It counts the generation batch, the loss one window of accumulation.
        items *= accumulation / trainer.args.steps_per_generation
    return objectives.seq_weights(
        normaliser,
        rows.batch.scored.sum(1),
        length=trainer.max_completion_length,
        items=items,
        accumulation=accumulation,
    )


def _sampler_ratio(
    trainer: Any, goal: Goal, rows: Layout, inputs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """As VESPO's weight takes vLLM's correction: within the ratio of the sequence."""
    ratio = inputs.get("importance_sampling_ratio")
    if ratio is None or not _vespo(trainer, goal):
        return {}
    logs = ratio.float().log().clamp(objectives.LOG_FLOOR, objectives.MAX_LOG)
    # TRL sums over padding too, where a cap below 1 counts.
    count = rows.batch.scored.sum(1).clamp(min=1).to(logs.device)
    return {objectives.SAMPLER: rows.gather(logs.sum(1) / count)}


def _factor(
    trainer: Any, goal: Goal, rows: Layout, inputs: Mapping[str, Any], chosen: Tensor | None
) -> Tensor | None:
    """`[n]`, on the surrogate alone: the entropy mask and vLLM's correction."""
    factor = None if chosen is None else rows.gather(chosen)
    corrected = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    if not corrected or _vespo(trainer, goal):
        return factor
    ratio = rows.gather(inputs["importance_sampling_ratio"])
    return ratio if factor is None else factor * ratio


def _bonus(trainer: Any, rows: Layout, chosen: Tensor | None) -> Tensor | None:
    """`[n]`, what each token's entropy counts in the loss; None without a bonus."""
    coef = trainer.entropy_coef if trainer._entropy_bonus_enabled else 0.0
    if trainer.use_adaptive_entropy and (trainer._last_world_entropy > trainer.args.entropy_target):
        coef = 0.0
    if coef == 0.0:
        return None
    counted = torch.ones(len(rows.places)) if chosen is None else rows.gather(chosen)
    return coef * counted / counted.sum().clamp(min=1) / _accumulation(trainer)


def is_training(trainer: Any) -> bool:
    """As TRL tells training from evaluation."""
    return bool(trainer.model.training)


def _accumulation(trainer: Any) -> int:
    return int(trainer.current_gradient_accumulation_steps) if is_training(trainer) else 1


def _vespo(trainer: Any, goal: Goal) -> bool:
    return goal.objective is None and trainer.loss_type == "vespo"


def _gathered(rows: Layout, inputs: Mapping[str, Any], name: str) -> Tensor | None:
    values = inputs.get(name)
    return None if values is None else rows.gather(values)
