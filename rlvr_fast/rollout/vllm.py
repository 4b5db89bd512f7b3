"""vLLM in this process, on the trainer's device."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlvr_fast.rollout import Completion, SamplingParams, vllm_process
from rlvr_fast.rollout.vllm_model import ServedModel, completion
from rlvr_fast.rollout.vllm_options import ENVIRONMENT, VLLMOptions

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.outputs import CompletionOutput


class VLLMEngine:
    """Generation by vLLM's `LLM`, see `Engine`.

    vLLM's own sampler decides: completions differ from those of other engines with the same seed.
    vLLM decides which device it works on when it is installed, and on a GPU takes the first that
    this process sees. New weights are copied into its own.

    Args:
        model: a folder or hub id, see `models.resolve`.
        dtype: of weights and cache.
        device: `cpu` or `cuda`, as vLLM was built for.
        head_dtype: of the logits, fp32 or `dtype`; none: fp32 on a GPU.
        options: see `VLLMOptions`.

    Raises:
        ImportError: without vLLM.
        RuntimeError: while this process has another such engine.
        ValueError: for another device than vLLM's, a model that it cannot serve, or a context
            beyond the model's.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        head_dtype: torch.dtype | None = None,
        options: VLLMOptions | None = None,
    ) -> None:
        options = options or VLLMOptions()
        self._device = torch.device(device)
        self._model = ServedModel.read(model, options.max_model_len)
        self._llm: LLM | None = None
        arguments = options.arguments(self._model, dtype, head_dtype, self._device)
        quiet = {"VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")}
        with vllm_process.starting(ENVIRONMENT | quiet):
            self._llm = _vllm(self._device)(skip_tokenizer_init=True, **arguments)
            if self._device.type == "cpu":
                self._llm.collective_rpc("sample_in_one_sweep")

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams
    ) -> list[list[Completion]]:
        """`sampling.n` completions for each prompt of token ids, in order.

        A completion that reaches the end of the context is cut off there. The random numbers of a
        sample depend on its prompt's place in `prompts` only.

        Raises:
            ValueError: for a prompt that is empty, has ids that the model does not know or leaves
                no room in the context; for a temperature above 2 or between 0 and 0.01; for
                weights that give no numbers.
        """
        from vllm import SamplingParams as Request

        llm = self._living()
        self._model.check_prompts(prompts)
        requests = [
            Request(**self._model.request(sampling, place), flat_logprobs=True)
            for place in range(len(prompts))
        ]
        if not requests:
            return []
        # What an earlier call left would be computed in other batches now, and rounded otherwise.
        llm.reset_prefix_cache()
        with vllm_process.generating():
            inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
            answers = llm.generate(inputs, requests, use_tqdm=False)
        groups = [[_completion(output) for output in answer.outputs] for answer in answers]
        return groups if sampling.temperature else [group * sampling.n for group in groups]

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copies parameters, by their Hugging Face names, into the engine.

        Weights that the model ties may come under any of their names. All tensors are held until
        the last has come.

        Raises:
            ValueError: for an unknown name, another shape, or a parameter that did not come. The
                engine then keeps what it had.
        """
        llm = self._living()
        weights = self._model.complete(named_tensors)
        # One call with everything: vLLM lays a layer out anew when all of its weights are there.
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        llm.reset_prefix_cache()

    def sleep(self) -> None:
        """Moves the weights off a GPU and drops the cache; a CPU has nothing to give back."""
        if self._device.type != "cpu":
            # Level 2 would not keep the weights, and `wake` alone must make the engine whole.
            self._living().sleep(level=1)

    def wake(self) -> None:
        """Moves the weights back and makes a new cache."""
        if self._device.type != "cpu":
            self._living().wake_up()

    def close(self) -> None:
        """Frees weights, cache and what vLLM has changed in this process."""
        if self._llm is not None:
            with vllm_process.stopping():
                self._llm.llm_engine.engine_core.shutdown()
                self._llm = None

    def _living(self) -> "LLM":
        if self._llm is None:
            raise RuntimeError("the engine is closed")
        return self._llm


def _vllm(device: torch.device) -> Any:
    """The class `LLM` of a vLLM that works on this device."""
    try:
        from vllm import LLM
        from vllm.platforms import current_platform
    except ImportError as error:
        raise ImportError("vLLM is not installed: pip install 'rlvr-fast[vllm]'") from error
    if device.type != current_platform.device_type or device.index not in (None, 0):
        raise ValueError(
            f"device: wanted {current_platform.device_type}, for which this vLLM was built, and "
            f"the first that this process sees, got {device}"
        )
    return LLM


def _completion(output: "CompletionOutput") -> Completion:
    logprobs = output.logprobs
    logp = [float(logprobs.logprobs[start]) for start in logprobs.start_indices]
    return completion(list(output.token_ids), logp, output.finish_reason)
