"""One policy-gradient problem: tokens, an LM head, and PPO's clipped surrogate over their mean.

Logits have a standard deviation of 2.5 before a sure token is raised by 25.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from benches.shapes import DENSE, Workload
from rlvr_fast.scored import ScoredTokens

LOW, HIGH = 0.2, 0.28
"""Clip bounds of the ratio, below and above 1."""
LOGIT_STD = 2.5
SURE_BY = 25.0

Solved = tuple[Tensor, Tensor, Tensor]
"""loss, d_hidden `[T, D]`, d_weight `[V, D]`."""
Step = Callable[[], Solved]


@dataclass(frozen=True, kw_only=True)
class Problem:
    workload: Workload
    hidden: Tensor
    """`[T, D]` bf16, wants a gradient."""
    weight: Tensor
    """`[V, D]` bf16, wants a gradient."""
    targets: Tensor
    """`[T]` int64."""
    old_logp: Tensor
    """`[T]` fp32, nats."""
    advantage: Tensor
    """`[S]` fp32."""
    lengths: Tensor
    """`[S]` int64 on the CPU."""

    @cached_property
    def master(self) -> Tensor:
        """`[V, D]` fp32, the same numbers as `weight`, wants a gradient."""
        return self.weight.detach().float().requires_grad_()

    @property
    def num_tokens(self) -> int:
        return len(self.targets)

    @property
    def device(self) -> str:
        return self.hidden.device.type

    @property
    def shape(self) -> tuple[int, int, int]:
        """T, D, V."""
        return (self.num_tokens, self.hidden.shape[1], self.weight.shape[0])

    @property
    def title(self) -> str:
        return "{}: T={}, D={}, V={}, bf16".format(self.workload.name, *self.shape)

    @property
    def gemm_flops(self) -> float:
        """`2 T D V`: one multiplication and one addition."""
        num_tokens, hidden_size, vocab_size = self.shape
        return 2.0 * num_tokens * hidden_size * vocab_size

    @cached_property
    def offsets(self) -> Tensor:
        """`[S+1]` int64 on the CPU."""
        return torch.cat([torch.zeros(1, dtype=torch.int64), self.lengths.cumsum(0)])

    @cached_property
    def places(self) -> Tensor:
        """`[T]`: where each token lies in `[S L]`, all sequences padded to the longest."""
        longest, count = int(self.lengths.max()), len(self.lengths)
        kept = torch.arange(longest).expand(count, -1) < self.lengths[:, None]
        return kept.flatten().nonzero().squeeze(-1).to(self.hidden.device)

    def padded(self, x: Tensor) -> Tensor:
        """`[T, ...]` to `[S, L, ...]`, zeros behind each sequence."""
        count, longest = len(self.lengths), int(self.lengths.max())
        flat = x.new_zeros(count * longest, *x.shape[1:])
        flat[self.places] = x.detach()
        return flat.unflatten(0, (count, longest))

    def unpadded(self, x: Tensor) -> Tensor:
        """`[S, L, ...]` to `[T, ...]`."""
        return x.flatten(0, 1)[self.places]

    def tokens(self) -> ScoredTokens:
        """With a weight of 1 / T each; on the CPU."""
        return ScoredTokens(
            targets=self.targets.cpu(),
            weight=torch.full((self.num_tokens,), 1 / self.num_tokens),
            seq_offsets=self.offsets,
            old_logp=self.old_logp.cpu(),
            advantage=self.token_advantage.cpu(),
        )

    @cached_property
    def token_advantage(self) -> Tensor:
        """`[T]` fp32."""
        lengths = self.lengths.to(self.advantage.device)
        return self.advantage.repeat_interleave(lengths, output_size=self.num_tokens)

    def surrogate(self, logp: Tensor) -> Tensor:
        """The loss of `[T]` log-probabilities in plain torch."""
        advantage = self.token_advantage.to(logp.dtype)
        ratio = torch.exp(logp - self.old_logp)
        return -torch.minimum(ratio * advantage, ratio.clamp(1 - LOW, 1 + HIGH) * advantage).mean()

    def like(self, num_tokens: int, workload: Workload) -> "Problem":
        """Other tokens with the same head."""
        return _tokens_for(self.weight, num_tokens, workload)

    def small(self) -> "Problem":
        """64 other tokens of the same workload, few enough for fp64, with more of them clipped."""
        return self.like(64, replace(self.workload, moved=0.4))


def problem(
    num_tokens: int,
    hidden_size: int,
    vocab_size: int,
    *,
    workload: Workload = DENSE,
    device: str = "cpu",
    seed: int = 0,
) -> Problem:
    """Random, with ratios on both sides of both bounds but none near one.

    A ratio near a bound is clipped or not by its rounding error: that would be a difference
    between contenders, but none in quality.
    """
    torch.manual_seed(seed)
    weight = torch.randn(vocab_size, hidden_size, device=device)
    weight *= LOGIT_STD / hidden_size**0.5
    return _tokens_for(weight.bfloat16().requires_grad_(), num_tokens, workload)


def _tokens_for(weight: Tensor, num_tokens: int, workload: Workload) -> Problem:
    device, (vocab_size, hidden_size) = weight.device, weight.shape
    torch.manual_seed(num_tokens)
    lengths = workload.lengths(num_tokens)
    hidden = torch.randn(num_tokens, hidden_size, device=device)
    targets = torch.randint(0, vocab_size, (num_tokens,), device=device)
    sure = torch.rand(num_tokens, device=device) < workload.sure
    hidden[sure] += SURE_BY / LOGIT_STD**2 * weight.detach()[targets[sure]].float()
    hidden = hidden.bfloat16()
    log_ratio = torch.empty(num_tokens, device=device).uniform_(-0.1, 0.1)
    moved = ~sure & (torch.rand(num_tokens, device=device) < workload.moved)
    log_ratio += 0.5 * moved * torch.randn(num_tokens, device=device).sign()
    return Problem(
        workload=workload,
        hidden=hidden.requires_grad_(),
        weight=weight,
        targets=targets,
        old_logp=_logp(hidden, targets, weight.detach()) - log_ratio,
        advantage=workload.advantages(len(lengths)).to(device),
        lengths=lengths,
    )


@torch.no_grad()
def _logp(hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    rows = 256 if hidden.device.type == "cpu" else 2048
    found = []
    for some, chosen in zip(hidden.split(rows), targets.split(rows), strict=True):
        if hidden.is_cuda:
            logits = torch.mm(some, weight.t(), out_dtype=torch.float32)
        else:
            logits = (some @ weight.t()).float()
        at_target = logits.gather(-1, chosen[:, None]).squeeze(-1)
        found.append(at_target - logits.logsumexp(-1))
    return torch.cat(found)


def truth(given: Problem) -> Solved:
    """In fp64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (given.hidden, given.weight))
    logp = torch.log_softmax(hidden @ weight.t(), -1).gather(-1, given.targets[:, None])
    return differentiated(given.surrogate(logp.squeeze(-1)), hidden, weight)


def truth_of_mean(given: Problem) -> Solved:
    """Of plain cross-entropy, the mean of `-logp`, in fp64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (given.hidden, given.weight))
    loss = torch.nn.functional.cross_entropy(hidden @ weight.t(), given.targets)
    return differentiated(loss, hidden, weight)


def true_scores(given: Problem) -> tuple[Tensor, Tensor]:
    """logp and entropy in fp64, without what cancels for a token that is nearly sure."""
    logits = given.hidden.detach().double() @ given.weight.detach().double().t()
    chosen = given.targets[:, None]
    margin = logits - logits.gather(-1, chosen)
    others = margin.scatter(-1, chosen, -torch.inf).logsumexp(-1)
    logp = torch.log_softmax(logits, -1)
    return -torch.nn.functional.softplus(others), -(logp.exp() * logp).sum(-1)


def differentiated(loss: Tensor, hidden: Tensor, weight: Tensor) -> Solved:
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))
