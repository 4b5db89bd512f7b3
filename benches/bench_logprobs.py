"""Log-probability and entropy of ready logits, against copying the logits once.

GB/s: the bytes that the task has to move over the time. Forward reads the logits once, `T V b`
bytes with `b` per logit; forward and backward read them twice and write their gradient, `3 T V b`.
The copy reads and writes, `2 T V b`. `% copy` is the rate over the copy's in the fastest rounds;
`x floor` is the time over the copy's.
"""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benches.measure import Call, compare, peak_bytes
from benches.report import Table
from rlvr_fast.ops.logprobs import logprobs

TOKENS, VOCAB = 1024, 49152
COPY = "floor: copy"

Op = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_ready_logits(
    dtype: torch.dtype, benchmark: BenchmarkFixture, report: Callable[[Table], None]
) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(TOKENS, VOCAB)).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (TOKENS,))
    _check(logits, targets)
    copy = torch.empty_like(logits)
    size = logits.nbytes
    calls = [
        Call(name=COPY, run=lambda: copy.copy_(logits.detach()), work=2 * size),
        Call(name="copy into fresh memory", run=logits.detach().clone, work=2 * size),
        Call(name="logprobs", run=_forward(logprobs, logits, targets), work=size),
        Call(name="torch", run=_forward(plain, logits, targets), work=size),
        Call(name="logprobs, with backward", run=_both(logprobs, logits, targets), work=3 * size),
        Call(name="torch, with backward", run=_both(plain, logits, targets), work=3 * size),
    ]
    timings = compare(calls, floor=COPY, rounds=7, pedantic=benchmark.pedantic)
    rows = [
        timing.row("GB/s")
        | {
            "% copy": 100 * timing.rate / timings[0].rate,
            "MB": peak_bytes(call.run) / 1e6,
        }
        for timing, call in zip(timings, calls, strict=True)
    ]
    title = f"logprobs and entropy of ready logits: T={TOKENS}, V={VOCAB}, {dtype}"
    report(Table(title=title, rows=rows))


def plain(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What one writes first: log_softmax in fp32, gather, `-sum(p log p)`."""
    logp = torch.log_softmax(logits.float(), -1)
    return logp.gather(-1, targets[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def _forward(op: Op, logits: Tensor, targets: Tensor) -> Callable[[], object]:
    @torch.no_grad()
    def call() -> object:
        return op(logits, targets)

    return call


def _both(op: Op, logits: Tensor, targets: Tensor) -> Callable[[], Tensor]:
    """Gradient of the sum of all log-probabilities and entropies."""

    def call() -> Tensor:
        logp, entropy = op(logits, targets)
        return torch.autograd.grad((logp + 0.1 * entropy).sum(), logits)[0]

    return call


def _check(logits: Tensor, targets: Tensor) -> None:
    """Both agree with fp64 to the precision of the logits' dtype, on a few rows."""
    few, chosen = logits.detach()[:16].clone().requires_grad_(), targets[:16]
    exact = few.detach().double().requires_grad_()
    logp = torch.log_softmax(exact, -1)
    outputs = logp.gather(-1, chosen[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)
    truth = [*outputs, torch.autograd.grad((outputs[0] + 0.1 * outputs[1]).sum(), exact)[0]]
    for op in (logprobs, plain):
        found = [*op(few, chosen), _both(op, few, chosen)()]
        for own, true in zip(found, truth, strict=True):
            error = (own.double() - true).norm() / true.norm()
            limit = 16 * torch.finfo(own.dtype).eps
            assert error <= limit, f"{op.__name__}: error {error:.1e}, wanted <= {limit:.1e}"
