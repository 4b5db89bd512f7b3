"""Checkpoints that appear complete or not at all, and hold everything a run depends on.

A run folder holds `config.json`, `checkpoints/step-000010/` and, at the end, `model/`; a run that
trains adapters also `adapter/`, and its checkpoints hold those, not the model they adapt. Tensors
are safetensors, everything else is JSON: loading one runs no code. A folder is written under a
hidden name, flushed to the disk and renamed, and loses its name before it is deleted, so that a
process killed at any moment leaves nothing that looks like a checkpoint and is none.
"""

import fcntl
import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlvr_fast import config as configs
from rlvr_fast import lora, parallel
from rlvr_fast.config import TrainConfig
from rlvr_fast.parallel import ALONE, World

_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a run is besides its tensors."""

    step: int
    """Training steps done."""
    method_state: Mapping[str, Any]
    position: int
    """In the endless order of prompts."""
    pending: Mapping[str, Any] | None = None
    """The next batch, where it was made ahead: the weights that sampled it are gone."""


def save(
    run_folder: Path,
    progress: Progress,
    model: PreTrainedModel,
    adamw: torch.optim.Optimizer,
    *,
    keep: int,
    world: World = ALONE,
) -> Path:
    """Writes `checkpoints/step-N` and deletes all but the newest `keep`; all ranks call it."""
    folder = run_folder / "checkpoints" / f"step-{progress.step:06d}"
    weights = parallel.for_leader(world, _weights(model))
    state_of_adamw = parallel.for_leader(world, _optimiser_tensors(adamw).items())
    if not world.leads:
        return folder
    with _appearing(folder) as scratch:
        save_file(weights, scratch / "model.safetensors")
        save_file(state_of_adamw, scratch / "optimizer.safetensors")
        save_file(_torch_rng(), scratch / "rng.safetensors")
        state = {
            "step": progress.step,
            "method_state": progress.method_state,
            "position": progress.position,
            "pending": progress.pending,
            "python_rng": random.getstate(),
            "numpy_rng": _numpy_rng(),
        }
        (scratch / "state.json").write_text(json.dumps(state))
    for old in _checkpoints(run_folder)[:-keep]:
        _discard(old)
    return folder


def latest(run_folder: Path) -> Path | None:
    """The newest checkpoint, or None."""
    found = _checkpoints(run_folder)
    return found[-1] if found else None


def restore(folder: Path, model: PreTrainedModel, adamw: torch.optim.Optimizer) -> Progress:
    """Puts weights, optimiser state and all random generators back as they were.

    Args:
        folder: from `latest`.
        model, adamw: of the shapes that were saved.

    Raises:
        ValueError: for a checkpoint of another model.
    """
    saved = load_file(folder / "model.safetensors")
    wanted = dict(_weights(model))
    if {name: x.shape for name, x in saved.items()} != {n: x.shape for n, x in wanted.items()}:
        raise ValueError(f"checkpoint {folder}: wanted the tensors of this model, got others")
    for name, tensor in wanted.items():
        tensor.copy_(parallel.like(saved[name], tensor))
    _restore_optimiser(adamw, load_file(folder / "optimizer.safetensors"))
    state = json.loads((folder / "state.json").read_text())
    version, internal, gauss = state["python_rng"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["numpy_rng"])
    rng = load_file(folder / "rng.safetensors")
    torch.set_rng_state(rng["cpu"])
    if torch.cuda.is_available() and "cuda" in rng:
        torch.cuda.set_rng_state(rng["cuda"])
    return Progress(**{each.name: state[each.name] for each in fields(Progress)})


def export(
    run_folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    *,
    world: World = ALONE,
) -> Path:
    """Writes `model/`, an ordinary Hugging Face folder with weights in `dtype`.

    Adapters are merged there, and written by themselves to `adapter/`, in peft's format and fp32.
    """
    folder = run_folder / "model"
    # Tied weights appear once, under the name that owns them; from_pretrained ties them again.
    named = parallel.for_leader(world, lora.named_weights(model, every_name=False))
    if not world.leads:
        return folder
    with _appearing(folder) as scratch:
        weights = {name: tensor.to("cpu", dtype) for name, tensor in named.items()}
        model.save_pretrained(scratch, state_dict=weights)
        tokenizer.save_pretrained(scratch)
        # save_pretrained writes the dtype of the model itself.
        file = scratch / "config.json"
        values = json.loads(file.read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
        file.write_text(json.dumps(values, indent=2) + "\n")
    if lora.adapted(model):
        with _appearing(run_folder / "adapter") as scratch:
            lora.write_adapter(model, scratch)
    return folder


def write_config(run_folder: Path, config: TrainConfig) -> None:
    """Writes `config.json`, whole or not at all."""
    run_folder.mkdir(parents=True, exist_ok=True)
    scratch = run_folder / ".config.json"
    scratch.write_text(json.dumps(configs.to_values(config), indent=2) + "\n")
    _flush(scratch)
    scratch.replace(run_folder / "config.json")


def read_config(run_folder: Path) -> dict[str, Any]:
    """The values that `write_config` wrote.

    Raises:
        FileNotFoundError: where there is no run.
    """
    file = run_folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"run: wanted a folder with a config.json, got {run_folder}")
    values: dict[str, Any] = json.loads(file.read_text())
    return values


@contextmanager
def hold(run_folder: Path) -> Iterator[None]:
    """Keeps other processes out of a run folder and clears what a killed one left half done.

    Raises:
        ValueError: while another process holds it. A dead process holds nothing.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    lock: TextIO
    with (run_folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"run_folder: wanted one that no other process trains in, got {run_folder}"
            ) from None
        for parent in (run_folder, run_folder / "checkpoints"):
            for leftover in parent.glob(".*.partial"):
                shutil.rmtree(leftover)
        yield


def _checkpoints(run_folder: Path) -> list[Path]:
    """Oldest first."""
    found = (run_folder / "checkpoints").glob("step-*")
    return sorted(
        (folder for folder in found if _NAME.fullmatch(folder.name)),
        key=lambda folder: int(folder.name.removeprefix("step-")),
    )


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A scratch folder that takes the name of `folder` when the block has filled it.

    Raises:
        OSError: where it cannot be written, on a full disk for one; nothing of it is left then.
    """
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        for file in scratch.iterdir():
            _flush(file)
        _flush(scratch)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise OSError(f"{folder} could not be written, older ones stay: {error}") from error
    if folder.exists():
        _discard(folder)
    scratch.rename(folder)
    _flush(folder.parent)


def _discard(folder: Path) -> None:
    nameless = folder.with_name(f".{folder.name}.old.partial")
    folder.rename(nameless)
    shutil.rmtree(nameless)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """What is trained; each once, though tied under several names."""
    for name, parameter in lora.trained(model):
        yield name, parameter.detach()


def _optimiser_tensors(adamw: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{index}.{name}": tensor
        for index, state in adamw.state_dict()["state"].items()
        for name, tensor in state.items()
    }


def _restore_optimiser(adamw: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in adamw.param_groups for p in group["params"]]
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = parallel.like(tensor, parameters[int(index)])
    adamw.load_state_dict({**adamw.state_dict(), "state": state})


def _torch_rng() -> dict[str, Tensor]:
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    return rng


def _numpy_rng() -> list[Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return [kind, np.asarray(keys).tolist(), position, has_gauss, gauss]
