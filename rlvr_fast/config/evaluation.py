"""What an evaluation depends on."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from rlvr_fast import options
from rlvr_fast.config.checks import Precision, check, check_device
from rlvr_fast.config.training import EngineName


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What `rlvr-fast eval` depends on besides the model.

    Raises:
        ValueError: for a value that cannot be.
    """

    task: str
    """Where prompts and rewards come from: addition, word_problems, dataset, mixture, or
    reasoning_gym:NAME."""
    task_options: options.Table = field(default_factory=dict)
    """Table of the task's own options."""
    prompts: int | None = None
    """Evaluate on the first so many held-out prompts; none: on all."""
    n: int | None = None
    """Sample so many completions per prompt, besides the greedy one; none: do not sample."""
    k: str = ""
    """Estimate pass@k from the samples for these k, separated by commas; empty: 1, 2, 4 ... n."""
    correct: float = 1.0
    """A completion with at least this reward counts as correct in pass@k and majority votes."""
    temperature: float = 1.0
    """Of sampling."""
    max_completion_tokens: int = 256
    """Completions are cut off here."""
    system_prompt: str = ""
    """Put before every chat as a system message; empty: none."""
    precision: Precision = Precision.BF16
    """Of the weights and matrix products."""
    engine: EngineName = EngineName.AUTO
    """embedded (transformers, in process), vllm (in process), vllm-server, or auto: vllm on a GPU
    where it is installed, else embedded."""
    engine_options: options.Table = field(default_factory=dict)
    """Table of the engine's own options."""
    seed: int = 0
    """Of sampling."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: cuda where there is one."""
    against: str = ""
    """Another model that answers the same prompts, to compare with; empty: none."""
    output: str = ""
    """JSON file for the result; empty: only show it."""
    completions: str = ""
    """JSONL file for every completion with its prompt, reward and task; empty: none."""
    plot: str = ""
    """Image (.png, .svg or .pdf) of pass@k, rewards and differences; empty: none."""

    def __post_init__(self) -> None:
        for name in ("prompts", "n", "max_completion_tokens"):
            check(self, name, getattr(self, name) is None or getattr(self, name) >= 1, ">= 1")
        check(self, "k", re.fullmatch(r"(\d+(,\d+)*)?", self.k) is not None, "numbers like 1,4,16")
        check(self, "temperature", 0 < self.temperature < math.inf, "> 0 and finite")
        for name in ("output", "completions", "plot"):
            folder = Path(getattr(self, name)).parent
            check(self, name, folder.is_dir(), "a file in a folder that exists")
        suffixes = (".png", ".svg", ".pdf")
        check(self, "plot", not self.plot or self.plot.endswith(suffixes), ".png, .svg or .pdf")
        check_device(self)

    @property
    def ks(self) -> list[int]:
        """Nothing without samples."""
        if self.n is None:
            return []
        if self.k:
            return [int(number) for number in self.k.split(",")]
        return [*(2**i for i in range((self.n - 1).bit_length())), self.n]
