"""vLLM in a process of its own, perhaps on a GPU of its own.

Token ids go in and come out through vLLM's `/inference/v1/generate`. New weights go through a
safetensors file in a folder that only this user can enter, which the server reloads
(`/collective_rpc` with `reload_weights`): the transfer that vLLM has itself needs NCCL and a second
GPU.
"""

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rlvr_fast.rollout import Completion, SamplingParams
from rlvr_fast.rollout.vllm_client import Client, Refused, Unreachable
from rlvr_fast.rollout.vllm_model import ServedModel, completion
from rlvr_fast.rollout.vllm_options import ENVIRONMENT, VLLMServerOptions
from rlvr_fast.rollout.vllm_spawn import Server

_AT_ONCE = 64  # Requests under way; each is a prompt with its samples.
_MEMORY = Path("/dev/shm")
_HOW = (
    "VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model MODEL "
    "--enable-scale-out --logprobs-mode processed_logprobs"
)


class VLLMServerEngine:
    """Generation by a vLLM server, see `Engine` and `VLLMEngine`.

    The server puts requests into batches as they come in, so two calls with the same seed may
    differ where a rounding decides.

    Args:
        model: a folder or hub id, see `models.resolve`. A server that runs already must have it.
        dtype: of weights and cache; a server that runs already keeps its own.
        device: `cpu` or `cuda`, as vLLM was built for; a server that runs already keeps its own.
        head_dtype: as for `VLLMEngine`; a server that runs already keeps its own.
        options: see `VLLMServerOptions`.

    Raises:
        RuntimeError: for a server that does not start, with the end of its log.
        ValueError: for an address where no vLLM server answers that was started as needed, or a
            context beyond the model's.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        head_dtype: torch.dtype | None = None,
        options: VLLMServerOptions | None = None,
    ) -> None:
        options, where = options or VLLMServerOptions(), torch.device(device)
        self._model = ServedModel.read(model, options.max_model_len)
        arguments = options.arguments(self._model, dtype, head_dtype, where)
        self._dtype, self._samples = dtype, options.max_num_seqs
        self._sleeps = where.type != "cpu"
        self._folder = Path(
            tempfile.mkdtemp(prefix="rlvr-fast-", dir=options.transfer_folder or self._roomy())
        )
        self._server: Server | None = None
        if options.address is None:
            self._server = _started(arguments, options, where, self._folder)
            self._client = self._server.client
        else:
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            self._client = Client(options.address)
            self._join(options.address)
        self._open = True

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams
    ) -> list[list[Completion]]:
        """`sampling.n` completions for each prompt of token ids, in order.

        Raises:
            ValueError: as `VLLMEngine.generate`.
            RuntimeError: for a server that died or refuses, with the end of its log.
        """
        self._model.check_prompts(prompts)
        bodies = [
            {"token_ids": list(prompt), "sampling_params": part}
            for place, prompt in enumerate(prompts)
            for part in _parts(self._model.request(sampling, place), self._samples)
        ]
        if not bodies:
            return []
        self._post("/reset_prefix_cache")
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            answers = pool.map(lambda body: self._post("/inference/v1/generate", body), bodies)
            done = iter([written for answer in answers for written in _completions(answer)])
        count = sampling.n if sampling.temperature else 1
        groups = [[next(done) for _ in range(count)] for _ in prompts]
        return groups if sampling.temperature else [group * sampling.n for group in groups]

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copies parameters, by their Hugging Face names, into the server.

        Weights that the model ties may come under any of their names.

        Raises:
            ValueError: for an unknown name, another shape, or a parameter that did not come. The
                server then keeps what it had.
            RuntimeError: for a server that died or refuses, with the end of its log.
        """
        weights = {
            # Copies: the file format refuses tensors that share memory, as tied ones do.
            name: tensor.to("cpu", self._dtype, copy=True).contiguous()
            for name, tensor in self._model.complete(named_tensors)
        }
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            save_file(weights, Path(folder) / "model.safetensors")
            self._post(
                "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}}
            )
        self._post("/reset_prefix_cache")

    def sleep(self) -> None:
        """Moves the weights off a GPU and drops the cache; a CPU has nothing to give back."""
        if self._sleeps:
            self._post("/sleep?level=1")

    def wake(self) -> None:
        """Moves the weights back and makes a new cache."""
        if self._sleeps:
            self._post("/wake_up")

    def close(self) -> None:
        """Stops the server if we have started it, and waits for its end."""
        self._open = False
        if self._server is not None:
            self._server.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _post(self, path: str, body: object = None) -> Any:
        if not self._open:
            raise RuntimeError("the engine is closed")
        try:
            return self._client.post(path, body)
        except Refused as error:
            log = f"; {self._server.log()}" if self._server and error.status >= 500 else ""
            raise RuntimeError(f"the vLLM server refused {path}: {error}{log}") from error
        except Unreachable as error:
            end = self._server.wait_end() if self._server else f"no answer from {error}"
            raise RuntimeError(end) from error

    def _join(self, address: str) -> None:
        """Learns what a server that runs already was started with."""
        try:
            info = self._client.get("/server_info?config_format=json")["vllm_config"]
        except (Refused, Unreachable) as error:
            self.close()
            raise ValueError(f"address: wanted a server by '{_HOW}', got {error}") from error
        model = info["model_config"]
        if model["logprobs_mode"] != "processed_logprobs":
            self.close()
            raise ValueError(
                f"address: wanted a server with --logprobs-mode processed_logprobs, "
                f"got {model['logprobs_mode']} at {address}"
            )
        self._dtype = getattr(torch, model["dtype"].removeprefix("torch."))
        self._samples = info["scheduler_config"]["max_num_seqs"]
        self._sleeps = model["enable_sleep_mode"]
        self._model = self._model.within(model["max_model_len"])

    def _roomy(self) -> Path | None:
        """Memory that looks like a folder, where two sets of fp32 weights have room."""
        size = 4 * sum(torch.Size(shape).numel() for shape in self._model.shapes.values())
        roomy = os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > 2 * size
        return _MEMORY if roomy else None


def _started(
    arguments: dict[str, Any], options: VLLMServerOptions, device: torch.device, folder: Path
) -> Server:
    arguments |= {
        "tokens_only": True,
        "distributed_executor_backend": "uni",
        "disable_uvicorn_access_log": True,
    }
    environment = {"VLLM_SERVER_DEV_MODE": "1", **ENVIRONMENT}
    if options.gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = options.gpu
    server = Server(folder, arguments, environment)
    try:
        server.wait(options.start_seconds)
        if device.type == "cpu":
            server.client.post("/collective_rpc", {"method": "sample_in_one_sweep"})
    except BaseException:
        server.stop()
        raise
    return server


def _parts(request: dict[str, Any], most: int) -> Iterator[dict[str, Any]]:
    """The request in several, as the server takes at most so many samples at once."""
    for first in range(0, request["n"], most):
        count = min(most, request["n"] - first)
        yield {**request, "n": count, "seed": request["seed"] + first}


def _completions(answer: Any) -> Iterator[Completion]:
    for choice in sorted(answer["choices"], key=lambda choice: int(choice["index"])):
        yield completion(
            choice["token_ids"],
            [token["logprob"] for token in choice["logprobs"]["content"]],
            choice["finish_reason"],
        )
