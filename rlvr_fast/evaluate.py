"""Rewards, pass@k and majority votes of a model on prompts it was not trained on."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlvr_fast import estimates, models
from rlvr_fast.config import EvalConfig
from rlvr_fast.devices import DTYPES, device
from rlvr_fast.engines import make_engine
from rlvr_fast.estimates import Interval
from rlvr_fast.methods.base import verified
from rlvr_fast.prompts import Prompt, Prompts
from rlvr_fast.rollout import Engine, SamplingParams
from rlvr_fast.tasks import Task, load_task

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One completion and what it earned."""

    prompt: Prompt
    text: str
    """Decoded without special tokens."""
    reward: float | None
    """None: nobody could score it; in every mean it counts as 0."""
    length: int
    """Tokens."""
    finished: bool
    """Ended by itself."""


Answers = Sequence[Sequence[Answer]]
"""As many for each prompt."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A completion that nobody could score counts as reward 0; intervals are in `estimates`."""

    reward: float
    """Mean over all completions; with rewards 0 and 1 and temperature 0, greedy accuracy."""
    reward_interval: Interval
    prompts: int
    samples: int
    """Completions per prompt."""
    temperature: float
    unscored: int
    """Completions that nobody could score."""
    finished: float
    """Share of completions that ended by themselves."""
    length: float
    """Mean completion tokens."""
    pass_at: Mapping[int, float]
    """By k: the probability that at least one of k completions is correct, mean over prompts."""
    pass_at_interval: Mapping[int, Interval]
    majority: float | None
    """Share of prompts to which most completions give the same correct answer, see `per_prompt`;
    None for a single completion."""
    majority_interval: Interval | None
    tasks: Mapping[str, "Evaluation"] = field(default_factory=dict)
    """The same for each task of a mixture alone."""

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        values = asdict(self) | {"tasks": {tag: one.to_json() for tag, one in self.tasks.items()}}
        for name in ("pass_at", "pass_at_interval"):
            values[name] = {str(k): value for k, value in values[name].items()}
        return values


def evaluate(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    *,
    ks: Sequence[int] = (),
    correct: float = 1.0,
) -> Evaluation:
    """Generates `sampling.n` completions per prompt and verifies them.

    Args:
        engine: with the weights to evaluate.
        tokenizer: the model's.
        task: whose reward function verifies.
        prompts: at least one.
        sampling: temperature 0 for greedy decoding.
        ks: estimate pass@k for these, each at most `sampling.n`.
        correct: a completion with at least this reward counts as correct.

    Raises:
        ValueError: for no prompts or an impossible k.
    """
    check_ks(ks, sampling.n)
    found = answers(engine, tokenizer, task, prompts, sampling)
    return evaluation(task, found, temperature=sampling.temperature, ks=ks, correct=correct)


def answers(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
) -> list[list[Answer]]:
    """`sampling.n` verified completions for each prompt; the arguments are those of `evaluate`.

    Raises:
        ValueError: for no prompts.
    """
    if not prompts:
        raise ValueError("prompts: wanted at least one to evaluate on, got none")
    groups = engine.generate([prompt.ids for prompt in prompts], sampling)
    flat = [(p, c) for p, group in zip(prompts, groups, strict=True) for c in group]
    texts = [str(tokenizer.decode(c.token_ids, skip_special_tokens=True)) for _, c in flat]
    rewards = verified(task, [prompt for prompt, _ in flat], texts)
    found = [
        Answer(prompt=p, text=text, reward=reward, length=len(c.token_ids), finished=c.finished)
        for (p, c), text, reward in zip(flat, texts, rewards, strict=True)
    ]
    return [found[start : start + sampling.n] for start in range(0, len(found), sampling.n)]


def evaluation(
    task: Task,
    groups: Answers,
    *,
    temperature: float,
    ks: Sequence[int] = (),
    correct: float = 1.0,
) -> Evaluation:
    """What `evaluate` says of these answers."""
    values = per_prompt(task, groups, ks=ks, correct=correct)
    samples = len(groups[0])
    vote = values.get(f"maj@{samples}")
    settings: dict[str, Any] = {"temperature": temperature, "ks": ks, "correct": correct}
    return Evaluation(
        reward=fmean(values["reward"]),
        reward_interval=estimates.mean_interval(values["reward"]),
        prompts=len(groups),
        samples=samples,
        temperature=temperature,
        unscored=sum(answer.reward is None for group in groups for answer in group),
        finished=fmean(answer.finished for group in groups for answer in group),
        length=fmean(values["length"]),
        pass_at={k: fmean(values[f"pass@{k}"]) for k in ks},
        pass_at_interval={k: estimates.mean_interval(values[f"pass@{k}"]) for k in ks},
        majority=None if vote is None else fmean(vote),
        majority_interval=None if vote is None else estimates.mean_interval(vote),
        tasks={tag: evaluation(part, own, **settings) for tag, part, own in by_task(task, groups)},
    )


def per_prompt(
    task: Task, groups: Answers, *, ks: Sequence[int] = (), correct: float = 1.0
) -> dict[str, list[float]]:
    """By name, one value per prompt: `reward`, `length`, `pass@K` and, of N > 1 samples, `maj@N`.

    `maj@N` is 1 where the answer that most of the completions give is correct. Answers are the same
    if `Task.answer_key` says so; of answers with as many votes the one sampled first wins, and the
    first completion that gives it stands for it.
    """
    rewards = [[answer.reward or 0.0 for answer in group] for group in groups]
    hits = [[reward >= correct for reward in group] for group in rewards]
    values = {
        "reward": [fmean(group) for group in rewards],
        "length": [fmean(answer.length for answer in group) for group in groups],
    }
    for k in ks:
        values[f"pass@{k}"] = [estimates.pass_at_k(len(hit), sum(hit), k) for hit in hits]
    samples = len(groups[0])
    if samples > 1:
        winners = [
            estimates.majority([task.part(a.prompt.example).answer_key(a.text) for a in group])
            for group in groups
        ]
        values[f"maj@{samples}"] = [
            0.0 if winner is None else float(hit[winner])
            for winner, hit in zip(winners, hits, strict=True)
        ]
    return values


def by_task(task: Task, groups: Answers) -> list[tuple[str, Task, Answers]]:
    """Tag, task and groups of each part of a mixture that was asked; nothing for other tasks."""
    tags = [group[0].prompt.example.task for group in groups]
    return [
        (tag, part, [group for group, other in zip(groups, tags, strict=True) if other == tag])
        for tag, part in task.parts.items()
        if tag in tags
    ]


def check_ks(ks: Sequence[int], samples: int) -> None:
    """Raises a ValueError unless every k is from 1 to `samples`."""
    if any(not 1 <= k <= samples for k in ks):
        raise ValueError(f"k: wanted 1 to n, {samples}, got {', '.join(map(str, ks))}")


def ask(model: str, task: Task, config: EvalConfig) -> dict[str, list[list[Answer]]]:
    """The model's answers by kind: `greedy` and, with `config.n`, `sampled`.

    Raises:
        ValueError: for what the model or task refuses, and for an impossible k.
    """
    if config.n is not None:
        check_ks(config.ks, config.n)
    path = models.resolve(model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = Prompts(
        task.evaluation[: config.prompts], tokenizer, system_prompt=config.system_prompt
    )
    encoded = list(prompts)
    engine = make_engine(
        config.engine,
        path,
        config.engine_options,
        dtype=DTYPES[config.precision],
        head_dtype=None,
        device=device(config.device),
    )
    with closing(engine):
        found = {}
        for kind, sampling in samplings(config).items():
            _LOG.info("%s: %s completions of %d prompts", model, kind, len(encoded))
            found[kind] = answers(engine, tokenizer, task, encoded, sampling)
    return found


def samplings(config: EvalConfig) -> dict[str, SamplingParams]:
    """By kind, how completions are drawn."""
    tokens = config.max_completion_tokens
    found = {"greedy": SamplingParams(temperature=0.0, max_tokens=tokens)}
    if config.n is not None:
        found["sampled"] = SamplingParams(
            temperature=config.temperature, max_tokens=tokens, n=config.n, seed=config.seed
        )
    return found


def ks_of(kind: str, config: EvalConfig) -> Sequence[int]:
    """The k of pass@k for that kind of answers."""
    return config.ks if kind == "sampled" else ()


def result(
    model: str, task: Task, config: EvalConfig, found: Mapping[str, Answers]
) -> dict[str, Any]:
    """What `evaluate_model` returns, from the model's answers."""
    drawn = samplings(config)
    evaluated = {
        kind: evaluation(
            task,
            groups,
            temperature=drawn[kind].temperature,
            ks=ks_of(kind, config),
            correct=config.correct,
        ).to_json()
        for kind, groups in found.items()
    }
    head = {"model": model, "task": config.task}
    return head | {kind: evaluated.get(kind) for kind in ("greedy", "sampled")}


def evaluate_model(model: str, config: EvalConfig) -> dict[str, Any]:
    """What `rlvr-fast eval` reports: the greedy evaluation and, with `config.n`, a sampled one.

    Args:
        model: folder, hub id or name.
        config: see `EvalConfig`; its `against` and its files are the command's.

    Returns:
        JSON values: `model`, `task`, `greedy` and `sampled` (or None).

    Raises:
        ValueError: for what the model or task refuses, and for an impossible k.
    """
    with closing(load_task(config.task, config.task_options)) as task:
        return result(model, task, config, ask(model, task, config))
