"""The process that imports a verifier once and forks one confined child for every completion.

It never runs the verifier on a completion itself and never unpickles what a child says: a child
owns one pipe, on which it may leave one record of fixed size before it is killed. So a completion
can neither reach a later one nor the trainer, and a child that hangs or dies costs one fork.
"""

import gc
import os
import pickle
import signal
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from select import select
from typing import NamedTuple, NoReturn

from rlvr_fast.rewards._sandbox import Limits, confine, has_call_filter

SCORED, UNSCORABLE, RAISED, MEMORY, TIMEOUT, CRASHED = range(6)
NUMBER = struct.Struct("<I")  # leads a request; the pickled (completion, row) follows
REPLY = struct.Struct("<IBd")  # that number, then the record
_RECORD = struct.Struct("<Bd")  # outcome, reward
_RECORD_FD = 3

Verifier = Callable[..., float | None]


class _Child(NamedTuple):
    pid: int
    number: int
    deadline: float  # of time.monotonic()


def serve(descriptor: int, parent: int) -> None:
    """Verify requests from the socket `descriptor` until it closes or process `parent` is gone."""
    connection = Connection(descriptor)
    verifier, warm_up, limits = pickle.loads(connection.recv_bytes())
    if warm_up is not None:
        completion, row = warm_up
        verifier(completion, **row)
    gc.collect()
    gc.freeze()  # else a collection in a child copies every page
    connection.send_bytes(bytes([has_call_filter()]))
    control = connection.fileno()
    children: dict[int, _Child] = {}  # by the readable end of its pipe
    with suppress(EOFError, OSError):
        while os.getppid() == parent:
            for ready in select([control, *children], [], [], _pause(children))[0]:
                if ready == control:
                    _fork(connection.recv_bytes(), verifier, limits, children)
                else:
                    _end(connection, children, ready, os.read(ready, _RECORD.size + 1))
            for late in [fd for fd, child in children.items() if child.deadline < time.monotonic()]:
                _end(connection, children, late, _RECORD.pack(TIMEOUT, 0.0))


def _pause(children: dict[int, _Child]) -> float:
    """Seconds to wait for news: until the next deadline, at most one."""
    soonest = min((child.deadline for child in children.values()), default=float("inf"))
    return min(1.0, max(0.0, soonest - time.monotonic()))


def _fork(request: bytes, verifier: Verifier, limits: Limits, children: dict[int, _Child]) -> None:
    readable, writable = os.pipe()
    deadline = time.monotonic() + limits.seconds
    pid = os.fork()
    if pid == 0:
        _be_child(writable, request, verifier, limits)
    os.close(writable)
    (number,) = NUMBER.unpack_from(request)
    children[readable] = _Child(pid, number, deadline)


def _be_child(record: int, request: bytes, verifier: Verifier, limits: Limits) -> NoReturn:
    try:
        os.dup2(0, 2)  # 0 and 1 are /dev/null already
        os.dup2(record, _RECORD_FD)
        os.closerange(_RECORD_FD + 1, os.sysconf("SC_OPEN_MAX"))
        confine(limits)
        os.write(_RECORD_FD, _RECORD.pack(*_verify(request, verifier)))
    finally:
        os._exit(0)


def _verify(request: bytes, verifier: Verifier) -> tuple[int, float]:
    try:
        completion, row = pickle.loads(request[NUMBER.size :])
        reward = verifier(completion, **row)
        return (UNSCORABLE, 0.0) if reward is None else (SCORED, float(reward))
    except MemoryError:
        return MEMORY, 0.0
    except BaseException:
        return RAISED, 0.0


def _end(connection: Connection, children: dict[int, _Child], fd: int, record: bytes) -> None:
    """Kill a child, whatever it says, and pass its record on if that is a sound one."""
    child = children.pop(fd)
    os.close(fd)
    os.kill(child.pid, signal.SIGKILL)
    os.waitpid(child.pid, 0)
    if len(record) != _RECORD.size or record[0] > TIMEOUT:
        record = _RECORD.pack(CRASHED, 0.0)
    connection.send_bytes(NUMBER.pack(child.number) + record)
