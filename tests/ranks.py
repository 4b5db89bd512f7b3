"""Two processes of a run on this machine, as torchrun would start them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from rlvr_fast import models


def run_two(script: str, folder: Path) -> list[Path]:
    """Runs `script OUT` as ranks 0 and 1; the two files that they were told to write."""
    models.resolve("tiny")  # Or both would write it.
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = {
        "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    outs = [folder / f"{rank}.pt" for rank in range(2)]
    running = [
        subprocess.Popen(
            [sys.executable, script, str(out)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, out in enumerate(outs)
    ]
    try:
        assert [each.wait(timeout=180) for each in running] == [0, 0]
    finally:
        for each in running:
            each.kill()
    return outs
