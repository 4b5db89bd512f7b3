"""verl 0.9: our objectives as policy losses, our advantages as estimators, our LM head.

verl loads the entry-point group `verl.plugins` in every process that imports it: a fresh
`import verl` calls `load` and needs nothing else. The environment variable `RLVR_FAST_VERL`
chooses `all` (default), `none`, or some of `losses,advantages,head`.

- `actor.policy_loss.loss_mode=rlvr_fast_NAME` for the methods of `padded.LOSSES`. Bounds come from
  the fields of verl's actor config, see `verl_functions.actor_options`; the mean is verl's
  `loss_agg_mode`.
- `algorithm.adv_estimator=rlvr_fast_NAME` for those of `outcome.ADVANTAGES`.
- With `use_fused_kernels` and the backend `triton`, `linear_cross_entropy` below takes the place of
  verl's function of that name, over a whole vocabulary or Megatron's slices of it.
"""

import logging
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlvr_fast.integrations.outcome import ADVANTAGES
from rlvr_fast.integrations.padded import LOSSES
from rlvr_fast.integrations.verl_functions import Options, estimator, policy_loss
from rlvr_fast.ops.linear_logprobs import linear_logprobs

SWITCH = "RLVR_FAST_VERL"
PARTS = ("losses", "advantages", "head")
PREFIX = "rlvr_fast_"
HEAD = "verl.utils.kernel.linear_cross_entropy"
SERIES = "0.9."
"""Versions of verl whose hooks these are; read and tested with 0.9.1."""

logger = logging.getLogger(__name__)


@dataclass
class _Installed:
    head: Callable[..., tuple[Tensor, Tensor]] | None = None
    """verl's own, where ours has taken its place."""


_installed = _Installed()


def load() -> None:
    """Activates what `RLVR_FAST_VERL` asks for; says so, or why not, in one logged warning.

    A warning, since verl hides all below it and its loader hides exceptions.
    """
    try:
        parts = wanted_parts(os.environ.get(SWITCH, "all"))
        done = activate(parts)
    except (ImportError, ValueError) as error:
        logger.warning("rlvr_fast is NOT active in verl: %s", error)
        return
    logger.warning(
        "rlvr_fast in verl: %s (%s=none switches it off)", ", ".join(done) or "off", SWITCH
    )


def wanted_parts(text: str) -> tuple[str, ...]:
    """The parts that a value of `RLVR_FAST_VERL` names.

    Raises:
        ValueError: for an unknown part.
    """
    named = [part.strip() for part in text.lower().split(",") if part.strip()]
    if named in (["all"], ["none"]):
        return PARTS if named == ["all"] else ()
    unknown = sorted(set(named) - set(PARTS))
    if unknown:
        raise ValueError(f"{SWITCH}: wanted all, none or some of {','.join(PARTS)}, got {text}")
    return tuple(part for part in PARTS if part in named)


def activate(parts: Collection[str] = PARTS) -> tuple[str, ...]:
    """Puts these parts into verl, in this process; a second call changes nothing.

    Call it before verl's Megatron models are imported: they keep the head that they find.

    Returns:
        The parts that are active now.

    Raises:
        ImportError: without verl, or for the head without Triton on a machine with CUDA.
        ValueError: for another series of verl than `SERIES`.
    """
    version = str(import_module("verl").__version__)
    if not version.startswith(SERIES):
        raise ValueError(f"verl: wanted {SERIES}*, got {version}")
    if "head" in parts:
        _check_triton()
    if "losses" in parts:
        for name in LOSSES:
            register_loss(PREFIX + name, name)
    if "advantages" in parts:
        for name in ADVANTAGES:
            register_advantages(PREFIX + name, name)
    if "head" in parts:
        _put_head()
    return tuple(part for part in PARTS if part in parts)


def deactivate() -> None:
    """Takes our names out of verl's tables and gives its head back."""
    core = import_module("verl.trainer.ppo.core_algos")
    for table in (core.POLICY_LOSS_REGISTRY, core.ADV_ESTIMATOR_REGISTRY):
        for name in [name for name in table if name.startswith(PREFIX)]:
            del table[name]
    if _installed.head is not None:
        module: Any = import_module(HEAD)
        module.linear_cross_entropy = _installed.head
        _installed.head = None


def register_loss(name: str, method: str, options: Options | None = None) -> None:
    """Makes `policy_loss(method, options)` a `loss_mode` of verl.

    Raises:
        ImportError: without verl.
        ValueError: for a method without such a loss, or an unknown option.
    """
    core = import_module("verl.trainer.ppo.core_algos")
    core.register_policy_loss(name)(policy_loss(method, options))


def register_advantages(name: str, method: str, options: Options | None = None) -> None:
    """Makes `estimator(method, options)` an `adv_estimator` of verl, in place of one so named.

    Raises:
        ImportError: without verl.
        ValueError: for a method whose advantages need more than one batch, or an unknown option.
    """
    core = import_module("verl.trainer.ppo.core_algos")
    found = estimator(method, options)
    core.ADV_ESTIMATOR_REGISTRY.pop(name, None)
    core.register_adv_est(name)(found)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies without logits, in the place of verl's function.

    Args:
        hidden: `[..., D]`, differentiable.
        weight: `[V, D]`, differentiable.
        labels: `[...]` integers in `[0, V)`.
        temperature: the sampler's, > 0.
        reduction: `none`.
        dist_process_group: of the ranks that have a slice of the vocabulary each. The gradient of
            `hidden` is then that of the slice, as verl's own function has it.

    Returns:
        Like labels, fp32, nats, both differentiable. verl's own are flat.

    Raises:
        ValueError: for another reduction, or shapes and dtypes that `linear_logprobs` refuses.
    """
    if reduction != "none":
        raise ValueError(f"reduction: wanted none, got {reduction}")
    group = dist_process_group
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    found = linear_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1).long(),
        temperature=float(temperature),
        vocab_group=group,
        sum_hidden_grad=False,
    )
    return found.logp.reshape(labels.shape), found.entropy.reshape(labels.shape)


def _check_triton() -> None:
    if torch.cuda.is_available():
        try:
            import triton  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"the head wants Triton on CUDA: pip install triton, or {SWITCH}=losses,advantages"
            ) from error


def _put_head() -> None:
    module: Any = import_module(HEAD)
    if module.linear_cross_entropy is not linear_cross_entropy:
        _installed.head = module.linear_cross_entropy
        module.linear_cross_entropy = linear_cross_entropy
