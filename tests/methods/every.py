"""Optimisers of every registered method, and batches with right and wrong answers for them."""

from functools import cache

import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from benches import drawn
from rlvr_fast import config as configs
from rlvr_fast import models
from rlvr_fast.methods import METHODS, method
from rlvr_fast.optimise import Optimiser
from rlvr_fast.tasks import Example

EXAMPLES = [
    Example(prompt, columns=drawn.COLUMNS, samples=samples)
    for prompt, samples in (("3+4=", 4), ("12+30=", 3), ("1+2+3+4+5=", 3))
]
SEED, NEXT_SEED, SHORT_SEED = 9, 11, 2
"""Of completions some of which are right and some wrong, whatever the prompt."""
every_method = pytest.mark.parametrize("name", METHODS)


@cache
def model_and_tokenizer():
    """Of random weights large enough for log-probabilities that differ."""
    model, tokenizer = models.load(models.resolve("tiny"))
    moved(model, seed=1)
    return model, tokenizer


@cache
def reference():
    model, _ = models.load(models.resolve("tiny"))
    moved(model, seed=2)
    return model.requires_grad_(False)


@torch.no_grad()
def moved(model, *, seed, by=0.1):
    draw = torch.Generator().manual_seed(seed)
    weights = parameters_to_vector(model.parameters())
    vector_to_parameters(
        weights + by * torch.randn(len(weights), generator=draw), model.parameters()
    )


def optimiser(name, **overrides):
    kind = METHODS[name]
    values = {
        "model": "tiny",
        "task": "addition",
        "method": name,
        "method_options": drawn.needed_options(kind),
        "run_folder": "unused",
        "precision": "fp32",
        "max_completion_tokens": 8,
        "updates_per_batch": 1 if kind.on_policy_only else 2,
    }
    config = configs.from_values(values, overrides)
    model, tokenizer = model_and_tokenizer()
    chosen = method(name, config.method_options)
    return Optimiser(config, chosen, model, reference(), vocab_size=len(tokenizer))


def collected(made, seed=SEED, longest=7):
    tokenizer = model_and_tokenizer()[1]
    on = drawn.context(EXAMPLES, tokenizer, samples=3, lengths=(1, longest), seed=seed)
    return drawn.verified(made._method, on)
