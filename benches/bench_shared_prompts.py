"""The update with every prompt computed once per group against once per completion.

SmolLM2-135M on 16 prompts of the addition task with 8 completions of 12 tokens each, as
`share_prompts` true and false: forward, backward, clipping and AdamW, bf16 autocast on fp32
weights. The completions are drawn tokens, the advantages drawn numbers: an update takes as long for
those. Both train one model in turn, at a learning rate of 0. Before that the gradients of both in
fp32 are compared; where they differ by more than `WANTED`, nothing is timed.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benches.main_job import LENGTH, PROMPTS, SAMPLES
from benches.report import Table
from rlvr_fast import config as configs
from rlvr_fast import models
from rlvr_fast.config import Precision, TrainConfig
from rlvr_fast.methods import method
from rlvr_fast.methods.rollouts import Groups, Rollout
from rlvr_fast.optimise import Optimiser
from rlvr_fast.prompts import Prompts
from rlvr_fast.tasks import load_task

ROUNDS = 3
"""Measured, after one to warm up."""
WANTED = 1e-5
"""Relative error of the fp32 gradient, over all parameters together."""


def test_update(
    tmp_path: Path, benchmark: BenchmarkFixture, report: Callable[[Table], None]
) -> None:
    config = configs.load(
        "addition", {"run_folder": str(tmp_path), "method": "grpo", "learning_rate": 0.0}
    )
    model, tokenizer = models.load(models.resolve("smollm2-135m"))
    groups = rollouts(config, tokenizer)
    ways = {
        name: optimiser(replace(config, share_prompts=share), model, tokenizer)
        for name, share in (("repeated", False), ("shared", True))
    }
    exact = replace(config, precision=Precision.FP32)
    shared, repeated = (
        gradients(optimiser(replace(exact, share_prompts=share), model, tokenizer), groups)
        for share in (True, False)
    )
    error, worst = errors(shared, repeated)
    assert error <= WANTED
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    benchmark.pedantic(turns, (ways, groups, seconds), rounds=1)
    taken = {name: times[1:] for name, times in seconds.items()}
    rows = [
        {
            "prompts": name,
            "model inputs": float(inputs(way, groups)),
            "update s": median(taken[name]),
            "x shared": median(
                own / shared for own, shared in zip(taken[name], taken["shared"], strict=True)
            ),
        }
        for name, way in ways.items()
    ]
    title = (
        f"One update: SmolLM2-135M, {PROMPTS} prompts x {SAMPLES} completions x {LENGTH} tokens, "
        f"median of {ROUNDS}"
    )
    note = f"gradients in fp32: relative error {error:.1e}, of the worst parameter {worst:.1e}"
    report(Table(title=title, rows=rows, notes=[note]))


def rollouts(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Groups:
    """The task's first prompts, each with completions of drawn tokens."""
    prompts = Prompts(load_task(config.task, config.task_options).train, tokenizer)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(len(tokenizer), (PROMPTS, SAMPLES, LENGTH), generator=draw).tolist()
    advantages = torch.randn(PROMPTS, SAMPLES, generator=draw).tolist()
    return [
        [
            Rollout(
                prompt=prompts[i],
                gen_prompt_ids=prompts[i].ids,
                train_prompt_ids=prompts[i].ids,
                completion_ids=completion,
                text="",
                finished=True,
                reward=advantage,
                advantage=advantage,
            )
            for completion, advantage in zip(tokens[i], advantages[i], strict=True)
        ]
        for i in range(PROMPTS)
    ]


def optimiser(
    config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Optimiser:
    chosen = method(config.method, config.method_options)
    return Optimiser(config, chosen, model, vocab_size=len(tokenizer))


def turns(
    ways: Mapping[str, Optimiser], groups: Groups, seconds: Mapping[str, list[float]]
) -> None:
    """Round by round, so that a busy machine slows both."""
    for step in range(1, ROUNDS + 2):
        for name, way in ways.items():
            start = time.perf_counter()
            way.update(groups, step)
            seconds[name].append(time.perf_counter() - start)


def inputs(way: Optimiser, groups: Groups) -> int:
    return sum(len(packed.input_ids) for packed in way.packs(way.samples(groups)))


def gradients(way: Optimiser, groups: Groups) -> dict[str, Tensor]:
    for packed in way.packs(way.samples(groups)):
        way.backward(packed)
    found = {n: p.grad for n, p in way.model.named_parameters() if p.grad is not None}
    way.model.zero_grad()
    return found


def errors(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[float, float]:
    """Relative, by norms: of all parameters together, and of the parameter where it is largest."""
    assert got.keys() == wanted.keys()
    apart = torch.stack([(got[name] - wanted[name]).norm() for name in wanted])
    size = torch.stack([wanted[name].norm() for name in wanted])
    return float(apart.norm() / size.norm()), float((apart / size).max())
