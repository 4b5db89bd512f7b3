"""The engine that a config names, with its own options."""

from dataclasses import dataclass
from importlib import metadata

import torch

from rlvr_fast import options
from rlvr_fast.config import EngineName
from rlvr_fast.rollout import Engine
from rlvr_fast.rollout.embedded import EmbeddedEngine
from rlvr_fast.rollout.vllm_options import VLLMOptions, VLLMServerOptions


@dataclass(frozen=True, kw_only=True)
class EmbeddedOptions:
    """Options of `engine = "embedded"`."""

    cache_tokens: int = 65536
    """Tokens of prompts and completions held at once; larger requests run in turns."""


KINDS: dict[EngineName, type] = {
    EngineName.EMBEDDED: EmbeddedOptions,
    EngineName.VLLM: VLLMOptions,
    EngineName.VLLM_SERVER: VLLMServerOptions,
}
"""By engine, its options."""


def chosen(name: EngineName, device: str) -> EngineName:
    """`auto` is vllm on a GPU where it is installed, else embedded; any other is itself."""
    if name is not EngineName.AUTO:
        return name
    if not device.startswith("cuda"):
        return EngineName.EMBEDDED
    try:
        # Importing it would change this process.
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return EngineName.EMBEDDED
    return EngineName.VLLM


def make_engine(
    name: EngineName,
    model: str,
    settings: options.Table,
    *,
    dtype: torch.dtype,
    head_dtype: torch.dtype | None,
    device: str,
) -> Engine:
    """An engine with the weights of a model.

    Args:
        name: see `chosen`.
        model: folder or hub id.
        settings: the engine's own options, as in a config.
        dtype: of its weights.
        head_dtype: of its logits; None: the engine's choice.
        device: where the trainer works; a server may be elsewhere.

    Raises:
        ValueError: for an unknown option, or a model that the engine refuses.
        ImportError: for vllm where it is not installed.
    """
    name = chosen(name, device)
    own: object = options.build(f"option of engine {name}", KINDS[name], settings)
    match own:
        case EmbeddedOptions():
            return EmbeddedEngine(
                model,
                dtype=dtype,
                head_dtype=head_dtype,
                device=device,
                cache_tokens=own.cache_tokens,
            )
        case VLLMServerOptions():
            from rlvr_fast.rollout.vllm_server import VLLMServerEngine

            return VLLMServerEngine(
                model, dtype=dtype, head_dtype=head_dtype, device=device, options=own
            )
        case VLLMOptions():
            from rlvr_fast.rollout.vllm import VLLMEngine

            return VLLMEngine(model, dtype=dtype, head_dtype=head_dtype, device=device, options=own)
    raise AssertionError(own)
