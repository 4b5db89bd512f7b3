"""Random models of transformers' own classes, which a test builds in milliseconds."""

import torch
import transformers

VOCABULARY = 50
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # Five times the usual, so that attention is far from uniform.
    "initializer_range": 0.1,
}
KINDS = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 16, "num_key_value_heads": 1},
}


def model_of(kind, seed=0):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**SIZES | KINDS[kind])
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()
