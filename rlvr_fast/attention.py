"""Runs a transformers model over a pack: every completion sees its prompt and itself.

The model's own layers run unchanged on the `N` tokens of a pack; only the attention function is
ours, registered with transformers' `AttentionInterface`. What attends to what is planned once per
pack, see `attention_plans`: neither padding nor an `[N, N]` mask reaches the rest of the model.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlvr_fast import fused_layers
from rlvr_fast.attention_plans import BlockPlan as BlockPlan
from rlvr_fast.attention_plans import Plan as Plan
from rlvr_fast.attention_plans import plan_blocks as plan_blocks
from rlvr_fast.attention_plans import plan_pack as plan_pack
from rlvr_fast.packed import Packed

NAME = "rlvr_fast"


@dataclass(frozen=True, kw_only=True)
class Head:
    """What lies between hidden states and logits: `cap(logit_scale * (h @ weight.T + bias))`."""

    weight: Tensor
    """`[V, D]`; the parameter itself, tied or not."""
    bias: Tensor | None
    """`[V]`."""
    softcap: float | None
    """`cap(u) = softcap * tanh(u / softcap)`; None for none."""
    logit_scale: float


def hidden_states(model: PreTrainedModel, packed: Packed) -> Tensor:
    """The backbone's output for every token of a pack; the LM head is not run.

    Args:
        model: a causal language model; made ready by `install` if it is not yet.
        packed: on the model's device.

    Returns:
        `[N, D]`, after the final norm; differentiable, also under autocast and checkpointing.

    Raises:
        ValueError: for a model that `install` does not support, a sliding window shorter than a
            prompt with its completion, or an empty pack.

    Cost: linear layers over `N` tokens, attention over each prompt with its completion.
    """
    if not len(packed.input_ids):
        raise ValueError("packed: wanted at least one token, got none")
    return run(model, packed.input_ids[None], packed.position_ids[None], plan_pack(packed))[0]


def run(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, plan: Plan) -> Tensor:
    """`hidden_states` for any plan: `[B, q]` tokens to `[B, q, D]`."""
    install(model)
    _check_window(model, plan.longest)
    hidden: Tensor = model.get_decoder()(
        input_ids=input_ids,
        position_ids=position_ids,
        # The plan replaces the mask. transformers leaves a 4-D one alone, and builds one otherwise.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device),
        use_cache=False,
        attention_plan=plan,
    ).last_hidden_state
    return hidden


def head(model: PreTrainedModel) -> Head:
    """The output embedding with what the model's config says is done to the logits."""
    config = model.config.get_text_config()
    output = model.get_output_embeddings()
    scale = getattr(config, "logit_scale", None) or 1.0
    return Head(
        weight=output.weight,
        bias=getattr(output, "bias", None),
        softcap=getattr(config, "final_logit_softcapping", None),
        # Cohere multiplies by the one, Granite divides by the other.
        logit_scale=scale / (getattr(config, "logits_scaling", None) or 1.0),
    )


def install(model: PreTrainedModel) -> None:
    """Registers our attention and selects it for `model`; harmless the second time.

    Outside of `hidden_states` the model then behaves as with `sdpa`.

    Raises:
        ValueError: for a model in which tokens reach each other in other ways than through causal
            full or sliding-window attention: recurrent, linear, chunked, bidirectional.
    """
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config = model.config.get_text_config()
    if config._attn_implementation == NAME:
        return
    kinds = {"full_attention", *(getattr(config, "layer_types", None) or ())}
    if (
        not model._supports_attention_backend
        or model._is_stateful
        or config.is_encoder_decoder
        or not getattr(config, "is_causal", True)
        or not kinds <= {"full_attention", "sliding_attention"}
    ):
        raise ValueError(
            "model: wanted a decoder with causal softmax attention in all layers, "
            f"got {config.model_type} with {', '.join(sorted(kinds))}"
        )
    model.set_attn_implementation(NAME)
    fused_layers.install(model)


def _check_window(model: PreTrainedModel, longest: int) -> None:
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    window = getattr(config, "sliding_window", None)
    if window is not None and "sliding_attention" in kinds and longest > window:
        raise ValueError(
            f"sequence: wanted at most the model's sliding window, {window} tokens, got {longest}"
        )


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    attention_plan: Plan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if attention_plan is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"model: wanted attention without {name}, got {type(module).__name__}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = cast(int, module.layer_idx)
    return attention_plan.attend(layer, query, key, value, scale=scale, dropout=dropout), None
