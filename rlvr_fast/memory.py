"""What a run will need, before it starts; and which field to lower when it was too much."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlvr_fast import attention
from rlvr_fast.config import EngineName, Precision, TrainConfig
from rlvr_fast.devices import DTYPES
from rlvr_fast.ops.tiled_head import DEFAULT_BUDGET
from rlvr_fast.packed import Sample, pack

_PROBE = 37  # Tokens. No weight has such a dimension: what is kept is told from weights by shape.

KNOBS = {
    "generate": "samples_per_prompt, prompts_per_step or max_completion_tokens (or the engine's "
    "own share of the memory, see engine_options)",
    "update": "tokens_per_microbatch, then logits_budget",
}
"""What to lower, by the part of a step."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes on the training device, without the engine's cache of keys and values; and on disk."""

    weights: int
    """Of the policy and of a reference."""
    optimiser: int
    """Gradients and AdamW's two moments, fp32."""
    engine: int
    """Its copy of the weights; 0 if it lives in another process."""
    activations: int
    """Kept for the backward pass of the largest micro-batch, by a forward pass of 37 tokens."""
    logits: int
    """The op's budget, and what it makes of the head."""
    available: int
    """On the device, before all this."""
    files: int
    """Checkpoints, one of them half written, and the final model."""
    disk: int
    """Free where the run folder is."""

    @property
    def total(self) -> int:
        """Of everything that is needed."""
        return self.weights + self.optimiser + self.engine + self.activations + self.logits

    def lines(self, config: TrainConfig) -> list[str]:
        """One for people, and one more for memory and disk each where it will not fit."""
        parts = ("weights", "optimiser", "engine", "activations", "logits")
        told = ", ".join(f"{name} {getattr(self, name) / 1e9:.2f}" for name in parts)
        lines = [
            f"memory, estimated: {told}, in all {self.total / 1e9:.2f} of "
            f"{self.available / 1e9:.2f} GB"
        ]
        if self.total > self.available:
            lines.append(
                f"this will hardly fit: lower tokens_per_microbatch, "
                f"{config.tokens_per_microbatch} (activations), or logits_budget"
            )
        if self.files > self.disk:
            lines.append(
                f"the disk will hardly do: {config.run_folder} takes {self.files / 1e9:.2f} GB, "
                f"{self.disk / 1e9:.2f} are free; lower keep_checkpoints, {config.keep_checkpoints}"
            )
        return lines


def estimate(config: TrainConfig, model: PreTrainedModel, *, prompt_tokens: int) -> Estimate:
    """Of a run of this config.

    Args:
        config: of the run.
        model: on the training device, as it will be trained.
        prompt_tokens: of a typical prompt.

    Cost: a forward pass of 37 tokens.
    """
    written = config.samples_per_prompt * config.max_completion_tokens
    prompts = prompt_tokens * (1 if config.share_prompts else config.samples_per_prompt)
    tokens = min(config.tokens_per_microbatch, config.prompts_per_step * (prompts + written))
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = attention.head(model).weight.numel()
    half = config.precision is Precision.BF16
    budget = config.logits_budget or DEFAULT_BUDGET.get(model.device.type, 2 << 30)
    copies = 2 if config.kl_coef > 0 and trained == count else 1
    return Estimate(
        weights=sum(p.nbytes for p in model.parameters()) * copies,
        optimiser=12 * trained,
        engine=_engine(config, model),
        activations=_per_token(model, half) * tokens + 2 * half * count,
        logits=budget + 4 * head,
        available=_available(model.device),
        files=12 * trained * (config.keep_checkpoints + 1)
        + DTYPES[config.precision].itemsize * count,
        disk=_disk(Path(config.run_folder)),
    )


@contextmanager
def explained(part: str) -> Iterator[None]:
    """Memory that runs out in the block becomes a MemoryError that names fields to lower."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not _is_lack_of_memory(error):
            raise
        first = str(error).splitlines()[0]
        raise MemoryError(f"out of memory in {part}: lower {KNOBS[part]} ({first})") from error


def _is_lack_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _engine(config: TrainConfig, model: PreTrainedModel) -> int:
    """Bytes of its weights, where they are on the training device."""
    if config.engine is EngineName.VLLM_SERVER:
        return 0
    count = sum(p.numel() for p in model.parameters())
    embedded = model.device.type == "cpu" and config.engine is not EngineName.VLLM
    if embedded and config.engine_precision is Precision.BF16:
        # Once more, as products with few rows want them.
        layers = getattr(model.get_decoder(), "layers", ())
        count += sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim == 2)
    return DTYPES[config.engine_precision].itemsize * count


def _per_token(model: PreTrainedModel, half: bool) -> int:
    """Bytes that autograd keeps for one token, without the weights."""
    packed = pack([[Sample(prompt_ids=[0] * _PROBE, completion_ids=[])]])
    packed = packed.to(model.device)
    kept: dict[int, int] = {}
    weights = {tuple(sorted(p.shape)) for p in model.parameters()}  # and autocast's copies of them

    def keep(x: Tensor) -> Tensor:
        if tuple(sorted(x.shape)) not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    def give(x: Any) -> Any:
        return x

    autocast = torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=half)
    with torch.autograd.graph.saved_tensors_hooks(keep, give), autocast:
        attention.hidden_states(model, packed)
    return sum(kept.values()) // _PROBE


def _disk(folder: Path) -> int:
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    return shutil.disk_usage(there).free


def _available(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
