"""The GEMMs of an LM head over row tiles, shared by every op that starts from hidden states."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""d_hidden, d_weight, d_bias."""

DEFAULT_BUDGET = {"cpu": 512 << 20, "cuda": 2 << 30}
"""Bytes of logits alive at once."""

VOCAB_BLOCK = 4096
"""CPU rows of d_weight per GEMM: the product stays in the cache until it is accumulated."""


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """How the head computes."""

    dtype: torch.dtype
    """Of the GEMMs' inputs."""
    logits_dtype: torch.dtype
    budget: int
    """Bytes of logits alive at once."""


@dataclass(frozen=True)
class Wanted:
    """Which gradients to compute, and in which dtypes they leave."""

    hidden: torch.dtype | None
    weight: torch.dtype | None
    bias: torch.dtype | None

    @staticmethod
    def of(needed: Sequence[bool], hidden: Tensor, weight: Tensor, bias: Tensor | None) -> "Wanted":
        """From autograd's `needs_input_grad` for the three, or nothing if that is empty."""
        dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        padded = [*needed, False, False, False]
        return Wanted(*(d if need else None for d, need in zip(dtypes, padded, strict=False)))

    @property
    def any(self) -> bool:
        return not (self.hidden is None and self.weight is None and self.bias is None)


def head_settings(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    logits_dtype: torch.dtype | None,
    logits_budget: int | None,
) -> HeadSettings:
    """Checks the head's inputs and fills in defaults; under autocast its dtype, as `nn.Linear`.

    Raises:
        ValueError: for shapes, dtypes, devices or a budget that do not fit.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden, weight: wanted [T, D] and [V, D], "
            f"got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: wanted [{weight.shape[0]}], got {list(bias.shape)}")
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    elif hidden.dtype == weight.dtype and hidden.is_floating_point():
        dtype = hidden.dtype
    else:
        raise ValueError(
            f"hidden, weight: wanted one floating point dtype (or autocast), "
            f"got {hidden.dtype} and {weight.dtype}"
        )
    if logits_dtype is None:
        keep = device == "cpu" or dtype == torch.float64
        logits_dtype = dtype if keep else torch.float32
    if logits_dtype not in (dtype, torch.float32):
        raise ValueError(f"logits_dtype: wanted {dtype} or torch.float32, got {logits_dtype}")
    budget = DEFAULT_BUDGET.get(device, 2 << 30) if logits_budget is None else logits_budget
    if budget < 1:
        raise ValueError(f"logits_budget: wanted at least one byte, got {budget}")
    return HeadSettings(dtype=dtype, logits_dtype=logits_dtype, budget=budget)


class TiledHead:
    """Computes logits tile by tile in one buffer, and accumulates gradients from it."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        settings: HeadSettings,
        wanted: Wanted,
        *,
        name: str = "head",
    ) -> None:
        """Two heads at work at the same time need a `name` each: it is that of their buffers."""
        self._name = name
        self._hidden = hidden.to(settings.dtype)
        self._weight = weight.to(settings.dtype)
        self._bias = None if bias is None else bias.to(settings.dtype)
        self._logits_dtype = settings.logits_dtype
        self.wanted = wanted
        self._separate = wanted.any and settings.logits_dtype != settings.dtype
        # Rows start at multiples of 16 bytes on CUDA, whatever the vocabulary.
        self._stride = len(weight) + (-len(weight) % 8 if hidden.is_cuda else 0)
        per_logit = settings.logits_dtype.itemsize + self._separate * settings.dtype.itemsize
        self.rows = max(1, settings.budget // (self._stride * per_logit))
        """Tokens per tile."""
        self._wide_weight: Tensor | None = None
        self._d_hidden = None if wanted.hidden is None else torch.empty_like(self._hidden)
        self._d_weight = (
            None
            if wanted.weight is None
            else torch.empty_like(self._weight, dtype=self._accumulator_dtype())
        )
        self._d_bias = (
            None
            if wanted.bias is None
            else weight.new_zeros(
                len(weight), dtype=torch.promote_types(settings.dtype, torch.float32)
            )
        )
        self._first = True

    def _accumulator_dtype(self) -> torch.dtype:
        """One tile rounds once anyway; several need fp32 between them."""
        dtype = self._weight.dtype
        if len(self._hidden) <= self.rows and self.wanted.weight == dtype:
            return dtype
        return torch.promote_types(dtype, torch.float32)

    def tiles(self, chunk: slice) -> Iterator[slice]:
        """Slices of at most `rows` tokens, as equal as they come."""
        start, length = chunk.start, chunk.stop - chunk.start
        count = -(-length // self.rows)
        for i in range(count):
            yield slice(start + i * length // count, start + (i + 1) * length // count)

    def logits(self, tile: slice) -> Tensor:
        """`[t, V]` raw logits in the shared buffer; the next call overwrites them."""
        hidden, weight, bias, dtype = (
            self._hidden[tile],
            self._weight,
            self._bias,
            self._logits_dtype,
        )
        out = self._buffer("logits", len(hidden), dtype)
        if hidden.dtype == dtype:
            _linear(hidden, weight, bias, out)
        elif hidden.is_cuda:
            torch.mm(hidden, weight.t(), out_dtype=dtype, out=out)
            if bias is not None:
                out += bias
        else:
            # CPU GEMMs have no bf16-in, fp32-out form.
            if self._wide_weight is None:
                self._wide_weight = weight.to(dtype)
            wide_bias = None if bias is None else bias.to(dtype)
            _linear(hidden.to(dtype), self._wide_weight, wide_bias, out)
        return out

    def gradient_buffer(self, logits: Tensor) -> Tensor:
        """Where d(loss)/d(logits) goes: over the logits themselves if the dtype allows."""
        if not self._separate:
            return logits
        return self._buffer("gradient", len(logits), self._hidden.dtype)

    def accumulate(self, tile: slice, dlogits: Tensor) -> None:
        """Adds this tile's part of every wanted gradient."""
        hidden = self._hidden[tile]
        if self._d_hidden is not None:
            torch.mm(dlogits, self._weight, out=self._d_hidden[tile])
        if self._d_weight is not None:
            add_product(self._d_weight, dlogits, hidden, first=self._first)
        if self._d_bias is not None:
            self._d_bias += dlogits.sum(0, dtype=self._d_bias.dtype)
        self._first = False

    def gradients(self) -> Gradients:
        """In the dtypes of the inputs."""
        if self._first and self._d_weight is not None:
            self._d_weight.zero_()
        found = (self._d_hidden, self._d_weight, self._d_bias)
        dtypes = (self.wanted.hidden, self.wanted.weight, self.wanted.bias)
        return tuple(  # type: ignore[return-value]
            None if g is None else g.to(dtype) for g, dtype in zip(found, dtypes, strict=True)
        )

    def _buffer(self, name: str, rows: int, dtype: torch.dtype) -> Tensor:
        size = rows * self._stride
        flat = workspace(f"{self._name} {name}", size * dtype.itemsize, self._hidden.device)
        return flat.view(dtype)[:size].view(rows, self._stride)[:, : len(self._weight)]


def add_product(total: Tensor, dlogits: Tensor, hidden: Tensor, *, first: bool) -> None:
    """`total [V, D] (+)= dlogits.T [V, t] @ hidden [t, D]`; the first product only writes."""
    if total.dtype == hidden.dtype:
        torch.addmm(total, dlogits.t(), hidden, beta=0 if first else 1, out=total)
    elif hidden.is_cuda:
        torch.addmm(
            total, dlogits.t(), hidden, beta=0 if first else 1, out_dtype=total.dtype, out=total
        )
    else:
        for start in range(0, total.shape[0], VOCAB_BLOCK):
            block = slice(start, start + VOCAB_BLOCK)
            product = torch.mm(dlogits[:, block].t(), hidden)
            if first:
                total[block].copy_(product)
            else:
                total[block].add_(product)


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.addmm(bias, hidden, weight.t(), out=out)


_kept = threading.local()


def workspace(name: str, size: int, device: torch.device) -> Tensor:
    """At least `size` bytes. On the CPU kept for the next call: fresh pages cost a third of a GEMM.

    `release_workspace` gives them back. CUDA has its own caching allocator.
    """
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.uint8, device=device)
    buffers: dict[str, Tensor] = _kept.__dict__
    if name not in buffers or buffers[name].numel() < size:
        buffers.pop(name, None)
        buffers[name] = torch.empty(size, dtype=torch.uint8)
    return buffers[name]


def release_workspace() -> None:
    """Frees this thread's CPU buffers, at most `logits_budget` bytes (twice that if dtypes mix)."""
    _kept.__dict__.clear()
