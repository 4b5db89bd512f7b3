"""Where the scored tokens of a padded batch lie, and what the backbone computes for them.

TRL pads prompts on the left and completions on the right, and repeats each prompt for each of its
completions. Rows are laid out without either where the model can: one block per prompt. Else the
backbone runs on the padded batch as TRL's does.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlvr_fast import attention
from rlvr_fast.packed import Packed, Sample, pack

STATIC_ROTATIONS = {"default", "linear", "llama3", "yarn"}
"""Rotary embeddings whose angles depend on distances only: padding on the left changes nothing."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """`P` prompt and `C` completion columns of `B` sequences, all on the CPU."""

    ids: Tensor
    """`[B, P+C]` int64."""
    mask: Tensor
    """`[B, P+C]` bool, what the model sees."""
    scored: Tensor
    """`[B, C]` bool, which completion tokens the loss looks at."""

    @property
    def width(self) -> int:
        """C."""
        return self.scored.shape[1]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.mask.sum(1).amax())

    @property
    def lies_as_expected(self) -> bool:
        """Prompts end, and completions begin, where the two meet; no prompt is empty."""
        prompt, completion = self.mask[:, : -self.width], self.mask[:, -self.width :]
        return bool(
            prompt.shape[1]
            and prompt[:, -1].all()
            and (prompt[:, 1:] >= prompt[:, :-1]).all()
            and (completion[:, 1:] <= completion[:, :-1]).all()
        )


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The `n` scored tokens in the order in which the loss sees them."""

    places: Tensor
    """`[n]` int64 on the CPU, in the flattened `[B, C]`."""
    seq_offsets: Tensor
    """`[S+1]` int64 on the CPU; sequences without a scored token may be left out."""
    batch: Batch
    packed: Packed | None
    """None: the backbone runs on the padded batch."""
    hidden_index: Tensor
    """`[n]` int64 on the CPU, the backbone's row that predicts each; padded rows flattened."""

    def hidden(self, model: PreTrainedModel) -> Tensor:
        """`[n, D]`, after the final norm; differentiable."""
        device, batch = model.device, self.batch
        index = self.hidden_index.to(device)
        if self.packed is not None:
            return _packed_hidden(model, self.packed.to(device)).index_select(0, index)
        found = model.get_decoder()(
            input_ids=batch.ids.to(device),
            attention_mask=batch.mask.to(device).long(),
            use_cache=False,
        )
        hidden: Tensor = found.last_hidden_state
        return hidden.flatten(0, 1).index_select(0, index.to(hidden.device))

    def gather(self, values: Tensor) -> Tensor:
        """`[B]`, `[B, 1]` or `[B, C]` to `[n]` fp32 on the CPU."""
        values = values if values.dim() == 2 else values[:, None]
        wide = values.detach().cpu().float().expand(self.batch.scored.shape)
        return wide.reshape(-1).index_select(0, self.places)

    def spread(self, values: Tensor) -> Tensor:
        """`[n]` to `[B, C]`, 0 where nothing is scored; differentiable."""
        shape = self.batch.scored.shape
        flat = values.new_zeros(shape.numel())
        return flat.index_copy(0, self.places.to(values.device), values).view(shape)

    @property
    def targets(self) -> Tensor:
        """`[n]` int64 on the CPU."""
        return self.batch.ids[:, -self.batch.width :].reshape(-1).index_select(0, self.places)


class _Kept:
    """A plan that FSDP hands to each layer as it is: of a dataclass it would make a copy in its own
    dtype, without what the layer before has prepared.
    """

    def __init__(self, plan: attention.Plan) -> None:
        self.longest = plan.longest
        self.attend = plan.attend


def _packed_hidden(model: PreTrainedModel, packed: Packed) -> Tensor:
    plan = _Kept(attention.plan_pack(packed))
    return attention.run(model, packed.input_ids[None], packed.position_ids[None], plan)[0]


def layout(batch: Batch, *, window: float) -> Layout:
    """Without padding and with each prompt once if no sequence is longer than `window`."""
    if not batch.lies_as_expected or batch.longest > window or not batch.scored.any():
        return _padded(batch)
    return _packed(batch)


def packed_window(model: PreTrainedModel) -> float:
    """The longest sequence that gives the same packed and padded; 0 for a model without.

    It takes attention that `attention.install` supports, in the implementation that it leaves to
    all other calls (sdpa), and positions that count as distances only.
    """
    config = model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", attention.NAME):
        return 0
    rotations = set(_rope_types(getattr(config, "rope_parameters", None)))
    if not rotations or not rotations <= STATIC_ROTATIONS:
        return 0
    try:
        attention.install(model)
    except ValueError:
        return 0
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    window = getattr(config, "sliding_window", None)
    return float("inf") if window is None or "sliding_attention" not in kinds else window


def _rope_types(parameters: object) -> Iterator[str]:
    """Of the model, or of each kind of layer."""
    if isinstance(parameters, dict):
        if "rope_type" in parameters:
            yield str(parameters["rope_type"])
        else:
            for value in parameters.values():
                yield from _rope_types(value)


def _packed(batch: Batch) -> Layout:
    prompts, completions = batch.ids[:, : -batch.width], batch.ids[:, -batch.width :]
    seen = batch.mask
    groups: dict[tuple[int, ...], list[int]] = {}
    for row in batch.scored.any(1).nonzero().squeeze(1).tolist():
        prompt = prompts[row][seen[row, : -batch.width]].tolist()
        groups.setdefault(tuple(prompt), []).append(row)
    packed = pack(
        [
            [
                Sample(
                    prompt_ids=prompt,
                    completion_ids=completions[row][seen[row, -batch.width :]].tolist(),
                )
                for row in rows
            ]
            for prompt, rows in groups.items()
        ]
    )
    order = torch.tensor([row for rows in groups.values() for row in rows])
    scored = batch.scored[order]
    return Layout(
        places=(order[:, None] * batch.width + torch.arange(batch.width))[scored],
        seq_offsets=_offsets(scored),
        batch=batch,
        packed=packed,
        hidden_index=packed.hidden_index[scored[seen[order, -batch.width :]]],
    )


def _padded(batch: Batch) -> Layout:
    rows, columns = batch.scored.nonzero(as_tuple=True)
    total = batch.ids.shape[1]
    return Layout(
        places=rows * batch.width + columns,
        seq_offsets=_offsets(batch.scored),
        batch=batch,
        packed=None,
        hidden_index=rows * total + (total - batch.width - 1) + columns,
    )


def _offsets(scored: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), scored.sum(1).cumsum(0)])
