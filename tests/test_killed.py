"""A run that is killed at any moment, and resumed, ends in the same bits as one that was not."""

import json
import random
import subprocess
import sys

import pytest
from safetensors.torch import load_file

STEPS = 6
PIPELINED = {"pipeline": True, "mismatch_correction": "token_truncate"}
KINDS = {"in turn": {}, "pipelined": PIPELINED}
MOMENTS = [random.Random(seed).random() for seed in range(5)]
"""Shares of the time that a whole run takes."""

SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
from rlvr_fast import cli, run

def start(arguments):
    pid = os.fork()  # After the imports, before torch has started a thread.
    if pid == 0:
        os._exit(cli.main(arguments))
    return pid

def train(folder, fields):
    return ["train", "tiny", "--run_folder", folder, *(f"--{k}={v}" for k, v in fields.items())]

for folder, fields, moments in json.loads(sys.argv[1]):
    begin = time.perf_counter()
    assert os.waitpid(start(train(f"{folder}/whole", fields)), 0)[1] == 0
    whole = time.perf_counter() - begin
    for i, moment in enumerate(moments):
        pid = start(train(f"{folder}/{i}", fields))
        time.sleep(moment * whole)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        written = Path(f"{folder}/{i}/config.json").exists()
        again = ["train", "--resume", f"{folder}/{i}"]
        again = again if written else train(f"{folder}/{i}", fields)
        assert os.waitpid(start(again), 0)[1] == 0
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By kind: a folder with `whole` and with a run for each moment."""
    folders = {kind: tmp_path_factory.mktemp("killed") for kind in KINDS}
    fields = {"steps": STEPS, "method": "grpo", "updates_per_batch": 2, "schedule": "linear",
              "checkpoint_every": 2, "trackers": "none"}  # fmt: skip
    work = [(str(folders[kind]), fields | own, MOMENTS) for kind, own in KINDS.items()]
    command = [sys.executable, "-c", SCRIPT, json.dumps(work)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folders


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moment", range(len(MOMENTS)))
def test_killed_at_a_random_moment_it_ends_in_the_same_weights(kind, moment, runs):
    found, wanted = runs[kind] / str(moment), runs[kind] / "whole"

    for name in ("model", "optimizer"):
        file = f"checkpoints/step-{STEPS:06d}/{name}.safetensors"
        mine, theirs = load_file(found / file), load_file(wanted / file)
        assert mine.keys() == theirs.keys()
        assert all(mine[key].equal(theirs[key]) for key in mine)
    texts = [(run / "completions.jsonl").read_text() for run in (found, wanted)]
    assert texts[0] == texts[1]


def test_pipelined_runs_are_other_runs(runs):
    files = [runs[kind] / "whole" / "completions.jsonl" for kind in KINDS]

    first, second = (file.read_text().splitlines() for file in files)

    assert first[:8] == second[:8]
    assert first[-8:] != second[-8:]
