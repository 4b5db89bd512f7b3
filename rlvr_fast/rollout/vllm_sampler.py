"""vLLM's sampler on a CPU: one sweep over the logits instead of seven.

Only vLLM imports this, by name, in whichever process it runs.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from rlvr_fast.ops.sample import sample
from rlvr_fast.ops.transform import LogitTransform


class Worker:
    """What vLLM's worker can do besides its own; see its `worker_extension_cls`."""

    model_runner: Any

    def sample_in_one_sweep(self) -> None:
        """From now on tokens are drawn by `OneSweep`."""
        self.model_runner.sampler = OneSweep(self.model_runner.sampler.logprobs_mode)


class OneSweep(Sampler):
    """Draws tokens and their log-probabilities, for requests by `ServedModel.request` only.

    Of what vLLM can do to a distribution they ask for a temperature and a logit bias. Nor do they
    read how a token ranks among all others, which is given as 0 here.
    """

    def forward(
        self,
        logits: Tensor,
        sampling_metadata: SamplingMetadata,
        predict_bonus_token: bool = False,
        logprobs_mode_override: Any = None,
    ) -> SamplerOutput:
        """One token for each row of `logits`, `[R, V]`; row `r` draws from its own generator."""
        logits = self.apply_logits_processors(logits, sampling_metadata, predict_bonus_token)
        count, generators = len(logits), sampling_metadata.generators
        tokens, logp = torch.empty(count, dtype=torch.int64), torch.empty(count)
        greedy = sampling_metadata.all_greedy  # Then vLLM gives no temperatures.
        temperatures = torch.zeros(count) if greedy else sampling_metadata.temperature
        for temperature in temperatures.unique().tolist():
            rows = (temperatures == temperature).nonzero()[:, 0]
            noise = _noise(rows.tolist(), generators) if temperature else None
            # The likeliest token's log-probability is vLLM's: at temperature 1.
            transform = LogitTransform(temperature=temperature or 1.0)
            some = logits if len(rows) == count else logits[rows]
            tokens[rows], logp[rows] = sample(some, noise, transform)
        ids = tokens.to(torch.int32)[:, None]
        return SamplerOutput(
            sampled_token_ids=ids,
            logprobs_tensors=LogprobsTensors(ids, logp[:, None], torch.zeros_like(tokens)),
        )


def _noise(rows: list[int], generators: Mapping[int, torch.Generator]) -> Tensor:
    noise = torch.empty(len(rows), dtype=torch.float64)
    for place, row in enumerate(rows):
        noise[place].uniform_(generator=generators.get(row))
    return noise
