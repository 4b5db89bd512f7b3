import math

import pytest
import torch
from sampled import assert_samples_of, stock_logits, stock_logp
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

from rlvr_fast import models
from rlvr_fast.rollout import SamplingParams, kv_cache
from rlvr_fast.rollout.embedded import EmbeddedEngine

PROMPTS = [[5, 9, 33], [7], [8, 60, 61, 62, 63, 64, 65, 66], [12, 12], [90, 80, 70, 60, 50]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model of strong opinions, so that its answers differ."""
    folder = models.tiny(tmp_path_factory.mktemp("model") / "tiny", seed=3)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 if parameter.dim() == 1 else 6)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stock(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def engine(folder):
    return EmbeddedEngine(folder, dtype=torch.float32)


def engine_ending_with(ids, folder, **settings):
    """Of the same model, whose completions these ids end besides its own 2."""
    GenerationConfig(eos_token_id=ids).save_pretrained(folder)
    try:
        return EmbeddedEngine(folder, dtype=torch.float32, **settings)
    finally:
        GenerationConfig(eos_token_id=2).save_pretrained(folder)


SYSTEM = [31, 4, 59, 26, 53, 58, 9, 79, 32, 38]


@pytest.mark.parametrize("system", [[], SYSTEM], ids=["", "common beginning"])
def test_greedy_completions_are_those_of_transformers(engine, stock, system):
    prompts = [system + prompt for prompt in PROMPTS]

    got = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=20))

    for prompt, (completion,) in zip(prompts, got, strict=True):
        wanted = stock.generate(
            torch.tensor([prompt]),
            generation_config=GenerationConfig(
                max_new_tokens=20, do_sample=False, eos_token_id=2, pad_token_id=3
            ),
        )
        assert completion.token_ids == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [0.6, 1, 1.3])
def test_logp_is_that_of_a_full_forward_at_the_temperature(engine, stock, temperature):
    sampling = SamplingParams(temperature=temperature, max_tokens=16, n=4)

    groups = engine.generate(PROMPTS, sampling)

    assert_samples_of(stock, PROMPTS, groups, temperature=temperature)


def test_greedy_logp_is_at_temperature_one(engine, stock):
    ((completion,),) = engine.generate(PROMPTS[:1], SamplingParams(temperature=0, max_tokens=8))
    assert_samples_of(stock, PROMPTS[:1], [[completion]])


def test_the_seed_decides(engine):
    sampling = [SamplingParams(max_tokens=12, n=3, seed=seed) for seed in (4, 4, 5)]
    first, again, other = (engine.generate(PROMPTS, s) for s in sampling)
    assert first == again
    assert first != other


def test_samples_of_a_prompt_differ(engine):
    (completions,) = engine.generate(PROMPTS[:1], SamplingParams(max_tokens=12, n=8))
    assert len({tuple(completion.token_ids) for completion in completions}) > 1


@pytest.mark.parametrize("cache_tokens", [1, 40, 100], ids=["one row", "split groups", "some"])
def test_a_small_cache_changes_no_completion(folder, engine, cache_tokens):
    sampling = SamplingParams(max_tokens=10, n=3, seed=7)
    small = EmbeddedEngine(folder, dtype=torch.float32, cache_tokens=cache_tokens)

    wanted, got = engine.generate(PROMPTS, sampling), small.generate(PROMPTS, sampling)

    for (group, other), prompt in zip(zip(wanted, got, strict=True), PROMPTS, strict=True):
        assert [c.token_ids for c in group] == [c.token_ids for c in other], prompt


def test_a_completion_ends_with_its_first_end_of_sequence(folder):
    ends = list(range(4, 100, 5))
    engine = engine_ending_with(ends, folder)

    got = engine.generate(PROMPTS, SamplingParams(max_tokens=6, n=5))

    completions = [completion for group in got for completion in group]

    # The config's own id 2 counts as well.
    ended = [[token in (2, *ends) for token in c.token_ids] for c in completions]
    assert {c.finished for c in completions} == {True, False}
    assert all(flags[-1] == c.finished for flags, c in zip(ended, completions, strict=True))
    assert not any(any(flags[:-1]) for flags in ended)
    assert all(c.finished or len(c.token_ids) == 6 for c in completions)


def test_rows_that_leave_do_not_disturb_those_that_stay(folder, stock):
    engine = engine_ending_with(list(range(4, 100, 6)), folder)

    got = engine.generate(PROMPTS, SamplingParams(max_tokens=24, n=6))

    assert len({len(c.token_ids) for group in got for c in group}) > 4
    assert_samples_of(stock, PROMPTS, got)


@pytest.mark.parametrize("cache_tokens", [40, 65536])
def test_the_plain_cache_gives_the_completions_of_the_compiled_one(
    folder, monkeypatch, cache_tokens
):
    engine = engine_ending_with(list(range(4, 100, 6)), folder, cache_tokens=cache_tokens)
    sampling = SamplingParams(max_tokens=24, n=6)
    used = []
    for kind in (kv_cache.BlockCache, kv_cache.PlainCache):
        attend = kind.attend
        monkeypatch.setattr(
            kind, "attend", lambda *a, _of=attend, **k: used.append(_of) or _of(*a, **k)
        )

    compiled = engine.generate(PROMPTS, sampling)
    assert len(set(used)) == 1
    monkeypatch.setattr("rlvr_fast.ops.decode_attention.supported", lambda _: False)
    plain = engine.generate(PROMPTS, sampling)

    assert len(set(used)) == 2
    for ones, others in zip(compiled, plain, strict=True):
        for one, other in zip(ones, others, strict=True):
            assert one.token_ids == other.token_ids
            assert one.logp == pytest.approx(other.logp, abs=1e-4)


def test_ids_past_the_tokenizers_are_never_sampled(folder, tmp_path):
    config = AutoConfig.from_pretrained(folder)
    config.vocab_size = 128
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    models.tiny(tmp_path / "uniform")
    model.save_pretrained(tmp_path / "uniform")

    engine = EmbeddedEngine(tmp_path / "uniform", dtype=torch.float32)
    got = engine.generate([[5]], SamplingParams(max_tokens=20, n=40))[0]

    assert max(token for completion in got for token in completion.token_ids) < 100
    for completion in got:
        assert completion.logp == pytest.approx([-math.log(100)] * len(completion.logp))


def test_frequencies_are_the_models_probabilities(engine, stock):
    count = 30000
    (got,) = engine.generate(PROMPTS[:1], SamplingParams(temperature=0.9, max_tokens=1, n=count))
    seen = torch.bincount(torch.tensor([c.token_ids[0] for c in got]), minlength=100)

    with torch.no_grad():
        wanted = count * (stock_logits(stock, PROMPTS[0], [0])[0] / 0.9).softmax(-1)

    often = wanted >= 5
    assert often.sum() > 50
    statistic = ((seen - wanted) ** 2 / wanted)[often].sum()
    freedom = int(often.sum())
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def test_loaded_weights_change_the_output_and_a_round_trip_restores_it(engine, stock):
    sampling = SamplingParams(max_tokens=10, n=2)
    before = engine.generate(PROMPTS, sampling)
    original = {name: p.detach().clone() for name, p in stock.named_parameters()}

    engine.load_weights((name, -p if p.dim() == 1 else p) for name, p in original.items())
    changed = engine.generate(PROMPTS, sampling)
    engine.load_weights(original.items())

    assert changed != before
    assert engine.generate(PROMPTS, sampling) == before


def test_a_tied_head_follows_the_embedding(engine, stock, folder):
    draw = torch.Generator().manual_seed(0)
    weights = {name: p.detach().clone() for name, p in stock.named_parameters()}
    embedding = weights["model.embed_tokens.weight"]
    embedding.copy_(torch.randn(embedding.shape, generator=draw))
    engine.load_weights(weights.items())
    fresh = AutoModelForCausalLM.from_pretrained(folder)
    fresh.load_state_dict(weights, strict=False)

    ((completion,),) = engine.generate(PROMPTS[:1], SamplingParams(max_tokens=5))

    assert_samples_of(fresh, PROMPTS[:1], [[completion]])


def test_a_tied_head_may_be_named_too(engine, stock):
    weights = dict(stock.named_parameters(remove_duplicate=False))
    assert "lm_head.weight" in weights
    engine.load_weights(weights.items())


def test_weights_that_do_not_fit_are_refused(engine, stock):
    weights = dict(stock.named_parameters())
    with pytest.raises(ValueError, match=r"got no model\.norm\.weight"):
        engine.load_weights((n, w) for n, w in weights.items() if n != "model.norm.weight")
    with pytest.raises(ValueError, match=r"names of the model's, got head\.weight"):
        engine.load_weights([("head.weight", torch.zeros(2))])
    with pytest.raises(ValueError, match=r"model\.norm\.weight: wanted \[64\], got \[65\]"):
        engine.load_weights([("model.norm.weight", torch.zeros(65))])


def test_weights_that_are_not_numbers_are_reported(engine, stock):
    engine.load_weights((n, torch.full_like(p, torch.nan)) for n, p in stock.named_parameters())
    with pytest.raises(ValueError, match="wanted finite log-probabilities"):
        engine.generate([[5]], SamplingParams(max_tokens=2))


def test_the_context_ends_a_completion_and_limits_the_prompt(engine):
    ((completion,),) = engine.generate([[5] * 508], SamplingParams(max_tokens=20, temperature=0))
    assert len(completion.token_ids) == 4
    assert not completion.finished
    with pytest.raises(ValueError, match=r"wanted 1 to 511 tokens.* got 512"):
        engine.generate([[5] * 512], SamplingParams())
    with pytest.raises(ValueError, match="got 0"):
        engine.generate([[]], SamplingParams())


def test_no_prompts_give_no_completions(engine):
    assert engine.generate([], SamplingParams()) == []


def test_bf16_stays_close_to_the_exact_model(folder, stock):
    engine = EmbeddedEngine(folder)
    sampling = SamplingParams(max_tokens=12, n=4)

    for prompt, completions in zip(PROMPTS, engine.generate(PROMPTS, sampling), strict=True):
        for completion in completions:
            wanted = stock_logp(stock, prompt, completion.token_ids)
            assert (torch.tensor(completion.logp) - wanted).abs().mean() < 0.3


def test_bf16_weights_that_are_loaded_are_those_that_are_sampled(folder, stock, tmp_path):
    torch.manual_seed(4)
    other = LlamaForCausalLM(AutoConfig.from_pretrained(folder))
    other.save_pretrained(models.tiny(tmp_path / "other"))
    sampling = SamplingParams(max_tokens=8, n=3)
    engine = EmbeddedEngine(folder)
    before = engine.generate(PROMPTS, sampling)

    engine.load_weights(other.named_parameters())
    loaded = engine.generate(PROMPTS, sampling)

    assert loaded != before
    assert loaded == EmbeddedEngine(tmp_path / "other").generate(PROMPTS, sampling)


def test_sleeping_loses_nothing(engine):
    sampling = SamplingParams(max_tokens=6)
    before = engine.generate(PROMPTS, sampling)
    engine.sleep()
    engine.wake()
    assert engine.generate(PROMPTS, sampling) == before
