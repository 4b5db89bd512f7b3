import json
from contextlib import closing

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlvr_fast import config as configs
from rlvr_fast import metrics, models
from rlvr_fast.prompts import Prompts
from rlvr_fast.run import train
from rlvr_fast.tasks import Example, Task, load_task
from rlvr_fast.trainer import Trainer


def tiny(folder, **overrides):
    return configs.load("tiny", {"run_folder": str(folder), "trackers": "none", **overrides})


def parameters(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def test_the_tiny_model_learns_to_add(tmp_path):
    done = train(tiny(tmp_path / "run"))

    assert done.reward_before < 0.2
    assert done.reward_after > 0.7
    assert done.sampled_last > 0.7
    assert done.evaluated_on == "25 training prompts"


def test_a_run_leaves_a_model_metrics_and_completions(tmp_path):
    given = {"steps": 3, "eval_every": 2, "log_completions": 2, "trackers": "tensorboard"}
    config = tiny(tmp_path / "run", **given)

    done = train(config)

    rows = metrics.read(done.run_folder)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["step"] for row in rows if "eval_reward" in row] == [0, 2, 3]
    assert {"reward", "length", "mismatch_kl", "entropy", "seconds_update"} <= rows[1].keys()
    texts = [
        json.loads(line)
        for line in (done.run_folder / "completions.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in texts] == [1, 1, 2, 2, 3, 3]
    assert list((done.run_folder / "tensorboard").glob("events*"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_exported_model_loads_and_answers_like_the_run(precision, tmp_path):
    given = {"precision": precision, "engine_precision": precision}
    config = tiny(tmp_path / "run", learning_rate=1e-2, steps=8, **given)
    folder = train(config).run_folder / "model"

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    assert model.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    task = load_task(config.task, config.task_options)
    prompts = [example.prompt for example in task.train]
    ids = torch.tensor(tokenizer(prompts)["input_ids"])
    answers = tokenizer.batch_decode(model(input_ids=ids).logits[:, -1].argmax(-1)[:, None])
    rewards = task.reward(
        prompts=prompts,
        completions=answers,
        answer=[example.columns["answer"] for example in task.train],
    )
    wanted = metrics.read(tmp_path / "run")[-1]["eval_reward"]
    assert sum(rewards) / len(rewards) == pytest.approx(wanted)


def test_the_same_seed_gives_the_same_weights_and_another_does_not(tmp_path):
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        folder = train(tiny(tmp_path / name, steps=3, seed=seed)).run_folder
        found.append((folder / "model" / "model.safetensors").read_bytes())

    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("reward", [1.0, None])
def test_a_step_without_any_advantage_is_logged_and_changes_no_weight(reward, tmp_path):
    def same(prompts, completions):
        return [reward] * len(completions)

    task = Task("same", [Example("1+1="), Example("2+2=")], [Example("3+3=")], same)
    trainer = Trainer(tiny(tmp_path, entropy_coef=0, learning_rate=1, warmup_steps=4), task)
    trainer.sync()
    before = parameters(trainer)

    rates = [trainer.step(step)[0]["learning_rate"] for step in (1, 2)]

    assert rates == pytest.approx([0.25, 0.5])
    assert all(map(torch.equal, before, parameters(trainer)))


def test_sampler_and_trainer_agree_when_both_are_fp32(tmp_path):
    config = tiny(tmp_path, temperature=0.7)
    with closing(load_task(config.task, config.task_options)) as task:
        trainer = Trainer(config, task)
        trainer.sync()

        read = [trainer.step(step)[0] for step in (1, 2)]

    assert max(values["mismatch_max"] for values in read) < 1e-4


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    config = tiny(tmp_path / "run", steps=1)
    train(config)

    with pytest.raises(ValueError, match=r"^run_folder: wanted one without a run \(or --resume"):
        train(config)


def test_chats_get_the_system_prompt_and_plain_prompts_refuse_it():
    tokenizer = models.load(models.resolve("tiny"))[1]
    chat = [Example([{"role": "user", "content": "hi"}])]

    (prompt,) = Prompts(chat, tokenizer, system_prompt="be kind")

    assert tokenizer.decode(prompt.ids) == "<bos>be kind\nhi\n"
    with pytest.raises(ValueError, match=r"^system_prompt: wanted a task whose prompts are chats"):
        Prompts([Example("hi")], tokenizer, system_prompt="be kind")[0]
