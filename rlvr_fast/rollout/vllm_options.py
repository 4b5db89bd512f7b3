"""Settings of the vLLM engines, as a user gives them and as vLLM takes them."""

from dataclasses import dataclass
from typing import Any

import torch

from rlvr_fast.rollout.vllm_model import ServedModel

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Nothing is reported to anybody, and nobody but this machine can connect.
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
}
"""Variables of vLLM's process."""
_TOKENS_AT_ONCE = 4096  # vLLM's default on a CPU.


@dataclass(frozen=True, kw_only=True)
class VLLMOptions:
    """Options of vLLM in the trainer's process.

    Raises:
        ValueError: for a number outside of its range.
    """

    max_model_len: int | None = None
    """Most tokens of prompt and completion together; none: the model's context."""
    gpu_memory_utilization: float = 0.4
    """Share of a GPU's memory for weights and cache; the trainer lives in the rest."""
    kv_cache_gib: float | None = None
    """Size of the cache instead of that share; none on a CPU: 2."""
    max_num_seqs: int = 256
    """Completions that advance together."""
    enforce_eager: bool | None = None
    """No CUDA graphs and the model not compiled; none: on a CPU only."""

    def __post_init__(self) -> None:
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"gpu_memory_utilization: wanted above 0, at most 1, "
                f"got {self.gpu_memory_utilization}"
            )
        if self.kv_cache_gib is not None and not 0 < self.kv_cache_gib < float("inf"):
            raise ValueError(f"kv_cache_gib: wanted above 0 and finite, got {self.kv_cache_gib}")
        if self.max_num_seqs < 1:
            raise ValueError(f"max_num_seqs: wanted at least 1, got {self.max_num_seqs}")

    def arguments(
        self,
        model: ServedModel,
        dtype: torch.dtype,
        head_dtype: torch.dtype | None,
        device: torch.device,
    ) -> dict[str, Any]:
        """Engine arguments of vLLM; those that it would take from the model are neutral.

        Raises:
            ValueError: for logits of another dtype than fp32 or the model's.
        """
        if head_dtype not in (None, dtype, torch.float32):
            raise ValueError(f"head_dtype: wanted {dtype} or torch.float32, got {head_dtype}")
        eager = device.type == "cpu" if self.enforce_eager is None else self.enforce_eager
        chosen: dict[str, Any] = {
            "model": model.path,
            "max_model_len": model.context,
            "dtype": str(dtype).removeprefix("torch."),
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "max_num_seqs": self.max_num_seqs,
            "enforce_eager": eager,
            "enable_sleep_mode": device.type != "cpu",
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",
            "use_tqdm_on_load": False,
            "seed": 0,
        }
        if device.type == "cpu":
            chosen |= _on_cpu(model.context)
        if self.kv_cache_gib is not None:
            chosen["kv_cache_memory_bytes"] = int(self.kv_cache_gib * 2**30)
        # A GPU's product leaves fp32 sums for nothing; a CPU casts the head at every step.
        if head_dtype == torch.float32 or (head_dtype is None and device.type != "cpu"):
            chosen["hf_overrides"] = {"head_dtype": "float32"}
        return chosen


@dataclass(frozen=True, kw_only=True)
class VLLMServerOptions(VLLMOptions):
    """Options of vLLM in another process; all but two are for one that we start.

    Raises:
        ValueError: for a number outside of its range, or an address of another form.
    """

    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory for weights and cache."""
    address: str | None = None
    """http://host:port of a server of this user's that runs already; none: start one, for this
    process only."""
    transfer_folder: str | None = None
    """Where weights pass through, seen by both processes; none: memory if there is room, else the
    folder for temporary files."""
    gpu: str | None = None
    """CUDA_VISIBLE_DEVICES of the server that we start; none: the GPUs that this process sees."""
    start_seconds: float = 900.0
    """How long a server that we start may take until it answers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.address is not None and not self.address.startswith(("http://", "https://")):
            raise ValueError(f"address: wanted http://host:port, got {self.address}")
        if not self.start_seconds > 0:
            raise ValueError(f"start_seconds: wanted above 0, got {self.start_seconds}")


def _on_cpu(context: int) -> dict[str, Any]:
    return {
        # There is no share of a GPU's memory to take.
        "kv_cache_memory_bytes": 2 * 2**30,
        # vLLM 0.32 cannot step a seeded request back there that it has computed half of.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(_TOKENS_AT_ONCE, context),
        # The samples of a prompt share its full blocks; by default one has 128 tokens.
        "block_size": 32,
        "kv_transfer_config": {
            "kv_connector": "SiblingBlocks",
            "kv_connector_module_path": "rlvr_fast.rollout.vllm_siblings",
            "kv_role": "kv_both",
        },
        "worker_extension_cls": "rlvr_fast.rollout.vllm_sampler.Worker",
    }
