"""One batch ahead: made in a thread while the optimiser works on the one before."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from rlvr_fast.collect import Batch


class Ahead:
    """At most one batch in the making. Without `start` everything happens in the caller's thread.

    While a batch is being made the engine is its alone: call `wait` before touching it.
    """

    def __init__(self, make: Callable[[int, int], Batch]) -> None:
        """`make(step, position)` gives a batch."""
        self._make = make
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[Batch] | None = None

    def take(self, step: int, position: int) -> Batch:
        """The batch that was started or put back; else one made now."""
        if self._pending is None:
            return self._make(step, position)
        batch, self._pending = self._pending.result(), None
        return batch

    def start(self, step: int, position: int) -> None:
        """Begins a batch with the engine's present weights."""
        assert self._pending is None
        if self._thread is None:
            # A new thread would otherwise take the environment's number of OpenMP threads.
            threads = torch.get_num_threads()
            self._thread = ThreadPoolExecutor(
                1, "rlvr-fast-ahead", initializer=torch.set_num_threads, initargs=(threads,)
            )
        self._pending = self._thread.submit(self._make, step, position)

    def wait(self) -> Batch | None:
        """The batch that was started, when it is ready; `take` still gives it."""
        return None if self._pending is None else self._pending.result()

    def close(self) -> None:
        """Waits for the batch in the making, if any, and drops it."""
        if self._thread is not None:
            self._thread.shutdown()

    def put_back(self, batch: Batch) -> None:
        """What `wait` gave an earlier process: the next `take` gives it."""
        assert self._pending is None
        self._pending = Future()
        self._pending.set_result(batch)
