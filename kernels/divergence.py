"""Divergence of two distributions over the vocabulary, a row each, and its gradient to the first.

The rows become z as in `kernels/logprobs.py`; with the student's probabilities p, the teacher's q,

    log p = z - m - log sum exp(z - m)      x = log q - log p = (z_q - z_p) - K

K is one number a row. The sums of p and q are 1, so `KL(p || q) = sum (p log(p / q) - p + q)`: each
term is >= 0, and 0 for equals; an error of K counts only squared. With `phi(x) = exp(x) - 1 - x`

    forward   KL(q || p) = sum q phi(-x)      dz = p - q
    reverse   KL(p || q) = sum p phi(x)       dz = p (log(p / q) - KL(p || q))

where `p phi(x) = (q - p) - p x`, or, near 0, p times the series `x^2 / 2 + x^3 / 6 + ...`.

Half of both divergences from the mixture `m = (p + q) / 2`: of each pair the greater is g, the
smaller `g exp(-n)` with n = |x|, and with `lost = 1 - exp(-n)` and `t = lost / (4 - lost)`

    c = log(g / m) = 2 atanh t      log(p / m) = c, or c - n where p is the smaller
    above = c - lost / 2 = 2 (t^2 / (1 + t) + atanh t - t)
    below = lost^2 / 2 - exp(-n) (phi(-n) - above)

the greater one's term is g above, the smaller one's g below, and

    jensen-shannon   sum g (above + below) / 2      dz = p (log(p / m) - KL(p || m)) / 2

The gradient to the logits is `dx = coef dz scale (1 - (z / cap)^2)`. Only the forward one needs no
sum over the row before, so it is written in the same sweep.
"""

import triton
import triton.language as tl

from rlvr_fast.kernels.logprobs import NO_MAXIMUM, load_block, store_block

FORWARD = tl.constexpr(0)
REVERSE = tl.constexpr(1)
JENSEN_SHANNON = tl.constexpr(2)
FAR = tl.constexpr(100.0)
"""`exp(-FAR)` is 0; the bound keeps `0 * inf` out where one of a pair is 0."""


@triton.jit
def load_row_block(row_ptr, start, vocab_size, transform, HAS_CAP: tl.constexpr,
                   BLOCK_V: tl.constexpr, TAIL: tl.constexpr):  # fmt: skip
    scale, cap = transform
    z, v = load_block(row_ptr, start, vocab_size, scale, cap, HAS_CAP, BLOCK_V, TAIL)
    if TAIL:
        z = tl.where(v < vocab_size, z, float("-inf"))  # a softcap has made it finite
    return z, v


@triton.jit
def fold(top, total, z):
    new_top = tl.maximum(top, tl.max(z, axis=0))
    return new_top, total * tl.exp(top - new_top) + tl.exp(z - new_top)


@triton.jit
def normaliser(row_ptr, vocab_size, transform, HAS_CAP: tl.constexpr, BLOCK_V: tl.constexpr):
    """m and the log of the sum relative to it."""
    top = NO_MAXIMUM
    total = tl.zeros([BLOCK_V], tl.float32)
    tail = vocab_size // BLOCK_V * BLOCK_V
    for start in range(0, tail, BLOCK_V):
        z, _ = load_row_block(row_ptr, start, vocab_size, transform, HAS_CAP, BLOCK_V, False)
        top, total = fold(top, total, z)
    for start in range(tail, vocab_size, BLOCK_V):
        z, _ = load_row_block(row_ptr, start, vocab_size, transform, HAS_CAP, BLOCK_V, True)
        top, total = fold(top, total, z)
    return top, tl.log(tl.sum(total, axis=0))


@triton.jit
def compared(z, z_teacher, stats):
    """log p, log q, x."""
    top, log_total, teacher_top, teacher_log_total = stats
    x = (z_teacher - z) - ((teacher_top - top) + (teacher_log_total - log_total))
    return (z - top) - log_total, (z_teacher - teacher_top) - teacher_log_total, x


@triton.jit
def phi_near(x):
    """phi where |x| < 0.5."""
    series = 1 / 5040 + x * (1 / 40320)
    series = 1 / 720 + x * series
    series = 1 / 120 + x * series
    series = 1 / 24 + x * series
    series = 1 / 6 + x * series
    return x * x * (1 / 2 + x * series)


@triton.jit
def relative_entropy(p, q, x):
    """`p phi(x)`: that of a pair of zeros, whose x is NaN, is 0."""
    far = (q - p) - p * tl.where(p == 0, 0.0, x)
    return tl.where(tl.abs(x) < 0.5, p * phi_near(x), far)


@triton.jit
def mixed(log_p, log_q, x):
    """n, g, exp(-n), c, above, below."""
    g = tl.exp(tl.where(x > 0, log_q, log_p))
    n = tl.where(g == 0, 0.0, tl.abs(x))
    n = tl.where(n > FAR, FAR, n)
    w = tl.exp(-n)
    phi = tl.where(n < 0.5, phi_near(-n), n - (1.0 - w))
    lost = tl.where(n < 0.5, n - phi, 1.0 - w)

    t = lost / (4.0 - lost)
    square = t * t
    series = 1 / 11 + square * (1 / 13)
    series = 1 / 9 + square * series
    series = 1 / 7 + square * series
    series = 1 / 5 + square * series
    series = 1 / 3 + square * series
    rest = t * square * series
    above = 2.0 * (square / (1.0 + t) + rest)
    return n, g, w, 2.0 * (t + rest), above, 0.5 * lost * lost - w * (phi - above)


@triton.jit
def add_neighbours(x, BLOCK_V: tl.constexpr):
    """Four by four, which one thread holds: sums kept for each lane would fill the registers."""
    return tl.sum(tl.reshape(x, [BLOCK_V // 4, 4]), axis=1)


@triton.jit
def terms(pair, KIND: tl.constexpr):
    """Of the divergence, and of KL(p || m)."""
    log_p, log_q, x = pair
    if KIND == JENSEN_SHANNON:
        _, g, _, _, above, below = mixed(log_p, log_q, x)
        return 0.5 * g * (above + below), g * tl.where(x > 0, below, above)
    elif KIND == REVERSE:
        return relative_entropy(tl.exp(log_p), tl.exp(log_q), x), 0.0
    else:
        return relative_entropy(tl.exp(log_q), tl.exp(log_p), -x), 0.0


@triton.jit
def gradient(pair, centre, KIND: tl.constexpr):
    log_p, log_q, x = pair
    if KIND == JENSEN_SHANNON:
        n, g, w, c, _, _ = mixed(log_p, log_q, x)
        return 0.5 * g * tl.where(x > 0, w * (c - n - centre), c - centre)
    elif KIND == REVERSE:
        p = tl.exp(log_p)
        return -p * (tl.where(p == 0, 0.0, x) + centre)
    else:
        return tl.exp(log_p) - tl.exp(log_q)


@triton.jit
def sweep_block(rows, start, vocab_size, transform, stats, sums, coef, SUM: tl.constexpr,
                WRITE: tl.constexpr, KIND: tl.constexpr, HAS_CAP: tl.constexpr,
                BLOCK_V: tl.constexpr, TAIL: tl.constexpr):  # fmt: skip
    student_ptr, teacher_ptr, out_ptr = rows
    scale, cap = transform
    kl, centre = sums
    z, v = load_row_block(student_ptr, start, vocab_size, transform, HAS_CAP, BLOCK_V, TAIL)
    teacher, _ = load_row_block(teacher_ptr, start, vocab_size, transform, HAS_CAP, BLOCK_V, TAIL)
    pair = compared(z, teacher, stats)
    if WRITE:
        dz = gradient(pair, centre, KIND)
        if HAS_CAP:
            dz *= 1.0 - (z / cap) * (z / cap)
        SHRINKS: tl.constexpr = out_ptr.dtype != student_ptr.dtype
        store_block(out_ptr, v, dz * (coef * scale), vocab_size, SHRINKS, TAIL)
    if SUM:
        kl_term, centre_term = terms(pair, KIND)
        kl += add_neighbours(kl_term, BLOCK_V)
        if KIND == JENSEN_SHANNON:
            centre += add_neighbours(centre_term, BLOCK_V)
    return kl, centre


@triton.jit
def sweep(rows, vocab_size, transform, stats, sums, coef, SUM: tl.constexpr, WRITE: tl.constexpr,
          KIND: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK_V: tl.constexpr):  # fmt: skip
    """Adds the terms to `sums`, or writes the gradient given them, or both."""
    tail = vocab_size // BLOCK_V * BLOCK_V
    for start in range(0, tail, BLOCK_V):
        sums = sweep_block(rows, start, vocab_size, transform, stats, sums, coef,
                           SUM, WRITE, KIND, HAS_CAP, BLOCK_V, False)  # fmt: skip
    for start in range(tail, vocab_size, BLOCK_V):
        sums = sweep_block(rows, start, vocab_size, transform, stats, sums, coef,
                           SUM, WRITE, KIND, HAS_CAP, BLOCK_V, True)  # fmt: skip
    return sums


@triton.jit
def fill_zeros(out_ptr, vocab_size, BLOCK_V: tl.constexpr):
    for start in range(0, vocab_size, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        store_block(out_ptr, v, tl.zeros([BLOCK_V], tl.float32), vocab_size, False, True)


@triton.jit(do_not_specialize=["vocab_size"])
def divergence_kernel(
    student_ptr,  # [t, V]
    teacher_ptr,  # [t, V]
    coef_ptr,  # [t]
    kl_ptr,  # [t]
    out_ptr,  # [t, V] or None: no gradient wanted
    vocab_size,
    student_stride,
    teacher_stride,
    out_stride,
    transform,  # (scale, cap)
    KIND: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    coef = tl.load(coef_ptr + t)
    if out_ptr is not None:
        out_ptr += t * out_stride
    if coef == 0:
        tl.store(kl_ptr + t, 0.0)
        if out_ptr is not None:
            fill_zeros(out_ptr, vocab_size, BLOCK_V)
    else:
        student_ptr += t * student_stride
        teacher_ptr += t * teacher_stride
        top, log_total = normaliser(student_ptr, vocab_size, transform, HAS_CAP, BLOCK_V)
        teacher_top, teacher_log_total = normaliser(
            teacher_ptr, vocab_size, transform, HAS_CAP, BLOCK_V
        )
        stats = (top, log_total, teacher_top, teacher_log_total)
        rows = (student_ptr, teacher_ptr, out_ptr)
        MIXED: tl.constexpr = KIND == JENSEN_SHANNON
        zeros = tl.zeros([BLOCK_V // 4], tl.float32)
        sums = (zeros, zeros if MIXED else 0.0)
        AT_ONCE: tl.constexpr = (KIND == FORWARD) & (out_ptr is not None)
        kl, centre = sweep(
            rows, vocab_size, transform, stats, sums, coef, True, AT_ONCE, KIND, HAS_CAP, BLOCK_V
        )
        kl = tl.sum(kl, axis=0)
        centre = tl.sum(centre, axis=0) if MIXED else kl
        tl.store(kl_ptr + t, kl)
        if (out_ptr is not None) & (not AT_ONCE):
            sweep(
                rows, vocab_size, transform, stats, (kl, centre), coef,
                False, True, KIND, HAS_CAP, BLOCK_V,
            )  # fmt: skip
