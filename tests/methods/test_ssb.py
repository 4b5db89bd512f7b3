"""SSB: a solution written with a hint teaches the model that does not see the hint."""

from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from rlvr_fast import config as configs
from rlvr_fast import models
from rlvr_fast.collect import Batch, has_signal
from rlvr_fast.methods import method
from rlvr_fast.methods.base import Context
from rlvr_fast.ops import divergence
from rlvr_fast.ops.linear_kl import linear_kl
from rlvr_fast.prompts import Prompts
from rlvr_fast.rollout import Completion, Engine, SamplingParams
from rlvr_fast.tasks import Example, Task
from rlvr_fast.trainer import Trainer


@cache
def tokenizer():
    return models.load(models.resolve("tiny"))[1]


@dataclass
class Script(Engine):
    """Writes what it was given, call by call; remembers what it was asked."""

    texts: list[list[list[str]]]
    asked: list[tuple[list[str], SamplingParams]] = field(default_factory=list)

    def generate(self, prompts, sampling):
        encode = tokenizer()
        self.asked.append(([encode.decode(ids) for ids in prompts], sampling))
        return [
            [
                Completion(token_ids=encode(text)["input_ids"], logp=[-1.0] * len(text),
                           finished=True)
                for text in texts
            ]
            for texts in self.texts.pop(0)
        ]  # fmt: skip


def exactly(prompts, completions, *, answer):
    """1 for `= answer` at the end; who says nothing after a = cannot be scored."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(t.endswith(f"={a}")) if "=" in t else 0.0
            for t, a in zip(texts, answer, strict=True)]  # fmt: skip


def answer_key(text):
    return text.partition("=")[2] or None


def context(engine, *prompts, seed=0, samples=4):
    examples = [Example(prompt, {"answer": "7"}) for prompt in prompts]
    return Context(
        step=1,
        position=0,
        task=Task("exactly", examples, examples, exactly, answer_key),
        prompts=Prompts(examples, tokenizer()),
        prompts_per_step=len(examples),
        tokenizer=tokenizer(),
        engine=engine,
        sampling=SamplingParams(temperature=1.0, max_tokens=32, n=samples, seed=seed),
    )


def collected(on, **options):
    chosen = method("ssb", options)
    groups = chosen.rollout(on, chosen.select_prompts(on))
    return chosen.advantages(chosen.verify(on, groups))


SHORT = "{problem}|{first}|{second}|"
MIXED = ["a=5", "b=7", "c=7", "d=6", "e=6", "f"]
"""The first right one is b; the most common wrong answer is 6, first given by d."""


def test_the_first_right_and_the_most_common_wrong_attempt_make_the_hint():
    found = set()
    for seed in range(8):
        engine = Script([[MIXED], [["g=7"]]])
        collected(context(engine, "3+4", seed=seed), template=SHORT)
        ((prompt,), sampling) = engine.asked[1]
        found.add(prompt)

    assert found == {"3+4|b=7|d=6|", "3+4|d=6|b=7|"}
    assert (sampling.n, sampling.temperature, sampling.max_tokens) == (1, 0.4, 32)


def test_among_wrong_answers_given_once_one_is_drawn():
    found = set()
    for seed in range(16):
        engine = Script([[["b=7", "d=6", "a=5"]], [["g=7"]]])
        collected(context(engine, "3+4", seed=seed), template=SHORT)
        found.update(set(engine.asked[1][0][0].split("|")) - {"3+4", "b=7", ""})

    assert found == {"d=6", "a=5"}


def test_a_right_solution_is_what_the_group_trains_on():
    (group,) = collected(context(Script([[MIXED], [["g=7"]]]), "3+4"), template=SHORT)
    *attempts, solution = group

    assert [each.scored_tokens for each in attempts] == [0] * 6
    assert [each.advantage for each in group] == [0] * 6 + [1]
    assert [each.reward for each in group] == [0, 1, 1, 0, 0, 0, 1]
    assert solution.text == "g=7"
    assert solution.scored_tokens == 3
    assert tokenizer().decode(solution.train_prompt_ids) == "3+4"
    hint = tokenizer().decode(solution.teacher_prompt_ids)
    assert hint in ("3+4|b=7|d=6|", "3+4|d=6|b=7|")
    assert solution.gen_prompt_ids == solution.teacher_prompt_ids
    assert has_signal(group)


def test_a_wrong_solution_trains_nothing():
    (group,) = collected(context(Script([[MIXED], [["g=8"]]]), "3+4"))

    assert sum(each.scored_tokens for each in group) == 0
    assert not has_signal(group)
    assert group[-1].reward == 0


@pytest.mark.parametrize("texts", [["a=7", "b=7"], ["a=5", "b=6"], ["a=7", "b"]],
                         ids=["all right", "all wrong", "no wrong answer"])  # fmt: skip
def test_a_group_without_both_writes_no_solution(texts):
    engine = Script([[texts]])

    (group,) = collected(context(engine, "3+4"))

    assert len(engine.asked) == 1
    assert [each.scored_tokens for each in group] == [0, 0]
    assert not has_signal(group)


def test_solutions_go_to_the_groups_they_are_of():
    engine = Script([[["a=5", "b=7"], ["c=7"], ["d=7", "e=6"]], [["g=7"], ["h=7"]]])

    found = collected(context(engine, "1", "2", "3"), template=SHORT)

    assert [[each.text for each in group if each.scored_tokens] for group in found] == [
        ["g=7"], [], ["h=7"]
    ]  # fmt: skip
    firsts = [prompt[0] for prompt in engine.asked[1][0]]
    assert firsts == [group[0].prompt.example.prompt for group in (found[0], found[2])]


def test_what_an_attempt_says_is_never_taken_for_a_place_of_the_template():
    engine = Script([[["{second}{problem}=7", "{first}=6"]], [["g=7"]]])

    collected(context(engine, "3+4"), template=SHORT)

    assert sorted(engine.asked[1][0][0].split("|")) == sorted(
        ["3+4", "{second}{problem}=7", "{first}=6", ""]
    )


def test_the_hint_of_a_chat_is_a_chat_whose_last_message_is_the_hint():
    asked = [{"role": "user", "content": "3+4"}]
    engine = Script([[["b=7", "d=6"]], [["g=7"]]])

    (group,) = collected(context(engine, asked), template="hint {problem} {first} {second}")

    hint = tokenizer().decode(group[-1].teacher_prompt_ids)
    plain = tokenizer().decode(group[-1].train_prompt_ids)
    assert hint in [plain.replace("3+4", f"hint 3+4 {pair}") for pair in ("b=7 d=6", "d=6 b=7")]


def test_known_value_of_two_tokens():
    """Source: papers-a, entry 18: KL .110944, times T^2 .443776; the gradient is T (p_s - p_t)."""
    objective = method("ssb", {}).objective()
    student = torch.zeros(1, 1, requires_grad=True)
    rows = torch.tensor([[1.0], [0.0]])

    found = linear_kl(
        student,
        rows,
        torch.tensor([[2.0]]),
        rows,
        torch.tensor([objective.scale]),
        kind=objective.kind,
        temperature=objective.temperature,
    )
    found.loss.backward()

    assert found.kl.item() == pytest.approx(0.110944, abs=1e-6)
    assert found.loss.item() == pytest.approx(0.443776, abs=1e-6)
    # The hidden state is the first logit itself.
    assert student.grad.item() == pytest.approx(2 * (0.5 - 0.731059), abs=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("backend", divergence.BACKENDS)
def test_known_value_on_every_backend(backend):
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    out = torch.empty(1, 2)

    kl = divergence.BACKENDS[backend](student, teacher, torch.tensor([4.0]), 0, 0.5, 0.0, out)

    assert kl.item() == pytest.approx(0.110944, abs=1e-6)
    assert out[0].tolist() == pytest.approx([2 * (0.5 - 0.731059), 2 * (0.5 - 0.268941)], abs=1e-5)


def test_a_collected_batch_survives_a_checkpoint():
    on = context(Script([[MIXED], [["g=7"]]]), "3+4")
    batch = Batch(groups=collected(on), dropped=[], position=1, seconds={})

    assert Batch.from_values(batch.to_values(), on.prompts) == batch


def even(prompts, completions):
    """About half of all texts are right, whatever the model writes."""
    return [float(sum(map(ord, text)) % 2 == 0) for text in completions]


EVEN = Task("even", [Example(p) for p in ("ab", "cdef", "ghi")], [Example("ab")], even,
            lambda text: text[:1] or None)  # fmt: skip


def trainer(folder, **settings):
    given = {
        "method": "ssb",
        "method_options.template": SHORT,
        "run_folder": str(folder),
        "entropy_coef": 0.0,
        "prompts_per_step": 3,
        "samples_per_prompt": 4,
        "max_completion_tokens": 6,
        **settings,
    }
    return Trainer(configs.load("tiny", given), EVEN)


@pytest.mark.parametrize("rank", [0, 4])
def test_the_trainer_trains_on_solutions_alone(rank, tmp_path):
    with closing(trainer(tmp_path, lora_rank=rank)) as made:
        made.sync()
        before = parameters_to_vector(made.model.parameters()).detach().clone()

        steps = [made.step(step) for step in (1, 2, 3)]

    taught = [sum(map(has_signal, groups)) for _, groups in steps]
    assert sum(taught) > 1
    for (values, groups), count in zip(steps, taught, strict=True):
        assert ("loss" in values) == (count > 0)
        assert all(sum(each.scored_tokens > 0 for each in group) <= 1 for group in groups)
    assert not torch.equal(parameters_to_vector(made.model.parameters()), before)


def test_steps_without_a_solution_are_harmless(tmp_path):
    with closing(trainer(tmp_path, **{"method_options.right": 2.0})) as made:
        made.sync()
        before = parameters_to_vector(made.model.parameters()).detach().clone()

        values, _ = made.step(1)

    assert values["microbatches"] == values["groups_with_signal"] == 0
    assert torch.equal(parameters_to_vector(made.model.parameters()), before)


def test_a_solution_that_was_written_from_the_bare_question_teaches_nothing_at_first(tmp_path):
    with closing(trainer(tmp_path, samples_per_prompt=8)) as made:
        made.sync()
        groups = made.ahead.take(1, 0).groups
        bare = [
            [
                each if each.teacher_prompt_ids is None
                else replace(each, teacher_prompt_ids=each.train_prompt_ids)
                for each in group
            ]
            for group in groups
        ]  # fmt: skip

        same, hinted = (made.optimiser.update(each, step=1) for each in (bare, groups))

    assert same["loss"] == 0
    assert same["grad_norm"] < 1e-7
    assert hinted["loss"] > 0
    assert hinted["grad_norm"] > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"^temperature: wanted > 0, got 0.0$"),
        ({"solution_temperature": -1.0}, r"^solution_temperature: wanted >= 0, got -1.0$"),
        ({"template": "{problem}{first}"}, r"^template: wanted {second} in it, got "),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        method("ssb", options)
