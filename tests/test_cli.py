import json
from dataclasses import fields

import pytest

from rlvr_fast import cli
from rlvr_fast.config import EvalConfig, TrainConfig
from rlvr_fast.methods import METHODS
from rlvr_fast.trainer import Trainer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian tiny", "unknown command trian; the nearest is train"),
        ("train", "train: wanted the name of a config, a TOML file or --resume RUN"),
        ("train huge", "config: wanted a TOML file or one of addition, "),
        ("train no/such.toml", "config: wanted a TOML file or one of"),
        ("train tiny --stpes 3", "unknown config field stpes; the nearest is steps"),
        ("train tiny --steps", "steps: wanted a value after --steps, got nothing"),
        ("train tiny --steps none", "steps: wanted int, got 'none'"),
        ("train tiny --steps 0", "steps: wanted >= 1, got 0"),
        ("train tiny stray", "arguments: wanted --field value, got stray"),
        ("train tiny --task subtraction", "task must be"),
        ("train tiny --task_options.hihg 9", "options of task addition must be among"),
        ("train tiny --method ppp", "unknown method ppp; the nearest is"),
        ("train tiny --method_options.clip 1", "unknown option of method grpo clip"),
        ("train tiny --model nowhere", "model: wanted a folder"),
        ("train --resume nowhere", "run: wanted a folder with a config.json, got nowhere"),
        ("eval --task addition", "eval: wanted a model folder, hub id or name first"),
        ("eval tiny", "task: wanted a value, got nothing"),
        ("eval tiny --task addition --k x", "k: wanted numbers like 1,4,16, got 'x'"),
        ("model", "rlvr-fast model: the following arguments are required: name"),
        ("model huge", "model: wanted a folder"),
        ("methods all of", "methods: wanted at most one name, got all of"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(
    arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)

    code = cli.main(arguments.split())

    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith(f"rlvr-fast: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("command", "kind"), [("train", TrainConfig), ("eval", EvalConfig)])
def test_help_shows_every_field(command, kind, capsys):
    assert cli.main([command, "--help"]) == 0

    shown = capsys.readouterr().out
    assert [field.name for field in fields(kind) if f"  --{field.name}\n" not in shown] == []


def test_help_names_every_command(capsys):
    assert cli.main([]) == 0

    shown = capsys.readouterr().out
    assert all(f"rlvr-fast {command}" in shown for command in cli.COMMANDS)


def test_methods_are_listed_with_a_line_each(capsys):
    assert cli.main(["methods"]) == 0

    *lines, _, _ = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(METHODS)
    marked = [line.split()[0] for line in lines if line.split()[1] == "*"]
    assert marked == [name for name, kind in METHODS.items() if kind.paper.reconstructed]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_shown_with_its_source_and_every_option(name, capsys):
    assert cli.main(["methods", name]) == 0

    shown = capsys.readouterr().out
    assert f"Source: {METHODS[name].paper.source}" in shown
    options = [field.name for field in fields(METHODS[name]) if field.init]
    assert [each for each in options if f"--method_options.{each}: " not in shown] == []


def test_training_shows_its_config_first_and_its_result_last(capsys, tmp_path):
    run = tmp_path / "run"

    code = cli.main(["train", "tiny", "--run_folder", str(run), "--steps=2"])

    first, *_, greedy, sampled, model, everything = capsys.readouterr().out.splitlines()
    assert code == 0
    assert first.split() == ["model", "tiny"]
    assert greedy.startswith("greedy reward on 25 training prompts, before and after: 0.")
    assert sampled.startswith("mean sampled reward, first and last step: 0.")
    assert model == f"model: {run}/model"
    assert everything == f"metrics, completions, checkpoints: {run}"


def test_ctrl_c_is_one_line_that_says_how_to_go_on(capsys, tmp_path, monkeypatch):
    run, step = tmp_path / "run", Trainer.step

    def interrupted(self, number):
        if number == 3:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        code = cli.main(["train", "tiny", "--run_folder", str(run), "--steps", "4"])

    line = capsys.readouterr().err.splitlines()[-1]
    assert code == 130
    assert line == f"rlvr-fast: interrupted; go on with: rlvr-fast train --resume {run}"
    assert cli.main(["train", "--resume", str(run), "--log_completions", "3"]) == 0
    assert "changed on resume: log_completions: 8 -> 3" in capsys.readouterr().out


def test_eval_shows_and_writes_json(capsys, tmp_path):
    output = tmp_path / "result.json"
    arguments = "--task addition --task_options.chat false --max_completion_tokens 1 --prompts 2"

    code = cli.main(["eval", "tiny", *arguments.split(), "--n", "2", "--output", str(output)])

    assert code == 0
    assert json.loads(capsys.readouterr().out) == json.loads(output.read_text())


def test_model_writes_a_folder_and_shows_where(capsys, tmp_path):
    assert cli.main(["model", "tiny", "--folder", str(tmp_path / "tiny")]) == 0

    assert capsys.readouterr().out == f"{tmp_path}/tiny\n"
    assert (tmp_path / "tiny" / "config.json").exists()


def test_bench_needs_the_source_checkout(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli.bench, "__file__", str(tmp_path / "rlvr_fast" / "cli" / "bench.py"))

    assert cli.main(["bench"]) == 2
    assert capsys.readouterr().err.startswith("rlvr-fast: bench: wanted the source checkout")
