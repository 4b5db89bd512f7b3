"""Attention by one variable-length kernel call per layer, on CUDA.

The queries of a pack are its rows as they lie. A branch's keys are copies of its trunk's,
then its own, so its queries are the last of a causal sequence: with more keys than queries, the
kernels line up the ends. Beside the linear layers that spares a repeated prompt's queries, but not
the copies of its keys and values. Two calls merged by their logsumexp, one to the prompt and one
to the completion, would spare those too; but the kernels' backward takes the logsumexp for a
constant, which makes the gradient of such a merge wrong, and each call would round its part.
"""

import functools
import importlib
import inspect
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rlvr_fast.attention_plans import layout
from rlvr_fast.attention_plans.layout import Copies, copies, gather
from rlvr_fast.packed import Packed

_SUPPORTED = (8, 0)  # Compute capability from which the kernels run.
_WIDE_HEADS = [(8, 0), (9, 0), (10, 0)]  # The others lack the shared memory to train above 192.


class Spans(NamedTuple):
    """Sequence `i` is rows `offsets[i]` to `offsets[i + 1]`, of queries and of keys."""

    query_offsets: Tensor
    """`[S+1]` int32, on the device."""
    key_offsets: Tensor
    longest_query: int
    longest_key: int


class Kernel(Protocol):
    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, spans: Spans, *, scale: float
    ) -> Tensor:
        """`[n, H, d]`, and `[k, K, d]` for the keys and values, to `[n, H, d]`.

        Query `i` from the end of a sequence sees all of its keys but the last `i`.
        """


@dataclass(frozen=True, kw_only=True)
class VarlenPlan:
    """The attention of one pack, see `plan_varlen`."""

    keys: Copies
    spans: Spans
    kernel: Kernel

    @property
    def longest(self) -> int:
        return self.spans.longest_key

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, dropout: float
    ) -> Tensor:
        assert dropout == 0
        with torch.autocast(value.device.type, enabled=False):
            q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
            k, v = gather(k, self.keys), gather(v, self.keys)
            return self.kernel(q, k, v, self.spans, scale=scale)[None]


def plan_varlen(packed: Packed, kernel: Kernel) -> VarlenPlan:
    """Plans the attention of a pack, which has a token at least; the tensors are on its device."""
    device, rows = packed.input_ids.device, len(packed.input_ids)
    parts = torch.tensor(list(layout.stretches(packed)))
    length, trunk_length, start, trunk_start, prefix_length = parts.T
    # Each sequence's keys are three runs of rows: what all share, the trunk's and its own.
    first = torch.stack([torch.zeros_like(start), trunk_start, start], 1).flatten()
    sizes = torch.stack([prefix_length, trunk_length, length], 1).flatten()
    run = torch.arange(len(sizes)).repeat_interleave(sizes)
    within = torch.arange(len(run)) - (sizes.cumsum(0) - sizes)[run]
    total = prefix_length + trunk_length + length
    return VarlenPlan(
        keys=copies(first[run] + within, rows, device),
        spans=Spans(
            query_offsets=_offsets(length, device),
            key_offsets=_offsets(total, device),
            longest_query=int(length.max()),
            longest_key=int(total.max()),
        ),
        kernel=kernel,
    )


def _offsets(lengths: Tensor, device: torch.device) -> Tensor:
    ends = F.pad(lengths.cumsum(0), (1, 0))
    return ends.to(device, torch.int32, non_blocking=True)


def takes(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether there is a kernel for such tensors here."""
    width = query.shape[-1]
    if (
        not value.is_cuda
        or dropout
        or value.dtype not in (torch.bfloat16, torch.float16)
        or width != value.shape[-1]
        or width % 8
        or width > 256
    ):
        return False
    capability = torch.cuda.get_device_capability(value.device)
    if capability < _SUPPORTED or (width > 192 and capability not in _WIDE_HEADS):
        return False
    return installed() is not None


@functools.cache
def installed() -> Kernel | None:
    """flash-attn's if there is one, else torch's; None in a torch without."""
    # On AMD, "cuda" is ROCm, whose kernels nobody tried here.
    if torch.version.hip is not None:
        return None
    try:
        return flash_attn_kernel()
    except ImportError:
        return torch_kernel() if torch.backends.cuda.is_flash_attention_available() else None


def flash_attn_kernel() -> Kernel:
    """That of the package flash-attn, 2.1 or later.

    Raises:
        ImportError: without it, or with an older one, which lines up the beginnings.
    """
    package = importlib.import_module("flash_attn")
    version = getattr(package, "__version__", "none")
    varlen = getattr(package, "flash_attn_varlen_func", None)
    if varlen is None or tuple(int(part) for part in version.split(".")[:2]) < (2, 1):
        raise ImportError(f"flash-attn: wanted 2.1 or later, got {version}")

    def kernel(query: Tensor, key: Tensor, value: Tensor, spans: Spans, *, scale: float) -> Tensor:
        output: Tensor = varlen(
            query,
            key,
            value,
            *spans,
            softmax_scale=scale,
            causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return output

    return kernel


def torch_kernel() -> Kernel:
    """torch's own, which is FlashAttention 2 unless the caller activated another."""
    from torch.nn.attention.varlen import varlen_attn

    # Before 2.12 it takes fewer key heads unasked.
    asks = "enable_gqa" in inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} | ({"enable_gqa": True} if asks else {})

    def kernel(query: Tensor, key: Tensor, value: Tensor, spans: Spans, *, scale: float) -> Tensor:
        return cast(Tensor, varlen_attn(query, key, value, *spans, scale=scale, **causal))

    return kernel
