from dataclasses import replace

import pytest
import torch

from rlvr_fast import config as configs
from rlvr_fast import memory, models
from rlvr_fast.attention import hidden_states
from rlvr_fast.packed import Sample, pack
from rlvr_fast.run import train


def needs(**overrides):
    config = configs.load("tiny", {"run_folder": "unused", **overrides})
    model, _ = models.load(models.resolve(config.model))
    return config, model, memory.estimate(config, model, prompt_tokens=5)


def test_weights_and_optimiser_are_counted_to_the_byte():
    _, model, found = needs(engine_precision="bf16")

    count = sum(p.numel() for p in model.parameters())
    assert found.weights == 4 * count
    assert found.optimiser == 12 * count
    matrices = [p for layer in model.model.layers for p in layer.parameters() if p.ndim == 2]
    assert found.engine == 2 * (count + sum(p.numel() for p in matrices))
    assert needs(engine_precision="bf16", engine="vllm")[2].engine == 2 * count
    assert needs(engine="vllm-server")[2].engine == 0
    assert needs(engine_precision="fp32")[2].engine == 4 * count


def test_a_reference_is_a_second_copy_of_the_weights():
    assert needs(kl_coef=0.1)[2].weights == 2 * needs()[2].weights


def test_activations_grow_with_the_micro_batch_until_that_holds_everything():
    sizes = [needs(tokens_per_microbatch=n)[2].activations for n in (100, 200, 10_000, 20_000)]

    assert sizes[1] == pytest.approx(2 * sizes[0])
    assert sizes[2] == sizes[3] > sizes[1]


def test_the_activations_are_those_that_autograd_keeps():
    _, model, found = needs(tokens_per_microbatch=64)
    packed = pack([[Sample(prompt_ids=[1] * 63, completion_ids=[1])]])
    kept = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = hidden_states(model, packed)

    truth = sum(size for pointer, size in kept.items() if pointer not in own)
    assert output.requires_grad
    assert found.activations == pytest.approx(truth, rel=0.2)


def test_a_run_writes_as_many_bytes_as_are_estimated(tmp_path):
    config, _, found = needs(run_folder=str(tmp_path / "run"), steps=3, checkpoint_every=1)
    train(config)

    tensors = [file.stat().st_size for file in (tmp_path / "run").rglob("*.safetensors")]
    one = found.optimiser  # A checkpoint: weights and two moments.
    assert sum(tensors) + one == pytest.approx(found.files, rel=0.1)


def test_a_disk_that_is_too_small_is_said():
    config, _, found = needs()

    _, warning = replace(found, disk=1000).lines(config)

    assert "disk" in warning
    assert "keep_checkpoints" in warning


def test_what_will_not_fit_is_said_with_the_fields_to_lower():
    config, _, found = needs()

    (line,) = found.lines(config)
    _, warning = replace(found, available=1000).lines(config)

    assert line.startswith("memory, estimated: weights 0.00, optimiser 0.00")
    assert warning.startswith("this will hardly fit: lower tokens_per_microbatch, 8192")


def test_memory_that_runs_out_names_the_fields_to_lower():
    with (
        pytest.raises(MemoryError, match=r"^out of memory in update: lower tokens_per_microbatch"),
        memory.explained("update"),
    ):
        torch.empty(1 << 50, dtype=torch.uint8)


def test_another_error_stays_as_it_is():
    with pytest.raises(RuntimeError, match=r"^shape"), memory.explained("generate"):
        torch.zeros(3).view(2)
