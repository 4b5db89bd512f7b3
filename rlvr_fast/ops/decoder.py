"""The parts of a decoder layer that read one input: norm, gated product, rotated heads. CPU only.

What lies between two matrix products is one sweep in C++ (formulas: csrc/decoder.h), fp32 inside.
Layers that share their input share its gradient's product too, and weights wider than the input,
as under autocast, are cast once per forward pass: nothing is kept that could go stale.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlvr_fast.ops.logprobs import as_numpy, threads


class Heads(NamedTuple):
    """How `[n, (H + 2 K) d]` is divided, and the norms of queries and keys."""

    queries: int
    keys: int
    size: int
    eps: float | None
    """Of the norms over `d`; None for none."""


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, dtype: torch.dtype, added: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`x + added` in the dtype of `x`, and that divided by its root mean square, times `weight`.

    Args:
        x: `[n, D]` fp32 or bf16. Differentiable, as `weight` and `added`.
        weight: `[D]` fp32 or bf16.
        eps: added to the mean square.
        dtype: of the second result: fp32 or bf16.
        added: `[n, D]`.

    Cost: reads the inputs once, also backward; the gradient of `weight` is summed in one order.
    """
    if added is not None:
        added = added.to(dtype)
    return _RmsNorm.apply(x, added, weight, eps, dtype)  # type: ignore[no-untyped-call, no-any-return]


def gated(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """`silu(gate) * up` of two linear layers of `x`, `[n, F]` in its dtype.

    Args:
        x: `[n, D]` fp32 or bf16. Differentiable, as weights and biases.
        weights, biases: `[F, D]` and `[F]` or None, of the gate and of the other.
    """
    return _Gated.apply(x, *weights, *biases)  # type: ignore[no-untyped-call, no-any-return]


def gate(y: Tensor) -> Tensor:
    """`silu(gate) * up` of both layers' outputs side by side, `[n, 2 F]`; no gradient."""
    first, second = y.chunk(2, 1)
    out = torch.empty_like(first, memory_format=torch.contiguous_format)
    _sweep("gated_fwd", first, second, out)
    return out


def rotated_heads(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    angles: tuple[Tensor, Tensor],
    heads: Heads,
    norms: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of `x`; queries and keys turned to their positions.

    Args:
        x: `[n, D]` fp32 or bf16. Differentiable, as weights, biases and norms.
        weights, biases: of the layers for queries, keys and values.
        angles: cosine and sine, `[n, d]`, of fp32 or bf16; both halves of `d` are alike.
        heads: `eps` wants `norms`.
        norms: `[d]`, the weights of the norms of queries and of keys.

    Returns:
        `[n, H, d]` and `[n, K, d]` in the wider dtype of `x` and the angles; `[n, K, d]` in that of
        `x`.
    """
    cosine, sine = (angle.contiguous() for angle in angles)
    q_norm, k_norm = norms or (None, None)
    return _RotatedHeads.apply(  # type: ignore[no-untyped-call, no-any-return]
        x, cosine, sine, heads, q_norm, k_norm, *weights, *biases
    )


def turn_heads(
    y: Tensor, angles: tuple[Tensor, Tensor], heads: Heads, norms: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`rotated_heads` of the three layers' outputs side by side; no gradient."""
    cosine, sine = (angle.contiguous() for angle in angles)
    (q, k, v), _ = _turned(y, cosine, sine, heads, norms or (None, None))
    return q, k, v


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, added: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        total = None if added is None else torch.empty_like(x)
        normed = torch.empty_like(x, dtype=dtype)
        rstd = _normalise(x, weight, eps, normed, added=added, total=total)
        total = x if total is None else total
        ctx.save_for_backward(total, weight, rstd)
        ctx.set_materialize_grads(False)
        ctx.dtypes = x.dtype, dtype
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor | None, d_normed: Tensor | None) -> tuple[Any, ...]:
        total, weight, rstd = ctx.saved_tensors
        stream, branch = ctx.dtypes
        with_added = ctx.needs_input_grad[1]
        if d_normed is None:
            same = None if d_total is None or not with_added else d_total.to(branch)
            return d_total, same, None, None, None
        d_x = torch.empty_like(total)
        d_added = d_x
        if with_added and stream != branch:
            d_added = torch.empty_like(total, dtype=branch)
        d_weight = _normalise_gradient(
            (total, weight, rstd), d_normed, d_x, d_total, None if d_added is d_x else d_added
        )
        return d_x, d_added if with_added else None, d_weight, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *layers: Tensor | None) -> Tensor:
        weights, biases = layers[:2], layers[2:]
        y, kept = _products(x, weights, biases)
        ctx.save_for_backward(x, y, *kept)
        ctx.layers = _Layers.of(weights, biases)
        return gate(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, y, *kept = ctx.saved_tensors
        d_y = torch.empty_like(y)
        _sweep("gated_bwd", *y.chunk(2, 1), _rows(d_out), *d_y.chunk(2, 1))
        return _gradients(x, kept, d_y, ctx.layers, ctx.needs_input_grad)


class _RotatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cosine: Tensor,
        sine: Tensor,
        heads: Heads,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        *layers: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights, biases = layers[:3], layers[3:]
        y, kept = _products(x, weights, biases)
        parts, rstds = _turned(y, cosine, sine, heads, (q_norm, k_norm))
        normed = () if q_norm is None else (y, q_norm, k_norm, *rstds)
        ctx.save_for_backward(x, cosine, sine, *normed, *kept)
        ctx.heads, ctx.normed = heads, bool(normed)
        ctx.layers = _Layers.of(weights, biases)
        return parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, cosine, sine, *kept = ctx.saved_tensors
        d_y = x.new_empty(len(x), sum(ctx.layers.sizes))
        *turning, d_value = _by_head(d_y, ctx.heads)
        d_value.copy_(gradients[2])
        d_norms: list[Tensor | None] = [None, None]
        if ctx.normed:
            y, *norms, q_rstd, k_rstd = kept[:5]
            kept = kept[5:]
            for i, rstd in enumerate((q_rstd, k_rstd)):
                straight = torch.empty(gradients[i].shape)
                _sweep("rotate", _rows(gradients[i]), cosine, sine, -1.0, straight)
                part = _by_head(y, ctx.heads)[i]
                d_norms[i] = _normalise_gradient((part, norms[i], rstd), straight, turning[i])
        else:
            for gradient, d_part in zip(gradients, turning, strict=False):
                _sweep("rotate", _rows(gradient), cosine, sine, -1.0, d_part)
        needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[6:])
        d_x, *d_layers = _gradients(x, kept, d_y, ctx.layers, needed)
        return d_x, None, None, None, *d_norms, *d_layers


class _Layers(NamedTuple):
    sizes: list[int]
    weight_dtype: torch.dtype
    bias_dtypes: list[torch.dtype | None]

    @classmethod
    def of(cls, weights: Sequence[Any], biases: Sequence[Any]) -> "_Layers":
        dtypes = [None if bias is None else bias.dtype for bias in biases]
        return cls([len(weight) for weight in weights], weights[0].dtype, dtypes)


def _products(
    x: Tensor, weights: Sequence[Any], biases: Sequence[Tensor | None]
) -> tuple[Tensor, Sequence[Tensor]]:
    """The layers' outputs side by side, and the weights in the dtype of `x`: joined if cast."""
    sizes = [len(weight) for weight in weights]
    y = x.new_empty(len(x), sum(sizes))
    kept, parts = weights, weights
    if weights[0].dtype != x.dtype:
        joined = x.new_empty(sum(sizes), x.shape[1])
        kept, parts = [joined], joined.split(sizes)
        for part, weight in zip(parts, weights, strict=True):
            part.copy_(weight)
    for part, bias, out in zip(parts, biases, y.split(sizes, 1), strict=True):
        if bias is None:
            torch.mm(x, part.t(), out=out)
        else:
            torch.addmm(bias.to(x.dtype), x, part.t(), out=out)
    return y, kept


def _gradients(
    x: Tensor, kept: Sequence[Tensor], d_y: Tensor, layers: _Layers, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Of `x`, of the weights and of the biases."""
    count, parts = len(layers.sizes), d_y.split(layers.sizes, 1)
    d_x = None
    if needed[0]:
        factors = [d_y] if len(kept) == 1 else parts
        d_x = torch.mm(factors[0], kept[0])
        for factor, weight in zip(factors[1:], kept[1:], strict=True):
            d_x.addmm_(factor, weight)
    d_weights = [
        torch.mm(part.t(), x).to(layers.weight_dtype) if wanted else None
        for part, wanted in zip(parts, needed[1 : 1 + count], strict=True)
    ]
    d_biases = [
        part.sum(0, dtype=torch.float32).to(dtype) if wanted else None
        for part, dtype, wanted in zip(parts, layers.bias_dtypes, needed[1 + count :], strict=True)
    ]
    return d_x, *d_weights, *d_biases


def _turned(
    y: Tensor, cosine: Tensor, sine: Tensor, heads: Heads, norms: tuple[Tensor | None, ...]
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor]]:
    """Queries, keys and values of `y`, and the factors of the norms."""
    *turning, value = _by_head(y, heads)
    rotated, rstds = [], []
    for part, norm in zip(turning, norms, strict=True):
        straight = part
        if norm is not None:
            straight = torch.empty(part.shape)
            rstds.append(_normalise(part, norm, heads.eps, straight))
        out = torch.empty(part.shape, dtype=torch.promote_types(y.dtype, cosine.dtype))
        _sweep("rotate", straight, cosine, sine, 1.0, out)
        rotated.append(out)
    return (rotated[0], rotated[1], value), rstds


def _by_head(y: Tensor, heads: Heads) -> list[Tensor]:
    counts = [heads.queries, heads.keys, heads.keys]
    return list(y.view(len(y), -1, heads.size).split(counts, 1))


def _normalise(
    x: Tensor,
    weight: Tensor,
    eps: float | None,
    normed: Tensor,
    *,
    added: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """Writes `normed` and, if anything is added, `total`; returns the factor per vector."""
    rstd = torch.empty(x.shape[:-1])
    _sweep("rms_norm_fwd", x, added, weight, eps, total, normed, rstd)
    return rstd


def _normalise_gradient(
    saved: tuple[Tensor, Tensor, Tensor],
    d_normed: Tensor,
    d_x: Tensor,
    d_total: Tensor | None = None,
    d_added: Tensor | None = None,
) -> Tensor:
    """Writes `d_x` and `d_added`; returns the weight's."""
    d_weight = torch.empty(saved[1].shape)
    d_total = None if d_total is None else _rows(d_total)
    _sweep("rms_norm_bwd", *saved, _rows(d_normed), d_total, d_x, d_added, d_weight)
    return d_weight.to(saved[1].dtype)


def _sweep(name: str, first: Tensor, *others: Any) -> None:
    from rlvr_fast import _C

    arrays = (as_numpy(x) if isinstance(x, Tensor) else x for x in (first, *others))
    getattr(_C, name)(*arrays, threads(first))


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
