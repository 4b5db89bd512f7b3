"""Memory that is kept between calls: on the CPU fresh pages cost more than they look.

A page that the kernel hands out for the first time is zeroed and mapped on first touch, which for
the logits of a tile takes a third of the time of the GEMM that fills them. CUDA has its own caching
allocator, so there everything here is plain `torch.empty`.
"""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_kept = threading.local()


def workspace(name: str, size: int, device: torch.device) -> Tensor:
    """At least `size` bytes of scratch memory; the next call with the same name overwrites it."""
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.uint8, device=device)
    buffers: dict[str, Tensor] = _kept.__dict__.setdefault("buffers", {})
    if name not in buffers or buffers[name].numel() < size:
        buffers.pop(name, None)
        buffers[name] = torch.empty(size, dtype=torch.uint8)
    return buffers[name]


def scratch(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`workspace` as a contiguous tensor."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return workspace(name, size, device)[:size].view(dtype).view(*shape)


def recycled(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised result for the caller to keep.

    Its memory is that of the last result of this name, if nobody holds that any more: a training
    loop that drops its gradients finds their pages again.
    """
    if device.type != "cpu":
        return torch.empty(*shape, dtype=dtype, device=device)
    results: dict[str, torch.UntypedStorage] = _kept.__dict__.setdefault("results", {})
    size = torch.Size(shape).numel() * dtype.itemsize
    last = results.get(name)
    if last is None or last.nbytes() != size or _holders(last) > 1:
        results.pop(name, None)
        del last
        results[name] = torch.empty(size, dtype=torch.uint8).untyped_storage()
    found: Tensor = torch.empty(0, dtype=dtype)
    found.set_(results[name], 0, torch.Size(shape))  # type: ignore[call-overload]
    return found


def release_workspace() -> None:
    """Gives all of this thread's kept memory back.

    At most `logits_budget` bytes, an fp32 `[V, D]`, copies of the weight in other dtypes, and one
    gradient of the weight.
    """
    _kept.__dict__.clear()


def _holders(storage: torch.UntypedStorage) -> int:
    """Tensors and Python objects that keep this memory alive; ours is one."""
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count
