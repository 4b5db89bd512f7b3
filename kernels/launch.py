"""How launchers start a kernel: lines on the log while and when Triton compiled it for seconds."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from triton.runtime.jit import JITFunction

LOG = logging.getLogger("rlvr_fast")

PATIENCE = 0.5
"""Seconds after which a first launch says what it is doing."""

latest: dict[str, Any] = {}
"""By kernel name, the program it ran last, with `n_spills` and `n_regs`; none in the interpreter.
"""
_started: set[Any] = set()


def launch(kernel: Any, programs: int) -> Callable[..., Any]:
    """`kernel[(programs,)]`, which logs that the kernel has to be compiled.

    No hook of Triton's is used: those are one for the whole process, and other people's.
    """

    def run(*args: Any, **options: Any) -> Any:
        key = (kernel, *(getattr(x, "dtype", None) for x in args), *options.items())
        if key in _started or not isinstance(kernel, JITFunction):  # else the interpreter's
            return _run(kernel, programs, args, options)
        _started.add(key)
        notice = threading.Timer(PATIENCE, LOG.info, ["compiling %s ...", kernel.__name__])
        notice.daemon = True
        notice.start()
        try:
            return _run(kernel, programs, args, options)
        finally:
            notice.cancel()

    return run


def _run(kernel: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    start = time.time()
    program = kernel[(programs,)](*args, **options)
    if program is not None and latest.get(program.name) is not program:
        latest[program.name] = program
        _log_compilation(program, start)
    return program


def _log_compilation(program: Any, start: float) -> None:
    files = program.metadata_group.items()
    written = max(Path(path).stat().st_mtime for name, path in files if name.endswith(".json"))
    if written < start:  # found on disk
        return
    target = program.metadata.target
    LOG.info(
        "compiled %s for %s %s in %.1f s; the next process finds it on disk",
        program.name,
        target.backend,
        target.arch,
        time.time() - start,
    )
