import os
import random
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from sampled import assert_samples_of
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from vllm_here import needs_vllm

from rlvr_fast import models
from rlvr_fast.rollout import SamplingParams, vllm_guard
from rlvr_fast.rollout.vllm import VLLMEngine
from rlvr_fast.rollout.vllm_options import VLLMOptions, VLLMServerOptions
from rlvr_fast.rollout.vllm_server import VLLMServerEngine

PROMPTS = [[5, 9, 33], [7], [8, 60, 61, 62, 63, 64, 65, 66]]
SMALL = VLLMOptions(kv_cache_gib=0.05)
PATCHABLE = [torch, torch.cuda, torch.accelerator, torch.Tensor]
CONNECTIONS: list[object] = []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With heads of 32, the narrowest that vLLM has on a CPU."""
    folder = models.tiny(tmp_path_factory.mktemp("vllm") / "tiny")
    config = AutoConfig.from_pretrained(folder)
    config.head_dim = 32
    torch.manual_seed(3)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _callables():
    return {
        (owner, name): value
        for owner in PATCHABLE
        for name, value in vars(owner).items()
        if callable(value)
    }


def _surroundings():
    """By name, hashed where only equality is of interest."""
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "PYTEST_"))}
    return {
        "Python's random numbers": hash(random.getstate()),
        "NumPy's": hash(np.random.get_state()[1].tobytes()),
        "NumPy's position": np.random.get_state()[2],
        "torch's": hash(torch.get_rng_state().numpy().tobytes()),
        "threads": torch.get_num_threads(),
        "the function that sets them": torch.set_num_threads,
        **outside,
    }


@needs_vllm
def test_the_process_is_as_before_while_the_engine_lives_and_after(folder):
    import vllm  # noqa: F401  (what its import changes is not the engine's doing)

    torch.set_num_threads(2)
    before, callables = _surroundings(), _callables()
    sys.addaudithook(
        lambda event, arguments: (
            CONNECTIONS.append(arguments) if event == "socket.connect" else None
        )
    )

    engine = VLLMEngine(folder, dtype=torch.float32, options=SMALL)
    during = _surroundings()
    engine.generate(PROMPTS, SamplingParams(max_tokens=4, n=2))
    generated = _surroundings()
    engine.close()

    torch.set_num_threads(1)
    assert during == generated == before
    after = _callables()
    assert {place for place, value in callables.items() if after[place] is not value} == set()
    assert not torch.distributed.is_initialized()
    assert CONNECTIONS == []


@needs_vllm
def test_reloaded_weights_give_what_a_fresh_engine_gives(folder, tmp_path):
    sampling = SamplingParams(max_tokens=10, n=4)
    torch.manual_seed(4)
    other = LlamaForCausalLM(AutoConfig.from_pretrained(folder))
    other.save_pretrained(models.tiny(tmp_path / "other"))

    engine = VLLMEngine(folder, options=SMALL)
    before = engine.generate(PROMPTS, sampling)
    engine.load_weights(other.named_parameters())
    reloaded = engine.generate(PROMPTS, sampling)
    engine.close()
    fresh = VLLMEngine(tmp_path / "other", options=SMALL)
    wanted = fresh.generate(PROMPTS, sampling)
    fresh.close()

    assert reloaded == wanted
    assert reloaded != before


@needs_vllm
def test_a_16_bit_model_with_an_fp32_head_stays_close_to_the_exact_model(folder):
    exact = AutoModelForCausalLM.from_pretrained(folder)
    engine = VLLMEngine(folder, head_dtype=torch.float32, options=SMALL)
    got = engine.generate(PROMPTS, SamplingParams(max_tokens=12, n=4))
    engine.close()

    assert_samples_of(exact, PROMPTS, got, rtol=0, atol=0.01)


@needs_vllm
@pytest.mark.parametrize("most", [1, 5, 256])
def test_samples_share_their_prompt_whatever_part_of_a_block_it_fills(folder, monkeypatch, most):
    from rlvr_fast.rollout.vllm_siblings import SiblingBlocks

    copied, copy = [], SiblingBlocks.wait_for_layer_load

    def counted(self, layer_name):
        copied.append(len(self._connector_metadata.targets))
        copy(self, layer_name)

    monkeypatch.setattr(SiblingBlocks, "wait_for_layer_load", counted)
    lengths = [1, 2, 31, 32, 33, 34, 63, 64, 65, 34]
    prompts = [[(7 * place + length) % 100 for place in range(length)] for length in lengths]
    options = VLLMOptions(kv_cache_gib=0.05, max_num_seqs=most)
    engine = VLLMEngine(folder, dtype=torch.float32, options=options)
    groups = engine.generate(prompts, SamplingParams(n=4, max_tokens=5))
    engine.close()

    exact = AutoModelForCausalLM.from_pretrained(folder)
    assert_samples_of(exact, prompts, groups, rtol=0, atol=1e-5)
    if most == 1:
        assert set(copied) == {0}
    elif most == 256:
        # Of 4 samples 3, where more is left than the last token; of the equal prompts 7 of 8.
        assert max(copied) == 3 * 5 + 7


@needs_vllm
def test_samples_that_vllm_puts_back_for_want_of_cache_are_right(folder, monkeypatch):
    from vllm.v1.core.sched.scheduler import Scheduler

    put_back, preempt = [], Scheduler._preempt_request

    def counted(self, request, *arguments, **named):
        put_back.append(request)
        return preempt(self, request, *arguments, **named)

    monkeypatch.setattr(Scheduler, "_preempt_request", counted)
    prompts = [[(7 * at + length) % 100 for at in range(length)] for length in (5, 31, 40, 64, 70)]
    options = VLLMOptions(kv_cache_gib=0.0013, max_model_len=256)
    engine = VLLMEngine(folder, dtype=torch.float32, options=options)
    groups = engine.generate(prompts, SamplingParams(n=6, max_tokens=60))
    engine.close()

    assert put_back
    exact = AutoModelForCausalLM.from_pretrained(folder)
    assert_samples_of(exact, prompts, groups, rtol=0, atol=1e-5)


@needs_vllm
def test_a_process_has_one_engine_at_a_time_and_a_closed_one_does_nothing(folder):
    engine = VLLMEngine(folder, options=SMALL)
    with pytest.raises(RuntimeError, match="close the other engine first"):
        VLLMEngine(folder, options=SMALL)
    assert engine.generate(PROMPTS, SamplingParams(max_tokens=2))
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate(PROMPTS, SamplingParams())


@needs_vllm
def test_a_model_or_device_that_vllm_has_not_is_refused(folder):
    with pytest.raises(ValueError, match="max_model_len: wanted 2 to 512, got 513"):
        VLLMEngine(folder, options=VLLMOptions(max_model_len=513))
    with pytest.raises(ValueError, match="device: wanted cpu, for which this vLLM was built"):
        VLLMEngine(folder, device="cuda:1")
    with pytest.raises(ValueError, match=r"head_dtype: wanted torch\.bfloat16 or torch\.float32"):
        VLLMEngine(folder, head_dtype=torch.float16)
    VLLMEngine(folder, options=SMALL).close()


def test_without_vllm_the_engine_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install 'rlvr-fast\[vllm\]'"):
        VLLMEngine(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gpu_memory_utilization", 1.5),
        ("kv_cache_gib", 0.0),
        ("max_num_seqs", 0),
        ("address", "localhost:8000"),
        ("start_seconds", 0.0),
    ],
)
def test_options_outside_their_range_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"{field}: wanted .*got {value}"):
        VLLMServerOptions(**{field: value})


def test_an_address_without_a_server_is_refused(folder):
    with pytest.raises(ValueError, match="address: wanted a server by 'VLLM_SERVER_DEV_MODE=1"):
        VLLMServerEngine(folder, options=VLLMServerOptions(address="http://127.0.0.1:9"))


SERVER = """
import signal, subprocess, sys, time
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # as vLLM, without a thought of its helper
open(sys.argv[1], "w").write(str(helper.pid))
time.sleep(600)
"""
PARENT = """
import os, subprocess, sys, time
guard = subprocess.Popen([sys.executable, sys.argv[1], str(os.getpid()), *sys.argv[2:]])
time.sleep(600)
"""


@pytest.mark.parametrize("end", ["kill", "terminate"])
def test_a_server_and_its_helpers_end_with_a_process_that_is_killed(tmp_path, end):
    folder, note = tmp_path / "folder", tmp_path / "note"
    folder.mkdir()
    guarded = [str(folder), sys.executable, "-c", SERVER, str(note)]
    parent = subprocess.Popen([sys.executable, "-c", PARENT, vllm_guard.__file__, *guarded])
    _wait(lambda: note.exists() and note.read_text())
    family = psutil.Process(parent.pid).children(recursive=True)
    assert int(note.read_text()) in {process.pid for process in family}

    getattr(parent, end)()
    parent.wait()

    _wait(lambda: not any(_lives(process) for process in family))
    _wait(lambda: not folder.exists())


def _lives(process):
    # A zombie is dead; not every machine's first process buries it at once.
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait(condition):
    last = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < last
        time.sleep(0.02)


def test_a_guard_ends_its_server_when_told_to_and_keeps_the_folder(tmp_path):
    note = tmp_path / "note"
    guarded = [str(tmp_path), sys.executable, "-c", SERVER, str(note)]
    guard = subprocess.Popen([sys.executable, vllm_guard.__file__, str(os.getpid()), *guarded])
    _wait(lambda: note.exists() and note.read_text())
    family = psutil.Process(guard.pid).children(recursive=True)

    guard.terminate()

    assert guard.wait() == 0
    _wait(lambda: not any(_lives(process) for process in family))
    assert tmp_path.exists()
