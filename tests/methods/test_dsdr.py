"""DSDR: diversity, what it adds to rewards, and the local term."""

import math
from dataclasses import replace

import pytest
import torch
from known import BACKENDS, LOGP, OLD, SEQUENCE_MEAN, f1
from rewarded import group

from benches import drawn
from rlvr_fast import embeddings, models
from rlvr_fast.methods import dsdr, method
from rlvr_fast.methods.dsdr import SampledEntropyBonus, formulas
from rlvr_fast.objectives import ClippedSurrogate
from rlvr_fast.tasks import Example


def measured(rewards, diverse):
    return [
        replace(rollout, metadata={"diversity": value})
        for rollout, value in zip(group(*rewards), diverse, strict=True)
    ]


def weights(rewards, diverse, **options):
    (found,) = method("dsdr", options).advantages([measured(rewards, diverse)])
    return [rollout.extras["local_weight"] for rollout in found]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("so $x + 1 = 2$ and $$a^2$$", {"x+1=2", "a^2"}),
        (r"\(b\), \[c = \frac{1}{d}\]", {"b", r"c=\frac{1}{d}"}),
        (r"thus \boxed{\frac{1}{2}}", {r"\frac{1}{2}"}),
        ("3+4=7, then 10 - 3 = 7 and 1.5*2=3", {"3+4=7", "10-3=7", "1.5*2=3"}),
        ("3 + 4 =\n7 3+4=7", {"3+4=7"}),
        ("it costs $5 or $6 on 2024-01-02", set()),
        (r"\boxed{7", set()),
        ("$" + "x" * 300 + "$", set()),
        ("", set()),
    ],
)
def test_formulas_are_found(text, wanted):
    assert formulas(text) == wanted


@pytest.mark.parametrize(
    "text",
    ["$", "$$", "$a", r"\(", r"\[", r"\(\\", r"\boxed{", "{", "1", "1+", "1 ", "9.", "1+1=", "$ $"],
)
def test_hostile_text_is_read_to_its_end(text):
    """Patterns that could match in many ways would never come back from these."""
    assert len(formulas(text * (200_000 // len(text)))) <= 2


def test_what_is_far_down_a_text_does_not_count():
    assert formulas("a" * 20_000 + " 1+1=2") == set()


def test_texts_that_say_the_same_are_not_diverse():
    vectors = embeddings.count_words(["a b $x$"] * 3)

    assert dsdr.diversity(["a b $x$"] * 3, vectors) == pytest.approx([0.0] * 3, abs=1e-7)
    assert dsdr.diversity(["alone $x$"], vectors[:1]) == [0.0]


def test_diversity_is_the_mean_of_distance_and_new_formulas():
    """Vectors at 90 and 180 degrees; the first text has two formulas, one of them its own."""
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])

    found = dsdr.diversity(["$x$ $y$", "$x$", "none"], vectors)

    assert found == pytest.approx([(0.75 + 0.5) / 2, (0.5 + 0) / 2, (0.75 + 0) / 2])


def test_the_weights_of_correct_responses_are_a_softmax_times_the_group():
    """Source: the method's notes: d = (.2, .4), tau = 5: (.26894, .73106)."""
    found = weights([1, 0, 1], [0.2, 0.9, 0.4])

    assert found == pytest.approx([3 * 0.26894, 0, 3 * 0.73106], abs=2e-5)
    assert weights([1, 1, 0, 0], [0.3, 0.3, 0.9, 0.1]) == [2.0, 2.0, 0.0, 0.0]
    assert weights([0, 0, None], [0.3, 0.2, 0.9]) == [0.0] * 3
    assert weights([1, 1], [0.2, 0.9], diversity_cap=0.2) == [1.0, 1.0]


def test_correct_responses_are_rewarded_for_diversity_and_wrong_ones_are_not():
    chosen = method("dsdr", {"reward_coef": 0.5})

    (found,) = chosen.advantages([measured([1, 1, 0], [0.4, 0.8, 0.8])])

    (wanted,) = method("grpo", {}).advantages([group(1.2, 1.4, 0.0)])
    assert [r.advantage for r in found] == pytest.approx([r.advantage for r in wanted], abs=1e-6)
    assert [r.reward for r in found] == [1, 1, 0]


@pytest.mark.parametrize("rewards", [[0, 0, 0], [0.5, 0, None]])
def test_a_group_without_a_correct_response_is_trained_as_in_grpo(rewards):
    (found,) = method("dsdr", {"reward_coef": 0.5}).advantages([measured(rewards, [0.9, 0.1, 0.5])])

    (wanted,) = method("grpo", {}).advantages([group(*rewards)])
    assert [r.advantage for r in found] == [r.advantage for r in wanted]


def test_an_all_correct_group_has_a_signal():
    (found,) = method("dsdr", {}).advantages([measured([1, 1], [0.4, 0.8])])

    assert found[1].advantage > 0 > found[0].advantage


def test_without_its_coefficients_it_is_grpo_and_asks_for_no_model(monkeypatch):
    monkeypatch.setattr(embeddings, "embedder", None)
    chosen = method("dsdr", {"reward_coef": 0, "local_coef": 0, "clip_high": 0.2})
    tokenizer = models.load(models.resolve("tiny"))[1]
    on = drawn.context([Example("?")], tokenizer, samples=6, lengths=(1, 3))

    found = chosen.advantages(drawn.verified(chosen, on))

    plain = method("grpo", {})
    assert found == plain.advantages(drawn.verified(plain, on))
    assert chosen.objective() == plain.objective()


def test_diversity_is_measured_where_rewards_are_and_kept_as_a_number():
    chosen = method("dsdr", {"embedding": "words"})
    tokenizer = models.load(models.resolve("tiny"))[1]
    on = drawn.context([Example("?"), Example("!")], tokenizer, samples=6, lengths=(4, 9))

    found = drawn.verified(chosen, on)

    for each in found:
        assert any(rollout.reward for rollout in each)
        texts = [rollout.text for rollout in each]
        wanted = dsdr.diversity(texts, embeddings.count_words(texts))
        assert [rollout.metadata["diversity"] for rollout in each] == wanted
        assert min(wanted) > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_local_term_has_the_gradient_of_both_of_its_factors(backend):
    """Oracle: `coef w r logp` and `coef w r (logp + 1)` in Python."""
    weight = [1.5, 1.5, 1.5, 0.25, 0.25]

    found = f1(
        SampledEntropyBonus(coef=0.1), backend, SEQUENCE_MEAN, extras={"local_weight": weight}
    )

    share = [1 / 6] * 3 + [1 / 4] * 2
    factor = [
        0.1 * s * w * math.exp(logp - old)
        for s, w, logp, old in zip(share, weight, LOGP, OLD, strict=True)
    ]
    wanted = [f * (logp + 1) for f, logp in zip(factor, LOGP, strict=True)]
    assert found.dlogp.tolist() == pytest.approx(wanted, abs=1e-7)
    loss = sum(f * logp for f, logp in zip(factor, LOGP, strict=True))
    assert found.loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_objective_is_the_clipped_surrogate_and_the_local_term(backend):
    extras = {"local_weight": [2.0, 2.0, 2.0, 0.0, 0.0]}
    objective = method("dsdr", {"local_coef": 0.1}).objective()

    both, clip, local = (
        f1(each, backend, SEQUENCE_MEAN, extras=extras)
        for each in (objective, ClippedSurrogate(clip_high=0.28), SampledEntropyBonus(coef=0.1))
    )

    torch.testing.assert_close(both.dlogp, clip.dlogp + local.dlogp, rtol=1e-5, atol=1e-7)
    assert both.loss == pytest.approx(clip.loss + local.loss, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding": "minilm"}, "embedding: wanted all-MiniLM-L6-v2, words, a folder or a hub"),
        ({"embedding_device": "tpu"}, "embedding_device: wanted cpu, cuda or cuda:N, got 'tpu'"),
        ({"sharpness": -1.0}, "sharpness: wanted >= 0, got -1.0"),
    ],
)
def test_an_option_that_cannot_be_names_wanted_and_got(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        method("dsdr", options)
