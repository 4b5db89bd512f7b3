"""One training step of ours against stock TRL: same model, prompts, rewards, sizes and optimiser.

Both train SmolLM2-135M with AdamW on fp32 weights, forward and backward under bf16 autocast, on
16 addition prompts with 8 completions each. Its end-of-sequence token is replaced by one that it
never samples, so every completion has exactly 12 tokens; the reward is the length of the text, so
every group has a signal and we may leave nothing out. TRL generates with transformers' `generate`.
Its settings are its defaults except: no gradient checkpointing (ours has none either), and four
micro-batches of 32 (NOTES.md: not established as the fastest).

Every contender has the machine to itself, in a process of its own, one after another: in turn,
processes that wait cost the one that works a fifth of its speed.
"""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benches.main_job import LENGTH, PROMPTS, SAMPLES, trl_settings
from benches.report import Table
from rlvr_fast import config as configs
from rlvr_fast import models
from rlvr_fast.rewards import completion_text
from rlvr_fast.tasks import Task, load_task
from rlvr_fast.trainer import Trainer

TOKENS = PROMPTS * SAMPLES * LENGTH
WARM_UP, STEPS = 2, 3
"""The second step, too, still meets fresh memory."""
NEVER_SAMPLED = "<file_sep>"
LEARNING_RATE = 1e-6

Seconds = dict[str, float]
PARTS = ("generate", "update", "sync", "step")


def text_length(completions: list[Any], **_: Any) -> list[float]:
    """The reward, in TRL's signature, which is ours."""
    return [float(len(completion_text(completion))) for completion in completions]


def test_training_step(
    tmp_path: Path, benchmark: BenchmarkFixture, report: Callable[[Table], None]
) -> None:
    folder = endless(tmp_path / "model")
    contenders = {"rlvr_fast": embedded}
    if installed("vllm"):
        contenders["rlvr_fast, vLLM"] = vllm
    if installed("trl"):
        contenders["TRL 1.16"] = stock
    found = benchmark.pedantic(one_by_one, (contenders, folder, tmp_path))
    own = median(s["step"] for s in found["rlvr_fast"])
    rows = [
        {
            "": name,
            **{f"{part} s": median(s[part] for s in steps) for part in PARTS},
            "tokens/s": TOKENS / median(s["step"] for s in steps),
            "x ours": median(s["step"] for s in steps) / own,
        }
        for name, steps in found.items()
    ]
    title = (
        f"One training step: SmolLM2-135M, {PROMPTS} prompts x {SAMPLES} completions x {LENGTH} "
        f"tokens, median of {STEPS} steps"
    )
    notes = [
        f"{torch.get_num_threads()} threads each, one process each, one after another",
        "update: everything that is neither generation nor weight transfer",
    ]
    report(Table(title=title, rows=rows, notes=notes))


def installed(module: str) -> bool:
    try:
        __import__(module)
    except ImportError:
        return False
    return True


def one_by_one(
    contenders: dict[str, Callable[..., None]], model: str, folder: Path
) -> dict[str, list[Seconds]]:
    """By name, the seconds of each step after those that warm up."""
    spawn = multiprocessing.get_context("spawn")
    found = {}
    for name, contender in contenders.items():
        mine, theirs = spawn.Pipe()
        arguments = (theirs, model, folder / contender.__name__)
        process = spawn.Process(target=contender, args=arguments)
        process.start()
        theirs.close()
        found[name] = [mine.recv() for _ in range(WARM_UP + STEPS)][WARM_UP:]
        process.join()
    return found


def embedded(parent: Connection, model: str, folder: Path) -> None:
    ours(parent, model, folder, "embedded")


def vllm(parent: Connection, model: str, folder: Path) -> None:
    ours(parent, model, folder, "vllm")


def ours(parent: Connection, model: str, folder: Path, engine: str) -> None:
    """Our trainer, one step at a time."""
    config = configs.load(
        "addition",
        {
            "model": model,
            "run_folder": str(folder),
            "method": "grpo",
            "engine": engine,
            "prompts_per_step": PROMPTS,
            "samples_per_prompt": SAMPLES,
            "max_completion_tokens": LENGTH,
            "learning_rate": LEARNING_RATE,
        },
    )
    trainer = Trainer(config, task())
    trainer.sync()
    for step in range(1, 1 + WARM_UP + STEPS):
        values, groups = trainer.step(step)
        assert sum(len(r.completion_ids) for group in groups for r in group) == TOKENS
        generate, sync = values["seconds_generate"], values["seconds_sync"]
        total = values["seconds_total"]
        update = total - generate - sync
        parent.send({"generate": generate, "update": update, "sync": sync, "step": total})
    trainer.engine.close()


def stock(parent: Connection, model: str, folder: Path) -> None:
    """TRL's trainer."""
    import trl
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
            parent.send(
                {"generate": generate, "update": step - generate, "sync": 0.0, "step": step}
            )

    trainer = Timed(
        model=model,
        reward_funcs=text_length,
        args=trl.GRPOConfig(
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_steps=WARM_UP + STEPS,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **trl_settings(folder),
        ),
        train_dataset=Dataset.from_list([{"prompt": e.prompt} for e in task().train]),
        callbacks=[Turns()],
    )
    trainer.train()


def task() -> Task:
    given = load_task("addition", {})
    return Task("addition", given.train[:PROMPTS], given.evaluation[:1], text_length)


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
