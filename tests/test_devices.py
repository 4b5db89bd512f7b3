"""What the process is asked of its devices."""

import subprocess
import sys

FAULTS = """
import resource, sys, torch
from rlvr_fast.devices import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(8):
    torch.zeros(16, 2**20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.zeros(16, 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 16 * 2**20 * 4 // 4096
"""Of one of those tensors."""


def faults(mode: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, mode], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


def test_a_freed_tensor_leaves_its_pages_to_the_next_one() -> None:
    assert faults("keep") < PAGES / 16 < faults("default")
