"""Engines turn prompts into completions; all of them speak this protocol."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample. There is no top-p or top-k: the ratio would have to account for them.

    Raises:
        ValueError: for a negative temperature or fewer than one token or completion.
    """

    temperature: float = 1.0
    """0 is greedy."""
    max_tokens: int = 128
    """Completions end here if not at an end-of-sequence token before."""
    n: int = 1
    """Completions per prompt."""
    seed: int = 0
    """The same seed, prompts and weights give the same completions."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: wanted at least 0 and finite, got {self.temperature}")
        for name in ("max_tokens", "n"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: wanted at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What the engine wrote, with the log-probabilities it sampled from."""

    token_ids: list[int]
    """With the end-of-sequence token, if it came."""
    logp: list[float]
    """Nats, one per token, at the sampling temperature (at 1 when greedy)."""
    finished: bool
    """Ended by itself; False when cut off at `max_tokens`."""


class Engine(Protocol):
    """Generation with weights that the trainer replaces."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams
    ) -> list[list[Completion]]:
        """`sampling.n` completions for each prompt of token ids, in order."""

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copies the trainer's parameters, by their Hugging Face names, into the engine."""

    def sleep(self) -> None:
        """Gives memory back while the trainer works; `wake` undoes it."""

    def wake(self) -> None:
        """Makes the engine ready again after `sleep`."""

    def close(self) -> None:
        """Ends what the engine has started; it generates no more."""
