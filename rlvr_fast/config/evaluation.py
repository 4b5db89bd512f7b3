"""What an evaluation depends on."""

import math
import re
from dataclasses import dataclass, field

from rlvr_fast import options
from rlvr_fast.config.checks import Precision, check, check_device


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
            check(self, name, getattr(self, name) is None or getattr(self, name) >= 1, ">= 1")
        check(self, "k", re.fullmatch(r"\d+(,\d+)*", self.k) is not None, "numbers like 1,4,16")
        check(self, "temperature", 0 < self.temperature < math.inf, "> 0 and finite")
        check_device(self)

    @property
    def ks(self) -> list[int]:
        return [int(number) for number in self.k.split(",")]
