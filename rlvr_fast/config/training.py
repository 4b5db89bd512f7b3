"""What a training run depends on."""

import math
from dataclasses import dataclass, field
from enum import StrEnum

from rlvr_fast import options, trackers
from rlvr_fast.config.checks import Precision, check, check_device
from rlvr_fast.config.corrections import MismatchCorrection, MismatchReduction, check_bounds


class Schedule(StrEnum):
    """What the learning rate does after its warm-up."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


class Overlong(StrEnum):
    """What becomes of completions that were cut off at `max_completion_tokens`."""

    KEEP = "keep"
    MASK = "mask"
    PENALTY = "penalty"


class KLEstimate(StrEnum):
    """Of KL(policy || reference), from the sampled tokens; see `objectives`."""

    K1 = "k1"
    K2 = "k2"
    K3 = "k3"


class EngineName(StrEnum):
    """What generates."""

    AUTO = "auto"
    EMBEDDED = "embedded"
    VLLM = "vllm"
    VLLM_SERVER = "vllm-server"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a run depends on. Written to the run folder; never edited after construction.

    Raises:
        ValueError: for a value that cannot be.
    """

    model: str
    """Model folder, hub id, or one that needs no download: smollm2-135m, tiny."""
    task: str
    """Where prompts and rewards come from: addition, word_problems, dataset, mixture, or
    reasoning_gym:NAME."""
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
    refill_rounds: int = 0
    """How often a batch may sample other prompts in place of groups without a signal; 0: never."""
    overlong: Overlong = Overlong.KEEP
    """Completions that are cut off: keep them, mask their tokens, or penalty (soft, see buffer)."""
    overlong_buffer: int | None = None
    """With overlong = penalty: over so many last tokens the reward falls linearly by 1; none: a
    fifth of max_completion_tokens, at least 1."""
    system_prompt: str = ""
    """Put before every chat as a system message; empty: none."""
    tokens_per_microbatch: int = 8192
    """Model inputs per forward pass; changes memory and speed, no gradient."""
    share_prompts: bool = True
    """Compute once what a group's sequences begin with in common; changes speed, no gradient."""
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
    """Weight of a KL penalty to a frozen copy of the initial model; 0: no copy is kept for it."""
    kl_estimate: KLEstimate = KLEstimate.K3
    """Of that penalty: k1, k2 (whose gradient is that of the KL) or k3 (never below 0)."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus."""
    mismatch_correction: MismatchCorrection = MismatchCorrection.NONE
    """Weigh losses by exp(trainer's logp - sampler's): per token or sequence, truncate the ratio at
    the two bounds below or mask it (0) outside of them. Denominators stay as they are."""
    mismatch_cap: float = 3.0
    """The largest ratio that counts as it is."""
    mismatch_floor: float = 0.0
    """The smallest ratio that counts as it is."""
    mismatch_reduction: MismatchReduction = MismatchReduction.SUM
    """A sequence's log-ratio: the sum over its tokens (exact), or the mean (any length alike)."""
    head_precision: Precision | None = None
    """Of the logits, here and in the embedded engine; none: fp32 where that costs no time."""
    precision: Precision = Precision.BF16
    """Of the forward and backward pass; the optimiser's weights are fp32. Also of the export."""
    lora_rank: int = 0
    """Train low-rank adapters of this rank and leave the model as it is; 0: train all weights."""
    lora_alpha: float = 32.0
    """The adapters' product is scaled by lora_alpha / lora_rank."""
    lora_targets: str = "all-linear"
    """Layers with an adapter: all-linear (all but the head), or names separated by commas."""
    engine: EngineName = EngineName.AUTO
    """embedded (transformers, in process), vllm (in process), vllm-server, or auto: vllm on a GPU
    where it is installed, else embedded."""
    engine_options: options.Table = field(default_factory=dict)
    """Table of the engine's own options."""
    pipeline: bool = False
    """Generate the next batch during the update: one step off policy, so a mismatch_correction is
    wanted."""
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
    trackers: str = "tensorboard"
    """Where numbers also go: tensorboard, wandb, trackio, separated by commas; or none."""
    split_weights: bool = False
    """Under torchrun: each rank holds a part of the weights, gradients and AdamW's state (FSDP2)
    instead of all of them; slower where they fit, changes no gradient."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: cuda where there is one."""
    threads: int | None = None
    """CPU threads; none: torch's own choice."""

    def __post_init__(self) -> None:
        for name in ("model", "task", "method", "run_folder"):
            check(self, name, bool(getattr(self, name)), "a name")
        for name in _COUNTS:
            check(self, name, getattr(self, name) is None or getattr(self, name) >= 1, ">= 1")
        for name in _NOT_NEGATIVE:
            check(self, name, 0 <= getattr(self, name) < math.inf, ">= 0 and finite")
        for name in ("temperature", "max_grad_norm", "lora_alpha"):
            check(self, name, 0 < getattr(self, name) < math.inf, "> 0 and finite")
        for name in ("adam_beta1", "adam_beta2"):
            check(self, name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        check(self, "seed", self.seed < 2**32, "< 2**32")
        check(self, "warmup_steps", self.warmup_steps <= self.steps, f"<= steps, {self.steps}")
        longest = self.max_completion_tokens
        fits = self.overlong_buffer is None or self.overlong_buffer <= longest
        check(self, "overlong_buffer", fits, f"<= max_completion_tokens, {longest}")
        free = not (self.pipeline and self.engine_sleeps)
        check(self, "engine_sleeps", free, "false with pipeline, whose engine always works")
        if self.pipeline:
            corrected = self.mismatch_correction is not MismatchCorrection.NONE
            check(self, "mismatch_correction", corrected, "one with pipeline, which is off policy")
        check_bounds(self.mismatch_floor, self.mismatch_cap)
        narrow = self.head_precision is Precision.BF16 and self.precision is not Precision.BF16
        check(self, "head_precision", not narrow, "fp32 or none with precision fp32")
        whole = not (self.split_weights and self.lora_rank)
        check(self, "split_weights", whole, "false with lora_rank, whose model is not trained")
        check_device(self)
        trackers.names(self.trackers)


_COUNTS = (
    "steps",
    "prompts_per_step",
    "samples_per_prompt",
    "max_completion_tokens",
    "overlong_buffer",
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
    "refill_rounds",
    "lora_rank",
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
        "trackers",
        "tokens_per_microbatch",
        "share_prompts",
        "engine_sleeps",
        "logits_budget",
        "split_weights",
        "device",
        "threads",
    }
)
"""What a resumed run may change: lengths, reports, and how the same gradient is computed."""
