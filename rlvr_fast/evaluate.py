"""Mean reward and pass@k of a model on prompts it was not trained on."""

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlvr_fast import models
from rlvr_fast.config import EvalConfig
from rlvr_fast.devices import DTYPES, device
from rlvr_fast.methods.base import verified
from rlvr_fast.prompts import Prompt, Prompts
from rlvr_fast.rollout import Engine, SamplingParams
from rlvr_fast.rollout.embedded import EmbeddedEngine
from rlvr_fast.tasks import Task, load_task


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A completion that nobody could score counts as reward 0."""

    reward: float
    """Mean over all completions; with rewards 0 and 1 and temperature 0, greedy accuracy."""
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
    pass_at: dict[int, float] = field(default_factory=dict)
    """By k: the probability that at least one of k completions is correct, mean over prompts."""

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self) | {"pass_at": {str(k): value for k, value in self.pass_at.items()}}


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
        correct: a completion with at least this reward counts as correct in pass@k.

    Raises:
        ValueError: for no prompts or an impossible k.
    """
    if not prompts:
        raise ValueError("prompts: wanted at least one to evaluate on, got none")
    if any(not 1 <= k <= sampling.n for k in ks):
        raise ValueError(f"k: wanted 1 to n, {sampling.n}, got {', '.join(map(str, ks))}")
    groups = engine.generate([prompt.ids for prompt in prompts], sampling)
    flat = [completion for group in groups for completion in group]
    texts = [str(tokenizer.decode(c.token_ids, skip_special_tokens=True)) for c in flat]
    asked = [prompt for prompt in prompts for _ in range(sampling.n)]
    scores = verified(task, asked, texts)
    rewards = [score or 0.0 for score in scores]
    return Evaluation(
        reward=math.fsum(rewards) / len(rewards),
        prompts=len(prompts),
        samples=sampling.n,
        temperature=sampling.temperature,
        unscored=scores.count(None),
        finished=sum(completion.finished for completion in flat) / len(flat),
        length=sum(len(completion.token_ids) for completion in flat) / len(flat),
        pass_at=_pass_at([reward >= correct for reward in rewards], sampling.n, ks),
    )


def _pass_at(correct: Sequence[bool], n: int, ks: Sequence[int]) -> dict[int, float]:
    hits = [sum(correct[start : start + n]) for start in range(0, len(correct), n)]
    return {k: sum(pass_at_k(n, hit, k) for hit in hits) / len(hits) for k in ks}


def evaluate_model(model: str, config: EvalConfig) -> dict[str, Any]:
    """What `rlvr-fast eval` reports: the greedy evaluation and, with `config.n`, a sampled one.

    Args:
        model: folder, hub id or name.
        config: see `EvalConfig`.

    Returns:
        JSON values: `model`, `task`, `greedy` and `sampled` (or None).

    Raises:
        ValueError: for what the model or task refuses, and for an impossible k.
    """
    with closing(load_task(config.task, config.task_options)) as task:
        path = models.resolve(model)
        engine = EmbeddedEngine(path, dtype=DTYPES[config.precision], device=device(config.device))
        tokenizer = AutoTokenizer.from_pretrained(path)
        prompts = Prompts(
            task.evaluation[: config.prompts], tokenizer, system_prompt=config.system_prompt
        )

        def run(sampling: SamplingParams, ks: Sequence[int]) -> dict[str, Any]:
            return evaluate(
                engine, tokenizer, task, list(prompts), sampling, ks=ks, correct=config.correct
            ).to_json()

        tokens = config.max_completion_tokens
        greedy = SamplingParams(temperature=0.0, max_tokens=tokens)
        sampled = None
        if config.n is not None:
            sampling = SamplingParams(
                temperature=config.temperature, max_tokens=tokens, n=config.n, seed=config.seed
            )
            sampled = run(sampling, config.ks)
        return {
            "model": model,
            "task": config.task,
            "greedy": run(greedy, ()),
            "sampled": sampled,
        }


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k is correct) from `correct` of `samples`.

    `1 - C(n - c, k) / C(n, k)` as the product of equation 1 and figure 3 of Chen et al.
    (2107.03374), which neither overflows nor cancels.

    Raises:
        ValueError: unless `0 <= correct <= samples` and `1 <= k <= samples`.
    """
    if not (0 <= correct <= samples and 1 <= k <= samples):
        raise ValueError(
            f"pass@k: wanted 0 <= correct <= samples and 1 <= k <= samples, "
            f"got {correct} of {samples} and k {k}"
        )
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - correct + 1, samples + 1))
