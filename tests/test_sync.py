"""`policy_loss` on a GPU never waits for it: audited without one, and shown with one."""

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree

from rlvr_fast.objectives import (
    KL3,
    ClippedSurrogate,
    EntropyBonus,
    Objective,
    SequenceClippedSurrogate,
)
from rlvr_fast.ops import policy_rows, vocab_shard
from rlvr_fast.ops.policy_loss import policy_loss
from rlvr_fast.scored import ScoredTokens
from rlvr_fast.tracing.trace import trace

aten = torch.ops.aten
OBJECTIVES = (
    ClippedSurrogate() + KL3(coef=0.1) + EntropyBonus(coef=0.01),
    SequenceClippedSurrogate(),
)
LENGTHS, HIDDEN, VOCAB = [3, 0, 4, 5], 16, 40
NUM_TOKENS = sum(LENGTHS)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class MadeUpDevice(FakeTensorMode):
    """Tensors on it ("meta", says torch) are shapes only; those on the CPU are real.

    `waits` lists what a CUDA device would be waited for. `equal`, and operations whose shapes
    depend on values (`nonzero`, `masked_select`, `unique`), raise by themselves.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = {isinstance(x, FakeTensor) for x in tensors}
        if kwargs.get("device") is not None:
            on_device.add(torch.device(kwargs["device"]).type == "meta")
        if True not in on_device:
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self.waits.append("the host reads a value")
            return 1
        copies = func in (aten._to_copy.default, aten.copy_.default) and False in on_device
        if copies and not (kwargs.get("non_blocking") or any(x is True for x in args)):
            self.waits.append("a copy between host and device, not non_blocking")
        if func is aten.addmm.dtype_out:
            return kwargs["out"]  # torch 2.11's shape rule takes the dtype for beta
        return super().__torch_dispatch__(func, types, args, kwargs)


class NoKernel:
    def __getitem__(self, grid):
        return lambda *arguments, **options: None


@pytest.fixture
def device(monkeypatch):
    """Where the code takes the branches of a CUDA device."""
    traced = trace(OBJECTIVES[0])
    fusible = {OBJECTIVES[0]: traced, OBJECTIVES[1]: None}
    monkeypatch.setattr(policy_rows, "fusible", lambda objective, device: fusible[objective])
    monkeypatch.setattr("rlvr_fast.kernels.policy_loss.policy_loss_kernel", NoKernel())
    monkeypatch.setattr(FakeTensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    with MadeUpDevice() as mode:
        yield mode


def batch(device: str, rewards: bool = False) -> tuple[Tensor, Tensor, ScoredTokens]:
    hidden, weight = (
        torch.randn(n, HIDDEN, device=device, dtype=torch.bfloat16).requires_grad_()
        for n in (NUM_TOKENS, VOCAB)
    )
    floats = torch.ones(NUM_TOKENS, device=device)
    tokens = ScoredTokens(
        targets=torch.zeros(NUM_TOKENS, dtype=torch.int64, device=device),
        weight=floats,
        seq_offsets=torch.tensor([0, *accumulate(LENGTHS)]),
        group_offsets=torch.tensor([0, 2, 4]),
        old_logp=-floats,
        ref_logp=-floats,
        advantage=None if rewards else floats,
        rewards=torch.ones(len(LENGTHS), device=device) if rewards else None,
    )
    return hidden, weight, tokens


def step(
    hidden: Tensor, weight: Tensor, tokens: ScoredTokens, objective: Objective, group: Any = None
) -> Tensor:
    budget = 5 * VOCAB * 4
    loss = policy_loss(
        hidden, weight, tokens, objective, logits_budget=budget, vocab_group=group
    ).loss
    loss.backward()
    return loss


@pytest.mark.parametrize("rewards", [False, True], ids=["advantages", "rewards"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=["one kernel", "two sweeps"])
def test_nothing_waits_for_the_device(device, objective, rewards):
    hidden, weight, tokens = batch("meta", rewards)

    step(hidden, weight, tokens, objective)

    assert device.waits == []
    assert hidden.grad.shape == hidden.shape
    assert weight.grad.shape == weight.shape


def test_the_audit_hears_what_waits(device):
    x = torch.ones(3, device="meta")

    assert float(x.sum()) == 1
    x.copy_(torch.ones(3))
    torch.ones(3).to("meta")
    x.cpu()
    torch.ones(3).to("meta", non_blocking=True)

    assert len(device.waits) == 4
    with pytest.raises(DynamicOutputShapeException):
        x.nonzero()


@needs_gpu
@pytest.mark.parametrize("rewards", [False, True], ids=["advantages", "rewards"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=["one kernel", "two sweeps"])
def test_a_real_device_is_not_waited_for(objective, rewards):
    inputs = batch("cuda", rewards)
    step(*inputs, objective)  # compiles

    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*inputs, objective)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_step_replays_from_a_cuda_graph():
    hidden, weight, tokens = batch("cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(hidden, weight, tokens, OBJECTIVES[0])  # compiles
    torch.cuda.synchronize()
    hidden.grad = weight.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(hidden, weight, tokens, OBJECTIVES[0])

    with torch.no_grad():
        hidden.copy_(torch.randn_like(hidden))
    graph.replay()
    replayed = [x.clone() for x in (loss, hidden.grad, weight.grad)]

    hidden.grad = weight.grad = None
    loss = step(hidden, weight, tokens, OBJECTIVES[0])
    eager = [loss, hidden.grad, weight.grad]
    torch.testing.assert_close(replayed, eager, rtol=2e-2, atol=1e-4)  # another GEMM, perhaps


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["token", "sequence"])
def test_slices_of_the_vocabulary_wait_in_the_first_call_only(device, monkeypatch, objective):
    class Group:
        """Of two ranks with as many rows; what the other one says does not matter to shapes."""

    inputs, group, met = batch("meta"), Group(), []
    for name, answer in (("get_rank", 0), ("get_world_size", 2), ("all_gather", None)):
        monkeypatch.setattr(torch.distributed, name, lambda *a, answer=answer, **k: answer)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, group: None)

    def meet(*arguments):
        met.append(arguments)
        return torch.empty(3, dtype=torch.int64, device="meta"), (0, VOCAB, 2 * VOCAB), 5

    monkeypatch.setattr(vocab_shard, "_met", meet)

    for _ in range(2):
        step(*inputs, objective, group)

    assert len(met) == 1
    assert device.waits == []
