"""The engine that is always available: transformers, in this process.

Each prompt is computed once, in a pack with the others, and its keys and values serve all of its
samples. The rows of a batch then advance together, and those that have finished leave it.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlvr_fast import attention, fused_layers, models
from rlvr_fast.ops import wide_linear
from rlvr_fast.ops.sample import sample
from rlvr_fast.ops.transform import LogitTransform
from rlvr_fast.ops.workspace import scratch
from rlvr_fast.packed import Sample, pack
from rlvr_fast.rollout import Completion, SamplingParams
from rlvr_fast.rollout.kv_cache import Batch, Cache, Prefill

_ROWS_AT_ONCE = 128  # Enough for the product, and few enough that their logits take 25 to 78 MB.


class _Row(NamedTuple):
    prompt: int
    sample: int


class EmbeddedEngine:
    """Generation with an own copy of a model, see `Engine`.

    Args:
        model: a folder or hub id, see `models.resolve`.
        dtype: of the copy and, on a CPU, of its cache. There bf16 weights of the layers are held
            twice, see `fused_layers.lay_out`.
        device: where the copy lives.
        head_dtype: of the logits, which fp32 softmax and sampling start from: fp32 or `dtype`. None
            as for `policy_loss`: fp32 where that costs no time. fp32 on a CPU without avx512_bf16
            casts the head once per `generate`.
        cache_tokens: how many tokens of prompts and completions are held at once; a larger
            request runs in turns. A single row may exceed it.

    Raises:
        ValueError: for a model that `attention.install` does not support, or another head_dtype.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        head_dtype: torch.dtype | None = None,
        cache_tokens: int = 65536,
    ) -> None:
        if head_dtype not in (None, dtype, torch.float32):
            raise ValueError(f"head_dtype: wanted {dtype} or torch.float32, got {head_dtype}")
        loaded, tokenizer = models.load(model, dtype=dtype)
        self._model = loaded
        self._device = torch.device(device)
        self._head_dtype, self._cache_tokens = head_dtype, cache_tokens
        # Embeddings are often padded: the rows past the tokenizer's are never sampled.
        self._vocab_size = len(tokenizer)
        self._eos_ids = torch.tensor(_eos_ids(loaded, tokenizer), dtype=torch.int64, device=device)
        self._context: int = loaded.config.get_text_config().max_position_embeddings
        self.wake()
        self._lay_out()

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams
    ) -> list[list[Completion]]:
        """`sampling.n` completions for each prompt of token ids, in order.

        A completion that reaches the end of the model's context is cut off there. The random
        numbers of a sample depend on its prompt's place in `prompts` only, not on the batches.

        Raises:
            ValueError: for a prompt that is empty or leaves no room in the context.
        """
        for prompt in prompts:
            if not 0 < len(prompt) < self._context:
                raise ValueError(
                    f"prompt: wanted 1 to {self._context - 1} tokens, the model's context less "
                    f"one, got {len(prompt)}"
                )
        draws = torch.Generator().manual_seed(sampling.seed)
        shape = (len(prompts), sampling.n, sampling.max_tokens)
        noise = torch.rand(shape, dtype=torch.float64, generator=draws)
        head = _Head(attention.head(self._model), self._vocab_size, self._head_dtype)
        done: dict[_Row, Completion] = {}
        for rows in self._batches(prompts, sampling):
            batch = [prompts[row.prompt] for row in rows]
            rows_noise = torch.stack([noise[row] for row in rows])
            completions = self._complete(batch, rows_noise.to(self._device), sampling, head)
            done.update(zip(rows, completions, strict=True))
        return [[done[_Row(p, s)] for s in range(sampling.n)] for p in range(len(prompts))]

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copies parameters, by their Hugging Face names, into the engine.

        Weights that the model ties may come under any of their names.

        Raises:
            ValueError: for an unknown name, another shape, or a parameter that did not come. The
                engine then holds a mixture.
        """
        own = self._model.state_dict(keep_vars=True)
        missing = {id(p): name for name, p in self._model.named_parameters()}
        for name, tensor in named_tensors:
            if name not in own:
                raise ValueError(f"named_tensors: wanted names of the model's, got {name}")
            if tensor.shape != own[name].shape:
                raise ValueError(
                    f"{name}: wanted {list(own[name].shape)}, got {list(tensor.shape)}"
                )
            own[name].detach().copy_(tensor.detach())
            missing.pop(id(own[name]), None)
        self._lay_out()
        if missing:
            raise ValueError(
                f"named_tensors: wanted all parameters, got no {min(missing.values())}"
            )

    def sleep(self) -> None:
        """Moves the copy off an accelerator; a CPU has nothing to give back."""
        _move(self._model, "cpu")

    def wake(self) -> None:
        """Moves the copy back."""
        _move(self._model, self._device)

    def close(self) -> None:
        """Nothing was started."""

    def _lay_out(self) -> None:
        if self._device.type == "cpu":
            fused_layers.lay_out(self._model)

    def _batches(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams
    ) -> Iterator[list[_Row]]:
        # The longest come first: prompts of similar length share a batch.
        order = sorted(range(len(prompts)), key=lambda p: len(prompts[p]), reverse=True)
        batch: list[_Row] = []
        tokens = longest = 0
        for row in (_Row(p, s) for p in order for s in range(sampling.n)):
            if not batch:
                longest = len(prompts[row.prompt])
            shared = batch and batch[-1].prompt == row.prompt
            more = sampling.max_tokens + (0 if shared else longest)
            if batch and tokens + more > self._cache_tokens:
                yield batch
                longest = len(prompts[row.prompt])
                batch, tokens, more = [], 0, sampling.max_tokens + longest
            batch.append(row)
            tokens += more
        if batch:
            yield batch

    def _complete(
        self,
        prompts: Sequence[Sequence[int]],
        noise: Tensor,
        sampling: SamplingParams,
        head: "_Head",
    ) -> list[Completion]:
        """One completion per row; equal prompts must be neighbours, the longest first."""
        cache, hidden = self._prefill(prompts, sampling.max_tokens)
        written = _Written(*noise.shape, device=self._device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
        alive = torch.arange(len(prompts), device=self._device)
        for step in range(sampling.max_tokens):
            tokens, logp = head.draw(hidden, noise[alive, step], sampling.temperature)
            written.tokens[alive, step], written.logp[alive, step] = tokens, logp
            written.length[alive] = step + 1
            ended = torch.isin(tokens, self._eos_ids)
            written.finished[alive] = ended
            going = ~ended & (lengths[alive] + step + 1 < self._context)
            if step + 1 == sampling.max_tokens or not going.any():
                break
            if not going.all():
                kept = cache.drop(~going)
                alive, tokens = alive[kept], tokens[kept]
            positions = lengths[alive] + step
            cache.grow()
            hidden = attention.run(self._model, tokens[:, None], positions[:, None], cache)[:, 0]
        return written.completions()

    def _prefill(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> tuple[Cache, Tensor]:
        """A cache with all rows' prompts, and `[R, D]` hidden states of their last tokens."""
        distinct = [p for i, p in enumerate(prompts) if i == 0 or p is not prompts[i - 1]]
        changes = [i > 0 and p is not prompts[i - 1] for i, p in enumerate(prompts)]
        prompt_of_row = torch.tensor(changes).cumsum(0).to(self._device)
        packed = pack([[Sample(prompt_ids=p, completion_ids=[])] for p in distinct])
        packed = packed.to(self._device)
        length = torch.tensor([len(p) for p in distinct])
        begin, prefix = packed.cu_seqlens[packed.block_offsets[:-1]], packed.prefix_length
        last = begin + length - prefix - 1
        place = torch.minimum(torch.arange(int(length.max())), length[:, None] - 1)
        source = torch.where(place < prefix, place, begin[:, None] + place - prefix)
        batch = Batch(prompt_of_row, length.to(self._device), max_tokens)
        plan = Prefill(attention.plan_pack(packed), source.to(self._device), batch)
        ids, positions = packed.input_ids[None], packed.position_ids[None]
        hidden = attention.run(self._model, ids, positions, plan)[0]
        return plan.cache, hidden[last.to(self._device)][prompt_of_row]


class _Head:
    """The output embedding of the tokens that may be sampled, for many small products."""

    def __init__(self, head: attention.Head, vocab_size: int, dtype: torch.dtype | None) -> None:
        """`dtype` of the logits; None: fp32 where that costs no time."""
        self._settings, weight = head, head.weight[:vocab_size]
        in_one_step = weight.is_cuda or (weight.dtype == torch.bfloat16 and wide_linear.supported())
        if dtype is None:
            free = in_one_step and (weight.is_cuda or wide_linear.keeps_up())
            dtype = torch.float32 if free else weight.dtype
        self._wide = in_one_step and dtype != weight.dtype
        if not in_one_step:
            weight = weight.to(dtype)
        self._weight = weight
        self._bias = None if head.bias is None else head.bias[:vocab_size].to(dtype)

    def draw(self, hidden: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """One token per row of `hidden` and its log-probability; greedy at temperature 0."""
        transform = LogitTransform(
            temperature=temperature or 1.0,
            softcap=self._settings.softcap,
            logit_scale=self._settings.logit_scale,
        )
        drawn = [
            sample(self._logits(some), u if temperature else None, transform)
            for some, u in zip(hidden.split(_ROWS_AT_ONCE), noise.split(_ROWS_AT_ONCE), strict=True)
        ]
        tokens, logp = zip(*drawn, strict=True)
        return torch.cat(tokens), torch.cat(logp)

    def _logits(self, hidden: Tensor) -> Tensor:
        weight, bias = self._weight, self._bias
        if not self._wide:
            return F.linear(hidden.to(weight.dtype), weight, bias)
        if hidden.is_cuda:
            logits = torch.mm(hidden, weight.t(), torch.float32)
            return logits if bias is None else logits + bias
        out = scratch("logits", (len(hidden), len(weight)), torch.float32, hidden.device)
        wide_linear.wide_linear(hidden, weight, bias, out, torch.get_num_threads())
        return out


def _move(module: torch.nn.Module, device: torch.device | str) -> None:
    module.to(device)  # As a PreTrainedModel's method it has no usable type.


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    places = [model.generation_config, model.config.get_text_config(), tokenizer]
    return models.eos_ids(*(getattr(place, "eos_token_id", None) for place in places))


class _Written:
    """What a batch has produced so far, `[rows, max_tokens]` each."""

    def __init__(self, rows: int, max_tokens: int, *, device: torch.device) -> None:
        self.tokens = torch.zeros(rows, max_tokens, dtype=torch.int64, device=device)
        self.logp = torch.zeros(rows, max_tokens, device=device)
        self.length = torch.zeros(rows, dtype=torch.int64, device=device)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)

    def completions(self) -> list[Completion]:
        if not self.logp.isfinite().all():
            raise ValueError("weights: wanted finite log-probabilities, got NaN or infinite ones")
        columns = (self.tokens, self.logp, self.length, self.finished)
        return [
            Completion(token_ids=tokens[:length], logp=logp[:length], finished=finished)
            for tokens, logp, length, finished in zip(*(c.tolist() for c in columns), strict=True)
        ]
