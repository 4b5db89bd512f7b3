import pytest
import small_models
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlvr_fast import attention
from rlvr_fast.packed import Sample, pack

VOCABULARY = small_models.VOCABULARY
SIZES = small_models.SIZES | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
    "a scale of its own": lambda: GraniteForCausalLM(
        GraniteConfig(**SIZES, attention_multiplier=0.7)
    ),
    "one key head per query head": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES | {"num_key_value_heads": 4})
    ),
}
LENGTHS = {
    "unequal prompts and completions": [(5, [3, 7, 1]), (9, [2, 2]), (1, [6, 4, 5, 1])],
    "empty completions": [(4, [0, 3, 0]), (3, [0, 0]), (2, [5, 0])],
    "groups of one": [(4, [3]), (7, [5]), (1, [1])],
    "more than one rectangle": [(150, [60, 3, 90, 2]), (6, [140, 5]), (2, [300])],
}


def _model(kind):
    torch.manual_seed(0)
    return KINDS[kind]().eval()


def _groups(lengths):
    draw = torch.Generator().manual_seed(1)

    def tokens(count):
        return torch.randint(3, VOCABULARY, (count,), generator=draw).tolist()

    return [
        [Sample(prompt_ids=prompt, completion_ids=tokens(completion)) for completion in completions]
        for prompt, completions in ((tokens(count), sizes) for count, sizes in lengths)
    ]


def _stock_hidden(model, sample):
    """The rows that predict the completion, from a forward without any of our code."""
    tokens = torch.tensor([[*sample.prompt_ids, *sample.completion_ids]])
    hidden = model.get_decoder()(input_ids=tokens).last_hidden_state[0]
    first = len(sample.prompt_ids) - 1
    return hidden[first : first + len(sample.completion_ids)]


def _gradients(model, hidden):
    model.zero_grad()
    torch.sin(hidden + torch.arange(hidden.shape[1])).mean(1).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_a_pack_gives_the_models_own_hidden_states_and_gradients(kind, lengths):
    model, groups = _model(kind), _groups(lengths)
    samples = [sample for group in groups for sample in group]
    stock = torch.cat([_stock_hidden(model, sample) for sample in samples])
    wanted = _gradients(model, stock)

    packed = pack(groups)
    hidden = attention.hidden_states(model, packed)[packed.hidden_index]

    torch.testing.assert_close(hidden, stock, rtol=1e-5, atol=1e-5)
    got = _gradients(model, hidden)
    for name, gradient in wanted.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-5 * max(scale, 1))


def test_a_prompt_computed_once_gives_the_gradients_of_a_repeated_one():
    model, groups = _model("llama"), _groups(LENGTHS["unequal prompts and completions"])
    shared, repeated = pack(groups), pack(groups, share_prompts=False)

    got, wanted = (
        _gradients(model, attention.hidden_states(model, packed)[packed.hidden_index])
        for packed in (shared, repeated)
    )

    assert len(shared.input_ids) < len(repeated.input_ids)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("poisoned", [0, 1], ids=["a sibling completion", "another block"])
def test_what_a_neighbour_says_changes_nothing(poisoned):
    model = _model("llama")
    groups = _groups([(5, [6, 4]), (3, [2, 7])])
    watched = groups[0][0]
    rows = slice(0, len(watched.prompt_ids) + len(watched.completion_ids) - 1)
    before = attention.hidden_states(model, pack(groups))[rows]

    victim = groups[poisoned][1]
    other = [(token + 1) % VOCABULARY for token in victim.completion_ids]
    groups[poisoned][1] = Sample(prompt_ids=victim.prompt_ids, completion_ids=other)

    after = attention.hidden_states(model, pack(groups))
    assert torch.equal(after[rows], before)


def test_a_sequence_of_nan_stays_alone():
    model, groups = _model("llama"), _groups([(5, [6, 4]), (3, [2, 7])])
    packed = pack(groups)
    last = int(packed.input_ids[-1])
    packed.input_ids[packed.input_ids == last] = (last + 1) % VOCABULARY
    packed.input_ids[-1] = last
    wanted = attention.hidden_states(model, packed)

    with torch.no_grad():
        model.get_input_embeddings().weight[last] = torch.nan

    hidden = attention.hidden_states(model, packed)
    assert torch.equal(hidden[:-7], wanted[:-7])
    assert hidden[-1].isnan().all()


# Newer transformers call it activation checkpointing; older ones know this name only.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_checkpointing_changes_neither_output_nor_gradient():
    model, packed = _model("llama"), pack(_groups(LENGTHS["unequal prompts and completions"]))
    plain = attention.hidden_states(model, packed)
    wanted = _gradients(model, plain)

    model.gradient_checkpointing_enable()
    hidden = attention.hidden_states(model.train(), packed)

    assert torch.equal(hidden, plain)
    got = _gradients(model, hidden)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-6)


def test_autocast_rounds_no_more_than_the_stock_model_does():
    model, groups = _model("llama"), _groups(LENGTHS["unequal prompts and completions"])
    samples, packed = [sample for group in groups for sample in group], pack(groups)
    exact = torch.cat([_stock_hidden(model, sample) for sample in samples])

    with torch.autocast("cpu", torch.bfloat16):
        stock = torch.cat([_stock_hidden(model, sample) for sample in samples])
        ours = attention.hidden_states(model, packed)[packed.hidden_index]

    assert (ours - exact).norm() < 1.1 * (stock - exact).norm()
    assert all(gradient.isfinite().all() for gradient in _gradients(model, ours).values())


def test_the_model_stays_an_ordinary_one_outside_of_packs():
    model = _model("qwen2")
    tokens = torch.randint(3, VOCABULARY, (2, 7))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    wanted = model(input_ids=tokens, attention_mask=mask).logits

    attention.install(model)

    assert torch.equal(model(input_ids=tokens, attention_mask=mask).logits, wanted)


def test_a_recurrent_model_is_refused():
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match="wanted a decoder with causal softmax attention"):
        attention.install(MambaForCausalLM(config))


def test_a_softcap_on_the_attention_is_refused():
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8))
    with pytest.raises(ValueError, match="wanted attention without softcap"):
        attention.hidden_states(model, pack(_groups([(4, [3, 2])])))


def test_a_sliding_window_is_refused_only_where_it_would_slide():
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8))
    assert attention.hidden_states(model, pack(_groups([(4, [5, 2])]))).shape == (9, 32)
    with pytest.raises(ValueError, match="sliding window, 8 tokens, got 9"):
        attention.hidden_states(model, pack(_groups([(4, [6, 2])])))


def test_an_empty_pack_is_refused():
    with pytest.raises(ValueError, match="wanted at least one token"):
        attention.hidden_states(_model("llama"), pack([]))


@pytest.mark.parametrize(
    "build",
    [
        KINDS["llama"],
        KINDS["qwen2"],
        lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
        lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)),
        lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5)),
    ],
    ids=["plain", "tied", "multiplied", "divided", "softcapped"],
)
def test_the_head_is_what_turns_hidden_states_into_the_models_logits(build):
    model = build().eval()
    tokens = torch.randint(3, VOCABULARY, (1, 9))
    head = attention.head(model)

    hidden = model.get_decoder()(input_ids=tokens).last_hidden_state
    logits = head.logit_scale * (hidden @ head.weight.T)
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)

    torch.testing.assert_close(logits, model(input_ids=tokens).logits, rtol=1e-5, atol=1e-5)
