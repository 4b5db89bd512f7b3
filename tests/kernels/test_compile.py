"""Every kernel compiles for GPUs that need not be there: no spills, wide accesses, one program."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
WIDE_LOOPS = {
    "logprobs_fwd_kernel": ["load"],
    "logprobs_bwd_kernel": ["load store", "store"],
    "policy_loss_kernel": ["load", "load store", "store"],
    "divergence_kernel": ["load", "load store"],
    "token_statistics_fwd_kernel": ["load"],
    "token_statistics_bwd_kernel": ["load store"],
}
"""The sweeps of a row; a lone store fills rows without a gradient."""
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

    with ThreadPoolExecutor(len(ARCHITECTURES)) as pool:
        return dict(zip(ARCHITECTURES, pool.map(run, ARCHITECTURES.values()), strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills_registers(compiled, architecture):
    kernels = [line for line in compiled[architecture] if "kernel" in line]
    of_methods = [line for line in kernels if " of method " in line["kernel"]]
    assert len(kernels) - len(of_methods) == 36
    assert len(of_methods) == 0 or len(of_methods) > 15
    assert [line for line in kernels if line["stack"] or line["spills"]] == []


def test_the_methods_objectives_were_compiled_for_one_of_them(compiled):
    lines = [line for line in compiled["sm_90"] if " of method " in line.get("kernel", "")]
    assert len(lines) > 15


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_loaded_and_gradients_stored_16_bytes_at_a_time(compiled, architecture):
    kernels = [line for line in compiled[architecture] if "kernel" in line]
    wanted = [WIDE_LOOPS.get(line["kernel"].split(" ")[0], []) for line in kernels]
    pairs = zip(kernels, wanted, strict=True)
    assert [line for line, loops in pairs if line["wide_loops"] != loops] == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_clipping_does_not_hide_nan(compiled, architecture):
    # The interpreter cannot tell: its minimum keeps NaN whatever the kernel says.
    clipped = [x for x in compiled[architecture] if "Clipped" in x.get("kernel", "")]
    assert clipped
    assert all(line["nan_aware"] == ["max", "min"] for line in clipped)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_lengths_and_values_need_no_other_program(compiled, architecture):
    assert compiled[architecture][-2] == {"recompilations": 0}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_log_says_when_a_kernel_had_to_be_compiled(compiled, architecture):
    before, after = compiled[architecture][-1]["messages"]
    target = f"cuda {ARCHITECTURES[architecture]}"
    assert before == "compiling group_advantages_kernel ..."
    assert re.fullmatch(rf"compiled group_advantages_kernel for {target} in \d+\.\d s; .*", after)
