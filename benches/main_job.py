"""The step of the main job that benches measure, and how TRL is told to do it."""

from pathlib import Path
from typing import Any

import torch

PROMPTS, SAMPLES, LENGTH = 16, 8, 12
MICROBATCH = 32
"""TRL's, in completions."""


def trl_settings(folder: Path) -> dict[str, Any]:
    """Of `GRPOConfig`; everything else is its default."""
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": True,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": MICROBATCH,
        "gradient_accumulation_steps": PROMPTS * SAMPLES // MICROBATCH,
        "num_generations": SAMPLES,
        "max_completion_length": LENGTH,
        "report_to": "none",
        "model_init_kwargs": {"dtype": torch.float32},
    }
