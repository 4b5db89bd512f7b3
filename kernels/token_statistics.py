"""More statistics of a row of logits from one sweep, and the gradient of all of them.

With z, d, e, s, p, logp and entropy of `kernels/logprobs.py`, K = {v: p_v >= min_p max p} and
`[v in K]` 1 or 0,

    mean    = sum_v z_v / V                       top_id = the lowest v with z_v = m
    log_sum = m + log s                           max_p  = 1 / s
    squared = sum_v p_v^2 = sum_v e_v^2 / s^2     kept   = sum_{v in K} p_v

`v in K` is `d_v >= log min_p`, which takes the maximum of the whole row: a second look, unless all
are kept. The gradient of a loss that depends on logp (by a), entropy (b), mean (m'), log_sum (l),
squared (q) and kept (k), where K is held constant:

    c_v  = l - b (log p_v + entropy) + 2 q (p_v - squared) + k ([v in K] - kept)
    dz_v = p_v (c_v - a) + m' / V                  v != y
    dz_y = -expm1(logp) a + p_y c_y + m' / V
"""

import triton
import triton.language as tl

from rlvr_fast.kernels.logprobs import NO_MAXIMUM, floored, load_block, store_block, transformed
from rlvr_fast.kernels.pointwise import expm1, log1p


@triton.jit
def fold(sums, z, v, start, vocab_size, target):
    """Adds a block; the target is left out of the sums of exponentials."""
    top, top_id, others, spread, squares, plain = sums
    inside = v < vocab_size
    plain += tl.where(inside, z, 0.0)
    z = tl.where(inside, z, float("-inf"))
    block_top, place = tl.max(z, axis=0, return_indices=True)
    top_id = tl.where(block_top > top, start + place, top_id)
    new_top = tl.maximum(top, block_top)
    drop = top - new_top
    keep = tl.exp(drop)
    d = floored(z - new_top)
    e = tl.where(v == target, 0.0, tl.exp(d))
    spread = (spread + others * drop) * keep + e * d
    others = others * keep + e
    squares = squares * keep * keep + e * e
    return new_top, top_id, others, spread, squares, plain


@triton.jit
def fold_kept(kept, z, v, vocab_size, top, log_min_p):
    d = z - top
    return kept + tl.where((v < vocab_size) & (d >= log_min_p), tl.exp(floored(d)), 0.0)


@triton.jit(do_not_specialize=["num_tokens", "vocab_size"])
def token_statistics_fwd_kernel(
    logits_ptr,  # [T, V]
    targets_ptr,  # [T]
    stats_ptr,  # [9, T]: logp, entropy, m, log s, mean, log_sum, squared, kept, max_p
    top_id_ptr,  # [T]
    num_tokens,
    vocab_size,
    row_stride,
    scale,
    cap,
    log_min_p,
    FILTER: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + t * row_stride
    target = tl.load(targets_ptr + t).to(tl.int32)
    z_target = transformed(tl.load(row_ptr + target), scale, cap, HAS_CAP)
    zeros = tl.zeros([BLOCK_V], tl.float32)
    sums = (NO_MAXIMUM, 0, zeros, zeros, zeros, zeros)
    tail = vocab_size // BLOCK_V * BLOCK_V
    for start in range(0, tail, BLOCK_V):
        z, v = load_block(row_ptr, start, vocab_size, scale, cap, HAS_CAP, BLOCK_V, False)
        sums = fold(sums, z, v, start, vocab_size, target)
    for start in range(tail, vocab_size, BLOCK_V):
        z, v = load_block(row_ptr, start, vocab_size, scale, cap, HAS_CAP, BLOCK_V, True)
        sums = fold(sums, z, v, start, vocab_size, target)
    top, top_id, others, spread, squares, plain = sums

    rest = tl.sum(others, axis=0)
    d = floored(z_target - top)
    e = tl.exp(d)
    total = rest + e
    log_total = tl.where(d == 0, log1p(rest), tl.log(total))
    kept = 1.0
    if FILTER:
        lanes = tl.zeros([BLOCK_V], tl.float32)
        for start in range(0, tail, BLOCK_V):
            z, v = load_block(row_ptr, start, vocab_size, scale, cap, HAS_CAP, BLOCK_V, False)
            lanes = fold_kept(lanes, z, v, vocab_size, top, log_min_p)
        for start in range(tail, vocab_size, BLOCK_V):
            z, v = load_block(row_ptr, start, vocab_size, scale, cap, HAS_CAP, BLOCK_V, True)
            lanes = fold_kept(lanes, z, v, vocab_size, top, log_min_p)
        kept = tl.sum(lanes, axis=0) / total

    stats_ptr += t
    tl.store(stats_ptr, d - log_total)
    tl.store(stats_ptr + num_tokens, log_total - (tl.sum(spread, axis=0) + e * d) / total)
    tl.store(stats_ptr + 2 * num_tokens, top)
    tl.store(stats_ptr + 3 * num_tokens, log_total)
    tl.store(stats_ptr + 4 * num_tokens, tl.sum(plain, axis=0) / vocab_size)
    tl.store(stats_ptr + 5 * num_tokens, top + log_total)
    tl.store(stats_ptr + 6 * num_tokens, (tl.sum(squares, axis=0) + e * e) / (total * total))
    tl.store(stats_ptr + 7 * num_tokens, tl.where(kept > 1.0, 1.0, kept))
    tl.store(stats_ptr + 8 * num_tokens, 1.0 / total)
    tl.store(top_id_ptr + t, top_id.to(tl.int64))


@triton.jit
def load_rows(ptr, num_tokens):
    """logp, entropy, m, log s, mean, log_sum, squared, kept: of the statistics or the gradients."""
    values = ()
    for i in tl.static_range(8):
        values += (tl.load(ptr + i * num_tokens),)
    return values


@triton.jit
def grad_block(z, v, target, vocab_size, stats, grads, log_min_p, scale, cap,
               HAS_CAP: tl.constexpr):  # fmt: skip
    logp, entropy, top, log_total, _, _, squared, kept = stats
    a, b, _, _, m, l, q, k = grads  # noqa: E741
    d = z - top
    log_p = tl.where(v == target, logp, floored(d) - log_total)
    p = tl.exp(log_p)
    c = l - b * (log_p + entropy) + 2 * q * (p - squared)
    c += k * (tl.where(d >= log_min_p, 1.0, 0.0) - kept)
    dz = p * c + tl.where(v == target, -expm1(logp), -p) * a + m / vocab_size
    if HAS_CAP:
        dz *= 1.0 - (z / cap) * (z / cap)
    return dz * scale


@triton.jit(do_not_specialize=["num_tokens", "vocab_size"])
def token_statistics_bwd_kernel(
    logits_ptr,  # [T, V]
    targets_ptr,  # [T]
    stats_ptr,  # [9, T]
    grads_ptr,  # [9, T]
    out_ptr,  # [T, V]
    num_tokens,
    vocab_size,
    row_stride,
    out_stride,
    scale,
    cap,
    log_min_p,
    HAS_CAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + t).to(tl.int32)
    stats = load_rows(stats_ptr + t, num_tokens)
    grads = load_rows(grads_ptr + t, num_tokens)
    row_ptr = logits_ptr + t * row_stride
    out_ptr += t * out_stride
    SHRINKS: tl.constexpr = out_ptr.dtype != row_ptr.dtype
    tail = vocab_size // BLOCK_V * BLOCK_V
    for start in range(0, tail, BLOCK_V):
        z, v = load_block(row_ptr, start, vocab_size, scale, cap, HAS_CAP, BLOCK_V, False)
        dx = grad_block(z, v, target, vocab_size, stats, grads, log_min_p, scale, cap, HAS_CAP)
        store_block(out_ptr, v, dx, vocab_size, SHRINKS, False)
    for start in range(tail, vocab_size, BLOCK_V):
        z, v = load_block(row_ptr, start, vocab_size, scale, cap, HAS_CAP, BLOCK_V, True)
        dx = grad_block(z, v, target, vocab_size, stats, grads, log_min_p, scale, cap, HAS_CAP)
        store_block(out_ptr, v, dx, vocab_size, SHRINKS, True)
