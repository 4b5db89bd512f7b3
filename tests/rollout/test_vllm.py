import socket
import socketserver
import threading
import time

import psutil
import pytest
import torch
from sampled import assert_samples_of
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM
from vllm_here import needs_vllm

from rlvr_fast import lora, models
from rlvr_fast.rollout import SamplingParams
from rlvr_fast.rollout.embedded import EmbeddedEngine
from rlvr_fast.rollout.vllm import VLLMEngine
from rlvr_fast.rollout.vllm_options import VLLMOptions, VLLMServerOptions
from rlvr_fast.rollout.vllm_server import VLLMServerEngine

pytestmark = needs_vllm

PROMPTS = [[5, 9, 33], [7], [8, 60, 61, 62, 63, 64, 65, 66], [12, 12], [90, 80, 70, 60, 50]]
EOS = [2, *range(4, 100, 7)]
TOKENS, ROWS = 100, 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tied, of strong opinions, and with rows past the tokenizer's that would win every draw."""
    folder = models.tiny(tmp_path_factory.mktemp("vllm") / "tiny")
    config = AutoConfig.from_pretrained(folder)
    config.vocab_size, config.head_dim = ROWS, 32  # vLLM has no narrower heads on a CPU.
    torch.manual_seed(3)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 if parameter.dim() == 1 else 6)
        # The first dimension is 1 at every token and after every layer.
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        model.get_input_embeddings().weight[:, 0] = 1
        model.get_input_embeddings().weight[TOKENS:, 0] = 1000
    model.save_pretrained(folder)
    GenerationConfig(eos_token_id=EOS, do_sample=True, top_k=2, temperature=0.1).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def weights(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def others(weights):
    """Other weights that keep the model's two peculiarities."""
    draw = torch.Generator().manual_seed(1)
    return {n: w * (1 + 0.2 * torch.randn(w.shape, generator=draw)) for n, w in weights.items()}


@pytest.fixture(scope="module")
def server(folder):
    options = VLLMServerOptions(kv_cache_gib=0.05, max_num_seqs=6)
    engine = VLLMServerEngine(folder, dtype=torch.float32, options=options)
    yield engine
    engine.close()


@pytest.fixture(scope="module", params=["in process", "server"])
def living(request, folder):
    if request.param == "server":
        yield request.getfixturevalue("server")
    else:
        options = VLLMOptions(kv_cache_gib=0.05)
        engine = VLLMEngine(folder, dtype=torch.float32, options=options)
        yield engine
        engine.close()


@pytest.fixture
def engine(living, weights):
    living.load_weights(weights.items())
    return living


def _assert_exact(folder, weights, groups, temperature=1.0):
    """Log-probabilities are those of transformers in fp32, over the tokenizer's ids."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.load_state_dict(weights, strict=False)
    assert_samples_of(model, PROMPTS, groups, temperature=temperature, tokens=TOKENS)


def test_greedy_completions_are_those_of_the_embedded_engine(engine, folder):
    sampling = SamplingParams(temperature=0, max_tokens=20, n=2)

    got = engine.generate(PROMPTS, sampling)
    wanted = EmbeddedEngine(folder, dtype=torch.float32).generate(PROMPTS, sampling)

    for group, reference in zip(got, wanted, strict=True):
        assert [c.token_ids for c in group] == [c.token_ids for c in reference]
        assert [c.finished for c in group] == [c.finished for c in reference]
        assert group[0].logp == pytest.approx(reference[0].logp, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.6, 1.3])
def test_logp_is_that_of_transformers_over_the_tokenizers_vocabulary(
    engine, folder, weights, temperature
):
    sampling = SamplingParams(temperature=temperature, max_tokens=12, n=8)
    got = engine.generate(PROMPTS, sampling)
    assert [len(group) for group in got] == [8] * len(PROMPTS)
    _assert_exact(folder, weights, got, temperature)


def test_ids_past_the_tokenizers_are_never_sampled(engine, folder, weights):
    prompt = PROMPTS[0]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model(torch.tensor([prompt])).logits[0, -1].argmax() >= TOKENS

    for temperature in (0, 1, 2):
        sampling = SamplingParams(temperature=temperature, max_tokens=8, n=20)
        (group,) = engine.generate([prompt], sampling)
        assert max(token for completion in group for token in completion.token_ids) < TOKENS


def test_a_completion_ends_with_its_first_end_of_sequence_or_at_max_tokens(engine):
    got = engine.generate(PROMPTS, SamplingParams(max_tokens=6, n=6))
    completions = [completion for group in got for completion in group]

    assert {completion.finished for completion in completions} == {True, False}
    for completion in completions:
        assert (completion.token_ids[-1] in EOS) == completion.finished
        assert not set(completion.token_ids[:-1]) & set(EOS)
        assert completion.finished or len(completion.token_ids) == 6


def test_the_seed_decides_and_all_samples_of_a_call_differ(engine):
    prompts = [[5, 9, 33]] * 3
    sampling = [SamplingParams(max_tokens=12, n=7, seed=seed) for seed in (4, 4, 5)]
    first, again, other = (
        [[c.token_ids for c in group] for group in engine.generate(prompts, s)] for s in sampling
    )
    assert first == again
    # Those that end at once are few kinds.
    ids = [tuple(i) for groups in (first, other) for group in groups for i in group if len(i) > 2]
    assert len(ids) > 20
    assert len(set(ids)) == len(ids)


def test_loaded_weights_are_those_of_transformers(engine, folder, weights, others):
    sampling = SamplingParams(max_tokens=10, n=2)
    before = engine.generate(PROMPTS, sampling)

    engine.load_weights(others.items())
    after = engine.generate(PROMPTS, sampling)
    engine.load_weights(weights.items())

    assert after != before
    _assert_exact(folder, others, after)
    assert engine.generate(PROMPTS, sampling) == before


@torch.no_grad()
def test_adapters_in_training_are_what_is_sampled(engine, folder):
    pytest.importorskip("peft", reason="adapters need it; the test extra installs it")
    model, _ = models.load(folder, dtype=torch.float32)
    lora.wrap(model, rank=4, alpha=8.0)
    draws = torch.Generator().manual_seed(3)
    for _, parameter in lora.trained(model):
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draws))

    engine.load_weights(lora.named_weights(model))
    groups = engine.generate(PROMPTS, SamplingParams(n=2, max_tokens=6))

    assert_samples_of(model, PROMPTS, groups, tokens=TOKENS)


def test_weights_that_do_not_fit_are_refused_and_change_nothing(engine, weights):
    sampling = SamplingParams(max_tokens=4)
    before = engine.generate(PROMPTS, sampling)
    zeros = {name: torch.zeros_like(weight) for name, weight in weights.items()}

    with pytest.raises(ValueError, match=r"got no model\.norm\.weight"):
        engine.load_weights((n, w) for n, w in zeros.items() if n != "model.norm.weight")
    with pytest.raises(ValueError, match=r"names of the model's, got head\.weight"):
        engine.load_weights([*zeros.items(), ("head.weight", torch.zeros(2))])
    with pytest.raises(ValueError, match=r"model\.norm\.weight: wanted \[64\], got \[65\]"):
        engine.load_weights({**zeros, "model.norm.weight": torch.zeros(65)}.items())

    assert engine.generate(PROMPTS, sampling) == before


def test_weights_that_are_not_numbers_are_reported(engine, weights):
    engine.load_weights((name, torch.full_like(w, torch.nan)) for name, w in weights.items())
    with pytest.raises(ValueError, match="wanted finite log-probabilities"):
        engine.generate([[5]], SamplingParams(max_tokens=2))


def test_the_context_ends_a_completion_and_limits_the_prompt(engine):
    sampling = SamplingParams(max_tokens=20, temperature=0)
    ((completion,),) = engine.generate([[5] * 510], sampling)
    assert len(completion.token_ids) == 2
    with pytest.raises(ValueError, match=r"wanted 1 to 511 tokens.* got 512"):
        engine.generate([[5] * 512], sampling)
    with pytest.raises(ValueError, match="got 0"):
        engine.generate([[]], sampling)
    with pytest.raises(ValueError, match="wanted ids of 0 to 127, got 128"):
        engine.generate([[128]], sampling)


def test_more_prompt_tokens_than_vllm_computes_at_once_are_no_obstacle(engine):
    prompts = [[5 + place] * 300 for place in range(20)]
    got = engine.generate(prompts, SamplingParams(max_tokens=2))
    assert [len(group) for group in got] == [1] * 20


@pytest.mark.parametrize("temperature", [0.001, 2.5])
def test_a_temperature_that_vllm_would_change_is_refused(engine, temperature):
    with pytest.raises(ValueError, match=r"temperature: wanted 0 or 0\.01 to 2\.0"):
        engine.generate([[5]], SamplingParams(temperature=temperature))


def test_no_prompts_give_no_completions_and_sleeping_loses_nothing(engine):
    before = engine.generate(PROMPTS, SamplingParams(max_tokens=6))
    engine.sleep()
    engine.wake()
    assert engine.generate(PROMPTS, SamplingParams(max_tokens=6)) == before
    assert engine.generate([], SamplingParams()) == []


class _Relay(socketserver.StreamRequestHandler):
    """TCP on this machine to a Unix socket, a connection at a time."""

    def handle(self):
        with socket.socket(socket.AF_UNIX) as server:
            server.connect(self.server.target)
            back = threading.Thread(target=self._copy, args=(server, self.request))
            back.start()
            self._copy(self.request, server)
            back.join()

    @staticmethod
    def _copy(source, target):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@pytest.fixture
def address(server):
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Relay) as relay:
        relay.target = str(server._folder / "socket")
        thread = threading.Thread(target=relay.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{relay.server_address[1]}"
        relay.shutdown()
        thread.join()


def test_a_server_that_runs_already_is_joined_and_left(server, address, folder, others):
    options = VLLMServerOptions(address=address)
    joined = VLLMServerEngine(folder, device="cuda", options=options)

    joined.load_weights(others.items())
    joined.sleep()
    got = joined.generate(PROMPTS, SamplingParams(max_tokens=5, n=10))
    joined.close()

    assert [len(group) for group in got] == [10] * len(PROMPTS)
    _assert_exact(folder, others, got)
    assert server.generate(PROMPTS, SamplingParams(max_tokens=5))
    with pytest.raises(RuntimeError, match="closed"):
        joined.generate(PROMPTS, SamplingParams())


def _lives(process):
    # A zombie is dead; not every machine's first process buries it at once.
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_server_that_dies_is_reported_with_its_log_and_leaves_nothing(server):
    (process,) = psutil.Process(server._server.pid).children()
    others = process.children(recursive=True)
    assert others

    process.kill()
    with pytest.raises(RuntimeError, match=r"ended with status 137; its log ends with\n.*\S"):
        server.generate(PROMPTS, SamplingParams(max_tokens=5))
    server.close()

    last = time.monotonic() + 20
    while any(_lives(helper) for helper in others):
        assert time.monotonic() < last
    assert not server._folder.exists()
