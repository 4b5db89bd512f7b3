"""The configuration of a training run: a frozen dataclass, from TOML and the command line."""

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

from rlvr_fast import options

SHIPPED = Path(__file__).parent / "configs"


class Schedule(StrEnum):
    """What the learning rate does after its warm-up."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


class Precision(StrEnum):
    """Of the matrix products; sums, statistics and the trainer's weights are fp32 in both."""

    BF16 = "bf16"
    FP32 = "fp32"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a run depends on. Written to the run folder; never edited after construction.

    Raises:
        ValueError: for a value that cannot be.
    """

    model: str
    """Model folder, hub id, or one that needs no download: smollm2-135m, tiny."""
    task: str
    """Where prompts and rewards come from: addition, or reasoning_gym:NAME."""
    task_options: options.Table = field(default_factory=dict)
    """Table of the task's own options."""
    method: str
    """The published method that is trained; `rlvr-fast methods` lists them."""
    method_options: options.Table = field(default_factory=dict)
    """Table of the method's own options."""
    run_folder: str
    """Where everything is written, must not hold a run yet; default runs/CONFIG-N, first free N."""
    seed: int = 0
    """Of sampling and of the order of prompts; every step reseeds from (seed, step)."""
    steps: int = 100
    """Training steps: one batch of completions each."""
    prompts_per_step: int = 16
    """Prompts sampled from in a step."""
    samples_per_prompt: int = 8
    """Completions of each prompt: one group."""
    max_completion_tokens: int = 256
    """Completions are cut off here, in training and evaluation."""
    temperature: float = 1.0
    """Of sampling, and of the log-probabilities that are trained."""
    system_prompt: str = ""
    """Put before every chat as a system message; empty: none."""
    tokens_per_microbatch: int = 8192
    """Model inputs per forward pass; changes memory and speed, no gradient."""
    share_prompts: bool = True
    """Compute a prompt once for its whole group; changes speed, no gradient."""
    updates_per_batch: int = 1
    """Optimiser updates on each batch; all but the first are off policy."""
    learning_rate: float = 1e-6
    """AdamW's, after the warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly to its full value."""
    schedule: Schedule = Schedule.CONSTANT
    """Learning rate after the warm-up: constant, or falling to 0 at the end of the last step."""
    adam_beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    adam_beta2: float = 0.999
    """AdamW's decay of the mean squared gradient."""
    weight_decay: float = 0.0
    """AdamW's, on every parameter."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    kl_coef: float = 0.0
    """Weight of the k3 KL estimate to a frozen copy of the initial model; 0: no copy is kept."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus."""
    precision: Precision = Precision.BF16
    """Of the forward and backward pass; the optimiser's weights are fp32. Also of the export."""
    engine: str = "embedded"
    """What generates: embedded (in process)."""
    engine_precision: Precision = Precision.BF16
    """Of the generating copy of the weights."""
    engine_sleeps: bool = False
    """Give the engine's accelerator memory back while the optimiser works; costs two copies."""
    logits_budget: int | None = None
    """Bytes of logits alive at once; none: the op's default for the device."""
    eval_every: int = 0
    """Steps between greedy evaluations; 0: only before the first step and after the last."""
    eval_prompts: int | None = None
    """Evaluate on the first so many held-out prompts; none: on all."""
    checkpoint_every: int = 10
    """Steps between checkpoints; one is always written after the last step."""
    keep_checkpoints: int = 2
    """Older checkpoints are deleted."""
    log_completions: int = 8
    """Completions per step that are written to completions.jsonl."""
    tensorboard: bool = True
    """Also write TensorBoard event files, if tensorboard is installed."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: cuda where there is one."""
    threads: int | None = None
    """CPU threads; none: torch's own choice."""

    def __post_init__(self) -> None:
        for name in ("model", "task", "method", "run_folder"):
            _check(self, name, bool(getattr(self, name)), "a name")
        for name in _COUNTS:
            _check(self, name, getattr(self, name) is None or getattr(self, name) >= 1, ">= 1")
        for name in _NOT_NEGATIVE:
            _check(self, name, 0 <= getattr(self, name) < math.inf, ">= 0 and finite")
        for name in ("temperature", "max_grad_norm"):
            _check(self, name, 0 < getattr(self, name) < math.inf, "> 0 and finite")
        for name in ("adam_beta1", "adam_beta2"):
            _check(self, name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        _check(self, "seed", self.seed < 2**32, "< 2**32")
        _check(self, "warmup_steps", self.warmup_steps <= self.steps, f"<= steps, {self.steps}")
        _check(self, "engine", self.engine == "embedded", "embedded")
        _check(self, "device", re.fullmatch(_DEVICE, self.device) is not None, _DEVICES)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What `rlvr-fast eval` depends on besides the model.

    Raises:
        ValueError: for a value that cannot be.
    """

    task: str
    """Where prompts and rewards come from: addition, or reasoning_gym:NAME."""
    task_options: options.Table = field(default_factory=dict)
    """Table of the task's own options."""
    prompts: int | None = None
    """Evaluate on the first so many held-out prompts; none: on all."""
    n: int | None = None
    """Sample so many completions per prompt, besides the greedy one; none: do not sample."""
    k: str = "1"
    """Estimate pass@k from the samples for these k, separated by commas."""
    correct: float = 1.0
    """A completion with at least this reward counts as correct in pass@k."""
    temperature: float = 1.0
    """Of sampling."""
    max_completion_tokens: int = 256
    """Completions are cut off here."""
    system_prompt: str = ""
    """Put before every chat as a system message; empty: none."""
    precision: Precision = Precision.BF16
    """Of the weights and matrix products."""
    seed: int = 0
    """Of sampling."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: cuda where there is one."""
    output: str = ""
    """JSON file for the result; empty: only show it."""

    def __post_init__(self) -> None:
        for name in ("prompts", "n", "max_completion_tokens"):
            _check(self, name, getattr(self, name) is None or getattr(self, name) >= 1, ">= 1")
        _check(self, "k", re.fullmatch(r"\d+(,\d+)*", self.k) is not None, "numbers like 1,4,16")
        _check(self, "temperature", 0 < self.temperature < math.inf, "> 0 and finite")
        _check(self, "device", re.fullmatch(_DEVICE, self.device) is not None, _DEVICES)

    @property
    def ks(self) -> list[int]:
        return [int(number) for number in self.k.split(",")]


_DEVICE, _DEVICES = r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:N"
_COUNTS = (
    "steps",
    "prompts_per_step",
    "samples_per_prompt",
    "max_completion_tokens",
    "tokens_per_microbatch",
    "updates_per_batch",
    "logits_budget",
    "eval_prompts",
    "checkpoint_every",
    "keep_checkpoints",
    "threads",
)
_NOT_NEGATIVE = (
    "seed",
    "warmup_steps",
    "learning_rate",
    "weight_decay",
    "kl_coef",
    "entropy_coef",
    "eval_every",
    "log_completions",
)

FREE_ON_RESUME = frozenset(
    {
        "run_folder",
        "steps",
        "eval_every",
        "eval_prompts",
        "checkpoint_every",
        "keep_checkpoints",
        "log_completions",
        "tensorboard",
        "tokens_per_microbatch",
        "share_prompts",
        "engine_sleeps",
        "logits_budget",
        "device",
        "threads",
    }
)
"""What a resumed run may change: lengths, reports, and how the same gradient is computed."""


def load(name_or_path: str, overrides: Mapping[str, object] | None = None) -> TrainConfig:
    """A shipped config by name or a TOML file, with some fields replaced.

    Args:
        name_or_path: a file if it ends in `.toml` or has a slash, else the name of a shipped one.
        overrides: by field, or by `table.option`; values of the field's type, or text of them.

    Raises:
        FileNotFoundError: where there is no such config; the message lists the shipped ones.
        ValueError: for an unknown field, a wrong type or an impossible value.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml" and len(path.parts) == 1:
        path = SHIPPED / f"{name_or_path}.toml"
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        shipped = ", ".join(sorted(found.stem for found in SHIPPED.glob("*.toml")))
        raise FileNotFoundError(
            f"config: wanted a TOML file or one of {shipped}, got {name_or_path}"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"config {name_or_path}: wanted TOML, got: {error}") from None
    return from_values({"run_folder": _free_folder(path.stem)} | values, overrides or {})


def from_values(
    values: Mapping[str, object], overrides: Mapping[str, object] | None = None
) -> TrainConfig:
    """As `load`, from a dictionary such as `to_values` gives.

    Raises:
        ValueError: as `load`.
    """
    merged = options.merge(TrainConfig, values, overrides or {})
    return options.build("config field", TrainConfig, merged)


def to_values(config: TrainConfig) -> dict[str, Any]:
    """Plain JSON and TOML values; `from_values` inverts it."""
    return {
        name: value.value if isinstance(value, Enum) else value
        for name, value in asdict(config).items()
    }


def changes(old: TrainConfig, new: TrainConfig) -> dict[str, str]:
    """By field, one line `field: old -> new` for every field that differs."""
    before, after = to_values(old), to_values(new)
    return {
        name: f"{name}: {before[name]} -> {after[name]}"
        for name in before
        if before[name] != after[name]
    }


def describe(config: TrainConfig) -> str:
    """One line per field."""
    values = to_values(config)
    width = max(map(len, values))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in values.items())


def _check(config: TrainConfig | EvalConfig, name: str, holds: bool, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name}: wanted {wanted}, got {getattr(config, name)!r}")


def _free_folder(stem: str) -> str:
    """The first of runs/STEM-1, runs/STEM-2 ... that does not exist."""
    n = 1
    while (Path("runs") / f"{stem}-{n}").exists():
        n += 1
    return str(Path("runs") / f"{stem}-{n}")
