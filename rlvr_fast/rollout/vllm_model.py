"""What both vLLM engines know about a model before vLLM has it, and what they ask vLLM for."""

import contextlib
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlvr_fast import models
from rlvr_fast.rollout import Completion, SamplingParams

_COLDEST, _HOTTEST = 0.01, 2.0  # vLLM raises lower temperatures to the first without an error.
_MOST_MASKED = 1024  # More biased tokens than this vLLM's GPU sampler refuses.
_NO_NUMBER = -9999.0  # What vLLM's server sends for NaN and minus infinity.
# JSON has no infinity; after this no token has any probability left in fp32, at any temperature.
_NEVER = -1e30


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model as vLLM serves it."""

    path: str
    vocab_size: int
    """Of the tokenizer. An embedding may have more rows: they are never sampled."""
    rows: int
    """Of the embedding."""
    eos_ids: list[int]
    context: int
    """Tokens of prompt and completion together."""
    shapes: dict[str, tuple[int, ...]]
    """Of the parameters and buffers, by Hugging Face name."""
    aliases: dict[str, list[str]]
    """All names of each tied tensor, its own included, by the first."""

    @classmethod
    def read(cls, model: str | Path, max_model_len: int | None = None) -> "ServedModel":
        """From the configuration alone; no weight is read.

        Raises:
            ValueError: for a `max_model_len` that the model does not reach, or more embedding rows
                without a token than vLLM can mask.
        """
        config = AutoConfig.from_pretrained(model)
        text, tokenizer = config.get_text_config(), AutoTokenizer.from_pretrained(model)
        longest = text.max_position_embeddings
        if max_model_len is not None and not 1 < max_model_len <= longest:
            raise ValueError(f"max_model_len: wanted 2 to {longest}, got {max_model_len}")
        if text.vocab_size - len(tokenizer) > _MOST_MASKED:
            raise ValueError(
                f"model: wanted at most {_MOST_MASKED} embedding rows more than tokens for vLLM, "
                f"got {text.vocab_size} and {len(tokenizer)}"
            )
        # Making a model may draw random numbers, on that device too.
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        names: dict[int, list[str]] = {}
        state = skeleton.state_dict(keep_vars=True)
        for name, tensor in state.items():
            names.setdefault(id(tensor), []).append(name)
        return cls(
            path=str(model),
            vocab_size=len(tokenizer),
            rows=text.vocab_size,
            eos_ids=_eos_ids(model, text.eos_token_id, tokenizer.eos_token_id),
            context=max_model_len or longest,
            shapes={name: tuple(tensor.shape) for name, tensor in state.items()},
            aliases={aliases[0]: aliases for aliases in names.values()},
        )

    def within(self, context: int) -> "ServedModel":
        """The same where a server allows only so many tokens."""
        return replace(self, context=min(self.context, context))

    def check_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raises ValueError for a prompt that vLLM cannot continue."""
        for prompt in prompts:
            if not 0 < len(prompt) < self.context:
                raise ValueError(
                    f"prompt: wanted 1 to {self.context - 1} tokens, the model's context less "
                    f"one, got {len(prompt)}"
                )
            if not 0 <= min(prompt) <= max(prompt) < self.rows:
                raise ValueError(
                    f"prompt: wanted ids of 0 to {self.rows - 1}, got {min(prompt)} to "
                    f"{max(prompt)}"
                )

    def request(self, sampling: SamplingParams, place: int) -> dict[str, Any]:
        """Fields of vLLM's SamplingParams for the prompt at a place among the prompts.

        All that vLLM would do to the distribution besides the temperature is at its neutral
        default. vLLM gives sample `i` the seed plus `i`.

        Raises:
            ValueError: for a temperature that vLLM does not sample at.
        """
        if sampling.temperature and not _COLDEST <= sampling.temperature <= _HOTTEST:
            raise ValueError(
                f"temperature: wanted 0 or {_COLDEST} to {_HOTTEST} for vLLM, "
                f"got {sampling.temperature}"
            )
        # Neighbouring seeds and places must not share samples, so not their sum.
        digest = hashlib.blake2b(f"{sampling.seed} {place}".encode(), digest_size=8).digest()
        fields: dict[str, Any] = {
            "temperature": float(sampling.temperature),
            "max_tokens": sampling.max_tokens,
            "n": sampling.n if sampling.temperature else 1,
            "seed": int.from_bytes(digest, "big") >> 2,
            "logprobs": 0,
            "detokenize": False,
            "ignore_eos": True,
            "stop_token_ids": self.eos_ids,
        }
        if self.rows > self.vocab_size:
            fields["logit_bias"] = dict.fromkeys(range(self.vocab_size, self.rows), _NEVER)
        return fields

    def complete(self, named_tensors: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        """The tensors under all names that they have in the model, once each.

        vLLM keeps a tied head apart when it reloads: it must come under its own name, too.

        Raises:
            ValueError: for an unknown name, another shape, or a parameter that did not come.
        """
        given: dict[str, Tensor] = {}
        for name, tensor in named_tensors:
            if name not in self.shapes:
                raise ValueError(f"named_tensors: wanted names of the model's, got {name}")
            if tuple(tensor.shape) != self.shapes[name]:
                raise ValueError(
                    f"{name}: wanted {list(self.shapes[name])}, got {list(tensor.shape)}"
                )
            given[name] = tensor.detach()
        missing = [
            name for name, aliases in self.aliases.items() if not given.keys() & set(aliases)
        ]
        if missing:
            raise ValueError(f"named_tensors: wanted all parameters, got no {min(missing)}")
        for aliases in self.aliases.values():
            came = next(given[name] for name in aliases if name in given)
            given |= {name: came for name in aliases if name not in given}
        return list(given.items())


def completion(token_ids: list[int], logp: list[float], reason: str | None) -> Completion:
    """What vLLM wrote, and why it ended.

    Raises:
        ValueError: for log-probabilities that are no numbers.
        RuntimeError: for one that vLLM gave up.
    """
    if reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a completion with {reason}, wanted stop or length")
    if not all(math.isfinite(value) and value > _NO_NUMBER for value in logp):
        raise ValueError("weights: wanted finite log-probabilities, got NaN or infinite ones")
    return Completion(token_ids=token_ids, logp=logp, finished=reason == "stop")


def _eos_ids(model: str | Path, *stated: int | list[int] | None) -> list[int]:
    places = list(stated)
    with contextlib.suppress(OSError):  # Not every model has the file.
        places.append(GenerationConfig.from_pretrained(model).eos_token_id)
    return models.eos_ids(*places)
