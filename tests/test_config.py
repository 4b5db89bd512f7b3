from dataclasses import fields

import pytest

from rlvr_fast import config, options
from rlvr_fast.config import EvalConfig, Schedule, TrainConfig

REQUIRED = {"model": "tiny", "task": "addition", "method": "grpo", "run_folder": "somewhere"}


@pytest.mark.parametrize("kind", [TrainConfig, EvalConfig])
def test_every_field_is_documented(kind):
    assert list(options.document(kind)) == [field.name for field in fields(kind)]


@pytest.mark.parametrize("name", sorted(path.stem for path in config.SHIPPED.glob("*.toml")))
def test_a_shipped_config_loads_by_name_and_by_path(name):
    by_path = config.load(str(config.SHIPPED / f"{name}.toml"))

    assert config.load(name) == by_path


def test_a_missing_config_lists_the_shipped_ones():
    with pytest.raises(FileNotFoundError, match=r"one of addition, .*, tiny, .*, got huge$"):
        config.load("huge")


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(ValueError, match=r"^unknown config field stpes; the nearest is steps$"):
        config.load("tiny", {"stpes": "3"})


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match=r"^model: wanted a value, got nothing$"):
        config.from_values({"task": "addition", "run_folder": "somewhere"})


def test_a_file_that_is_no_toml_is_named(tmp_path):
    broken = tmp_path / "broken.toml"
    broken.write_text("steps = = 3")

    with pytest.raises(ValueError, match=r"broken.toml: wanted TOML, got"):
        config.load(str(broken))


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("steps", 0, ">= 1"),
        ("logits_budget", 0, ">= 1"),
        ("seed", -1, ">= 0"),
        ("seed", 2**32, r"< 2\*\*32"),
        ("learning_rate", "nan", ">= 0 and finite"),
        ("temperature", 0.0, "> 0 and finite"),
        ("adam_beta2", 1.0, r"in \[0, 1\)"),
        ("warmup_steps", 101, "<= steps, 100"),
        ("schedule", "step", "constant | linear | cosine"),
        ("engine", "sglang", "auto | embedded | vllm | vllm-server"),
        ("overlong_buffer", "3000", "<= max_completion_tokens, 256"),
        ("device", "tpu", "auto, cpu, cuda or cuda:N"),
        ("model", "", "a name"),
    ],
)
def test_an_impossible_value_names_field_wanted_and_got(field, value, wanted):
    with pytest.raises(ValueError, match=f"^{field}: wanted {wanted}.*, got "):
        config.from_values(REQUIRED, {field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", "many"), ("steps", 1.5), ("seed", True), ("share_prompts", "yes"), ("model", 3)],
)
def test_a_value_of_another_type_is_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field}: wanted (int|bool|str), got "):
        config.from_values(REQUIRED, {field: value})


def test_text_is_read_as_the_type_of_its_field():
    given = {
        "steps": "7",
        "learning_rate": "1",
        "share_prompts": "false",
        "schedule": "cosine",
        "logits_budget": "none",
        "system_prompt": "3",
        "task_options.high": "30",
        "task_options.template": "{a} and {b}",
    }

    read = config.from_values(REQUIRED, given)

    assert read == TrainConfig(
        **REQUIRED,
        steps=7,
        learning_rate=1.0,
        share_prompts=False,
        schedule=Schedule.COSINE,
        system_prompt="3",
        task_options={"high": 30, "template": "{a} and {b}"},
    )


def test_an_override_of_one_table_entry_keeps_the_others():
    read = config.load("tiny", {"task_options.high": 3})

    assert read.task_options == {**config.load("tiny").task_options, "high": 3}


def test_values_survive_the_way_to_json_and_back():
    original = config.load("tiny", {"schedule": "linear", "eval_prompts": 5})

    assert config.from_values(config.to_values(original)) == original


def test_the_default_run_folder_is_the_first_free_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny-1").mkdir(parents=True)

    assert config.load("tiny").run_folder == "runs/tiny-2"


def test_what_may_change_on_resume_are_fields():
    assert {field.name for field in fields(TrainConfig)} >= config.FREE_ON_RESUME


def test_a_field_without_a_value_is_named():
    with pytest.raises(ValueError, match=r"^steps: wanted a value after --steps, got nothing$"):
        options.parse("config field", TrainConfig, ["--seed=3", "--steps"])
