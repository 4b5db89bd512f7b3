"""The one batch type: sequences lie end to end and nothing is padded.

Shape letters used everywhere: `T` scored (completion) tokens, `S` sequences, `G` groups,
`V` vocabulary, `D` hidden, `N` model inputs (prompts and completions).
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rlvr_fast.scored import ScoredTokens

__all__ = ["Packed", "Sample", "ScoredTokens", "pack"]


SHORTEST_PREFIX = 8
"""Below it the rows spared are not worth the plain causal attention that the others lose."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion on its way into a pack; lists hold plain Python numbers."""

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    token_weight: float = 1.0
    """Of each scored token, from `aggregate` over the whole optimiser batch."""
    loss_mask: Sequence[int] | None = None
    """Per completion token, 0 for text the policy did not write (tool output)."""
    advantage: float | Sequence[float] | None = None
    reward: float | None = None
    old_logp: Sequence[float] | None = None
    ref_logp: Sequence[float] | None = None
    rollout_logp: Sequence[float] | None = None
    extras: Mapping[str, float | Sequence[float]] = field(default_factory=dict)
    """Further numbers for the objective, one per completion token or one for all of them."""
    teacher_prompt_ids: Sequence[int] | None = None
    """What a teacher sees before the completion, where there is one."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """One micro-batch: model inputs and the scored tokens within them.

    The inputs are *blocks*, of completions of one prompt. Its *trunk* is the prompt and one of the
    completions, an ordinary sequence. Every other completion is a *branch*: what it has in common
    with the trunk is not laid down again; the rest attends to that part of the trunk and to itself.
    So equal tokens after equal tokens come once; `hidden_index` points to the same rows for all.
    The last token of a completion is no input: it predicts nothing. What all prompts begin with may
    come once, before the first block; every block then attends to it too.
    """

    input_ids: Tensor
    """`[N]` int64."""
    position_ids: Tensor
    """`[N]` int64; a branch continues from the last row of its trunk that it attends to."""
    cu_seqlens: Tensor
    """`[K+1]` int64 on the CPU, segment boundaries: each trunk and each branch is one."""
    block_offsets: Tensor
    """`[B+1]` int64 on the CPU, in segments: which trunk and branches belong together. A segment
    before the first is what all prompts begin with.
    """
    seen: Tensor
    """`[K]` int64 on the CPU, how many of its trunk's rows a branch attends to; 0 for others."""
    hidden_index: Tensor
    """`[T]` int64, the row of the model's output that predicts each scored token."""
    scored: ScoredTokens
    teacher: "Packed | None" = None
    """The same completions in the same order after the teacher's prompts; its `scored` is empty of
    all but targets, weights and offsets."""

    @property
    def prefix_length(self) -> int:
        """Model inputs before the first block."""
        return int(self.cu_seqlens[self.block_offsets[0]])

    def to(self, device: torch.device | str) -> "Packed":
        """A copy whose tensors are on `device`; the offsets stay on the CPU."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            hidden_index=self.hidden_index.to(device, non_blocking=True),
            scored=self.scored.to(device),
            teacher=None if self.teacher is None else self.teacher.to(device),
        )


def pack(groups: Sequence[Sequence[Sample]], *, share_prompts: bool = True) -> Packed:
    """Lays groups of samples end to end.

    Args:
        groups: each group answers one prompt; groups and samples may differ in size and length.
        share_prompts: a prompt that all samples of a group have in common is laid down once, with
            completions as branches of each other, and so is a beginning of `SHORTEST_PREFIX` tokens
            or more that all prompts of several blocks have in common, such as a system message. The
            gradient is the same; without it every sample carries its own copy.

    Returns:
        A `Packed` on the CPU with all completion tokens scored, in the order given.

    Raises:
        ValueError: for an empty prompt, or a list whose length is not its completion's.
    """
    blocks = [block for group in groups for block in _blocks(group, share_prompts)]
    prefix = _common_prefix(blocks) if share_prompts else []
    rows = _Rows()
    if prefix:
        rows.lay(prefix, 0)
    block_offsets = [len(rows.segments) - 1]
    for block in blocks:
        _lay_block(rows, block, len(prefix))
        block_offsets.append(len(rows.segments) - 1)
    return Packed(
        input_ids=_ints(rows.ids),
        position_ids=_ints(rows.positions),
        cu_seqlens=_ints(rows.segments),
        block_offsets=_ints(block_offsets),
        seen=_ints(rows.seen),
        hidden_index=_ints(rows.hidden_index),
        scored=_scored([sample for group in groups for sample in group], groups),
        teacher=_teacher(groups, share_prompts),
    )


@dataclass
class _Rows:
    """What is laid down so far; fields as those of `Packed`."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=lambda: [0])
    seen: list[int] = field(default_factory=list)
    hidden_index: list[int] = field(default_factory=list)

    def lay(self, tokens: Sequence[int], position: int, seen: int = 0) -> int:
        """A segment whose first token has this position; gives that token's row."""
        row = len(self.ids)
        self.ids += tokens
        self.positions += range(position, position + len(tokens))
        self.segments.append(len(self.ids))
        self.seen.append(seen)
        return row


def _lay_block(rows: _Rows, block: Sequence[Sample], depth: int) -> None:
    """A prompt without its first `depth` tokens, and its completions."""
    prompt = block[0].prompt_ids[depth:]
    # The last token of a completion predicts nothing, and nobody else sees it.
    inputs = [list(sample.completion_ids[:-1]) for sample in block]
    # In this order whatever begins with a sequence follows on it without a gap.
    order = sorted(range(len(inputs)), key=lambda place: inputs[place])
    hosts = _hosts(inputs, order)
    trunk, common = _trunk(inputs, [place for place in order if hosts[place] == place])
    begin = rows.lay([*prompt, *inputs[trunk]], depth)
    branches = {trunk: len(rows.ids)}
    # Those that see most come first: attention in C++ relies on it.
    for host in sorted(common.keys() - {trunk}, key=lambda host: (-common[host], host)):
        shared = len(prompt) + common[host]
        branches[host] = rows.lay(inputs[host][common[host] :], depth + shared, shared)
    last = begin + len(prompt) - 1  # Of the prompt; it predicts every first token.
    for sample, own, host in zip(block, inputs, hosts, strict=True):
        if sample.completion_ids:
            rows.hidden_index += range(last, last + 1 + min(len(own), common[host]))
            rows.hidden_index += range(branches[host], branches[host] + len(own) - common[host])


def _hosts(inputs: Sequence[list[int]], order: Sequence[int]) -> list[int]:
    """For each sequence the one, perhaps itself, that is laid down for it and begins with it."""
    hosts = list(range(len(inputs)))
    for shorter, longer in reversed(list(itertools.pairwise(order))):
        if inputs[longer][: len(inputs[shorter])] == inputs[shorter]:
            hosts[shorter] = hosts[longer]
    return hosts


def _trunk(inputs: Sequence[list[int]], order: Sequence[int]) -> tuple[int, dict[int, int]]:
    """Of the hosts, in order, the one from which the others are cheapest to branch off, the first
    of several, and after how many tokens each of them does.
    """
    steps = [_common_length(inputs[a], inputs[b]) for a, b in itertools.pairwise(order)]

    def common(place: int) -> list[int]:
        # Two have in common what all between them have.
        before = list(itertools.accumulate(reversed(steps[:place]), min))
        return [*reversed(before), 0, *itertools.accumulate(steps[place:], min)]

    best = max(range(len(order)), key=lambda place: (sum(common(place)), -order[place]))
    trunk = order[best]
    return trunk, dict(zip(order, common(best), strict=True)) | {trunk: len(inputs[trunk])}


def _blocks(group: Sequence[Sample], share_prompts: bool) -> list[Sequence[Sample]]:
    if any(len(sample.prompt_ids) == 0 for sample in group):
        raise ValueError("prompt_ids: wanted at least one token, got none")
    if share_prompts and all(
        list(sample.prompt_ids) == list(group[0].prompt_ids) for sample in group[1:]
    ):
        return [group] if group else []
    return [[sample] for sample in group]


def _common_prefix(blocks: Sequence[Sequence[Sample]]) -> Sequence[int]:
    """What all prompts begin with, but for the last token of the shortest; empty if too short."""
    if len(blocks) < 2:
        return []
    prompts = [list(block[0].prompt_ids[:-1]) for block in blocks]
    # The first and last in order differ as early as any two.
    common = _common_length(min(prompts), max(prompts))
    return prompts[0][:common] if common >= SHORTEST_PREFIX else []


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that both begin with."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _scored(samples: Sequence[Sample], groups: Sequence[Sequence[Sample]]) -> ScoredTokens:
    lengths = [len(sample.completion_ids) for sample in samples]
    weight = [
        sample.token_weight * keep
        for sample in samples
        for keep in _per_token("loss_mask", sample.loss_mask, 1, sample)
    ]
    return ScoredTokens(
        targets=_ints([token for sample in samples for token in sample.completion_ids]),
        weight=torch.tensor(weight, dtype=torch.float32),
        seq_offsets=_offsets(lengths),
        group_offsets=_offsets([len(group) for group in groups]),
        old_logp=_optional(samples, "old_logp"),
        ref_logp=_optional(samples, "ref_logp"),
        rollout_logp=_optional(samples, "rollout_logp"),
        rewards=_rewards(samples),
        advantage=_optional(samples, "advantage"),
        extras=_extras(samples),
    )


def _teacher(groups: Sequence[Sequence[Sample]], share_prompts: bool) -> Packed | None:
    prompts = [sample.teacher_prompt_ids for group in groups for sample in group]
    missing = sum(prompt is None for prompt in prompts)
    if missing == len(prompts):
        return None
    if missing:
        raise ValueError(
            f"teacher_prompt_ids: wanted them on every sample or on none, got {missing} without"
        )
    if not all(prompt is not None and len(prompt) for prompt in prompts):
        raise ValueError("teacher_prompt_ids: wanted at least one token, got none")
    seen = [
        [
            Sample(
                prompt_ids=sample.teacher_prompt_ids or [],
                completion_ids=sample.completion_ids,
                token_weight=sample.token_weight,
                loss_mask=sample.loss_mask,
            )
            for sample in group
        ]
        for group in groups
    ]
    return pack(seen, share_prompts=share_prompts)


def _extras(samples: Sequence[Sample]) -> dict[str, Tensor]:
    names = {name for sample in samples for name in sample.extras}
    for name in names:
        missing = sum(name not in sample.extras for sample in samples)
        if missing:
            raise ValueError(
                f"extras[{name!r}]: wanted it on every sample or on none, got {missing} without it"
            )
    return {
        name: torch.tensor(
            [x for s in samples for x in _per_token(f"extras[{name!r}]", s.extras[name], 0, s)],
            dtype=torch.float32,
        )
        for name in sorted(names)
    }


def _rewards(samples: Sequence[Sample]) -> Tensor | None:
    rewards = [sample.reward for sample in samples]
    if all(reward is None for reward in rewards):
        return None
    return torch.tensor([float("nan") if r is None else r for r in rewards], dtype=torch.float32)


def _optional(samples: Sequence[Sample], name: str) -> Tensor | None:
    values = [getattr(sample, name) for sample in samples]
    missing = sum(value is None for value in values)
    if missing == len(values):
        return None
    if missing:
        raise ValueError(f"{name}: wanted it on every sample or on none, got {missing} without it")
    flat = [
        x for v, sample in zip(values, samples, strict=True) for x in _per_token(name, v, 0, sample)
    ]
    return torch.tensor(flat, dtype=torch.float32)


def _per_token(name: str, value: object, default: float, sample: Sample) -> Sequence[float]:
    length = len(sample.completion_ids)
    if value is None:
        return [default] * length
    if isinstance(value, int | float):
        return [value] * length
    if not isinstance(value, Sequence):
        raise ValueError(
            f"{name}: wanted a number or one per completion token, got {type(value).__name__}"
        )
    if len(value) != length:
        raise ValueError(
            f"{name}: wanted one value per completion token, {length}, got {len(value)}"
        )
    return value


def _ints(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _offsets(lengths: Sequence[int]) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), _ints(lengths).cumsum(0)])
