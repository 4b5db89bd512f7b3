"""One row from logits to gradient: statistics, objective and its derivative, gradient in place.

With w the token's weight, l the objective's token loss and H the entropy, a row gives

    logp, H        as in `kernels/logprobs.py`
    l(logp, H, fields)
    a = w dl/dlogp      b = w dl/dH

and its logits become d(w l)/d(logits), the second sweep of `kernels/logprobs.py` with a and b.
A masked row (w = 0) has l = a = b = 0, whatever its fields hold.
"""

import triton
import triton.language as tl

from rlvr_fast.kernels.group_advantages import group_scale, normalised
from rlvr_fast.kernels.logprobs import row_stats, write_grad


@triton.jit
def load_all(ptrs, t):
    values = ()
    for i in tl.static_range(len(ptrs)):
        values += (tl.load(ptrs[i] + t).to(tl.float32),)
    return values


@triton.jit
def advantage_from_rewards(groups, t, KIND: tl.constexpr):
    rewards_ptr, group_offsets_ptr, seq_of_token_ptr, group_of_seq_ptr, ddof, eps = groups
    s = tl.load(seq_of_token_ptr + t).to(tl.int64)
    g = tl.load(group_of_seq_ptr + s).to(tl.int64)
    begin = tl.load(group_offsets_ptr + g)
    end = tl.load(group_offsets_ptr + g + 1)
    mean, factor = group_scale(rewards_ptr, begin, end, ddof, eps, KIND)
    return normalised(tl.load(rewards_ptr + s).to(tl.float32), mean, factor)


@triton.jit(do_not_specialize=["num_tokens", "vocab_size"])
def policy_loss_kernel(
    logits_ptr,  # [t, V]
    targets_ptr,  # [t]
    out_ptr,  # [t, V] or None: no gradient wanted
    results_ptr,  # [6, t]: logp, H, l, a, b, advantage
    num_tokens,
    vocab_size,
    logits_stride,
    out_stride,
    transform,  # (scale, cap)
    old_logp_ptr,  # [t] or None: the row's own logp
    advantage_ptr,  # [t] or None
    field_ptrs,  # each [t]: the weight, then what else the objective reads
    scalars,
    groups,  # see `advantage_from_rewards`, or None
    OBJECTIVE: tl.constexpr,
    ENTROPY: tl.constexpr,
    KIND: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + t * logits_stride
    target = tl.load(targets_ptr + t).to(tl.int32)
    scale, cap = transform
    stats = row_stats(row_ptr, target, vocab_size, scale, cap, HAS_CAP, BLOCK_V)
    logp, entropy, _, _ = stats

    old_logp = logp
    if old_logp_ptr is not None:
        old_logp = tl.load(old_logp_ptr + t).to(tl.float32)
    advantage = 0.0
    if advantage_ptr is not None:
        advantage = tl.load(advantage_ptr + t).to(tl.float32)
    elif groups is not None:
        advantage = advantage_from_rewards(groups, t, KIND)

    fields = load_all(field_ptrs, t)
    weight = fields[0]
    loss, dlogp, dentropy = OBJECTIVE(logp, entropy, old_logp, advantage, fields, scalars)
    loss = tl.where(weight == 0, 0.0, loss)
    dlogp = tl.where(weight == 0, 0.0, weight * dlogp)
    dentropy = tl.where(weight == 0, 0.0, weight * dentropy)

    tl.store(results_ptr + t, logp)
    tl.store(results_ptr + t + num_tokens, entropy)
    tl.store(results_ptr + t + 2 * num_tokens, loss)
    tl.store(results_ptr + t + 3 * num_tokens, dlogp)
    tl.store(results_ptr + t + 4 * num_tokens, dentropy)
    tl.store(results_ptr + t + 5 * num_tokens, tl.where(weight == 0, 0.0, advantage))
    if out_ptr is not None:
        write_grad(
            row_ptr, out_ptr + t * out_stride, target, vocab_size, stats, dlogp, dentropy,
            scale, cap, ENTROPY, HAS_CAP, BLOCK_V,
        )  # fmt: skip
