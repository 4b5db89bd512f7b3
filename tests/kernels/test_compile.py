"""Every kernel compiles for GPUs that need not be there: no spills, wide loads, one program."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
PROGRAM = Path(__file__).with_name("compile_all.py")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, list[dict]]:
    """Compiled in processes of their own: in this one Triton may be the interpreter."""
    folder = tmp_path_factory.mktemp("compile")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "RLVR_FAST_CACHE": str(folder / "objectives"),
    }

    def run(architecture: int) -> list[dict]:
        command = [sys.executable, str(PROGRAM), str(architecture)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ARCHITECTURES, pool.map(run, ARCHITECTURES.values()), strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills_registers(compiled, architecture):
    kernels = [line for line in compiled[architecture] if "kernel" in line]
    assert len(kernels) == 19
    assert [line for line in kernels if line["stack"]] == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_loaded_16_bytes_at_a_time(compiled, architecture):
    rows = [line for line in compiled[architecture] if "group" not in line.get("kernel", "group")]
    assert [line for line in rows if not line["wide_loads"]] == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_clipping_does_not_hide_nan(compiled, architecture):
    # The interpreter cannot tell: its minimum keeps NaN whatever the kernel says.
    clipped = [x for x in compiled[architecture] if "Clipped" in x.get("kernel", "")]
    assert clipped
    assert all(line["nan_aware"] == ["max", "min"] for line in clipped)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_lengths_and_values_need_no_other_program(compiled, architecture):
    assert compiled[architecture][-1] == {"recompilations": 0}
