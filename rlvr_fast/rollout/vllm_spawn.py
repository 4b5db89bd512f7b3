"""A vLLM server of our own, which ends with this process at the latest."""

import json
import os
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlvr_fast.rollout import vllm_guard
from rlvr_fast.rollout.vllm_client import Client, Refused, Unreachable

_LOG_LINES = 30
_PATIENCE = 20.0  # Seconds from a server's last word to its end.


class Server:
    """Starts at once; `wait` until it answers.

    It listens on a Unix socket in a folder that only this user can enter. `stop` ends it, and so
    does the end of this process, however that comes.

    Args:
        folder: for the socket and the log; it goes with the server.
        arguments: of vLLM, by their names in Python.
        environment: variables of the server besides this process's own.
    """

    def __init__(
        self, folder: Path, arguments: Mapping[str, Any], environment: Mapping[str, str]
    ) -> None:
        self._log = folder / "log"
        socket = folder / "socket"
        command = [
            *(sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"),
            *flags({**arguments, "uds": str(socket)}),
        ]
        guard = [sys.executable, "-P", vllm_guard.__file__, str(os.getpid()), str(folder)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*guard, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,  # Ctrl-C is the trainer's business.
            )
        self.pid = self._process.pid
        self.client = Client(socket)
        self.stop = weakref.finalize(self, _stop, self._process, folder)

    def wait(self, seconds: float) -> None:
        """Returns when the server answers.

        Raises:
            RuntimeError: if it ends before, or the time is over.
        """
        last = time.monotonic() + seconds
        while True:
            try:
                self.client.get("/health")
            except Refused as error:
                raise RuntimeError(f"the vLLM server is not well: {error}") from error
            except Unreachable:
                if (end := self.end()) or time.monotonic() > last:
                    raise RuntimeError(
                        end or f"the vLLM server did not answer within {seconds} s; {self.log()}"
                    ) from None
                time.sleep(0.1)
            else:
                return

    def end(self) -> str:
        """How the server ended, with the end of its log; empty while it lives."""
        status = self._process.poll()
        if status is None:
            return ""
        return f"the vLLM server ended with status {status}; {self.log()}"

    def wait_end(self) -> str:
        """The same for a server that answers no more, once it is gone."""
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            return f"the vLLM server does not answer; {self.log()}"
        return self.end()

    def log(self) -> str:
        """The end of the log."""
        try:
            lines = self._log.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return "its log is gone"
        return "\n".join(["its log ends with", *lines[-_LOG_LINES:]])


def flags(arguments: Mapping[str, Any]) -> Iterator[str]:
    """Command-line words for arguments of vLLM."""
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        else:
            yield f"--{flag}"
            yield json.dumps(value) if isinstance(value, dict) else str(value)


def _stop(process: "subprocess.Popen[bytes]", folder: Path) -> None:
    process.terminate()
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)
