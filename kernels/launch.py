"""How launchers start a kernel: one line on the log when that took seconds because of Triton."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOG = logging.getLogger("rlvr_fast")

latest: dict[str, Any] = {}
"""By kernel name, the program it ran last, with `n_spills` and `n_regs`; none in the interpreter.
"""


def launch(kernel: Any, programs: int) -> Callable[..., Any]:
    """`kernel[(programs,)]`, which logs that the kernel had to be compiled.

    No hook of Triton's is used: those are one for the whole process, and other people's.
    """

    def run(*args: Any, **options: Any) -> Any:
        start = time.time()
        program = kernel[(programs,)](*args, **options)
        if program is not None and latest.get(program.name) is not program:
            latest[program.name] = program
            _log_compilation(program, start)
        return program

    return run


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
