"""One training step of ours against stock TRL: same model, prompts, rewards, sizes and optimiser.

Both train SmolLM2-135M with AdamW on fp32 weights, forward and backward under bf16 autocast, on
16 addition prompts with 8 completions each. Its end-of-sequence token is replaced by one that it
never samples, so every completion has exactly 12 tokens; the reward is the length of the text, so
every group has a signal and we may leave nothing out. TRL generates with transformers' `generate`.
Its settings are its defaults except: no gradient checkpointing (ours has none either), and four
micro-batches of 32 (NOTES.md: not established as the fastest).

Both step in turn in one process: ours runs when a step of TRL's loop has ended.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benches.report import Table
from rlvr_fast import config as configs
from rlvr_fast import models
from rlvr_fast.rewards import completion_text
from rlvr_fast.tasks import Task, load_task
from rlvr_fast.trainer import Trainer

PROMPTS, SAMPLES, LENGTH = 16, 8, 12
TOKENS = PROMPTS * SAMPLES * LENGTH
MICROBATCH = 32
"""TRL's, in completions. Ours packs all into one."""
STEPS = 2
"""Measured, after one to warm up."""
NEVER_SAMPLED = "<file_sep>"
LEARNING_RATE = 1e-6

Seconds = dict[str, float]


def text_length(completions: list[Any], **_: Any) -> list[float]:
    """The reward, in TRL's signature, which is ours."""
    return [float(len(completion_text(completion))) for completion in completions]


def test_training_step(
    tmp_path: Path, benchmark: BenchmarkFixture, report: Callable[[Table], None]
) -> None:
    trl = pytest.importorskip("trl", reason="the bench extra installs it")
    folder = endless(tmp_path / "model")
    given = load_task("addition", {})
    task = Task("addition", given.train[:PROMPTS], given.evaluation[:1], text_length)
    ours, theirs = Ours(folder, task, tmp_path / "ours"), []
    peer = stock(trl, folder, task, tmp_path / "trl", ours, theirs)
    benchmark.pedantic(peer.train)
    rows = [
        {
            "": name,
            **{f"{part} s": median(s[part] for s in steps[1:]) for part in steps[0]},
            "tokens/s": TOKENS / median(s["step"] for s in steps[1:]),
            "x ours": median(
                s["step"] / own["step"] for s, own in zip(steps[1:], ours.seconds[1:], strict=True)
            ),
        }
        for name, steps in (("rlvr_fast", ours.seconds), ("TRL 1.16", theirs))
    ]
    title = (
        f"One training step: SmolLM2-135M, {PROMPTS} prompts x {SAMPLES} completions x {LENGTH} "
        f"tokens, median of {STEPS} steps"
    )
    report(Table(title=title, rows=rows, notes=["update: everything that is not generation"]))


def endless(folder: Path) -> str:
    """SmolLM2-135M with an end-of-sequence token that it never samples."""
    model, tokenizer = models.load(models.resolve("smollm2-135m"))
    # Both need a padding token, and TRL takes the end of sequence for want of one.
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.eos_token = NEVER_SAMPLED
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.convert_tokens_to_ids(NEVER_SAMPLED)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class Ours:
    """Our trainer, one step at a time."""

    def __init__(self, model: str, task: Task, run_folder: Path) -> None:
        config = configs.load(
            "addition",
            {
                "model": model,
                "run_folder": str(run_folder),
                "method": "grpo",
                "prompts_per_step": PROMPTS,
                "samples_per_prompt": SAMPLES,
                "max_completion_tokens": LENGTH,
                "learning_rate": LEARNING_RATE,
            },
        )
        self.trainer = Trainer(config, task)
        self.trainer.sync()
        self.seconds: list[Seconds] = []

    def step(self) -> None:
        values, groups = self.trainer.step(len(self.seconds) + 1)
        assert sum(len(r.completion_ids) for group in groups for r in group) == TOKENS
        generate, total = values["seconds_generate"], values["seconds_total"]
        self.seconds.append({"generate": generate, "update": total - generate, "step": total})


def stock(
    trl: Any, model: str, task: Task, folder: Path, ours: Ours, seconds: list[Seconds]
) -> Any:
    """TRL's trainer; after each of its steps ours has its turn and `seconds` grows."""
    from datasets import Dataset
    from transformers import TrainerCallback

    class Timed(trl.GRPOTrainer):
        generating = 0.0

        def _generate(self, prompts: list[Any]) -> Any:
            start = time.perf_counter()
            found = super()._generate(prompts)
            self.generating += time.perf_counter() - start
            assert sum(map(len, found[1])) == TOKENS
            return found

    class Turns(TrainerCallback):
        start = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            trainer.generating, self.start = 0.0, time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            step, generate = time.perf_counter() - self.start, trainer.generating
            seconds.append({"generate": generate, "update": step - generate, "step": step})
            ours.step()

    trainer = Timed(
        model=model,
        reward_funcs=text_length,
        args=trl.GRPOConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=True,
            gradient_checkpointing=False,
            per_device_train_batch_size=MICROBATCH,
            gradient_accumulation_steps=PROMPTS * SAMPLES // MICROBATCH,
            num_generations=SAMPLES,
            max_completion_length=LENGTH,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_steps=1 + STEPS,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            model_init_kwargs={"dtype": torch.float32},
        ),
        train_dataset=Dataset.from_list([{"prompt": e.prompt} for e in task.train]),
        callbacks=[Turns()],
    )
    return trainer
