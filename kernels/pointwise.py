"""Pointwise functions that `triton.language` lacks, or has with other rules for NaN.

They are written in its primitives, so that they run in the interpreter as well.
"""

import triton
import triton.language as tl


@triton.jit
def minimum(x, y):
    """NaN if either is, as in torch."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def maximum(x, y):
    """NaN if either is, as in torch."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sign(x):
    """0 for NaN, as in torch."""
    return (x > 0).to(tl.float32) - (x < 0).to(tl.float32)


@triton.jit
def log1p(x):
    """Kahan: the error of `w = 1 + x` is in `log w` and in `w - 1` alike, and cancels."""
    w = 1.0 + x
    exact = (w == 1.0) | (w == float("inf"))
    return tl.where(exact, x, tl.log(w) * (x / tl.where(exact, 1.0, w - 1.0)))


@triton.jit
def expm1(x):
    """Kahan: the error of `w = exp x` is in `w - 1` and in `log w` alike, and cancels.

    Where `w` is far from 1 `w - 1` is right as it is, and `log w` may not exist.
    """
    w = tl.exp(x)
    near = tl.abs(x) < 0.5
    log_w = tl.log(tl.where(near & (w != 1.0), w, 2.0))
    return tl.where(near, tl.where(w == 1.0, x, (w - 1.0) * (x / log_w)), w - 1.0)


@triton.jit
def tanh(x):
    """A polynomial near 0, where the exponentials cancel (Cephes, `tanhf`)."""
    x = minimum(maximum(x, -20.0), 20.0)  # it is +-1 from 10 on, and inf - inf would be NaN
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    far = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    return tl.where(tl.abs(x) < 0.625, x + x * square * series, far)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))
