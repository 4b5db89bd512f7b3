"""What vLLM changes in the process it runs in, put back as far as it can be.

Its CPU build replaces `torch.set_num_threads` by nothing and torch's streams and events by
stand-ins; starting it seeds the random numbers of Python, NumPy and torch, sets environment
variables that every later subprocess inherits, and makes a process group. Only the stand-ins, which
a process without CUDA has no other use for, and the process group stay while the engine lives; they
go with it. On a machine with several memory nodes vLLM also binds the process to one, for good.
"""

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

_REPLACED: list[tuple[Any, str]] = [
    (torch, "Event"),
    *[(torch.cuda, name) for name in ("Event", "Stream", "set_stream", "current_stream", "stream")],
    *[(torch.accelerator, name) for name in ("synchronize", "empty_cache", "get_memory_info")],
    (torch.Tensor, "pin_memory"),
    (torch.Tensor, "record_stream"),
]


@dataclass
class _Process:
    engine: bool = False
    had_group: bool = False
    originals: list[Any] = field(default_factory=list)


_process = _Process()


@contextmanager
def starting(environment: Mapping[str, str]) -> Iterator[None]:
    """The engine is made within, with these environment variables.

    Raises:
        RuntimeError: while there is one. vLLM's groups are the process's: the first engine to go
            would take them from the other.
    """
    if _process.engine:
        raise RuntimeError("vLLM runs once in a process: close the other engine first")
    before, threads = dict(os.environ), torch.get_num_threads()
    set_num_threads = torch.set_num_threads
    _process.engine, _process.had_group = True, torch.distributed.is_initialized()
    _process.originals = [getattr(owner, name) for owner, name in _REPLACED]
    os.environ.update(environment)
    try:
        with _keeping_random_numbers():
            yield
    except BaseException:
        _stopped()
        raise
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        _restore(before, environment)


@contextmanager
def generating() -> Iterator[None]:
    """vLLM's sampler draws within, also from the global random numbers; they stay as they are.

    So does the environment, in which torch's compiler leaves a variable when vLLM first uses it.
    """
    before = dict(os.environ)
    try:
        with _keeping_random_numbers():
            yield
    finally:
        _restore(before, {})


@contextmanager
def stopping() -> Iterator[None]:
    """The engine is shut down within, and with it goes what it needed of the process.

    vLLM would end a process group that was there before, as under torchrun, too.
    """
    destroy = torch.distributed.destroy_process_group

    def destroy_given(group: torch.distributed.ProcessGroup | None = None) -> None:
        if group is not None:
            destroy(group)

    if _process.had_group:
        torch.distributed.destroy_process_group = destroy_given
    try:
        yield
    finally:
        torch.distributed.destroy_process_group = destroy
        _stopped()


def _stopped() -> None:
    _process.engine = False
    for (owner, name), original in zip(_REPLACED, _process.originals, strict=True):
        setattr(owner, name, original)
    if torch.distributed.is_initialized() and not _process.had_group:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()


@contextmanager
def _keeping_random_numbers() -> Iterator[None]:
    """All global generators are afterwards as before."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(_devices()):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _devices() -> list[int]:
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


def _restore(before: Mapping[str, str], ours: Mapping[str, str]) -> None:
    for name in set(os.environ) - set(before):
        # vLLM reads its own variables again later.
        if name in ours or not name.startswith("VLLM_"):
            del os.environ[name]
    os.environ.update(before)
