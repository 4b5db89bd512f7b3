"""Everybody who takes part, by name: the bare GEMMs, ours in each setting, torch, and the peers.

All solve the same problem (`benches/problems.py`), except the two marked `plain CE`: they solve
mean cross-entropy only, without ratios, advantages or entropies, and stand there as a bar for
speed. `peers.py` says how each package is called.
"""

import importlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benches import peers
from benches.peers import Score, Scores, attempt, with_eager_loss
from benches.problems import (
    HIGH,
    LOW,
    Problem,
    Solved,
    Step,
    differentiated,
    truth,
    truth_of_mean,
)
from rlvr_fast.objectives import ClippedSurrogate
from rlvr_fast.ops.active_rows import mark_active
from rlvr_fast.ops.linear_logprobs import linear_logprobs
from rlvr_fast.ops.policy_loss import PolicyLossOutput, policy_loss

FLOOR = "floor: 3 GEMMs"
FRESH_FLOOR = "floor: fresh gradients"
SCORE_FLOOR = "floor: 1 GEMM"
OURS = "policy_loss"
SMALL_BUDGET = {"cpu": 12 << 20, "cuda": 256 << 20}
"""Bytes of logits."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    name: str
    build: Callable[[Problem], Step]
    score: Callable[[Problem], Score] | None = None
    """None: it computes no log-probabilities that one could look at."""
    modules: tuple[str, ...] = ()
    """What has to be importable, `package.module` or `package.module:name`."""
    install: str = ""
    """The packages that have it, for pip."""
    cuda_only: bool = False
    cost: Mapping[str, float] = field(default_factory=lambda: {"cpu": 3.0, "cuda": 2.0})
    """Expected time by device, in multiples of the floor; for planning only."""
    logit_bytes: int = 0
    """At the peak, for each of the T V logits; 0: bounded whatever T is."""
    padded: bool = False
    """Its interface wants all sequences of one length."""
    setup: float = 0.0
    """Expected seconds to compile, for each shape."""
    truth: Callable[[Problem], Solved] = truth

    def missing(self, device: str) -> str | None:
        """Why it cannot take part, or None."""
        if self.cuda_only and device != "cuda":
            return "needs a CUDA GPU"
        for module in self.modules:
            _, reason = attempt(partial(_imported, module))
            if reason:
                return f"{reason} (pip install {self.install})" if self.install else reason
        return None


def _imported(module: str) -> object:
    name, _, attribute = module.partition(":")
    found = peers.verl(name) if name.startswith("verl.") else importlib.import_module(name)
    return getattr(found, attribute) if attribute else found


class Gemms:
    """The three products of a problem, and nothing else."""

    def __init__(self, given: Problem) -> None:
        self.hidden, self.weight = given.hidden.detach(), given.weight.detach()
        self.logits = self.hidden.new_empty(given.num_tokens, len(self.weight))
        self.d_hidden, self.d_weight = torch.empty_like(self.hidden), torch.empty_like(self.weight)

    def logits_only(self) -> None:
        torch.mm(self.hidden, self.weight.t(), out=self.logits)

    def into_place(self) -> None:
        """Into memory that was used before."""
        self.logits_only()
        torch.mm(self.logits, self.weight, out=self.d_hidden)
        torch.mm(self.logits.t(), self.hidden, out=self.d_weight)

    def fresh(self) -> object:
        """Into new gradients, as everybody must who returns them."""
        self.logits_only()
        return torch.mm(self.logits, self.weight), torch.mm(self.logits.t(), self.hidden)


OBJECTIVE = ClippedSurrogate(clip_low=LOW, clip_high=HIGH)


def ours(name: str, *, autocast: bool = False, cost: float = 1.2, **settings: Any) -> Contender:
    """policy_loss with `settings`; under autocast on fp32 weights, as our trainer uses it."""

    def call(given: Problem) -> Callable[[], PolicyLossOutput]:
        tokens, own = given.tokens(), dict(settings)
        if given.device != "cpu":
            # As a trainer does, once a batch; on the CPU the op does it itself.
            tokens = mark_active(tokens, OBJECTIVE).to(given.device)
        weight = given.master if autocast else given.weight
        if own.get("logits_budget") == "small":
            own["logits_budget"] = SMALL_BUDGET[given.device]

        def run() -> PolicyLossOutput:
            with torch.autocast(given.device, torch.bfloat16) if autocast else nullcontext():
                return policy_loss(given.hidden, weight, tokens, OBJECTIVE, **own)

        return run

    def build(given: Problem) -> Step:
        run, weight = call(given), given.master if autocast else given.weight
        return lambda: differentiated(run().loss, given.hidden, weight)

    def score(given: Problem) -> Score:
        run = call(given)

        def scores() -> Scores:
            out = run()
            return out.logp, out.entropy

        return scores

    return Contender(name=name, build=build, score=score, cost={"cpu": cost, "cuda": 1.3})


def linear_score(given: Problem) -> Score:
    def score() -> Scores:
        return linear_logprobs(given.hidden, given.weight, given.targets)

    return score


def share_skipped(given: Problem) -> float:
    """Of the tokens that policy_loss does not multiply."""
    tokens = mark_active(given.tokens(), OBJECTIVE).to(given.device)
    return policy_loss(given.hidden, given.weight, tokens, OBJECTIVE).metrics.read()["skipped"]


def naive_score(given: Problem) -> Score:
    """All logits, in fp32 for the softmax: what one writes first."""
    return lambda: _all_at_once(given, entropy=True)


def _all_at_once(given: Problem, *, entropy: bool) -> Scores:
    logp = torch.log_softmax((given.hidden @ given.weight.t()).float(), -1)
    chosen = logp.gather(-1, given.targets[:, None]).squeeze(-1)
    return chosen, -(logp.exp() * logp).sum(-1) if entropy else None


def naive(given: Problem) -> Step:
    return with_eager_loss(lambda _: partial(_all_at_once, given, entropy=False))(given)


def compiled(given: Problem) -> Step:
    """torch.compile of the naive loss."""

    def loss() -> torch.Tensor:
        return given.surrogate(_all_at_once(given, entropy=False)[0])

    fast = torch.compile(loss, dynamic=False)
    return lambda: differentiated(fast(), given.hidden, given.weight)


SETTINGS = [
    ours(OURS),
    ours(f"{OURS}, fp32 weights, autocast", autocast=True),
    ours(f"{OURS}, fp32 logits", logits_dtype=torch.float32),
    ours(f"{OURS}, bf16 logits", logits_dtype=torch.bfloat16),
    ours(f"{OURS}, batch_invariant", batch_invariant=True),
    ours(f"{OURS}, score_all", score_all=True),
    ours(f"{OURS}, small budget", logits_budget="small", cost=1.8),
    Contender(
        name="linear_logprobs + eager loss",
        build=with_eager_loss(linear_score),
        score=linear_score,
        cost={"cpu": 1.6, "cuda": 1.7},
    ),
]
TORCH = [
    Contender(name="torch", build=naive, score=naive_score, logit_bytes=16),
    Contender(
        name="torch.compile",
        build=compiled,
        cost={"cpu": 1.3, "cuda": 1.5},
        logit_bytes=12,
        setup=6.0,
    ),
]
PEERS = [
    Contender(
        name="TRL op",
        build=with_eager_loss(peers.trl_score),
        score=peers.trl_score,
        modules=("trl.kernels",),
        install="trl==1.16.0",
        cost={"cpu": 6.0, "cuda": 2.0},
    ),
    Contender(
        name="Liger fused GRPO",
        padded=True,
        build=peers.liger_grpo,
        modules=("liger_kernel.chunked_loss",),
        install="liger-kernel==0.8.5",
        cost={"cpu": 4.0, "cuda": 12.0},
    ),
    Contender(
        name="Liger fused GRPO, chunk 1",
        padded=True,
        build=partial(peers.liger_grpo, sequences_per_chunk=1),
        modules=("liger_kernel.chunked_loss",),
        install="liger-kernel==0.8.5",
        cost={"cpu": 6.5, "cuda": 15.0},
    ),
    Contender(
        name="Liger scaled CE",
        build=with_eager_loss(peers.liger_scaled_score),
        score=peers.liger_scaled_score,
        modules=("liger_kernel.ops.fused_linear_scaled_cross_entropy",),
        install="liger-kernel==0.8.5",
        cost={"cpu": 4.5, "cuda": 2.0},
    ),
    Contender(
        name="Liger Triton GRPO on logits",
        padded=True,
        build=peers.liger_triton,
        modules=("liger_kernel.transformers.grpo_loss",),
        install="liger-kernel==0.8.5",
        cuda_only=True,
        logit_bytes=6,
    ),
    Contender(
        name="verl torch head",
        build=with_eager_loss(peers.verl_torch_score),
        score=peers.verl_torch_score,
        modules=("verl.utils.experimental.torch_functional",),
        install="--no-deps verl==0.9.1",
        cost={"cpu": 4.5, "cuda": 2.5},
    ),
    Contender(
        name="verl Triton head",
        build=with_eager_loss(peers.verl_triton_score),
        score=peers.verl_triton_score,
        modules=("verl.utils.kernel.linear_cross_entropy",),
        install="--no-deps verl==0.9.1",
        cuda_only=True,
    ),
    Contender(
        name="cut-cross-entropy",
        build=with_eager_loss(peers.cut_score),
        score=peers.cut_score,
        modules=("cut_cross_entropy",),
        install="cut-cross-entropy==25.1.1",
        logit_bytes=12,
        setup=6.0,
        cost={"cpu": 1.3, "cuda": 2.0},
    ),
]
BARS = [
    Contender(
        name="F.linear_cross_entropy (plain CE)",
        build=peers.torch_cross_entropy,
        modules=("torch.nn:LinearCrossEntropyOptions",),
        truth=truth_of_mean,
        cost={"cpu": 26.0, "cuda": 3.0},
    ),
    Contender(
        name="QuACK (plain CE)",
        build=peers.quack_cross_entropy,
        modules=("quack.linear_cross_entropy",),
        install="quack-kernels==0.6.5",
        cuda_only=True,
        truth=truth_of_mean,
    ),
]
EVERYBODY = {c.name: c for c in [*SETTINGS, *TORCH, *PEERS, *BARS]}
SWEPT = [OURS, "torch", "TRL op", "cut-cross-entropy", "Liger fused GRPO", "Liger scaled CE",
         "verl Triton head", "QuACK (plain CE)"]  # fmt: skip
"""Who takes part in the curves; the first ones get the time first. Without a Hopper GPU Liger's
scaled CE is the loop of verl's torch head.
"""
SCORERS = ["linear_logprobs + eager loss", "torch", "TRL op", "Liger scaled CE", "verl torch head",
           "verl Triton head", "cut-cross-entropy"]  # fmt: skip
