"""JSON over HTTP with one vLLM server."""

import json
import os
import socket
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_SECONDS = 3600.0  # For one answer; a batch of long completions takes minutes.


class Unreachable(Exception):
    """Nobody answers, or the answer broke off."""


class Refused(Exception):
    """An answer that is an error; the message is the server's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{message} (HTTP status {status})")
        self.status = status


class Client:
    """A new connection per call, so that threads can share it.

    Args:
        address: `http://host:port` or `https://host:port`, or the path of a Unix socket. Over TCP
            the key in the environment's `VLLM_API_KEY` goes along, if there is one.
    """

    def __init__(self, address: str | Path) -> None:
        self._address = address
        key = os.environ.get("VLLM_API_KEY") if isinstance(address, str) else None
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def get(self, path: str) -> Any:
        """The answer to GET, as `post`."""
        return self._call("GET", path, None)

    def post(self, path: str, body: object = None) -> Any:
        """What the server answers, None for an empty answer.

        Raises:
            Unreachable: without an answer.
            Refused: for an answer that is an error.
        """
        return self._call("POST", path, json.dumps({} if body is None else body))

    def _call(self, method: str, path: str, body: str | None) -> Any:
        connection = self._connection()
        try:
            connection.request(method, path, body, self._headers)
            answer = connection.getresponse()
            text = answer.read().decode()
        except (OSError, HTTPException) as error:
            raise Unreachable(f"{self._address}: {error!r}") from error
        finally:
            connection.close()
        if answer.status != 200:
            raise Refused(answer.status, _message(text))
        return json.loads(text) if text else None

    def _connection(self) -> HTTPConnection:
        if isinstance(self._address, Path):
            return _UnixConnection(self._address)
        parts = urlsplit(self._address)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        return kind(parts.netloc, timeout=_SECONDS)


class _UnixConnection(HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_SECONDS)
        self.sock.connect(str(self._path))


def _message(text: str) -> str:
    """The message of vLLM's error objects, else the text's beginning."""
    try:
        answer = json.loads(text)
    except ValueError:
        return text[:500]
    for key in ("error", "message", "detail"):
        if isinstance(answer, dict) and key in answer:
            answer = answer[key]
    return str(answer)[:2000]
