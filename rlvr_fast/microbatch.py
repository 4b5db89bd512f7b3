"""Cuts an optimiser batch into forward passes of a bounded number of model inputs."""

from collections.abc import Sequence
from typing import TypeAlias

from rlvr_fast.packed import Sample

Group: TypeAlias = Sequence[Sample]


def microbatches(
    groups: Sequence[Group], budget: int, *, share_prompts: bool, split_groups: bool = True
) -> list[list[Group]]:
    """First fit decreasing: longest piece first, into the first microbatch that has room.

    Args:
        groups: in any order; empty ones vanish.
        budget: model inputs per microbatch. A sample longer than that is one of its own.
        share_prompts: as for `pack`: a prompt that a group has in common counts once.
        split_groups: cut a group that is larger than the budget; else it is one microbatch.

    Returns:
        Every sample exactly once.

    Raises:
        ValueError: for a budget below 1.
    """
    if budget < 1:
        raise ValueError(f"budget: wanted at least 1, got {budget}")
    pieces = [
        piece
        for group in groups
        for piece in (_split(group, budget, share_prompts) if split_groups else [group])
        if piece
    ]
    filled: list[list[Group]] = []
    room: list[int] = []
    for piece in sorted(pieces, key=lambda piece: -model_inputs(piece, share_prompts)):
        size = model_inputs(piece, share_prompts)
        place = next((i for i, left in enumerate(room) if left >= size), None)
        if place is None:
            filled.append([piece])
            room.append(budget - size)
        else:
            filled[place].append(piece)
            room[place] -= size
    return filled


def model_inputs(group: Group, share_prompts: bool) -> int:
    """Prompt and completion tokens that `pack` lays down for a group; fewer if some are alike."""
    once, each = _sizes(group, share_prompts)
    return once + sum(each)


def _sizes(group: Group, share_prompts: bool) -> tuple[int, list[int]]:
    """Model inputs of what the group has in common, and of what each sample adds."""
    prompts = [list(sample.prompt_ids) for sample in group]
    completions = [max(len(sample.completion_ids) - 1, 0) for sample in group]
    if share_prompts and all(prompt == prompts[0] for prompt in prompts):
        return len(prompts[0]), completions
    return 0, [len(prompt) + length for prompt, length in zip(prompts, completions, strict=True)]


def _split(group: Group, budget: int, share_prompts: bool) -> list[Group]:
    """Pieces of about equal size, as few as fit."""
    if not group:
        return []
    once, each = _sizes(group, share_prompts)
    longest_first = sorted(zip(each, group, strict=True), key=lambda pair: -pair[0])
    for count in range(max(-(-sum(each) // budget), 1), len(group)):
        pieces: list[list[Sample]] = [[] for _ in range(count)]
        sizes = [once] * count
        for size, sample in longest_first:
            smallest = sizes.index(min(sizes))
            pieces[smallest].append(sample)
            sizes[smallest] += size
        if max(sizes) <= budget:
            return list(pieces)
    return [[sample] for sample in group]
