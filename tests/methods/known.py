"""The fixture F1 of the published formulas, run through every backend of the row primitives.

Two sequences of 3 and 2 tokens, one group, advantage +1 and -1. The logits have four tokens: the
target, which is 0, has the fixture's log-probability, and the others share the rest.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rlvr_fast.ops import logprobs
from rlvr_fast.ops.fused_rows import fused_rows
from rlvr_fast.ops.objective_rows import Segmentation, evaluate
from rlvr_fast.tracing.objective import Objective
from rlvr_fast.tracing.tokens import TokenFields
from rlvr_fast.tracing.trace import trace

BACKENDS = tuple(logprobs.BACKENDS)
LENGTHS = torch.tensor([3, 2])
LOGP = [-0.8, -0.9, -1.5, -0.4, -0.7]
OLD = [-1.0, -0.5, -2.0, -0.3, -1.2]
REF = [-1.1, -0.6, -1.4, -0.2, -1.0]
ROLLOUT = [-1.1, -0.5, -2.6, -0.3, -1.0]
ENTROPY = [0.9, 0.2, 1.4, 0.1, 0.6]
ADVANTAGE = [1.0, 1.0, 1.0, -1.0, -1.0]

TOKEN_MEAN = torch.full((2,), 1 / 5)
SEQUENCE_MEAN = torch.tensor([1 / 6, 1 / 4])
SEQUENCE_SUM = torch.tensor([1 / 2, 1 / 2])


@dataclass(frozen=True)
class Found:
    loss: float
    """`sum(weight * token_loss)`."""
    dlogp: Tensor
    """`[5]`."""
    dlogits: Tensor
    """`[5, 4]`."""


def f1(
    objective: Objective,
    backend: str,
    seq_weight: Tensor,
    *,
    extras: Mapping[str, list[float]] | None = None,
    advantage: list[float] = ADVANTAGE,
    logp: list[float] = LOGP,
    old: list[float] = OLD,
) -> Found:
    """The objective on the fixture. It must not read the entropy, which is that of the logits."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    target = torch.tensor(logp, dtype=dtype)
    rest = torch.log(-torch.expm1(target) / 3)
    logits = torch.stack([target, rest, rest, rest], dim=1)
    targets = torch.zeros(len(logp), dtype=torch.int64)
    fields = fields_of(seq_weight, dtype, extras=extras, advantage=advantage, old=old)
    out = torch.empty_like(logits)
    traced = trace(objective) if backend == "triton" else None
    if traced is not None:
        rows = fused_rows(
            logits, targets, fields, None, objective, traced, scale=1.0, cap=0.0, out=out
        )
        return Found(float((fields.weight * rows[2]).sum()), rows[3], out)
    stats = logprobs.BACKENDS[backend](logits, targets, 1.0, 0.0)
    said = on_rows(objective, stats, fields)
    logprobs.GRAD_BACKENDS[backend](
        logits, targets, stats, said.dlogp, said.dentropy, 1.0, 0.0, out
    )
    return Found(float((fields.weight * said.token_loss).sum()), said.dlogp, out)


def with_entropy(
    objective: Objective,
    seq_weight: Tensor,
    *,
    entropy: list[float] = ENTROPY,
    extras: Mapping[str, list[float]] | None = None,
    advantage: list[float] = ADVANTAGE,
) -> Found:
    """The objective in fp64 torch on the fixture's entropies, which no logits could have."""
    logp = torch.tensor(LOGP, dtype=torch.float64)
    stats = torch.stack([logp, torch.tensor(entropy).double(), *torch.zeros(2, 5).double()])
    fields = fields_of(seq_weight, torch.float64, extras=extras, advantage=advantage)
    said = on_rows(objective, stats, fields)
    return Found(float((fields.weight * said.token_loss).sum()), said.dlogp, torch.zeros(5, 4))


def fields_of(
    seq_weight: Tensor,
    dtype: torch.dtype,
    *,
    extras: Mapping[str, list[float]] | None = None,
    advantage: list[float] = ADVANTAGE,
    old: list[float] = OLD,
) -> TokenFields:
    given = {"old_logp": old, "ref_logp": REF, "rollout_logp": ROLLOUT, "advantage": advantage}
    return TokenFields(
        weight=seq_weight.repeat_interleave(LENGTHS).to(dtype),
        extras={name: torch.tensor(x, dtype=dtype) for name, x in (extras or {}).items()},
        **{name: torch.tensor(x, dtype=dtype) for name, x in given.items()},
    )


def on_rows(objective: Objective, stats: Tensor, fields: TokenFields):
    cut = Segmentation(seq=torch.tensor([0, 3, 5]), group=torch.tensor([0, 5]))
    return evaluate(objective, stats, fields, cut, slice(0, 5))


def assert_known(found: Found, loss: float, gradient: list[float]) -> None:
    """To the digits that the fixture is printed with; the logits' gradient is `dlogp (1 - p)`."""
    wanted = torch.tensor(gradient, dtype=torch.float64)
    assert abs(found.loss - loss) < 3e-6
    torch.testing.assert_close(found.dlogp.double(), wanted, rtol=0, atol=3e-6)
    if found.dlogits.any():
        at_target = wanted * (1 - torch.tensor(LOGP).double().exp())
        torch.testing.assert_close(found.dlogits[:, 0].double(), at_target, rtol=0, atol=3e-6)
