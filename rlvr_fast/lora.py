"""Low-rank adapters (2106.09685) through peft: they train in place of the model's own weights.

A layer computes `x W^T + (alpha / rank) x A^T B^T` with `W` frozen. The model stays the
`PreTrainedModel` that it was, with other linear layers inside, so that whatever runs it runs it
still. `A` and `B` are fp32 under a `W` of any dtype.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

ALL_LINEAR = "all-linear"
_NAME = "default"
_BASE = ".base_layer"
_SAVED_PREFIX = "base_model.model."


def wrap(
    model: PreTrainedModel, *, rank: int, alpha: float, targets: str = ALL_LINEAR, seed: int = 0
) -> None:
    """Freezes a model and gives it adapters to train, in place; they change no output yet.

    Args:
        model: without adapters.
        rank: of each adapter, >= 1.
        alpha: the adapters' product is scaled by `alpha / rank`; > 0.
        targets: names of linear layers of the decoder separated by commas, the last part of a name
            or all of it; or `all-linear`: every one. The head never has an adapter.
        seed: of `A`; `B` starts as 0.

    Raises:
        ValueError: for a rank, alpha or target that cannot be.
        ImportError: without the package peft.
    """
    if rank < 1:
        raise ValueError(f"lora_rank: wanted >= 1, got {rank}")
    if not 0 < alpha < float("inf"):
        raise ValueError(f"lora_alpha: wanted > 0 and finite, got {alpha}")
    if adapted(model):
        raise ValueError("model: wanted one without adapters, got one that has them")
    layers = _targeted(model, targets)
    peft = _peft()
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=layers,
        task_type="CAUSAL_LM",
    )
    # peft draws on the CPU, wherever the model is.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, model, adapter_name=_NAME)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def adapted(model: PreTrainedModel) -> bool:
    """Whether `wrap` has been here."""
    return getattr(model, "peft_config", None) is not None


def trained(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The parameters that an optimiser changes, each once, with the model's names for them."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


@torch.no_grad()
def named_weights(
    model: PreTrainedModel, *, every_name: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """All weights as the model without adapters names them, with its adapters added in.

    Args:
        model: with or without adapters; it is not changed.
        every_name: tied weights come under each of their names, else once.

    Yields:
        Name and detached tensor. A layer with an adapter gives a new tensor, fp32 if its own was
        narrower, which lives no longer than the caller keeps it.
    """
    layers = {f"{name}{_BASE}.weight": layer for name, layer in _layers(model)}
    for name, parameter in model.named_parameters(remove_duplicate=not every_name):
        if name in layers:
            yield name.replace(_BASE, ""), parameter.detach() + layers[name].get_delta_weight(_NAME)
        elif not _is_adapters(name):
            yield name.replace(_BASE, ""), parameter.detach()


@contextmanager
def reference(model: PreTrainedModel) -> Iterator[None]:
    """Within it the model computes as if it had no adapters; do not train there."""
    layers = [layer for _, layer in _layers(model)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def write_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Writes what `peft.PeftModel.from_pretrained(base, folder)` reads, in fp32."""
    settings: Any = copy.copy(model.peft_config[_NAME])
    settings.inference_mode = True
    settings.base_model_name_or_path = model.name_or_path
    settings.target_modules = sorted(settings.target_modules)
    settings.save_pretrained(folder)
    tensors = {
        _SAVED_PREFIX + name.replace(f".{_NAME}.", "."): parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if _is_adapters(name)
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _targeted(model: PreTrainedModel, targets: str) -> Sequence[str]:
    """Full names of the layers."""
    decoder = {id(module) for module in model.get_decoder().modules()}
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and id(module) in decoder
        and module is not model.get_output_embeddings()
    ]
    if targets == ALL_LINEAR:
        return linear
    found: set[str] = set()
    for target in (part.strip() for part in targets.split(",")):
        named = [name for name in linear if f".{name}".endswith(f".{target}")]
        if not target or not named:
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(
                f"lora_targets: wanted {ALL_LINEAR} or some of {', '.join(known)}, got {targets!r}"
            )
        found.update(named)
    return sorted(found)


def _layers(model: PreTrainedModel) -> list[tuple[str, Any]]:
    if not adapted(model):
        return []
    lora_layer = _peft().tuners.lora.LoraLayer
    return [(name, each) for name, each in model.named_modules() if isinstance(each, lora_layer)]


def _is_adapters(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("lora_rank: adapters need peft: pip install peft") from error
    return peft
