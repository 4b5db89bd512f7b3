"""Keeps a server that belongs to another process: `vllm_guard.py PID FOLDER COMMAND...`.

Run as a program, so that it outlives the process PID, which may be killed without notice. It starts
COMMAND in a session of its own and stops everything in that session when it gets SIGTERM, when the
command ends, or when PID is no longer its parent; then it removes FOLDER, too. vLLM's own helpers
would go on without their server.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from types import FrameType

_EVERY, _GRACE = 0.2, 10.0  # Seconds.


class _Stop(Exception):
    pass


def main() -> int:
    """Exit status of the command, 128 and the signal's number for one; 0 if stopped from here."""
    parent, folder, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    signal.signal(signal.SIGTERM, _raise)
    status = 0
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        while os.getppid() == parent and server.poll() is None:
            time.sleep(_EVERY)
        status = server.returncode or 0
        status = 128 - status if status < 0 else status
    except _Stop:
        pass
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _end(server)
    if os.getppid() != parent:
        shutil.rmtree(folder, ignore_errors=True)
    return status


def _raise(number: int, frame: FrameType | None) -> None:
    raise _Stop


def _end(server: "subprocess.Popen[bytes]") -> None:
    """No process of the server's session is left."""
    if server.poll() is None:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(_GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


if __name__ == "__main__":
    sys.exit(main())
