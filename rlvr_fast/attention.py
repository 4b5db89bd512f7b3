"""Runs a transformers model over a pack: every completion sees its prompt and itself.

The model's own layers run unchanged on the `N` tokens of a pack; only the attention function is
ours, registered with transformers' `AttentionInterface`. What attends to what is planned once per
pack: the rows that share keys are gathered into a few rectangular SDPA calls, so neither padding
nor a `[N, N]` mask reaches the rest of the model.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlvr_fast.packed import Packed

NAME = "rlvr_fast"
_WASTE = 1.5  # How much larger a rectangle may be than what it holds; each is a kernel launch.
_SMALL = 2**16  # Query-key pairs below which waste is not worth another launch.


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


class Plan(Protocol):
    """Decides who attends to whom; passed through the model to every layer."""

    @property
    def longest(self) -> int: ...  # Tokens that see each other, first to last, at most.

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, dropout: float
    ) -> Tensor:
        """`[B, H, q, d]`, and `[B, K, q, d]` for the keys and values, to `[B, q, H, d]`."""


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
    plan = plan_blocks(packed)
    return run(model, packed.input_ids[None], packed.position_ids[None], plan)[0]


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


class _Rectangle(NamedTuple):
    """One SDPA call over `C` sequences; surplus places repeat a row of the same sequence."""

    queries: Tensor
    """`[C, q]` int64, rows of the pack."""
    keys: Tensor
    """`[C, k]` int64, rows of the pack."""
    mask: Tensor | None
    """`[C, 1, q, k]` bool; None for plain causal."""


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """The attention of one pack, see `plan_blocks`."""

    rectangles: Sequence[_Rectangle]
    output_rows: Tensor
    """`[N]` int64: where in the rectangles' queries, laid end to end, each token stands."""
    longest: int
    """Tokens of a prompt and one of its completions, at most."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, dropout: float
    ) -> Tensor:
        device = value.device.type
        # On the CPU, SDPA is two to three times as fast in fp32 as in bf16, casts included.
        dtype = torch.promote_types(value.dtype, torch.float32) if device == "cpu" else value.dtype
        with torch.autocast(device, enabled=False):
            q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
            outputs = [_sdpa(r, q, k, v, scale, dropout) for r in self.rectangles]
            return _gather(torch.cat(outputs), self.output_rows)[None].to(value.dtype)


def _sdpa(
    rectangle: _Rectangle, query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float
) -> Tensor:
    num_keys, ratio = key.shape[1], query.shape[1] // key.shape[1]
    q = _gather(query, rectangle.queries).transpose(1, 2)
    k, v = (_gather(rows, rectangle.keys).transpose(1, 2) for rows in (key, value))
    mask = rectangle.mask
    if mask is None:
        k, v = (x.repeat_interleave(ratio, 1) for x in (k, v))
    else:
        # All query heads of a key head become further queries of it: nothing is repeated.
        q = q.unflatten(1, (num_keys, ratio)).flatten(2, 3)
        mask = mask.repeat(1, 1, ratio, 1)
    output = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale
    )
    heads: Tensor = output.unflatten(2, (-1, rectangle.queries.shape[1])).flatten(1, 2)
    return heads.transpose(1, 2).flatten(0, 1)


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """`rows[index]` over the first dimension; an embedding's backward is the fast one."""
    gathered: Tensor = F.embedding(index, rows.flatten(1)).unflatten(-1, rows.shape[1:])
    return gathered


class _Sequence(NamedTuple):
    """Rows `start` to `start + length`; they also see `prompt_length` rows of their prompt."""

    length: int
    prompt_length: int
    start: int
    prompt_start: int


def plan_blocks(packed: Packed) -> BlockPlan:
    """Plans the attention of a pack; the tensors are on its device.

    A prompt is a causal sequence of its own, and so is a prompt with an only completion.
    """
    device = packed.input_ids.device
    sequences = list(_sequences(packed))
    output_rows = torch.empty(packed.input_ids.shape[0], dtype=torch.int64)
    rectangles: list[_Rectangle] = []
    offset = 0
    plain, branches = ([s for s in sequences if bool(s.prompt_length) is b] for b in (False, True))
    for bucket in itertools.chain(_buckets(plain), _buckets(branches)):
        queries, keys, mask = _rectangle(bucket)
        lengths = torch.tensor([s.length for s in bucket])
        real = torch.arange(queries.shape[1]) < lengths[:, None]
        output_rows[queries[real]] = offset + real.flatten().nonzero().squeeze(1)
        offset += queries.numel()
        mask = None if mask is None else mask.to(device)
        rectangles.append(_Rectangle(queries.to(device), keys.to(device), mask))
    longest = max((s.prompt_length + s.length for s in sequences), default=0)
    return BlockPlan(rectangles=rectangles, output_rows=output_rows.to(device), longest=longest)


def _sequences(packed: Packed) -> Iterator[_Sequence]:
    bounds = packed.cu_seqlens.tolist()
    for first, last in itertools.pairwise(packed.block_offsets.tolist()):
        segments = [(a, b - a) for a, b in itertools.pairwise(bounds[first : last + 1])]
        (prompt, prompt_length), *completions = [s for s in segments if s[1]]
        if len(completions) == 1:
            yield _Sequence(prompt_length + completions[0][1], 0, prompt, prompt)
            continue
        yield _Sequence(prompt_length, 0, prompt, prompt)
        for start, length in completions:
            yield _Sequence(length, prompt_length, start, prompt)


def _buckets(sequences: Sequence[_Sequence]) -> Iterator[list[_Sequence]]:
    """Sequences of similar size, so that little of their common rectangle is empty."""
    bucket: list[_Sequence] = []
    filled = prompt = 0
    for sequence in sorted(sequences, reverse=True):
        area = sequence.length * (sequence.prompt_length + sequence.length)
        length = bucket[0].length if bucket else sequence.length
        prompt = max(prompt, sequence.prompt_length)
        whole = (len(bucket) + 1) * length * (prompt + length)
        if bucket and whole > max(_SMALL, _WASTE * (filled + area)):
            yield bucket
            bucket, filled, prompt = [], 0, sequence.prompt_length
        bucket.append(sequence)
        filled += area
    if bucket:
        yield bucket


def _rectangle(bucket: Sequence[_Sequence]) -> _Rectangle:
    length, prompt_length, start, prompt_start = torch.tensor(bucket).T[:, :, None]
    column = torch.arange(int(length.max()))
    queries = start + torch.minimum(column, length - 1)
    if not prompt_length.any():
        return _Rectangle(queries=queries, keys=queries, mask=None)
    prompt_column = torch.arange(int(prompt_length.max()))
    prompt = prompt_start + torch.minimum(prompt_column, prompt_length - 1)
    shape = (len(bucket), len(column), -1)
    prompt_seen = (prompt_column < prompt_length)[:, None].expand(shape)
    own_seen = (column <= column[:, None]).expand(shape)
    mask = torch.cat([prompt_seen, own_seen], dim=2)[:, None]
    return _Rectangle(queries=queries, keys=torch.cat([prompt, queries], 1), mask=mask)
