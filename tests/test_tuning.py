"""Tuned launch options and budgets: where they come from, and how they are measured."""

import json
import subprocess
import sys
import time

import pytest
import torch

from rlvr_fast import autotune, cli, tuning
from rlvr_fast.autotune import Case

CPU = torch.device("cpu")
NAME = tuning.device_name(CPU)
SMALL = {"BLOCK_V": 1024, "num_warps": 4}


@pytest.fixture(autouse=True)
def user_file(monkeypatch, tmp_path):
    """Nobody's real file takes part."""
    path = tmp_path / "cache" / "tuned.json"
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    tuning.forget()
    yield path
    tuning.forget()


def fused(vocab_size: int = 100_000, dtype: torch.dtype = torch.bfloat16):
    return tuning.row_launch("fused", vocab_size, dtype, CPU)


def test_without_a_file_the_defaults_stand():
    assert fused() == {"BLOCK_V": 4096, "num_warps": 16, "enable_fp_fusion": False}
    assert tuning.logits_budget(CPU, 1024, 100_000, 77) == 77


def test_an_entry_is_for_one_kernel_dtype_and_size_class(user_file):
    tuning.save({NAME: {"fused bfloat16 V<=131072": SMALL}}, user_file)

    assert fused() == fused(65_537) == fused(131_072) == SMALL | {"enable_fp_fusion": False}
    others = [fused(65_536), fused(131_073), fused(dtype=torch.float32)]
    others.append(tuning.row_launch("gradient", 100_000, torch.bfloat16, CPU))
    assert [launch["BLOCK_V"] for launch in others] == [4096] * 4


def test_a_budget_is_for_a_class_of_heads(user_file):
    tuning.save({NAME: {"budget D<=1024 V<=131072": {"logits_budget": 5}}}, user_file)

    heads = [(513, 65_537), (1024, 131_072), (512, 131_072), (1025, 131_072), (1024, 131_073)]
    assert [tuning.logits_budget(CPU, *head, 7) for head in heads] == [5, 5, 7, 7, 7]


def test_the_users_own_entry_comes_before_a_shipped_one(user_file, tmp_path):
    budgets = {f"budget D<=1024 V<={v}": {"logits_budget": v} for v in (1024, 2048)}
    tuning.save({NAME: budgets}, tmp_path / "shipped" / "made_up.json")
    tuning.save({NAME: {"budget D<=1024 V<=1024": {"logits_budget": 5}}}, user_file)

    assert [tuning.logits_budget(CPU, 1024, v, 7) for v in (1024, 2048, 4096)] == [5, 2048, 7]


def test_what_another_device_measured_does_not_count(user_file):
    tuning.save({"NVIDIA H200": {"fused bfloat16 V<=131072": SMALL}}, user_file)

    assert fused()["BLOCK_V"] == 4096


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "wanted JSON that `rlvr-fast tune` wrote"),
        ("[1]", r"wanted entries by device name, got \[1\]"),
        ('{"H200": 3}', "H200: wanted entries by name, got 3"),
        ('{"H200": {"fuse float32 V<=1": {}}}', "H200: fuse float32 V<=1: wanted `KERNEL DTYPE"),
        (
            '{"H200": {"fused float32 V<=1": {"BLOCK_V": 1024}}}',
            "H200: fused float32 V<=1: wanted BLOCK_V and num_warps, got {'BLOCK_V': 1024}",
        ),
        (
            '{"H200": {"fused float32 V<=1": {"BLOCK_V": 1000, "num_warps": 4}}}',
            "fused float32 V<=1: BLOCK_V: wanted a power of two from 128 to 65536, got 1000",
        ),
        (
            '{"H200": {"budget D<=1 V<=1": {"logits_budget": 0}}}',
            "budget D<=1 V<=1: logits_budget: wanted a number from 1 to .*, got 0",
        ),
    ],
)
def test_a_foreign_file_is_named_at_use_with_the_entry(text, message, user_file):
    user_file.parent.mkdir()
    user_file.write_text(text)

    with pytest.raises(ValueError, match=f"{user_file}: .*{message}"):
        fused()
    with pytest.raises(ValueError, match=f"{user_file}: .*{message}"):
        tuning.save({}, user_file)
    assert user_file.read_text() == text


def test_a_look_up_takes_microseconds():
    fused()
    start = time.perf_counter()
    for _ in range(1000):
        fused()
    assert time.perf_counter() - start < 0.05


def test_importing_reads_no_file_and_asks_no_device():
    code = "import rlvr_fast.tuning as t; print(t._entries.cache_info().misses)"
    code += "; import sys; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "False"]


def sleeper() -> float:
    """Takes as many milliseconds as the budget says."""
    return time.sleep(tuning.logits_budget(CPU, 8, 32, 20) / 1000)


BUDGETS = [{"logits_budget": n} for n in (40, 2, 30)]
CASES = [Case("budget D<=8 V<=32", BUDGETS, lambda: sleeper)]


def test_tuning_finds_the_fastest_and_keeps_what_it_read_before(user_file):
    tuning.save({NAME: {"budget D<=8 V<=32": {"logits_budget": 1}}}, user_file)
    lines = []

    found = autotune.tune("cpu", 0.001, progress=lines.append, cases=CASES)

    assert found.table() == {NAME: {"budget D<=8 V<=32": {"logits_budget": 2}}}
    assert lines == ["1 of 1: budget D<=8 V<=32: {'logits_budget': 2}"]
    assert found.markdown().splitlines()[2].startswith("| budget D<=8 V<=32 | logits_budget 2 | 2")
    assert tuning.logits_budget(CPU, 8, 32, 20) == 1


def test_what_is_hardly_faster_does_not_replace_the_default(monkeypatch):
    monkeypatch.setattr(autotune, "GAIN", 3.0)
    case = Case("budget D<=8 V<=32", [{"logits_budget": 15}], lambda: sleeper)

    found = autotune.tune("cpu", 0.001, cases=[case])

    assert found.table() == {NAME: {}}
    assert "| default |" in found.markdown()


@pytest.mark.parametrize(
    ("device", "minutes", "message"),
    [("meta", 1, "device: wanted cpu, or cuda"), ("cpu", 0, "minutes: wanted more than 0, got 0")],
)
def test_tuning_refuses_what_it_cannot_do(device, minutes, message):
    with pytest.raises(ValueError, match=message):
        autotune.tune(device, minutes, cases=[])


def test_every_case_has_an_entry_of_its_own_that_can_be_looked_up():
    cases = [*autotune.cpu_cases(), *autotune.cuda_cases(CPU)]
    table = {NAME: {case.entry: case.candidates[0] for case in cases}}

    assert len(table[NAME]) == len(cases)
    with tuning.using(table):
        assert fused(128_256) == autotune.ROW_LAUNCHES[0] | {"enable_fp_fusion": False}
        assert tuning.logits_budget(CPU, 576, 49_152, 7) == 12 << 20


def test_a_head_is_measured_through_the_op_itself(monkeypatch):
    monkeypatch.setattr(autotune, "CPU_TOKENS", 4)

    d_hidden, d_weight = autotune._head(8, 32)()

    assert (d_hidden.shape, d_weight.shape) == ((4, 8), (32, 8))


def test_the_command_writes_the_table_and_says_where(capsys, monkeypatch, user_file):
    tuning.save({"NVIDIA H200": {}, NAME: {"budget D<=1 V<=1": {"logits_budget": 1}}}, user_file)
    monkeypatch.setattr(autotune, "cpu_cases", lambda: CASES)

    assert cli.main(["tune", "--device", "cpu", "--minutes", "0.001"]) == 0

    shown = capsys.readouterr().out
    assert "| budget D<=8 V<=32 | logits_budget 2 |" in shown
    assert shown.endswith(f"written: {user_file}\n")
    assert json.loads(user_file.read_text()) == {
        "NVIDIA H200": {},
        NAME: {"budget D<=8 V<=32": {"logits_budget": 2}},
    }
    assert [path.name for path in user_file.parent.iterdir()] == ["tuned.json"]
    assert tuning.logits_budget(CPU, 8, 32, 20) == 2


class Launches:
    """In a kernel's place: what it is launched with."""

    def __init__(self):
        self.options = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.options.append(options)


@pytest.mark.parametrize(
    ("kernel", "name"), [("statistics", "logprobs_fwd_kernel"), ("gradient", "logprobs_bwd_kernel")]
)
def test_launchers_take_the_tuned_options(kernel, name, monkeypatch):
    launches = Launches()
    monkeypatch.setattr(f"rlvr_fast.kernels.logprobs.{name}", launches)
    monkeypatch.setattr(autotune, "TILE_BYTES", 4096 * 4)
    run = autotune._rows(kernel, 4096, torch.float32, CPU)

    with tuning.using({NAME: {f"{kernel} float32 V<=4096": SMALL}}):
        run()

    assert launches.options[-1].items() >= SMALL.items()
