"""A pool of killable, confined processes for verifiers, since text from a model is hostile.

Third-party verifiers hand what a model wrote to `eval` (sympy's parser does), to regular
expressions and to arithmetic without bounds. Here every completion is verified in a process of its
own: a fork of a worker that has imported the verifier, which gives up its rights first
(`_sandbox.py`) and is killed afterwards (`_server.py`). The worker is started with `exec`, never
forked from the trainer, and does not run `rlvr_fast/__init__.py`, so that it stays free of torch.

Pools of other libraries (pebble, concurrent.futures) keep a process for many items, so that one
completion can change how the next is judged, and unpickle its answer in the trainer.
"""

import inspect
import math
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

from rlvr_fast.rewards import Completion, completion_text
from rlvr_fast.rewards._sandbox import Limits as Limits
from rlvr_fast.rewards._server import (
    CRASHED,
    MEMORY,
    NUMBER,
    RAISED,
    REPLY,
    TIMEOUT,
    UNSCORABLE,
    Verifier,
)

Row: TypeAlias = Mapping[str, Any]

_REASONS = {RAISED: "raised", MEMORY: "out of memory", TIMEOUT: "timeout", CRASHED: "crashed"}
_STARTUP_SECONDS = 60

# The package stands in for itself, not yet executed, until somebody asks it for a name.
_BOOTSTRAP = """\
import sys
sys.path[:] = {path!r}
from importlib import util
package = sys.modules["rlvr_fast"] = util.module_from_spec(util.find_spec("rlvr_fast"))
def execute(name):
    del package.__getattr__
    package.__spec__.loader.exec_module(package)
    return getattr(package, name)
package.__getattr__ = execute
from rlvr_fast.rewards._server import serve
serve({descriptor}, {parent})
"""


class VerifierPool:
    """A reward function: `verifier(completion, **row) -> float | None` in killable workers.

    A completion that is too long, runs out of time or memory, ends its process, makes the verifier
    raise or earns no finite number scores 0.0 and is counted in `failures`, by reason; the others
    are unaffected. Equal completions of equal rows are verified once a batch. The worker starts
    with the first batch and serves all later ones; it ends with `close()`, with the pool, and with
    the process that owns the pool, however that ends.
    """

    def __init__(
        self,
        verifier: Verifier,
        limits: Limits | None = None,
        *,
        workers: int | None = None,
        warm_up: tuple[str, Row] | None = None,
    ) -> None:
        """Nothing is started yet.

        Args:
            verifier: picklable, so a function or object at the top level of a module. It gets the
                text of one completion and, by name, the columns that it has parameters for.
            limits: of one completion.
            workers: completions verified at the same time; by default one per CPU, at most 8.
            warm_up: a harmless completion and its row, verified once when the worker starts, so
                that what the verifier loads late is there before the first fork.

        Raises:
            ValueError: for a verifier that a worker could not import.
            RuntimeError: on anything but Linux.
        """
        if sys.platform != "linux":
            raise RuntimeError(f"VerifierPool needs Linux to confine verifiers, got {sys.platform}")
        self.failures: Counter[str] = Counter()
        self.__name__ = getattr(verifier, "__name__", type(verifier).__name__)  # TRL logs it
        self._limits = limits or Limits()
        self._workers = workers or min(8, len(os.sched_getaffinity(0)))
        self._parameters = list(inspect.signature(verifier).parameters.values())[1:]
        self._start_message = _pickled(verifier, warm_up, self._limits)
        self._worker: _Worker | None = None
        self._lock = threading.Lock()

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any
    ) -> list[float | None]:
        """Rewards `[S]` of completions `[S]`; every column that the verifier reads is `[S]`.

        Raises:
            ValueError: for a missing column, or one of another length.
            RuntimeError: if the worker does not start, or is lost twice within the batch.
        """
        read = {name: columns[name] for name in self._columns_read(columns)}
        rows = [dict(zip(read, row, strict=True)) for row in zip(*read.values(), strict=True)]
        texts = [completion_text(completion) for completion in completions]
        return self.verify(texts, rows if read else [{}] * len(texts))

    def verify(self, completions: Sequence[str], rows: Sequence[Row]) -> list[float | None]:
        """The same from one mapping of the verifier's arguments per completion, `[S]`."""
        places: dict[bytes, list[int]] = {}
        for place, item in enumerate(zip(completions, rows, strict=True)):
            if len(item[0]) <= self._limits.characters:
                places.setdefault(pickle.dumps(item), []).append(place)
            else:
                self._count("too long", 1)
        rewards: list[float | None] = [0.0] * len(completions)
        with self._lock:
            judgements = self._exchange(list(places))
            for (outcome, reward), equals in zip(judgements, places.values(), strict=True):
                judged = self._judged(outcome, reward, len(equals))
                for place in equals:
                    rewards[place] = judged
        return rewards

    def close(self) -> None:
        """Stop the worker. A later batch starts a new one."""
        if self._worker is not None:
            self._worker.stop()
            self._worker = None

    def __enter__(self) -> "VerifierPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _columns_read(self, columns: Mapping[str, Any]) -> list[str]:
        if any(p.kind is p.VAR_KEYWORD for p in self._parameters):
            return list(columns)
        needed = [p.name for p in self._parameters if p.default is p.empty]
        if not columns.keys() >= set(needed):
            raise ValueError(f"{self.__name__} needs columns {needed}, got {sorted(columns)}")
        return [p.name for p in self._parameters if p.name in columns]

    def _exchange(self, batch: list[bytes]) -> list[tuple[int, float]]:
        """Outcome and reward of each pickled completion and row."""
        judgements = [(CRASHED, 0.0)] * len(batch)
        todo, pending = deque(range(len(batch))), set[int]()
        losses = 0
        try:
            while todo or pending:
                worker = self._worker = self._worker or _Worker(self._start_message, self._limits)
                try:
                    while todo and len(pending) < self._workers:
                        pending.add(number := todo.popleft())
                        worker.send(number, batch[number])
                    number, outcome, reward = worker.receive()
                except (EOFError, OSError) as error:
                    losses += 1
                    if losses > 1:
                        raise RuntimeError("a verifier worker was lost twice in a batch") from error
                    self._count("worker lost", 1)
                    self.close()
                    todo.extendleft(pending)
                    pending.clear()
                else:
                    pending.remove(number)
                    judgements[number] = outcome, reward
        finally:
            if pending:
                self.close()  # its late answers would be taken for those of the next batch
        return judgements

    def _judged(self, outcome: int, reward: float, times: int) -> float | None:
        if outcome == UNSCORABLE:
            return None
        reason = _REASONS.get(outcome, "" if math.isfinite(reward) else "not finite")
        self._count(reason, times if reason else 0)
        return 0.0 if reason else reward

    def _count(self, reason: str, times: int) -> None:
        if times:
            self.failures[reason] += times


class _Worker:
    """The server process of a pool and the socket to it; every wait for it has an end."""

    def __init__(self, start_message: bytes, limits: Limits) -> None:
        ours, theirs = socket.socketpair()
        patience = struct.pack("ll", _STARTUP_SECONDS + math.ceil(limits.seconds), 0)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, patience)
        self._connection = Connection(ours.detach())
        with theirs:
            self._process = _started(theirs.fileno())
        self.stop = weakref.finalize(self, _stop, self._process, self._connection)
        try:
            self._connection.send_bytes(start_message)
            (has_call_filter,) = self._connection.recv_bytes()
        except (EOFError, OSError) as error:
            self.stop()
            raise RuntimeError("a verifier worker did not start; stderr says why") from error
        if not has_call_filter:
            warnings.warn("verifiers run without a system call filter here", stacklevel=2)

    def send(self, number: int, item: bytes) -> None:
        self._connection.send_bytes(NUMBER.pack(number) + item)

    def receive(self) -> tuple[int, int, float]:
        number, outcome, reward = REPLY.unpack(self._connection.recv_bytes())
        return number, outcome, reward


def _started(descriptor: int) -> subprocess.Popen[bytes]:
    code = _BOOTSTRAP.format(path=sys.path, descriptor=descriptor, parent=os.getpid())
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a fork keeps only one
    return subprocess.Popen(
        [sys.executable, "-c", code],
        pass_fds=[descriptor],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, **one_thread, "PYTHONHASHSEED": "0"},
        start_new_session=True,  # Ctrl-C is the trainer's business
    )


def _stop(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    process.kill()
    process.wait()


def _pickled(verifier: Verifier, warm_up: tuple[str, Row] | None, limits: Limits) -> bytes:
    wanted = "a verifier must be picklable, from the top level of a module other than __main__"
    try:
        message = pickle.dumps((verifier, warm_up, limits))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(f"{wanted}, got {verifier!r}") from error
    if b"__main__" in message:
        raise ValueError(f"{wanted}, got {verifier!r}")
    return message
