"""The GEMMs of an LM head over row tiles, shared by every op that starts from hidden states."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlvr_fast import tuning
from rlvr_fast.ops import wide_linear
from rlvr_fast.ops.add_product import add_product
from rlvr_fast.ops.tiles import tile_rows
from rlvr_fast.ops.workspace import recycled, scratch, workspace

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""d_hidden, d_weight, d_bias."""

DEFAULT_BUDGET = {"cpu": 512 << 20, "cuda": 2 << 30}
"""Bytes of logits alive at once."""

INVARIANT_ROWS = 256
"""Rows of every logits GEMM that must give the same bits whatever the batch: one shape, one
algorithm, one order of sums."""


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """How the head computes."""

    dtype: torch.dtype
    """Of the GEMMs' inputs."""
    logits_dtype: torch.dtype
    budget: int
    """Bytes of logits alive at once."""
    batch_invariant: bool = False
    """Logits are computed in GEMMs of `INVARIANT_ROWS` rows, the last one padded."""


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
    batch_invariant: bool = False,
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
    if hidden.device != weight.device:
        raise ValueError(
            f"hidden, weight: wanted one device, got {hidden.device} and {weight.device}"
        )
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
        wide = device != "cpu" or (dtype == torch.bfloat16 and wide_linear.keeps_up())
        logits_dtype = torch.float32 if wide and dtype != torch.float64 else dtype
    if logits_dtype not in (dtype, torch.float32):
        raise ValueError(f"logits_dtype: wanted {dtype} or torch.float32, got {logits_dtype}")
    budget = logits_budget
    if budget is None:
        default = DEFAULT_BUDGET.get(device, 2 << 30)
        budget = tuning.logits_budget(hidden.device, hidden.shape[1], weight.shape[0], default)
    if budget < 1:
        raise ValueError(f"logits_budget: wanted at least one byte, got {budget}")
    return HeadSettings(
        dtype=dtype, logits_dtype=logits_dtype, budget=budget, batch_invariant=batch_invariant
    )


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
        weight_grad: Tensor | None = None,
        tiles_alive: int = 1,
        name: str = "head",
    ) -> None:
        """Plans the tiles; the GEMMs come with `logits` and `accumulate`.

        Args:
            wanted: gradients to compute.
            weight_grad: `[V, D]`, to which the gradient of the weight is added; `gradients` then
                has none for it.
            tiles_alive: how many tiles share the budget, if there are several.
            name: of the buffers. Two heads at work at the same time need one each.
        """
        self._name, self._settings, self.wanted = name, settings, wanted
        self._turns = itertools.cycle(range(tiles_alive))
        self._hidden = hidden.to(settings.dtype)
        self._weight = self._cast("weight", weight, settings.dtype)
        self._bias = None if bias is None else bias.to(settings.dtype)
        self._wide_weight: Tensor | None = None
        self._wide = self._in_one_step()
        # Triton makes accesses wide where it knows that strides are multiples of 16 elements.
        self._stride = len(weight) + (-len(weight) % 16 if hidden.is_cuda else 0)
        limit = settings.budget // (self._stride * settings.logits_dtype.itemsize)
        limit //= 1 if len(hidden) <= limit else tiles_alive
        self.rows = tile_rows(len(hidden), limit, hidden.shape[1], hidden.device)
        """Tokens per tile."""
        self._d_hidden = None if wanted.hidden is None else torch.empty_like(self._hidden)
        self._d_weight, self._first = weight_grad, weight_grad is None
        self._keeps_d_weight = weight_grad is None
        if wanted.weight is not None and weight_grad is None:
            self._d_weight = self._new_d_weight(wanted.weight)
        self._d_bias = (
            None
            if wanted.bias is None
            else weight.new_zeros(
                len(weight), dtype=torch.promote_types(settings.dtype, torch.float32)
            )
        )

    def tiles(self, chunk: slice) -> Iterator[slice]:
        """Slices of at most `rows` tokens; on the CPU as equal as they come."""
        start, length = chunk.start, chunk.stop - chunk.start
        count = -(-length // self.rows)
        if self._hidden.is_cuda:
            for i in range(count):
                yield slice(start + i * self.rows, min(start + (i + 1) * self.rows, chunk.stop))
            return
        for i in range(count):
            yield slice(start + i * length // count, start + (i + 1) * length // count)

    def logits(self, tile: slice) -> Tensor:
        """`[t, V]` raw logits in one of `tiles_alive` buffers, which take turns."""
        hidden = self._hidden[tile]
        if not self._settings.batch_invariant or self._wide:
            out = self._logits_buffer(len(hidden))
            self._linear(hidden, out)
            return out
        padded = hidden.new_zeros(
            -(-len(hidden) // INVARIANT_ROWS) * INVARIANT_ROWS, hidden.shape[1]
        )
        padded[: len(hidden)] = hidden
        out = self._logits_buffer(len(padded))
        for rows, block in zip(
            padded.split(INVARIANT_ROWS), out.split(INVARIANT_ROWS), strict=True
        ):
            self._linear(rows, block)
        return out[: len(hidden)]

    def gradient_buffer(self, logits: Tensor) -> Tensor:
        """Where d(loss)/d(logits) goes: over the logits; a narrower dtype at the front of rows."""
        dtype = self._settings.dtype
        if logits.dtype == dtype:
            return logits
        ratio = logits.dtype.itemsize // dtype.itemsize
        shape, strides = logits.shape, (logits.stride(0) * ratio, 1)
        flat = torch.empty(0, dtype=dtype, device=logits.device)
        return flat.set_(logits.untyped_storage(), logits.storage_offset() * ratio, shape, strides)

    def accumulate(self, tile: slice, dlogits: Tensor, rows: Tensor | None = None) -> None:
        """Adds this tile's part of every wanted gradient.

        Args:
            dlogits: `[t, V]`, or `[n, V]` with only some rows of the tile.
            rows: `[n]` int64, which ones; the others have no gradient.
        """
        hidden = self._hidden[tile]
        if self._d_hidden is not None and rows is None:
            torch.mm(dlogits, self._weight, out=self._d_hidden[tile])
        elif self._d_hidden is not None and rows is not None:
            self._d_hidden[tile].zero_().index_copy_(0, rows, torch.mm(dlogits, self._weight))
        if self._d_weight is not None:
            kept = hidden if rows is None else hidden.index_select(0, rows)
            last = self._last_d_weight() if tile.stop == len(self._hidden) else None
            add_product(self._d_weight, dlogits, kept, first=self._first, last=last)
            self._d_weight = self._d_weight if last is None else last
        if self._d_bias is not None:
            self._d_bias += dlogits.sum(0, dtype=self._d_bias.dtype)
        self._first = False

    def gradients(self) -> Gradients:
        """In the dtypes of the inputs."""
        hidden, weight, bias = self._d_hidden, self._d_weight, self._d_bias
        if self._first and weight is not None:
            weight.zero_()
        weight = weight if self._keeps_d_weight else None
        if weight is not None and self.wanted.weight != weight.dtype:
            assert self.wanted.weight is not None
            weight = self._result("d_weight", self.wanted.weight).copy_(weight)
        return (
            None if hidden is None else hidden.to(self.wanted.hidden),
            weight,
            None if bias is None else bias.to(self.wanted.bias),
        )

    def _in_one_step(self) -> bool:
        """Whether fp32 logits of bf16 operands come from `wide_linear`; makes those contiguous."""
        settings = self._settings
        wide = (settings.dtype, settings.logits_dtype) == (torch.bfloat16, torch.float32)
        if self._hidden.is_cuda or not wide or not wide_linear.supported():
            return False
        self._hidden, self._weight = self._hidden.contiguous(), self._weight.contiguous()
        return True

    def _new_d_weight(self, leaves_as: torch.dtype) -> Tensor:
        """One tile rounds once anyway; several need fp32 between them."""
        dtype = self._weight.dtype
        if len(self._hidden) > self.rows or leaves_as != dtype:
            dtype = torch.promote_types(dtype, torch.float32)
        if dtype == leaves_as:
            return self._result("d_weight", dtype)
        return scratch(f"{self._name} d_weight", self._weight.shape, dtype, self._weight.device)

    def _last_d_weight(self) -> Tensor | None:
        """Where the sum goes with the last tile, if that rounds it."""
        total, dtype = self._d_weight, self._weight.dtype
        if total is None or not self._keeps_d_weight or self._weight.is_cuda:
            return None
        rounds = total.dtype != dtype and self.wanted.weight == dtype
        return self._result("d_weight", dtype) if rounds else None

    def _result(self, name: str, dtype: torch.dtype) -> Tensor:
        return recycled(
            f"{self._name} {name} {dtype}", self._weight.shape, dtype, self._weight.device
        )

    def _cast(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.dtype == dtype or x.is_cuda:
            return x.to(dtype)
        return scratch(f"{self._name} {name} {dtype}", x.shape, dtype, x.device).copy_(x)

    def _linear(self, hidden: Tensor, out: Tensor) -> None:
        """`out = hidden @ weight.T + bias`, fp32 logits from narrower inputs included."""
        weight, bias, dtype = self._weight, self._bias, out.dtype
        if hidden.dtype != dtype and hidden.is_cuda:
            torch.mm(hidden, weight.t(), out_dtype=dtype, out=out)
            if bias is not None:
                out += bias
            return
        if self._wide:
            wide = None if bias is None else bias.float()
            wide_linear.wide_linear(hidden, weight, wide, out, torch.get_num_threads())
            return
        if hidden.dtype != dtype:
            # torch's CPU GEMMs have no bf16-in, fp32-out form.
            if self._wide_weight is None:
                self._wide_weight = self._cast("wide weight", weight, dtype)
            hidden, weight = hidden.to(dtype), self._wide_weight
            bias = None if bias is None else bias.to(dtype)
        if bias is None:
            torch.mm(hidden, weight.t(), out=out)
        else:
            torch.addmm(bias, hidden, weight.t(), out=out)

    def _logits_buffer(self, rows: int) -> Tensor:
        size, dtype = rows * self._stride, self._settings.logits_dtype
        buffer = f"{self._name} logits {next(self._turns)}"
        flat = workspace(buffer, size * dtype.itemsize, self._hidden.device)
        tile = flat[: size * dtype.itemsize].view(dtype).view(rows, self._stride)
        return tile[:, : len(self._weight)]
