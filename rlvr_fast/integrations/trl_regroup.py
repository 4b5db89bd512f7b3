"""Completions of one prompt meet in one micro-batch, where their prompt is computed once.

TRL shuffles a generation batch before it is cut. The micro-batches of one optimiser step are
exchanged among each other here; which sequences a step sees stays.
"""

from collections.abc import Sequence
from typing import Any

import torch

from rlvr_fast.integrations.trl_problem import Goal

Inputs = dict[str, Any]


def is_neutral(trainer: Any, goal: Goal) -> bool:
    """Whether loss and gradient of a step do not depend on what is in which of its micro-batches.

    They do for means over the tokens of a micro-batch; and where generation batches and optimiser
    steps do not begin together, a window is not known.
    """
    steps, window = trainer.args.steps_per_generation, trainer.args.gradient_accumulation_steps
    return (
        (goal.normaliser or trainer.loss_type) != "bnpo"
        and trainer.top_entropy_quantile == 1.0
        and not trainer._entropy_bonus_enabled
        and window > 1
        and (steps % window == 0 or window % steps == 0)
    )


def regrouped(batches: Sequence[Inputs], window: int) -> list[Inputs]:
    """The same micro-batches, those of each `window` in order of prompts."""
    found: list[Inputs] = []
    for start in range(0, len(batches), window):
        found += _sorted(batches[start : start + window])
    return found


def _sorted(batches: Sequence[Inputs]) -> list[Inputs]:
    sizes = [len(batch["prompt_ids"]) for batch in batches]
    seen: dict[tuple[int, ...], list[int]] = {}
    masks = torch.cat([batch["prompt_mask"] for batch in batches]).bool().cpu()
    ids = torch.cat([batch["prompt_ids"] for batch in batches]).cpu()
    for row in range(len(ids)):
        seen.setdefault(tuple(ids[row][masks[row]].tolist()), []).append(row)
    order = torch.tensor([row for rows in seen.values() for row in rows])
    sorted_values: dict[str, list[Any]] = {}
    for name, value in batches[0].items():
        if isinstance(value, torch.Tensor) and value.dim() and len(value) == sizes[0]:
            every = torch.cat([batch[name] for batch in batches])
            sorted_values[name] = list(every[order.to(every.device)].split(sizes))
    return [
        batch | {name: parts[i] for name, parts in sorted_values.items()}
        for i, batch in enumerate(batches)
    ]
