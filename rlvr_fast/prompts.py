"""Prompts as token ids, and the seeded order in which training visits them."""

import math
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlvr_fast.tasks import Example
from rlvr_fast.tasks import Prompt as Asked

_SMALLEST_SHARE = 1e-4  # of a task; the blocks of the order grow with its inverse


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One example, ready for an engine."""

    index: int
    """Position among the task's examples: the key of whatever a method remembers of it."""
    example: Example
    ids: list[int]


class Prompts(Sequence[Prompt]):
    """Encodes examples when they are first asked for.

    A string is tokenised as it is; messages go through the tokenizer's chat template.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        *,
        system_prompt: str = "",
        seed: int = 0,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """Nothing is encoded yet.

        Args:
            examples: at least one if any prompt is to be taken.
            tokenizer: the model's.
            system_prompt: put before every chat; empty: none.
            seed: of the order of `take`.
            weights: the share of every `Example.task` in that order, see `Task.weights`; none or
                empty: every example has the same share, whatever its task.

        Raises:
            ValueError: for weights that are not those of the examples' tasks.
        """
        self._examples, self._tokenizer = examples, tokenizer
        self._system_prompt = system_prompt
        self._order = _Order(examples, weights or {}, seed)
        self._encoded: dict[int, Prompt] = {}

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Prompt:  # type: ignore[override]
        if index not in self._encoded:
            example = self._examples[index]
            ids = self.encode(example.prompt)
            self._encoded[index] = Prompt(index=index, example=example, ids=ids)
        return self._encoded[index]

    def take(self, position: int, count: int) -> list[Prompt]:
        """`count` prompts from `position` (from 0) on of an endless order.

        The order is a function of the seed, the examples and the weights, and of nothing else. It
        visits every example once in each epoch, and every epoch is a new permutation. With weights
        every task has epochs of its own, and has had its share of prompts, give or take one, after
        every few of them.

        Raises:
            ValueError: for a negative number.
        """
        if position < 0 or count < 0:
            raise ValueError(f"take: wanted position and count >= 0, got {position} and {count}")
        return [self[index] for index in self._order.indices(position, count)]

    def encode(self, prompt: Asked) -> list[int]:
        """Token ids of any prompt, as those of the examples are made.

        Raises:
            ValueError: for a chat without a chat template, or a system prompt without a chat.
        """
        if isinstance(prompt, str):
            if self._system_prompt:
                raise ValueError(
                    f"system_prompt: wanted a task whose prompts are chats, "
                    f"got the plain text {prompt!r}"
                )
            return list(self._tokenizer(prompt)["input_ids"])
        messages = [dict(message) for message in prompt]
        if self._system_prompt:
            messages.insert(0, {"role": "system", "content": self._system_prompt})
        if self._tokenizer.chat_template is None:
            raise ValueError(
                "model: wanted one whose tokenizer has a chat template, since the task's prompts "
                "are chats, got none"
            )
        text = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        # The template has written every special token already.
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


class _Order:
    """An endless order of indices that can be read from anywhere.

    Positions are cut into blocks. How often a task has come by the end of a block is a difference
    of two rounded products of that end, so that the counts add up and no state is needed.
    """

    def __init__(
        self, examples: Sequence[Example], weights: Mapping[str, float], seed: int
    ) -> None:
        self._seed = seed
        self._members: dict[str, Sequence[int]] = {"": range(len(examples))}
        if weights:
            self._members = {tag: [] for tag in weights}
            members: dict[str, list[int]] = {}
            for index, example in enumerate(examples):
                members.setdefault(example.task, []).append(index)
            if members.keys() != weights.keys():
                raise ValueError(
                    f"weights: wanted one for each of {sorted(members)}, got {sorted(weights)}"
                )
            self._members = {tag: members[tag] for tag in weights}
        shares = [weights.get(tag, 1.0) for tag in self._members]
        if min(shares) < _SMALLEST_SHARE * math.fsum(shares):
            raise ValueError(
                f"weights: wanted shares of at least {_SMALLEST_SHARE}, got {dict(weights)}"
            )
        ends = [end / math.fsum(shares) for end in accumulate(shares)]
        self._ends = [0.0, *ends[:-1], 1.0]
        # With two or more of every task in a block, no count falls from one block to the next.
        self._block = math.ceil(2 * math.fsum(shares) / min(shares))

    def indices(self, position: int, count: int) -> Iterator[int]:
        permutations: dict[tuple[str, int], Tensor] = {}
        block, skipped = divmod(position, self._block)
        visits: list[tuple[str, int]] = []
        while len(visits) < skipped + count:
            visits += self._visits(block)
            block += 1
        for tag, visit in visits[skipped : skipped + count]:
            members = self._members[tag]
            epoch, place = divmod(visit, len(members))
            if (tag, epoch) not in permutations:
                seed = _mixed(self._seed, tag, epoch)
                generator = torch.Generator().manual_seed(seed)
                permutations[tag, epoch] = torch.randperm(len(members), generator=generator)
            yield members[int(permutations[tag, epoch][place])]

    def _visits(self, block: int) -> list[tuple[str, int]]:
        """The tasks of a block, spread out; with each the number of times it came before."""
        phases = random.Random(_mixed(self._seed, "phases", block))
        before, after = self._counts(block), self._counts(block + 1)
        places = []
        for tag, first, last in zip(self._members, before, after, strict=True):
            phase = phases.random()
            places += [((v - first + phase) / (last - first), tag, v) for v in range(first, last)]
        return [(tag, visit) for _, tag, visit in sorted(places)]

    def _counts(self, blocks: int) -> list[int]:
        ends = [math.floor(blocks * self._block * end) for end in self._ends]
        return [end - start for start, end in pairwise(ends)]


def _mixed(seed: int, tag: str, epoch: int) -> int:
    """Different for every seed and epoch below 2**31 of a task."""
    return ((seed << 31) + epoch) ^ (zlib.crc32(tag.encode()) << 31)
