"""Fixtures of every test: Triton's interpreter without a GPU, poisoned memory, one tolerance."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Nobody's own measurements reach the tests.
os.environ["RLVR_FAST_TUNED"] = "/nonexistent/tuned.json"

# Two threads on a busy machine wait milliseconds for each other at every small op.
torch.set_num_threads(1)

Precise = Callable[[Tensor, Tensor, Tensor], None]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` and its kin return NaN, so that nothing may rely on what lies in memory."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(x: Tensor) -> Tensor:
        if x.dtype == torch.uint8:
            return x.fill_(255)  # bytes of a workspace: NaN in every floating point dtype
        # One that already requires a gradient, as torch's checkpointing makes, is nobody's memory.
        return x.fill_(torch.nan) if x.is_floating_point() and not x.requires_grad else x

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A test may set any number of threads: the next one has one again."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def as_exact_as_torch() -> Precise:
    """The one tolerance: error against fp64 at most twice plain torch's own, plus a few eps."""

    def check(ours: Tensor, plain: Tensor, truth: Tensor) -> None:
        assert ours.shape == truth.shape
        assert torch.isfinite(ours).all()
        scale = truth.double().norm() + 1e-30
        error, allowed = ((x.double() - truth.double()).norm() / scale for x in (ours, plain))
        eps = torch.finfo(ours.dtype).eps
        assert error <= 2 * allowed + 4 * eps, f"relative error {error:.2e}, torch's {allowed:.2e}"

    return check
