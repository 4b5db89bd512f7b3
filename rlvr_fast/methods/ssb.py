"""Distils what the model writes when it sees a right and a wrong attempt (SSB, 2512.05105)."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from rlvr_fast.methods.base import Context, Evidence, Method, Paper, as_rollout, verified
from rlvr_fast.methods.rollouts import Group, Groups, Rollout
from rlvr_fast.objectives import Distillation, Divergence
from rlvr_fast.prompts import Prompt
from rlvr_fast.rollout import Completion
from rlvr_fast.tasks import Task

TEMPLATE = """\
{problem}

Here are two attempts at this problem. They come to different answers, so one of them is wrong.

First attempt:
{first}

Second attempt:
{second}

Find out where the wrong one fails. Then write one complete solution that stands on its own: \
explain every step, warn of the mistake where it is easily made, do not mention the attempts, and \
end with the final answer in the form that the problem asks for."""
_PLACES = ("problem", "first", "second")


@dataclass(frozen=True, kw_only=True)
class SSB(Method):
    """The frozen initial model, which sees the attempts, teaches the model that sees the question.

    Of a group with a right and a wrong answer, the first right attempt and one with the most common
    wrong answer go into a hint prompt, in random order, and the policy writes one solution to it.
    If that is right, it is what the group trains on: `scale` KL(teacher || student) of its tokens,
    with both models' logits divided by `temperature`, the teacher after the hint prompt, the
    student after the question alone. The mean is over all such tokens of the batch, and `scale` is
    `temperature` squared. Nothing else has a gradient, and a step without such a group changes no
    weight. There is no advantage; the reward that is logged counts the solutions too.

    The paper does this once, before training: 4 attempts at temperature 0.8 per problem, then LoRA
    of rank 32 for 3 epochs over 256 solutions. Here every step samples its own. The length
    of the hint prompt is up to two completions more than the question's: the engine and the
    teacher, who reads it without a gradient, need room for it.
    """

    paper: ClassVar[Paper] = Paper(
        source="2512.05105",
        formula="T^2 KL(softmax(z_teacher / T) || softmax(z / T)), T = 2",
        evidence=Evidence.CODE,
        reconstructed=(
            "attempts and solutions are the policy's own in every step, not the initial model's",
            "the words of the hint prompt",
        ),
    )
    needs_reference: ClassVar[bool] = True

    temperature: float = 2.0
    """Divides the logits of teacher and student; > 0."""
    solution_temperature: float = 0.4
    """At which solutions are sampled; 0 is greedy."""
    right: float = 1.0
    """The least reward of a right answer."""
    template: str = TEMPLATE
    """Of the hint prompt's message, with {problem}, {first} and {second}."""

    def __post_init__(self) -> None:
        self.check_not_negative("solution_temperature")
        if not self.temperature > 0:
            raise ValueError(f"temperature: wanted > 0, got {self.temperature}")
        for place in _PLACES:
            if f"{{{place}}}" not in self.template:
                raise ValueError(f"template: wanted {{{place}}} in it, got {self.template!r}")

    def verify(self, context: Context, groups: Groups) -> Groups:
        groups = super().verify(context, groups)
        random = np.random.default_rng(context.sampling.seed)
        pairs = [self._pair(context.task, group, random) for group in groups]
        hints = {
            index: self._hint(context, groups[index][0].prompt, pair)
            for index, pair in enumerate(pairs)
            if pair
        }
        solutions = self._solutions(context, groups, hints)
        return [
            [*map(_without_gradient, group), *solutions.get(index, [])]
            for index, group in enumerate(groups)
        ]

    def advantages(self, groups: Groups) -> Groups:
        return [[replace(r, advantage=float(_taught(r))) for r in group] for group in groups]

    def objective(self) -> Distillation:
        return Distillation(
            kind=Divergence.FORWARD, temperature=self.temperature, scale=self.temperature**2
        )

    def _pair(self, task: Task, group: Group, random: np.random.Generator) -> list[str]:
        """A right and a wrong attempt in random order; empty if there are not both."""
        right = [r.text for r in group if r.reward is not None and r.reward >= self.right]
        wrong: dict[str, str] = {}
        votes = Counter[str]()
        for rollout in group:
            answer = task.part(rollout.prompt.example).answer_key(rollout.text)
            if answer is not None and rollout.reward is not None and rollout.reward < self.right:
                wrong.setdefault(answer, rollout.text)
                votes[answer] += 1
        if not (right and wrong):
            return []
        most = [answer for answer, count in votes.items() if count == max(votes.values())]
        pair = [right[0], wrong[most[random.integers(len(most))]]]
        return pair[::-1] if random.integers(2) else pair

    def _hint(self, context: Context, prompt: Prompt, pair: Sequence[str]) -> list[int]:
        asked = prompt.example.prompt
        if isinstance(asked, str):
            return context.prompts.encode(self._filled(asked, pair))
        *before, last = asked
        hint = {**last, "content": self._filled(last["content"], pair)}
        return context.prompts.encode([*before, hint])

    def _filled(self, problem: str, pair: Sequence[str]) -> str:
        # In one sweep: an attempt may well hold {second}.
        texts = dict(zip(_PLACES, (problem, *pair), strict=True))
        return re.sub(r"\{(problem|first|second)\}", lambda it: texts[it[1]], self.template)

    def _solutions(
        self, context: Context, groups: Groups, hints: dict[int, list[int]]
    ) -> dict[int, Group]:
        """By group, the one solution to its hint; without a gradient unless it is right."""
        if not hints:
            return {}
        seed = int(np.random.SeedSequence((context.sampling.seed, 1)).generate_state(1)[0])
        sampling = replace(context.sampling, n=1, temperature=self.solution_temperature, seed=seed)
        written = context.engine.generate(list(hints.values()), sampling)
        solutions = [
            _solution(context, groups[index][0].prompt, hint, completion)
            for (index, hint), (completion,) in zip(hints.items(), written, strict=True)
        ]
        rewards = verified(context.task, [s.prompt for s in solutions], [s.text for s in solutions])
        found: dict[int, Group] = {}
        for index, solution, reward in zip(hints, solutions, rewards, strict=True):
            kept = replace(solution, reward=reward)
            right = reward is not None and reward >= self.right
            found[index] = [kept if right else _without_gradient(kept)]
        return found


def _solution(context: Context, prompt: Prompt, hint: list[int], found: Completion) -> Rollout:
    return replace(
        as_rollout(context, prompt, found),
        gen_prompt_ids=hint,
        teacher_prompt_ids=hint,
        # Of another prompt and temperature than what is trained: no mismatch of the sampler's.
        rollout_logp=None,
    )


def _without_gradient(rollout: Rollout) -> Rollout:
    return replace(rollout, loss_mask=[0] * len(rollout.completion_ids))


def _taught(rollout: Rollout) -> bool:
    return rollout.teacher_prompt_ids is not None and rollout.scored_tokens > 0
