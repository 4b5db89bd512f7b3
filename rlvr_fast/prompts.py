"""Prompts as token ids, and the seeded order in which training visits them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from rlvr_fast.tasks import Example


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
    ) -> None:
        self._examples, self._tokenizer = examples, tokenizer
        self._system_prompt, self._seed = system_prompt, seed
        self._encoded: dict[int, Prompt] = {}

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Prompt:  # type: ignore[override]
        if index not in self._encoded:
            example = self._examples[index]
            ids = self._encode(example)
            self._encoded[index] = Prompt(index=index, example=example, ids=ids)
        return self._encoded[index]

    def batch(self, step: int, count: int) -> list[Prompt]:
        """The prompts of a training step (from 1): `count` consecutive ones of an endless order.

        The order is a new permutation in each epoch, a function of the seed and nothing else.
        """
        chosen, epochs = [], {}
        for position in range((step - 1) * count, step * count):
            epoch, place = divmod(position, len(self))
            if epoch not in epochs:
                generator = torch.Generator().manual_seed(_mixed(self._seed, epoch))
                epochs[epoch] = torch.randperm(len(self), generator=generator).tolist()
            chosen.append(self[epochs[epoch][place]])
        return chosen

    def _encode(self, example: Example) -> list[int]:
        if isinstance(example.prompt, str):
            if self._system_prompt:
                raise ValueError(
                    f"system_prompt: wanted a task whose prompts are chats, "
                    f"got the plain text {example.prompt!r}"
                )
            return list(self._tokenizer(example.prompt)["input_ids"])
        messages = [dict(message) for message in example.prompt]
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


def _mixed(seed: int, epoch: int) -> int:
    """Different for every pair below 2**31."""
    return (seed << 31) + epoch
