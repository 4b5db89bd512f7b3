"""What `FastGRPOTrainer` can do, checked once and before any training."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import PreTrainedModel

from rlvr_fast import attention
from rlvr_fast.integrations.trl_objectives import LOSS_TYPES, seq_weights
from rlvr_fast.integrations.trl_problem import Goal
from rlvr_fast.methods import method as find_method
from rlvr_fast.methods.base import BatchShape, Method
from rlvr_fast.objectives import Objective
from rlvr_fast.ops.group_advantages import Scale
from rlvr_fast.ops.objective_rows import Segmentation
from rlvr_fast.tracing.level import Level, level
from rlvr_fast.tracing.tokens import TokenFields

TRAINERS_OWN = ("select_prompts", "rollout", "verify", "advantages", "shape", "prepare", "observe")
"""Hooks whose work TRL does, in its own way."""
CLOSE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Relative error of logits that counts as the same; narrower dtypes round."""
CLOSE_NARROW = 5e-2


def check_settings(trainer: Any) -> None:
    """Raises a ValueError for the first setting that changes the loss in a way not known here."""
    args = trainer.args
    refused = {
        "use_liger_kernel": args.use_liger_kernel,
        "cast_lm_head_to_fp32": args.cast_lm_head_to_fp32,
        "torch_compile": args.torch_compile,
        "router_aux_loss_coef": trainer.aux_loss_enabled and trainer.router_aux_loss_coef,
        "deepspeed": trainer.is_deepspeed_enabled,
        "fsdp_config['cpu_offload']": _offloads(trainer),
    }
    for name, value in refused.items():
        if value:
            raise ValueError(f"{name}: wanted it off with FastGRPOTrainer, got {value}")
    if trainer._is_vlm:
        raise ValueError("processing_class: wanted a tokenizer (text only), got a processor")
    if trainer.loss_type not in LOSS_TYPES:
        raise ValueError(
            f"loss_type: wanted one of {', '.join(LOSS_TYPES)}, got {trainer.loss_type}"
        )
    if trainer.importance_sampling_level not in ("token", "sequence"):
        raise ValueError(
            "importance_sampling_level: wanted token or sequence, "
            f"got {trainer.importance_sampling_level}"
        )


def _offloads(trainer: Any) -> bool:
    """Then a model's weights say nothing of the device on which it runs."""
    if not trainer.is_fsdp_enabled:
        return False
    policy = trainer.accelerator.state.fsdp_plugin.cpu_offload
    return isinstance(policy, CPUOffloadPolicy) or bool(getattr(policy, "offload_params", False))


def check_adapters(model: nn.Module) -> None:
    """Raises a ValueError for adapters that change what the backbone is given."""
    for settings in (getattr(model, "peft_config", None) or {}).values():
        if settings.is_prompt_learning:
            raise ValueError(
                f"peft_config: wanted adapters inside of layers, such as LoRA, "
                f"got {settings.peft_type.value}"
            )


def check_parts(model: PreTrainedModel) -> None:
    """Raises a ValueError for a model that does not end in a decoder and a plain head."""
    output = model.get_output_embeddings()
    if type(output) is not nn.Linear:
        raise ValueError(
            f"model: wanted a plain linear head without adapters, got {type(output).__name__}"
        )
    decoder = model.get_decoder()
    if decoder is None or decoder is model:
        raise ValueError(
            f"model: wanted one whose decoder get_decoder() gives, got {type(model).__name__}"
        )


@torch.no_grad()
def check_logits(model: PreTrainedModel) -> None:
    """Raises a ValueError unless backbone and head, as this package runs them, give the model's own
    logits for four tokens.
    """
    if model.device.type == "meta":  # FSDP's cpu_ram_efficient_loading; rank 0 has the weights.
        return
    output: Any = model.get_output_embeddings()
    ids = torch.arange(4, device=model.device)[None] % len(output.weight)
    training = model.training
    model.eval()
    try:
        wanted = model(input_ids=ids, use_cache=False).logits.float()
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        model.train(training)
    found = _logits(hidden.to(output.weight.dtype), model).float()
    error = float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))
    if not error <= CLOSE.get(output.weight.dtype, CLOSE_NARROW):
        raise ValueError(
            "model: wanted logits that are the head's, scaled and soft-capped as its config says, "
            f"got {type(model).__name__} with others (relative difference {error:.1e})"
        )


def _logits(hidden: Tensor, model: PreTrainedModel) -> Tensor:
    head = attention.head(model)
    logits = head.logit_scale * nn.functional.linear(hidden, head.weight, head.bias)
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def goal(trainer: Any, objective: Objective | None, method: str | Method | None) -> Goal:
    """What a trainer's user wants in place of the loss type.

    Raises:
        ValueError: for both, or for one that cannot be.
    """
    if objective is not None and method is not None:
        raise ValueError("objective, method: wanted one of the two, got both")
    if method is not None:
        return from_method(method, trainer)
    own = None if objective is None else check_objective(objective, trainer)
    return Goal(objective=own, normaliser=None)


def check_objective(objective: object, trainer: Any) -> Objective:
    """The objective, if a loss over single tokens or sequences that reads what TRL has.

    Raises:
        ValueError: for another one. TRL spreads the completions of a prompt over micro-batches, so
            nothing can look at a group as a whole.
    """
    if not isinstance(objective, Objective):
        raise ValueError(f"objective: wanted an Objective, got {type(objective).__name__}")
    found = level(objective)
    if found.value > Level.SEQUENCE.value:
        raise ValueError(
            "objective: wanted one that looks at tokens or sequences, "
            f"got {type(objective).__name__}, which looks at a {found.name.lower()}"
        )
    _check_fields(objective, trainer)
    return objective


def _check_fields(objective: Objective, trainer: Any) -> None:
    one = torch.ones(1)
    fields = TokenFields(
        weight=one,
        old_logp=-one,
        ref_logp=-one if trainer.beta != 0.0 else None,
        rollout_logp=-one if trainer.use_vllm else None,
        advantage=one,
        extras={},
    )
    view = Segmentation(seq=torch.tensor([0, 1])).view(-one, one, fields, slice(0, 1))
    try:
        objective.token_loss(view)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"objective: wanted one that reads what TRL has (the reference with beta > 0, the "
            f"sampler's log-probabilities with use_vllm, no extras), got "
            f"{type(objective).__name__}: {error}"
        ) from error


def from_method(wanted: str | Method, trainer: Any) -> Goal:
    """A method's objective, and the loss type whose normaliser is the method's token weight.

    Raises:
        ValueError: for a method that is more than that.
    """
    method = find_method(wanted, {}) if isinstance(wanted, str) else wanted
    name = wanted if isinstance(wanted, str) else type(method).__name__
    own = [x for x in TRAINERS_OWN if getattr(type(method), x) is not getattr(Method, x)]
    if own:
        raise ValueError(
            f"method: wanted an objective and token weights only, since TRL does the rest, "
            f"got {name}, which has its own {', '.join(own)}"
        )
    if method.settings:
        raise ValueError(
            f"method: wanted one without settings of our trainer, got {name} with "
            f"{', '.join(method.settings)}"
        )
    _check_advantages(method, name, trainer)
    if method.needs_reference and trainer.beta == 0.0:
        raise ValueError(f"beta: wanted > 0 for method {name}, which reads the reference, got 0")
    if method.on_policy_only and not on_policy(trainer):
        raise ValueError(
            f"num_iterations, steps_per_generation: wanted one update per batch for {name}, got "
            f"{trainer.num_iterations} and {trainer.args.steps_per_generation}"
        )
    return Goal(
        objective=check_objective(method.objective(), trainer), normaliser=_loss_type(method, name)
    )


def on_policy(trainer: Any) -> bool:
    """Whether the policy of every update is the one that generated."""
    args = trainer.args
    return bool(
        args.gradient_accumulation_steps % (args.steps_per_generation * trainer.num_iterations) == 0
    )


def _check_advantages(method: Method, name: str, trainer: Any) -> None:
    normalisation = method.normalisation()
    scales = {Scale.STD: "group", Scale.NONE: "none"}
    wanted = scales.get(normalisation.scale)
    if wanted is None or (wanted == "group" and normalisation.ddof != 1):
        raise ValueError(f"method: wanted advantages that TRL can make, got {name}'s own")
    if trainer.scale_rewards != wanted or trainer.multi_objective_aggregation != (
        "sum_then_normalize"
    ):
        raise ValueError(
            f"scale_rewards: wanted {wanted!r} with 'sum_then_normalize' for method {name}, "
            f"got {trainer.scale_rewards!r} with {trainer.multi_objective_aggregation!r}"
        )


def _loss_type(method: Method, name: str) -> str:
    """Tried on a batch that tells them apart."""
    lengths, length = torch.tensor([1, 2, 4, 6]), 9
    shape = BatchShape(
        seq_lengths=lengths, group_offsets=torch.tensor([0, 2, 4]), max_completion_tokens=length
    )
    weights = method.seq_weights(shape)
    for loss_type in ("dapo", "grpo", "dr_grpo", "luspo"):
        found = seq_weights(
            loss_type, lengths, length=length, items=float(lengths.sum()), accumulation=1
        )
        if torch.allclose(found, weights):
            return loss_type
    raise ValueError(
        f"method: wanted token weights that a loss type of TRL has too, got {name}'s own"
    )
