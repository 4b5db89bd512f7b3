"""The shapes and the workloads that are measured: head sizes of real models, lengths, advantages.

Shape letters: `T` tokens, `D` hidden size, `V` vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 8
"""Completions per prompt."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """An LM head by the hidden size and (padded) vocabulary of the model's public config."""

    model: str
    hidden_size: int
    vocab_size: int


HEADS = [
    Head(model="SmolLM2-135M", hidden_size=576, vocab_size=49152),
    Head(model="Qwen2.5-0.5B", hidden_size=896, vocab_size=151936),
    Head(model="Qwen3-0.6B", hidden_size=1024, vocab_size=151936),
    Head(model="Qwen2.5-1.5B", hidden_size=1536, vocab_size=151936),
    Head(model="Llama-3.2-1B", hidden_size=2048, vocab_size=128256),
    Head(model="Qwen3-1.7B", hidden_size=2048, vocab_size=151936),
    Head(model="Qwen2.5-3B", hidden_size=2048, vocab_size=151936),
]
"""The last two differ in nothing that a head can see; `by_shape` names both."""

BY_MODEL = {head.model: head for head in HEADS}


def by_shape() -> dict[tuple[int, int], str]:
    """Model names by (D, V): equal heads are measured once."""
    names: dict[tuple[int, int], list[str]] = {}
    for head in HEADS:
        names.setdefault((head.hidden_size, head.vocab_size), []).append(head.model)
    return {shape: ", ".join(models) for shape, models in names.items()}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """How the tokens of a problem are distributed."""

    name: str
    spread: float = 0.0
    """Standard deviation of the logarithm of the lengths; 0: all sequences are equally long."""
    zero_groups: float = 0.0
    """Share of the groups whose completions all got the same reward: their advantage is 0."""
    sure: float = 0.0
    """Share of the tokens whose probability is nearly 1."""
    moved: float = 0.02
    """Share of the tokens whose ratio is far outside of the clip bounds, above or below; about half
    of those are clipped, and a contender may skip their gradient."""
    min_groups: int = 1
    padding: float = 1.0
    """About how much longer the sequences are padded to the longest; for planning."""

    def num_groups(self, num_tokens: int) -> int:
        """Of eight completions, each of about 512 tokens, or shorter where there are few tokens."""
        wanted = max(self.min_groups, num_tokens // (512 * GROUP))
        return max(1, min(wanted, num_tokens // GROUP))

    def lengths(self, num_tokens: int) -> Tensor:
        """`[S]` int64 on the CPU, each at least 1, `num_tokens` in all."""
        count = GROUP * self.num_groups(num_tokens)
        shares = torch.exp(self.spread * torch.randn(count))
        if num_tokens < count:
            raise ValueError(f"num_tokens: wanted at least {count}, got {num_tokens}")
        bounds = (shares.cumsum(0) / shares.sum() * (num_tokens - count)).round().long()
        return bounds.diff(prepend=torch.zeros(1, dtype=torch.int64)) + 1

    def advantages(self, num_sequences: int) -> Tensor:
        """`[S]` fp32 on the CPU."""
        advantage = torch.randn(num_sequences)
        groups = num_sequences // GROUP
        chosen = torch.randperm(groups)[: round(self.zero_groups * groups)]
        advantage.view(groups, GROUP)[chosen] = 0.0
        return advantage


DENSE = Workload(name="dense")
LENGTHS = Workload(name="log-normal lengths", spread=0.8, padding=2.5)
LOW_ENTROPY = Workload(name="low-entropy logits", sure=0.8)
CONFIDENT = Workload(name="confident logits", sure=1.0)
ZERO_SHARES = (0.0, 0.2, 0.4, 0.5, 0.6)


def zero_advantage(share: float) -> Workload:
    """Ten groups or more, `share` of them without a signal."""
    name = f"{round(100 * share)} % zero-advantage groups"
    return Workload(name=name, zero_groups=share, min_groups=10)
