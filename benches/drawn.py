"""Batches of drawn completions that go through a method's own hooks, as a trainer's do.

An update takes as long for drawn tokens as for sampled ones, and nobody has to wait for a model.
"""

import math
import random
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlvr_fast.methods import METHODS, method
from rlvr_fast.methods.base import Context, Method
from rlvr_fast.methods.rollouts import Groups
from rlvr_fast.objectives import Distillation
from rlvr_fast.prompts import Prompts
from rlvr_fast.rollout import Completion, SamplingParams
from rlvr_fast.tasks import Example, Task

OPTIONS: Mapping[str, object] = {"embedding": "words", "column": "answer"}
"""By name: options that want a download, or a column that few tasks have, and what they are here.
"""
COLUMNS: Mapping[str, object] = {"answer": "7"}
"""What tasks know of every example."""


@dataclass(frozen=True, kw_only=True)
class DrawnEngine:
    """Completions that depend on the prompt, the seed and their place in the group only."""

    vocab_size: int
    lengths: tuple[int, int]
    """The least and the greatest."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams
    ) -> list[list[Completion]]:
        return [
            [self._completion(f"{list(ids)} {sampling.seed} {i}") for i in range(sampling.n)]
            for ids in prompts
        ]

    def _completion(self, seed: str) -> Completion:
        draw = random.Random(seed)
        length = draw.randint(*self.lengths)
        return Completion(
            token_ids=[draw.randrange(4, self.vocab_size) for _ in range(length)],
            logp=[draw.gauss(-math.log(self.vocab_size), 0.2) for _ in range(length)],
            finished=True,
        )

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """It has none."""

    def sleep(self) -> None:
        """It never works."""

    wake = close = sleep


def needed_options(kind: type[Method]) -> dict[str, object]:
    """Options of a method that cannot stay as they are, or have no default."""
    return {
        each.name: OPTIONS[each.name]
        for each in fields(kind)
        if each.init and (each.name in OPTIONS or (each.default is each.default_factory is MISSING))
    }


def fitting(name: str) -> dict[str, object]:
    """What a config must say that trains this method, over any other of its fields."""
    kind = METHODS[name]
    given: dict[str, object] = {"method": name, "method_options": needed_options(kind)}
    if isinstance(method(name, needed_options(kind)).objective(), Distillation):
        given["entropy_coef"] = 0.0  # A distillation has nothing that could take a bonus.
    return given


def right_or_wrong(completions: Sequence[object], **columns: object) -> list[float]:
    """0 or 1, by the text alone; about as many of each."""
    return [float(zlib.crc32(str(text).encode()) % 2) for text in completions]


def context(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    lengths: tuple[int, int],
    seed: int = 0,
) -> Context:
    """Of a step that takes every example once."""
    task = Task("drawn", examples, examples, right_or_wrong)
    return Context(
        step=1,
        position=0,
        task=task,
        prompts=Prompts(examples, tokenizer),
        prompts_per_step=len(examples),
        tokenizer=tokenizer,
        engine=DrawnEngine(vocab_size=len(tokenizer), lengths=lengths),
        sampling=SamplingParams(max_tokens=lengths[1], n=samples, seed=seed),
    )


def verified(by: Method, on: Context) -> Groups:
    """What the step has collected before it knows advantages."""
    prompts = by.select_prompts(on)
    return by.verify(on, by.rollout(on, prompts))
