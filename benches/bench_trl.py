"""The optimisation part of a TRL step: stock `GRPOTrainer` against `FastGRPOTrainer`.

SmolLM2-135M on 16 addition prompts with 8 completions of 12 tokens each: loss, backward, clipping
and AdamW, bf16 autocast on fp32 weights. The inputs are what TRL prepares: prompts padded on the
left and repeated, completions shuffled and cut into four micro-batches of 32. They are drawn, the
same for all contenders; an update takes as long for those. TRL's settings are its defaults, but for
gradient checkpointing, which is off: it would add the same forward pass to all.

All train in one process in turn, at a learning rate of 0. Before that the gradients in fp32 are
compared; where they differ by more than `WANTED`, nothing is timed.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from benches.main_job import LENGTH, MICROBATCH, PROMPTS, SAMPLES, trl_settings
from benches.report import Table
from rlvr_fast import models
from rlvr_fast.tasks import load_task

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

ROUNDS = 3
"""Measured, after one to warm up."""
WANTED = 1e-5
"""Relative error of the fp32 gradient, over all parameters together."""
STOCK, OURS = "TRL 1.16", "FastGRPOTrainer"

Inputs = dict[str, Tensor]


def test_update(
    tmp_path: Path, benchmark: BenchmarkFixture, report: Callable[[Table], None]
) -> None:
    from rlvr_fast.integrations.trl import FastGRPOTrainer
    from rlvr_fast.integrations.trl_regroup import regrouped

    stock = trainer(trl.GRPOTrainer, tmp_path)
    batches = prepared(stock.processing_class)
    ways = {
        STOCK: (stock, batches),
        OURS: (trainer(FastGRPOTrainer, tmp_path), regrouped(batches, len(batches))),
        f"{OURS}(share_prompts=False)": (
            trainer(FastGRPOTrainer, tmp_path, share_prompts=False),
            batches,
        ),
    }
    wanted = gradients(*ways[STOCK])
    error = max(apart(gradients(*way), wanted) for way in ways.values())
    assert error <= WANTED
    optimisers = {
        name: torch.optim.AdamW(way.model.parameters(), lr=0.0) for name, (way, _) in ways.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    benchmark.pedantic(turns, (ways, optimisers, seconds), rounds=1)
    report(table({name: times[1:] for name, times in seconds.items()}, error))


def table(taken: Mapping[str, list[float]], error: float) -> Table:
    rows = [
        {
            "": name,
            "update s": median(times),
            "x ours": median(a / b for a, b in zip(times, taken[OURS], strict=True)),
        }
        for name, times in taken.items()
    ]
    title = (
        f"The update of a TRL step: SmolLM2-135M, {PROMPTS} prompts x {SAMPLES} completions x "
        f"{LENGTH} tokens, micro-batches of {MICROBATCH}, median of {ROUNDS}"
    )
    notes = [
        f"{torch.get_num_threads()} threads, in turn",
        f"gradients in fp32: relative difference from TRL's at most {error:.1e}",
    ]
    return Table(title=title, rows=rows, notes=notes)


def trainer(kind: Any, folder: Path, **extra: Any) -> Any:
    settings = trl_settings(folder)
    found = kind(
        model=models.resolve("smollm2-135m"),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(**settings),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["1+1="] * PROMPTS}),
        **extra,
    )
    found.model.train()
    found.current_gradient_accumulation_steps = settings["gradient_accumulation_steps"]
    return found


def prepared(tokenizer: Any) -> list[Inputs]:
    """The task's first prompts with drawn completions and advantages, as TRL lays them out."""
    draw = torch.Generator().manual_seed(0)
    texts = [example.prompt for example in load_task("addition", {}).train[:PROMPTS]]
    prompts = tokenizer.apply_chat_template(
        [text if isinstance(text, list) else [{"role": "user", "content": text}] for text in texts],
        add_generation_prompt=True,
        tokenize=True,
        padding=True,
        padding_side="left",
        return_dict=True,
        return_tensors="pt",
    )
    total = PROMPTS * SAMPLES
    order = torch.randperm(total, generator=draw)
    values = {
        "prompt_ids": prompts["input_ids"].repeat_interleave(SAMPLES, 0)[order],
        "prompt_mask": prompts["attention_mask"].repeat_interleave(SAMPLES, 0)[order],
        "completion_ids": torch.randint(len(tokenizer), (total, LENGTH), generator=draw),
        "completion_mask": torch.ones(total, LENGTH, dtype=torch.int64),
        "advantages": torch.randn(total, generator=draw),
    }
    parts = [value.split(MICROBATCH) for value in values.values()]
    items = torch.tensor(total * LENGTH)
    return [
        dict(zip(values, part, strict=True)) | {"num_items_in_batch": items}
        for part in zip(*parts, strict=True)
    ]


def turns(
    ways: Mapping[str, tuple[Any, list[Inputs]]],
    optimisers: Mapping[str, torch.optim.Optimizer],
    seconds: Mapping[str, list[float]],
) -> None:
    """Round by round, so that a busy machine slows all."""
    for _ in range(ROUNDS + 1):
        for name, (way, batches) in ways.items():
            start = time.perf_counter()
            backward(way, batches)
            nn.utils.clip_grad_norm_(way.model.parameters(), 1.0)
            optimisers[name].step()
            optimisers[name].zero_grad()
            seconds[name].append(time.perf_counter() - start)


def backward(way: Any, batches: list[Inputs]) -> None:
    for inputs in batches:
        way._compute_loss(way.model, inputs).backward()


def gradients(way: Any, batches: list[Inputs]) -> dict[str, Tensor]:
    """In fp32."""
    way.accelerator.native_amp = False
    backward(way, batches)
    way.accelerator.native_amp = True
    found = {name: p.grad for name, p in way.model.named_parameters()}
    way.model.zero_grad()
    return found


def apart(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Relative, by norms over all parameters together."""
    gaps = torch.stack([(found[name] - wanted[name]).norm() for name in wanted])
    whole = torch.stack([wanted[name].norm() for name in wanted])
    return float(gaps.norm() / whole.norm())
