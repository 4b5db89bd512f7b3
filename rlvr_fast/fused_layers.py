"""Decoder layers that run in fewer sweeps on the CPU, for training and generation.

A layer qualifies that has the modules of a pre-norm decoder with a gated MLP and that gives, on
random weights and input, what the fused layer gives: what transformers' code does with its modules
is tried, not assumed. Modules, parameters and their names stay; only the layer's `forward` changes.
A part that is more than it seems when it runs (adapters, hooks, shards) runs as its own module.
"""

import copy
from types import MethodType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, PreTrainedModel

from rlvr_fast.ops import decoder, laid_out
from rlvr_fast.ops.laid_out import LaidOut

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_DTYPES = (torch.float32, torch.bfloat16)


def install(model: PreTrainedModel) -> None:
    """Gives the decoder's layers that qualify a fused forward; harmless the second time.

    It is used for calls with an `attention_plan` only, on the CPU, in fp32 or bf16.
    """
    agrees: dict[tuple[Any, ...], bool] = {}
    layers = [layer for layer in getattr(model.get_decoder(), "layers", ()) if _has_parts(layer)]
    for layer in layers:
        kind = _kind(layer)
        if kind not in agrees:
            agrees[kind] = _agrees(layer)
        if agrees[kind] and "forward" not in vars(layer):  # Somebody else's stays.
            setattr(layer, "forward", MethodType(_forward, layer))  # noqa: B010


def lay_out(model: PreTrainedModel) -> None:
    """Makes the fused layers faster with few rows, in inference mode, on the CPU, in bf16.

    Their weights are copied: to be called whenever they have changed. Layers of other dtypes, or
    with parts that are more than they seem, stay as they are.
    """
    for layer in getattr(model.get_decoder(), "layers", ()):
        fused = getattr(vars(layer).get("forward"), "__func__", None) is _forward
        layer.laid_out = _Products.of(layer) if fused else None


class _Products(NamedTuple):
    """The matrix products of a layer, by what they give."""

    heads: LaidOut
    attended: LaidOut
    gate: LaidOut
    added: LaidOut

    @classmethod
    def of(cls, layer: Any) -> "_Products | None":
        attention, mlp = layer.self_attn, layer.mlp
        parts = (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        )
        modules = [module for part in parts for module in part]
        weight = attention.q_proj.weight
        if not (laid_out.supported(weight) and _plain_linear(weight, *modules)):
            return None
        return cls(*(LaidOut(*_layers(*part)) for part in parts))


def _forward(layer: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    if kwargs.get("attention_plan") is None or not _fits(layer, hidden_states):
        return cast(Tensor, type(layer).forward(layer, hidden_states, **kwargs))
    attention, mlp = layer.self_attn, layer.mlp
    products = getattr(layer, "laid_out", None) if hidden_states.is_inference() else None
    x = hidden_states.flatten(0, -2)
    wide, narrow = x.dtype, _product_dtype(x)
    fused = _fits_attention(attention, x, kwargs)
    x, normed = _normed(layer.input_layernorm, x, narrow if fused else wide)
    if fused:
        added = _attended(attention, normed, hidden_states.shape, kwargs, products)
    else:
        added = attention(hidden_states=normed.view_as(hidden_states), **kwargs)[0]
    fused = _plain(mlp) and _plain_linear(x, mlp.gate_proj, mlp.up_proj)
    dtype = narrow if fused else wide
    x, normed = _normed(layer.post_attention_layernorm, x, dtype, added.flatten(0, -2))
    if fused and products:
        added = products.added(decoder.gate(products.gate(normed)))
    elif fused:
        added = mlp.down_proj(decoder.gated(normed, *_layers(mlp.gate_proj, mlp.up_proj)))
    else:
        added = mlp(normed)
    return cast(Tensor, x + added).view_as(hidden_states)


def _normed(
    norm: Any, x: Tensor, dtype: torch.dtype, added: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return decoder.rms_norm(x, norm.weight, eps=norm.variance_epsilon, dtype=dtype, added=added)


def _attended(
    attention: Any,
    x: Tensor,
    shape: torch.Size,
    kwargs: dict[str, Any],
    products: _Products | None,
) -> Tensor:
    size = attention.head_dim
    angles = tuple(angle.flatten(0, 1) for angle in kwargs["position_embeddings"])
    norms = [attention.q_norm, attention.k_norm] if _head_norms(attention) else []
    heads = decoder.Heads(
        queries=len(attention.q_proj.weight) // size,
        keys=len(attention.k_proj.weight) // size,
        size=size,
        eps=norms[0].variance_epsilon if norms else None,
    )
    weights = tuple(norm.weight for norm in norms) or None
    if products:
        parts = decoder.turn_heads(products.heads(x), angles, heads, weights)
    else:
        layers = _layers(attention.q_proj, attention.k_proj, attention.v_proj)
        parts = decoder.rotated_heads(x, *layers, angles, heads, weights)
    q, k, v = (part.unflatten(0, shape[:-1]).transpose(1, 2) for part in parts)
    dropout = attention.attention_dropout if attention.training else 0.0
    own = {"dropout": dropout, "scaling": attention.scaling}
    function = AttentionInterface()[attention.config._attn_implementation]
    heads_out = function(attention, q, k, v, **(kwargs | own))[0]
    projected = products.attended if products else attention.o_proj
    return cast(Tensor, projected(heads_out.flatten(-2)))


def _layers(*layers: nn.Linear) -> tuple[list[Tensor], list[Tensor | None]]:
    return [layer.weight for layer in layers], [layer.bias for layer in layers]


def _product_dtype(x: Tensor) -> torch.dtype:
    if not torch.is_autocast_enabled("cpu"):
        return x.dtype
    return torch.get_autocast_dtype("cpu")


def _fits(layer: Any, hidden: Tensor) -> bool:
    return (
        hidden.is_cpu
        and hidden.dtype in _DTYPES
        and _product_dtype(hidden) in _DTYPES
        and not isinstance(layer, FSDPModule)
        and _plain_norm(hidden, layer.input_layernorm, layer.post_attention_layernorm)
    )


def _fits_attention(attention: Any, x: Tensor, kwargs: dict[str, Any]) -> bool:
    cosine = kwargs["position_embeddings"][0]
    return (
        _plain(attention)
        and _plain_linear(x, attention.q_proj, attention.k_proj, attention.v_proj)
        and (not _head_norms(attention) or _plain_norm(x, attention.q_norm, attention.k_norm))
        and cosine.dtype in _DTYPES
        and cosine.shape[-1] == attention.head_dim
        and cosine[..., 0].numel() == len(x)
    )


def _head_norms(attention: Any) -> bool:
    return "q_norm" in attention._modules


def _plain_linear(x: Tensor, *modules: nn.Module) -> bool:
    return all(
        type(module) is nn.Linear and module.weight.dtype == x.dtype and _plain(module)
        for module in modules
    )


def _plain_norm(x: Tensor, *modules: Any) -> bool:
    return all(_plain(module) and module.weight.dtype == x.dtype for module in modules)


def _plain(module: nn.Module) -> bool:
    """Whether its weights are here, whole, and calling it would do no more than its forward."""
    return (
        not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and not isinstance(module, FSDPModule)
        and not any(
            parameter is not None and (isinstance(parameter, DTensor) or not parameter.is_cpu)
            for parameter in module._parameters.values()
        )
    )


def _has_parts(layer: nn.Module) -> bool:
    parts: dict[str, Any] = layer._modules
    if parts.keys() != _LAYER:
        return False
    attention, mlp = parts["self_attn"], parts["mlp"]
    names = attention._modules.keys()
    norms = [parts["input_layernorm"], parts["post_attention_layernorm"]]
    if names >= _HEAD_NORMS:
        norms += [attention.q_norm, attention.k_norm]
    return (
        names - _HEAD_NORMS == _ATTENTION
        and mlp._modules.keys() == _MLP
        and all(
            hasattr(norm, "variance_epsilon") and getattr(norm, "weight", None) is not None
            for norm in norms
        )
    )


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """Layers of one kind run the same code: the same classes with the same settings."""
    return tuple(
        (
            type(module),
            tuple(
                (name, value)
                for name, value in sorted(vars(module).items())
                if isinstance(value, bool | int | float | str) and name != "layer_idx"
            ),
            tuple(tuple(parameter.shape) for parameter in module.parameters(recurse=False)),
        )
        for module in layer.modules()
    )


class _Mixture:
    """Attention that gives away every query, key and value, whoever may see them."""

    longest = 1

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, dropout: float
    ) -> Tensor:
        ratio = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(ratio, 1) for x in (key, value))
        return (scale * query * key + value).transpose(1, 2).to(value.dtype)


@torch.no_grad()
def _agrees(layer: nn.Module) -> bool:
    """Whether a copy with random weights, in fp32, gives the same fused and not."""
    if any(isinstance(p, DTensor) or not p.is_cpu for p in layer.parameters()):
        return False
    layer = copy.deepcopy(layer).float().eval().requires_grad_(False)
    draws = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        scale = 1.0 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
        parameter.normal_(generator=draws).mul_(scale)
    attention: Any = layer.self_attn
    width = cast(Any, layer.input_layernorm).weight.shape[0]
    hidden = torch.randn(1, 3, width, generator=draws)
    angle = torch.rand(1, 3, attention.head_dim // 2, generator=draws).repeat(1, 1, 2)
    settings = {"position_embeddings": (angle.cos(), angle.sin()), "attention_plan": _Mixture()}
    settings["attention_mask"] = None
    with torch.autocast("cpu", enabled=False):
        if not _fits(layer, hidden):
            return False
        wanted = type(layer).forward(layer, hidden, **settings)
        found = _forward(layer, hidden, **settings)
    return bool((found - wanted).norm() <= 1e-4 * (wanted - hidden).norm())
