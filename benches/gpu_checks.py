"""Every kernel and op on the device, against fp64 of the same inputs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlvr_fast import objectives
from rlvr_fast.objectives import Objective, Tokens
from rlvr_fast.ops import divergence, group_advantages, logprobs
from rlvr_fast.ops.fused_rows import fused_rows
from rlvr_fast.ops.group_advantages import GroupNormalisation, Scale
from rlvr_fast.ops.linear_kl import linear_kl
from rlvr_fast.ops.linear_kl import reference as kl_reference
from rlvr_fast.ops.linear_logprobs import linear_logprobs
from rlvr_fast.ops.linear_logprobs import reference as logprobs_reference
from rlvr_fast.ops.policy_loss import policy_loss
from rlvr_fast.ops.policy_loss import reference as policy_reference
from rlvr_fast.ops.policy_rows import group_rewards_of
from rlvr_fast.ops.token_statistics import token_statistics
from rlvr_fast.scored import ScoredTokens
from rlvr_fast.tracing.tokens import TokenFields
from rlvr_fast.tracing.trace import trace

CLIPPED = objectives.ClippedSurrogate(clip_high=0.28)
EVERYTHING = (
    objectives.DynamicClipSurrogate() + objectives.KL3(coef=0.04) + objectives.EntropyBonus()
)
OBJECTIVES: dict[str, Objective] = {
    "clipped": CLIPPED,
    "dual clip": objectives.ClippedSurrogate(dual_clip=3.0),
    "capped weight": objectives.CappedWeight(),
    "dynamic clip, KL, entropy": EVERYTHING,
    "whole sequences": objectives.SequenceClippedSurrogate(clip_low=0.02, clip_high=0.02),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TRANSFORMS = {"plain": (1.0, 0.0), "softcap": (0.5, 15.0)}
FINE = 2e-5
"""Of fp32 arithmetic over a vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Where:
    """What to check on."""

    device: str
    vocab_size: int = 151_665
    """Odd: Qwen's vocabulary without padding."""
    hidden_size: int = 256
    rows: int = 96


Check = Callable[[Where], str]
"""Raises AssertionError; else tells the greatest relative error or what else it saw."""


def relative(own: Tensor, true: Tensor) -> float:
    return float((own.double() - true.double()).norm() / (true.double().norm() + 1e-30))


def near(limit: float, **pairs: tuple[Tensor, Tensor]) -> str:
    """All within a relative error, NaN never."""
    found = {name: relative(*pair) for name, pair in pairs.items()}
    told = ", ".join(f"{name} {error:.1e}" for name, error in found.items())
    assert all(error <= limit for error in found.values()), f"wanted <= {limit:.1e}, got {told}"
    return told


def every_check() -> Iterator[tuple[str, Check]]:
    for dtype in DTYPES:
        for name, transform in TRANSFORMS.items():
            for padding in (0, 7):
                label = f"{_short(dtype)}, {name}, stride V + {padding}"
                yield f"row sweeps: {label}", partial(row_sweeps, dtype, transform, padding)
    for name, objective in (("clipped", CLIPPED), ("everything", EVERYTHING)):
        for rewards in (False, True):
            label = f"fused rows: {name}, {'rewards' if rewards else 'advantage'}"
            yield label, partial(fused, objective, rewards)
    for scale in Scale:
        yield f"group advantages: {scale.name}", partial(groups, scale)
    for name, objective in OBJECTIVES.items():
        yield f"policy_loss: {name}, fp32 logits", partial(whole, objective, torch.float32, None)
        yield f"policy_loss: {name}, tiles", partial(whole, objective, torch.float32, 40)
    bf16 = torch.bfloat16
    yield (
        "policy_loss: capped weight, bf16 logits",
        partial(whole, OBJECTIVES["capped weight"], bf16, 40),
    )
    yield "policy_loss: rewards", partial(whole, CLIPPED, torch.float32, 40, rewards=True)
    yield "policy_loss: masked tokens", masked
    yield "linear_logprobs", scores
    yield "token_statistics", statistics
    for kind in divergence.Divergence:
        yield f"linear_kl: {kind.name}", partial(kl, kind)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def logits_like(on: Where, dtype: torch.dtype, padding: int = 0) -> tuple[Tensor, Tensor]:
    """`[t, V]` with rows `V + padding` apart, and targets."""
    flat = 3 * torch.randn(on.rows, on.vocab_size + padding, device=on.device)
    targets = torch.randint(0, on.vocab_size, (on.rows,), device=on.device)
    return flat.to(dtype)[:, : on.vocab_size], targets


def row_sweeps(dtype: torch.dtype, transform: tuple[float, float], padding: int, on: Where) -> str:
    """Statistics, then the gradient in place and (from fp32) into the front of the same rows."""
    logits, targets = logits_like(on, dtype, padding)
    dlogp, dentropy = (torch.randn(on.rows, device=on.device) for _ in range(2))
    exact = logits.double()
    true = logprobs.reference(exact, targets, *transform)
    gradient = torch.empty_like(exact)
    given = (targets, true, dlogp.double(), dentropy.double(), *transform)
    logprobs.reference_grad(exact, *given, gradient)
    stats = logprobs.row_stats(logits, targets, *transform)
    out, limit = logits, torch.finfo(dtype).eps
    if dtype == torch.float32:
        out, limit = torch.full_like(logits, torch.nan), FINE
        front = logits.clone(memory_format=torch.contiguous_format)
        narrow = front.view(torch.bfloat16)[:, : on.vocab_size]
        logprobs.row_grad(front, targets, stats, dlogp, dentropy, *transform, narrow)
        near(torch.finfo(torch.bfloat16).eps, narrow=(narrow, gradient))
    logprobs.row_grad(logits, targets, stats, dlogp, dentropy, *transform, out)
    told = near(FINE, logp=(stats[0], true[0]), entropy=(stats[1], true[1]))
    return f"{told}, {near(limit, gradient=(out, gradient))}"


def scored(on: Where, logp: Tensor, *, rewards: bool = False) -> ScoredTokens:
    """Tokens of eight sequences in two groups, with every field; on the device."""
    rows = len(logp)
    offsets = torch.arange(9) * rows // 8
    count = torch.randn(rows)
    return ScoredTokens(
        targets=torch.randint(0, on.vocab_size, (rows,)),
        weight=torch.rand(rows) / rows,
        seq_offsets=offsets,
        group_offsets=torch.tensor([0, 4, 8]),
        old_logp=logp.cpu().float() + 0.3 * torch.randn(rows),
        ref_logp=logp.cpu().float() + 0.3 * torch.randn(rows),
        rewards=torch.rand(8) if rewards else None,
        advantage=None if rewards else count,
    ).to(on.device)


def fused(objective: Objective, rewards: bool, on: Where) -> str:
    """The one kernel for a tile, against autograd from loss to logits."""
    logits, _ = logits_like(on, torch.float32)
    logp = torch.full((on.rows,), -12.0)
    tokens = scored(on, logp, rewards=rewards)
    norm, index = GroupNormalisation(), tokens.segments
    advantage = tokens.advantage
    group_rewards = None
    if rewards:
        assert tokens.rewards is not None
        wide = tokens.rewards.double()
        advantage = tokens.expand(group_advantages.group_advantages(wide, index.group_offsets))
        group_rewards = group_rewards_of(tokens, norm)
    fields = _fields(tokens, advantage, torch.float64)
    exact = logits.double().requires_grad_()
    true = logprobs.reference(exact, tokens.targets, 1.0, 0.0)
    loss = objective.token_loss(Tokens(true[0], true[1], fields))
    (gradient,) = torch.autograd.grad((fields.weight * loss).sum(), exact)
    own = _fields(tokens, None if rewards else tokens.advantage, torch.float32)
    out = torch.full_like(logits, torch.nan)
    settings = {"scale": 1.0, "cap": 0.0, "out": out}
    found = fused_rows(
        logits, tokens.targets, own, group_rewards, objective, trace(objective), **settings
    )
    return near(
        10 * FINE, logp=(found[0], true[0]), loss=(found[2], loss), gradient=(out, gradient)
    )


def _fields(tokens: ScoredTokens, advantage: Tensor | None, dtype: torch.dtype) -> TokenFields:
    cast = {name: getattr(tokens, name).to(dtype) for name in ("weight", "old_logp", "ref_logp")}
    wide = None if advantage is None else advantage.to(dtype)
    return TokenFields(**cast, advantage=wide, extras={})


def groups(scale: Scale, on: Where) -> str:
    """Ragged groups, one of a single sequence, one of equal rewards, one reward unknown."""
    rewards = torch.rand(200, device=on.device)
    rewards[:8], rewards[50] = 1.0, torch.nan
    offsets = torch.tensor([0, 8, 9, 40, 40, 140, 200], device=on.device)
    norm = GroupNormalisation(scale=scale)
    own, true = (
        group_advantages.group_advantages(x, offsets, normalisation=norm)
        for x in (rewards, rewards.double())
    )
    return near(FINE, advantage=(own, true))


def head(on: Where, rows: int = 0) -> tuple[Tensor, Tensor]:
    """bf16 hidden and weight that want gradients."""
    hidden = torch.randn(rows or on.rows, on.hidden_size, device=on.device)
    weight = (
        2.5 / on.hidden_size**0.5 * torch.randn(on.vocab_size, on.hidden_size, device=on.device)
    )
    return hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()


def doubled(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.detach().double().requires_grad_() for x in tensors)


def whole(
    objective: Objective,
    logits_dtype: torch.dtype,
    tile_rows: int | None,
    on: Where,
    *,
    rewards: bool = False,
) -> str:
    """policy_loss with both gradients, in one tile or in tiles of about `tile_rows`."""
    hidden, weight = head(on)
    tokens = scored(on, _true_logp(hidden, weight, on), rewards=rewards)
    wide = doubled(hidden, weight)
    true = policy_reference(*wide, tokens, objective)
    exact = torch.autograd.grad(true, wide)
    budget = None if tile_rows is None else 6 * tile_rows * on.vocab_size
    out = policy_loss(
        hidden, weight, tokens, objective, logits_dtype=logits_dtype, logits_budget=budget
    )
    own = torch.autograd.grad(out.loss, (hidden, weight))
    limit = 0.01 if logits_dtype == torch.float32 else 0.04
    return near(limit, d_hidden=(own[0], exact[0]), d_weight=(own[1], exact[1]))


def _true_logp(hidden: Tensor, weight: Tensor, on: Where) -> Tensor:
    """Near that of a random target: enough for ratios on both sides of 1."""
    logits = hidden.detach().float() @ weight.detach().float().t()
    return -logits.logsumexp(-1)


def masked(on: Where) -> str:
    """Whatever lies in tokens of weight 0, NaN too, changes nothing."""
    hidden, weight = head(on)
    tokens = scored(on, torch.full((on.rows,), -12.0))
    tokens.weight[::3] = 0.0
    before = torch.autograd.grad(
        policy_loss(hidden, weight, tokens, EVERYTHING).loss, (hidden, weight)
    )
    for field in (tokens.old_logp, tokens.ref_logp, tokens.advantage):
        assert field is not None
        field[::3] = torch.nan
    after = torch.autograd.grad(
        policy_loss(hidden, weight, tokens, EVERYTHING).loss, (hidden, weight)
    )
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "gradients differ"
    return "same bits"


def scores(on: Where) -> str:
    """linear_logprobs, differentiated through both outputs, in tiles."""
    hidden, weight = head(on)
    targets = torch.randint(0, on.vocab_size, (on.rows,), device=on.device)
    wide = doubled(hidden, weight)
    true = logprobs_reference(*wide, targets)
    exact = torch.autograd.grad((true[0] + 0.3 * true[1]).sum(), wide)
    settings = {"logits_dtype": torch.float32, "logits_budget": 160 * on.vocab_size}
    found = linear_logprobs(hidden, weight, targets, **settings)
    own = torch.autograd.grad((found[0] + 0.3 * found[1]).sum(), (hidden, weight))
    told = near(1e-4, logp=(found[0], true[0]), entropy=(found[1], true[1]))
    return f"{told}, {near(0.01, d_hidden=(own[0], exact[0]), d_weight=(own[1], exact[1]))}"


def statistics(on: Where) -> str:
    """All of them with a gradient through all that have one; in fp64 the op is plain torch."""
    logits, targets = logits_like(on, torch.bfloat16)
    found = []
    for x in (logits.float().requires_grad_(), logits.double().requires_grad_()):
        values = token_statistics(x, targets, min_p=0.05)._asdict()
        kept = [v for name, v in values.items() if name not in ("max_prob", "top_id")]
        found.append((values, torch.autograd.grad(torch.stack(kept).sum(), x)[0]))
    (own, gradient), (true, exact) = found
    return near(2 * FINE, gradient=(gradient, exact), **{n: (own[n], true[n]) for n in true})


def kl(kind: divergence.Divergence, on: Where) -> str:
    """linear_kl from another head over the same vocabulary, in tiles."""
    student, teacher = head(on), head(on)
    weight = torch.rand(on.rows, device=on.device)
    wide, other = doubled(*student), doubled(*teacher)
    true = kl_reference(*wide, *(x.detach() for x in other), kind=kind)
    exact = torch.autograd.grad((weight.double() * true).sum(), wide)
    settings = {"logits_dtype": torch.float32, "logits_budget": 480 * on.vocab_size}
    found = linear_kl(*student, *teacher, weight, kind=kind, **settings)
    own = torch.autograd.grad(found.loss, student)
    told = near(1e-4, kl=(found.kl, true))
    return f"{told}, {near(0.01, d_hidden=(own[0], exact[0]), d_weight=(own[1], exact[1]))}"
