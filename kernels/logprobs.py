"""Log-probability and entropy of one token per row of logits, and their gradient.

A row of logits x becomes `z = scale x`, or `cap tanh(scale x / cap)`. With its maximum m and the
target y,

    d_v = z_v - m      e_v = exp(d_v)      s = sum_v e_v      u = sum_v e_v d_v

    logp    = d_y - log s,  or  -log1p(sum_{v != y} e_v)  where y is the maximum: never above 0
    entropy = log s - u / s                              both terms are >= 0
    p_v     = exp(d_v - log s)

One sweep suffices: when a block raises the maximum from m to m', with `h = m - m'`,

    u <- (u + s h) exp(h)      s <- s exp(h)

The gradient of a loss that depends on logp (by a) and on the entropy (by b), a second sweep:

    dz_v = -p_v (a + b (log p_v + entropy))      v != y
    dz_y = -expm1(logp) a - p_y b (logp + entropy)

and `dx = dz scale (1 - (z / cap)^2)`. `1 - p_y` written as `-expm1(logp)` keeps the gradient of a
token that is nearly sure.
"""

import triton
import triton.language as tl

from rlvr_fast.kernels.pointwise import expm1, log1p, tanh

LOWEST = tl.constexpr(-1e4)
"""A shifted logit below this has probability 0; the bound keeps `0 * -inf` out of the entropy."""
NO_MAXIMUM = tl.constexpr(-3e38)
"""Finite, so that a first block of `-inf` (a masked vocabulary) gives no `-inf - -inf`."""


def row_launch(vocab_size: int) -> dict[str, int | bool]:
    """Default block size and launch options of a kernel with one program a row.

    8 logits a thread are 16-byte accesses in any dtype at <= 64 registers. By the SASS of sm_90
    that is 2 rows and 32 KB of loads (bf16: 16 KB) an SM; 16 logits a thread halve the threads, and
    more, smaller programs have too many rows in L2 for the second sweep to find its own.
    """
    block = min(max(triton.next_power_of_2(vocab_size), 128), 4096)
    # Fused multiply-adds would round z differently from one use to the next: the maximum would
    # not be 0 after the shift, and a row's gradient would not fit its logp.
    return {"BLOCK_V": block, "num_warps": max(block // 256, 1), "enable_fp_fusion": False}


@triton.jit
def transformed(x, scale, cap, HAS_CAP: tl.constexpr):
    z = x.to(tl.float32) * scale
    if HAS_CAP:
        z = cap * tanh(z / cap)
    return z


@triton.jit
def floored(d):
    """Not `maximum`, which would turn NaN into a number."""
    return tl.where(d < LOWEST, LOWEST, d)


@triton.jit
def load_block(row_ptr, start, vocab_size, scale, cap, HAS_CAP: tl.constexpr, BLOCK_V: tl.constexpr,
               TAIL: tl.constexpr):  # fmt: skip
    """Only the tail is masked: a mask at an odd `vocab_size` would split every wide load."""
    v = start + tl.arange(0, BLOCK_V)
    if TAIL:
        x = tl.load(row_ptr + v, mask=v < vocab_size, other=float("-inf"))
    else:
        x = tl.load(row_ptr + v)
    return transformed(x, scale, cap, HAS_CAP), v


@triton.jit
def fold(top, others, spread, z, v, target):
    """Adds a block to the sums without the target: `others` is s, `spread` is u, per lane."""
    new_top = tl.maximum(top, tl.max(z, axis=0))
    drop = top - new_top
    keep = tl.exp(drop)
    d = floored(z - new_top)
    e = tl.where(v == target, 0.0, tl.exp(d))
    return new_top, others * keep + e, (spread + others * drop) * keep + e * d


@triton.jit
def row_stats(
    row_ptr, target, vocab_size, scale, cap, HAS_CAP: tl.constexpr, BLOCK_V: tl.constexpr
):
    """The first sweep: logp, entropy, m, log s.

    The tail is a loop of at most one pass: a compiler that sees two tails alike keeps all that
    one computed for the other, and spills.
    """
    # Before the last reduction: after it a faster warp may be overwriting the row.
    z_target = transformed(tl.load(row_ptr + target), scale, cap, HAS_CAP)
    top = NO_MAXIMUM
    others = tl.zeros([BLOCK_V], tl.float32)
    spread = tl.zeros([BLOCK_V], tl.float32)
    tail = vocab_size // BLOCK_V * BLOCK_V
    for start in range(0, tail, BLOCK_V):
        z, v = load_block(row_ptr, start, vocab_size, scale, cap, HAS_CAP, BLOCK_V, False)
        top, others, spread = fold(top, others, spread, z, v, target)
    for start in range(tail, vocab_size, BLOCK_V):
        z, v = load_block(row_ptr, start, vocab_size, scale, cap, HAS_CAP, BLOCK_V, True)
        z = tl.where(v < vocab_size, z, float("-inf"))  # a softcap has made it finite
        top, others, spread = fold(top, others, spread, z, v, target)

    rest = tl.sum(others, axis=0)
    d = floored(z_target - top)
    e = tl.exp(d)
    log_total = tl.where(d == 0, log1p(rest), tl.log(rest + e))
    entropy = log_total - (tl.sum(spread, axis=0) + e * d) / (rest + e)
    return d - log_total, entropy, top, log_total


@triton.jit
def grad_block(z, v, target, stats, dlogp, dentropy, scale, cap, ENTROPY: tl.constexpr,
               HAS_CAP: tl.constexpr):  # fmt: skip
    logp, entropy, top, log_total = stats
    log_p = floored(z - top) - log_total
    dz = -tl.exp(log_p)
    at_target = -expm1(logp) * dlogp
    if ENTROPY:
        dz *= dlogp + dentropy * (log_p + entropy)
        at_target -= tl.exp(logp) * dentropy * (logp + entropy)
    else:
        dz *= dlogp
    dz = tl.where(v == target, at_target, dz)
    if HAS_CAP:
        dz *= 1.0 - (z / cap) * (z / cap)
    return dz * scale


@triton.jit
def store_block(out_ptr, v, x, vocab_size, SHRINKS: tl.constexpr, TAIL: tl.constexpr):
    if SHRINKS:
        # `out` may be the front of the same row in a narrower dtype: this block's stores then
        # land on logits that a slower warp has yet to load.
        tl.debug_barrier()
    x = x.to(out_ptr.dtype.element_ty)
    if TAIL:
        tl.store(out_ptr + v, x, mask=v < vocab_size)
    else:
        tl.store(out_ptr + v, x)


@triton.jit
def write_grad(row_ptr, out_ptr, target, vocab_size, stats, dlogp, dentropy, scale, cap,
               ENTROPY: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK_V: tl.constexpr):  # fmt: skip
    """The second sweep; `out_ptr` may be `row_ptr`. Rows without a gradient are not read."""
    tail = vocab_size // BLOCK_V * BLOCK_V
    SHRINKS: tl.constexpr = out_ptr.dtype != row_ptr.dtype
    if (dlogp == 0) & (dentropy == 0):
        zeros = tl.zeros([BLOCK_V], tl.float32)
        for start in range(0, tail, BLOCK_V):
            store_block(out_ptr, start + tl.arange(0, BLOCK_V), zeros, vocab_size, False, False)
        for start in range(tail, vocab_size, BLOCK_V):
            store_block(out_ptr, start + tl.arange(0, BLOCK_V), zeros, vocab_size, False, True)
    else:
        for start in range(0, tail, BLOCK_V):
            z, v = load_block(row_ptr, start, vocab_size, scale, cap, HAS_CAP, BLOCK_V, False)
            dx = grad_block(z, v, target, stats, dlogp, dentropy, scale, cap, ENTROPY, HAS_CAP)
            store_block(out_ptr, v, dx, vocab_size, SHRINKS, False)
        for start in range(tail, vocab_size, BLOCK_V):
            z, v = load_block(row_ptr, start, vocab_size, scale, cap, HAS_CAP, BLOCK_V, True)
            dx = grad_block(z, v, target, stats, dlogp, dentropy, scale, cap, ENTROPY, HAS_CAP)
            store_block(out_ptr, v, dx, vocab_size, SHRINKS, True)


# Row strides stay specialised: "divisible by 16" is what makes the loads 16 bytes wide.
@triton.jit(do_not_specialize=["num_tokens", "vocab_size"])
def logprobs_fwd_kernel(
    logits_ptr,  # [T, V]
    targets_ptr,  # [T]
    stats_ptr,  # [4, T]: logp, entropy, m, log s
    num_tokens,
    vocab_size,
    row_stride,
    scale,
    cap,
    HAS_CAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)  # T * V passes 2**31 at 16k tokens of a 150k vocabulary
    row_ptr = logits_ptr + t * row_stride
    target = tl.load(targets_ptr + t).to(tl.int32)

    logp, entropy, top, log_total = row_stats(
        row_ptr, target, vocab_size, scale, cap, HAS_CAP, BLOCK_V
    )
    tl.store(stats_ptr + t, logp)
    tl.store(stats_ptr + t + num_tokens, entropy)
    tl.store(stats_ptr + t + 2 * num_tokens, top)
    tl.store(stats_ptr + t + 3 * num_tokens, log_total)


@triton.jit(do_not_specialize=["num_tokens", "vocab_size"])
def logprobs_bwd_kernel(
    logits_ptr,  # [T, V]
    targets_ptr,  # [T]; -1 is in another slice of the vocabulary
    stats_ptr,  # [4, T]
    dlogp_ptr,  # [T]
    dentropy_ptr,  # [T] or None
    out_ptr,  # [T, V]
    num_tokens,
    vocab_size,
    row_stride,
    out_stride,
    scale,
    cap,
    HAS_CAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + t).to(tl.int32)
    stats = (
        tl.load(stats_ptr + t),
        tl.load(stats_ptr + t + num_tokens),
        tl.load(stats_ptr + t + 2 * num_tokens),
        tl.load(stats_ptr + t + 3 * num_tokens),
    )
    dentropy = 0.0
    if dentropy_ptr is not None:
        dentropy = tl.load(dentropy_ptr + t)
    write_grad(
        logits_ptr + t * row_stride, out_ptr + t * out_stride, target, vocab_size, stats,
        tl.load(dlogp_ptr + t), dentropy, scale, cap, dentropy_ptr is not None, HAS_CAP, BLOCK_V,
    )  # fmt: skip
