"""How the ops behave on a device: no waiting, graphs, torch.compile, the same bits again."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benches.gpu_checks import CLIPPED, EVERYTHING, Check, Where, head, near, scored
from rlvr_fast.objectives import Objective
from rlvr_fast.ops.active_rows import mark_active
from rlvr_fast.ops.divergence import Divergence
from rlvr_fast.ops.linear_kl import linear_kl
from rlvr_fast.ops.linear_logprobs import linear_logprobs
from rlvr_fast.ops.logprobs import logprobs
from rlvr_fast.ops.policy_loss import policy_loss
from rlvr_fast.scored import ScoredTokens

Gradients = tuple[Tensor, ...]
Step = Callable[[], Gradients]


def every_behaviour(*, cuda: bool) -> Iterator[tuple[str, Check]]:
    """Without CUDA those that have a meaning there."""
    yield "same bits again: policy_loss", same_bits
    yield "batch invariance: logp and entropy", invariant
    yield "skipped rows: same gradients", skipped
    yield "skip_clipped: same gradients", skipped_later
    if cuda:
        # On the CPU the check of the targets' range is a branch on data.
        yield "torch.compile: logprobs, one graph", compiled_logprobs
        yield "torch.compile: policy_loss, one graph", compiled_loss
        yield "no host sync: policy_loss, advantages", lambda on: no_sync(on, step(on))
        yield "no host sync: policy_loss, rewards", lambda on: no_sync(on, step(on, rewards=True))
        yield "no host sync: policy_loss, skipped rows", lambda on: no_sync(on, step(on, zero=True))
        yield "no host sync: policy_loss, everything", lambda on: no_sync(on, step(on, EVERYTHING))
        yield "no host sync: linear_logprobs", lambda on: no_sync(on, linear_step(on))
        yield "no host sync: linear_kl", lambda on: no_sync(on, kl_step(on))
        yield "CUDA graph: policy_loss", lambda on: captured(on, zero=False)
        yield "CUDA graph: policy_loss, skipped rows", lambda on: captured(on, zero=True)


def batch(
    on: Where, objective: Objective, *, rewards: bool = False, zero: bool = False
) -> ScoredTokens:
    """Tokens on the device; with `zero` those of the first half have no advantage."""
    tokens = scored(replace(on, device="cpu"), torch.full((on.rows,), -12.0), rewards=rewards)
    if zero:
        assert tokens.advantage is not None
        tokens.advantage[: on.rows // 2] = 0.0
    return mark_active(tokens, objective).to(on.device)


def step(
    on: Where, objective: Objective = CLIPPED, *, rewards: bool = False, zero: bool = False
) -> Step:
    """policy_loss, forward and backward."""
    hidden, weight = head(on)
    tokens = batch(on, objective, rewards=rewards, zero=zero)

    def run() -> Gradients:
        out = policy_loss(hidden, weight, tokens, objective)
        return torch.autograd.grad(out.loss, (hidden, weight))

    return run


def linear_step(on: Where) -> Step:
    hidden, weight = head(on)
    targets = torch.randint(0, on.vocab_size, (on.rows,), device=on.device)

    def run() -> Gradients:
        logp, entropy = linear_logprobs(hidden, weight, targets)
        return torch.autograd.grad((logp + entropy).sum(), (hidden, weight))

    return run


def kl_step(on: Where) -> Step:
    student, teacher = head(on), head(on)
    weight = torch.rand(on.rows, device=on.device)

    def run() -> Gradients:
        found = linear_kl(*student, *teacher, weight, kind=Divergence.REVERSE)
        return torch.autograd.grad(found.loss, student)

    return run


def no_sync(on: Where, run: Step) -> str:
    """Torch raises at whatever waits for the device."""
    run()
    torch.cuda.synchronize(on.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize(on.device)
    return "none seen"


def captured(on: Where, *, zero: bool) -> str:
    """A graph replayed on other hidden states gives what eager gives."""
    hidden, weight = head(on)
    tokens = batch(on, CLIPPED, zero=zero)

    def run() -> tuple[Tensor, ...]:
        out = policy_loss(hidden, weight, tokens, CLIPPED)
        return out.loss, *torch.autograd.grad(out.loss, (hidden, weight))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    with torch.no_grad():
        hidden.copy_(torch.randn_like(hidden))
    graph.replay()
    torch.cuda.synchronize(on.device)
    names = ("loss", "d_hidden", "d_weight")
    pairs = zip(names, zip(found, run(), strict=True), strict=True)
    return near(1e-5, **dict(pairs))


def same_bits(on: Where) -> str:
    run = step(on, EVERYTHING)
    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "gradients differ"
    return "same bits"


def invariant(on: Where) -> str:
    """batch_invariant: a row's logp and entropy do not depend on what else is in the batch."""
    hidden, weight = head(on)
    tokens = batch(on, EVERYTHING)
    few = tokens.select(torch.arange(on.rows // 3))
    whole, part = (
        policy_loss(hidden[: x.num_tokens], weight, x, EVERYTHING, batch_invariant=True)
        for x in (tokens, few)
    )
    assert torch.equal(whole.logp[: few.num_tokens], part.logp), "logp differs"
    assert torch.equal(whole.entropy[: few.num_tokens], part.entropy), "entropy differs"
    return "same bits"


def skipped(on: Where) -> str:
    """Half of the rows marked inactive: as if they had been multiplied."""
    hidden, weight = head(on)
    tokens = batch(on, CLIPPED, zero=True)
    assert tokens.active is not None
    assert not bool(tokens.active.all())
    everything = replace(tokens, active=torch.ones_like(tokens.active)).to(on.device)
    own, full = (
        torch.autograd.grad(policy_loss(hidden, weight, x, CLIPPED).loss, (hidden, weight))
        for x in (tokens, everything)
    )
    return near(0.01, d_hidden=(own[0], full[0]), d_weight=(own[1], full[1]))


def skipped_later(on: Where) -> str:
    """Half of the rows clipped: as if they had been multiplied, in several tiles."""
    hidden, weight = head(on)
    tokens = batch(on, CLIPPED)
    assert tokens.old_logp is not None
    assert tokens.advantage is not None
    clipped = torch.arange(on.rows, device=on.device) % 2 == 0
    tokens = replace(
        tokens,
        old_logp=torch.where(clipped, tokens.old_logp - 40.0, tokens.old_logp),
        advantage=torch.ones_like(tokens.advantage),
    )
    budget = max(1, on.rows // 3) * on.vocab_size * 4
    own, full = (
        torch.autograd.grad(
            policy_loss(
                hidden, weight, tokens, CLIPPED, logits_budget=budget, skip_clipped=late
            ).loss,
            (hidden, weight),
        )
        for late in (True, False)
    )
    return near(0.01, d_hidden=(own[0], full[0]), d_weight=(own[1], full[1]))


def compiled_logprobs(on: Where) -> str:
    logits = torch.randn(on.rows, on.vocab_size, device=on.device, requires_grad=True)
    targets = torch.randint(0, on.vocab_size, (on.rows,), device=on.device)

    def loss(x: Tensor) -> Tensor:
        logp, entropy = logprobs(x, targets)
        return (logp + 0.3 * entropy).sum()

    return _as_eager(loss, logits)


def compiled_loss(on: Where) -> str:
    hidden, weight = head(on)
    tokens = batch(on, CLIPPED)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return policy_loss(x, w, tokens, CLIPPED).loss

    return _as_eager(loss, hidden, weight)


def _as_eager(loss: Callable[..., Tensor], *inputs: Tensor) -> str:
    """The same gradients from one graph."""
    torch.compiler.reset()
    eager = torch.autograd.grad(loss(*inputs), inputs)
    fast = torch.compile(loss, fullgraph=True)
    own = torch.autograd.grad(fast(*inputs), inputs)
    names = ("first", "second")
    return near(0.01, **dict(zip(names, zip(own, eager, strict=True), strict=False)))
