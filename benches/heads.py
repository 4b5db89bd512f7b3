"""One policy-gradient problem, and everybody's way of solving it.

A problem is `T` tokens in eight sequences of equal length (so that peers with a padded interface
have nothing to pad), bf16 `hidden [T, D]` and `weight [V, D]`, and PPO's clipped surrogate with
bounds 0.2 and 0.28, mean over tokens. Peers are run as installed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlvr_fast.objectives import ClippedSurrogate
from rlvr_fast.ops.policy_loss import policy_loss
from rlvr_fast.packed import ScoredTokens

NUM_SEQUENCES = 8
LOW, HIGH = 0.2, 0.28
TRL_VOCAB_CHUNK = 32768
"""`_CHUNKED_LOGPROB_CHUNK_SIZE` of trl.trainer.utils."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    hidden: Tensor
    """`[T, D]` bf16, wants a gradient."""
    weight: Tensor
    """`[V, D]` bf16, wants a gradient."""
    master: Tensor
    """`[V, D]` fp32, the same numbers, wants a gradient."""
    targets: Tensor
    """`[T]` int64."""
    old_logp: Tensor
    """`[T]` fp32, nats."""
    advantage: Tensor
    """`[8]` fp32."""

    @property
    def num_tokens(self) -> int:
        return len(self.targets)

    @property
    def shape(self) -> tuple[int, int, int]:
        """T, D, V."""
        return (self.num_tokens, self.hidden.shape[1], self.weight.shape[0])

    @property
    def gemm_flops(self) -> float:
        """`2 T D V`: one multiplication and one addition."""
        num_tokens, hidden_size, vocab_size = self.shape
        return 2.0 * num_tokens * hidden_size * vocab_size

    def padded(self, x: Tensor) -> Tensor:
        """`[T, ...]` to `[8, T / 8, ...]`."""
        return x.unflatten(0, (NUM_SEQUENCES, -1))

    def part(self, num_tokens: int) -> "Problem":
        """The same with the first tokens of each sequence only, `num_tokens` in all."""

        def first(x: Tensor) -> Tensor:
            return self.padded(x.detach())[:, : num_tokens // NUM_SEQUENCES].flatten(0, 1)

        return Problem(
            hidden=first(self.hidden).requires_grad_(),
            weight=self.weight,
            master=self.master,
            targets=first(self.targets),
            old_logp=first(self.old_logp),
            advantage=self.advantage,
        )

    def tokens(self) -> ScoredTokens:
        length = self.num_tokens // NUM_SEQUENCES
        return ScoredTokens(
            targets=self.targets,
            weight=torch.full((self.num_tokens,), 1 / self.num_tokens),
            seq_offsets=torch.arange(NUM_SEQUENCES + 1) * length,
            old_logp=self.old_logp,
            advantage=self.advantage,
        )

    def surrogate(self, logp: Tensor) -> Tensor:
        """The loss of `[T]` log-probabilities in plain torch."""
        advantage = self.advantage.to(logp.dtype).repeat_interleave(
            self.num_tokens // NUM_SEQUENCES
        )
        ratio = torch.exp(logp - self.old_logp)
        return -torch.minimum(ratio * advantage, ratio.clamp(1 - LOW, 1 + HIGH) * advantage).mean()


def problem(num_tokens: int, hidden_size: int, vocab_size: int) -> Problem:
    """Random, with ratios on both sides of both bounds but none near one.

    A ratio near a bound is clipped or not by its rounding error: that would be a difference
    between contenders, but none in quality.
    """
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size).bfloat16()
    weight = (0.1 * torch.randn(vocab_size, hidden_size)).bfloat16()
    targets = torch.randint(0, vocab_size, (num_tokens,))
    logp = torch.cat(
        [_logp(*rows, weight) for rows in zip(hidden.split(256), targets.split(256), strict=True)]
    )
    log_ratio = torch.tensor([-0.5, 0.0, 0.0, 0.0, 0.5])[torch.randint(0, 5, (num_tokens,))]
    log_ratio += torch.empty(num_tokens).uniform_(-0.1, 0.1)
    return Problem(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        master=weight.detach().float().requires_grad_(),
        targets=targets,
        old_logp=logp - log_ratio,
        advantage=torch.randn(NUM_SEQUENCES),
    )


def _logp(hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    logits = hidden.float() @ weight.float().t()
    return torch.log_softmax(logits, -1).gather(-1, targets[:, None]).squeeze(-1)


Solved = tuple[Tensor, Tensor, Tensor]
"""loss, d_hidden `[T, D]`, d_weight `[V, D]`."""
Step = Callable[[], Solved]


def truth(given: Problem) -> Solved:
    """In fp64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (given.hidden, given.weight))
    return _differentiated(_naive_loss(given, hidden, weight, torch.float64), hidden, weight)


def ours(given: Problem, *, logits_budget: int | None = None) -> Step:
    """policy_loss on bf16 weights."""
    return _ours(given, given.weight, logits_budget)


def ours_autocast(given: Problem) -> Step:
    """policy_loss on fp32 master weights under bf16 autocast, as our trainer uses it."""

    def step() -> Solved:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return _ours(given, given.master, None)()

    return step


def _ours(given: Problem, weight: Tensor, logits_budget: int | None) -> Step:
    tokens, objective = given.tokens(), ClippedSurrogate(clip_low=LOW, clip_high=HIGH)

    def step() -> Solved:
        out = policy_loss(given.hidden, weight, tokens, objective, logits_budget=logits_budget)
        return _differentiated(out.loss, given.hidden, weight)

    return step


def naive(given: Problem) -> Step:
    """All logits, in fp32 for the softmax: what one writes first."""

    def step() -> Solved:
        loss = _naive_loss(given, given.hidden, given.weight, torch.float32)
        return _differentiated(loss, given.hidden, given.weight)

    return step


def compiled(given: Problem) -> Step:
    """torch.compile of the naive loss.

    Raises:
        RuntimeError: where inductor does not work; with torch's reason.
    """
    loss_of = torch.compile(_naive_loss, dynamic=False)

    def step() -> Solved:
        loss = loss_of(given, given.hidden, given.weight, torch.float32)
        return _differentiated(loss, given.hidden, given.weight)

    step()
    return step


def trl(given: Problem) -> Step:
    """TRL 1.16's op with the vocabulary chunk and outputs of its trainer, and the eager loss."""

    def step() -> Solved:
        loss = given.surrogate(trl_logp(given))
        return _differentiated(loss, given.hidden, given.weight)

    return step


def trl_logp(given: Problem) -> Tensor:
    """`[T]` log-probabilities by TRL's op; it computes the entropies too, as its trainer asks."""
    from trl.kernels import ChunkedLogProbFunction

    logp: Tensor = ChunkedLogProbFunction.apply(
        given.hidden,
        given.weight,
        None,
        given.targets,
        1.0,
        TRL_VOCAB_CHUNK,
        None,
        1.0,
        ("log_probs", "entropy"),
    )[0]
    return logp


def liger(given: Problem, *, sequences_per_chunk: int = 1) -> Step:
    """Liger 0.8.5's fused linear GRPO loss; its `loss_type="dapo"` is the mean over tokens."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    op = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=False,
        use_ref_model=False,
        chunk_size=sequences_per_chunk,
        epsilon_low=LOW,
        epsilon_high=HIGH,
        loss_type="dapo",
    )
    mask = torch.ones_like(given.padded(given.targets))

    def step() -> Solved:
        loss, _ = op(
            given.padded(given.hidden),
            given.weight,
            given.padded(given.targets),
            mask,
            given.advantage,
            old_per_token_logps=given.padded(given.old_logp),
        )
        return _differentiated(loss, given.hidden, given.weight)

    return step


def _naive_loss(given: Problem, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    logits = (hidden @ weight.t()).to(dtype)
    logp = torch.log_softmax(logits, -1).gather(-1, given.targets[:, None]).squeeze(-1)
    return given.surrogate(logp)


def _differentiated(loss: Tensor, hidden: Tensor, weight: Tensor) -> Solved:
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))
