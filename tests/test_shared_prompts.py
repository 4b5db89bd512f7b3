"""The whole update with shared prompts, against stock transformers on one sequence at a time."""

import random

import pytest
import torch
from small_models import KINDS, VOCABULARY, model_of
from torch import Tensor

from rlvr_fast import attention
from rlvr_fast.objectives import ClippedSurrogate
from rlvr_fast.ops.policy_loss import policy_loss
from rlvr_fast.packed import Sample, pack

CLIP = 0.2
LIMIT = 1e-5
"""Relative. In an fp64 model it would be no less: transformers computes its norms in fp32."""


def groups_of(seed, common):
    """Two to five groups of one to five samples; lengths from one token, completions from none.

    All prompts begin with the same `common` tokens.
    """
    draw = random.Random(seed)

    def sample(prompt):
        length = draw.choice([0, 1, 1, draw.randint(2, 9)])
        return Sample(
            prompt_ids=prompt,
            completion_ids=[draw.randrange(VOCABULARY) for _ in range(length)],
            token_weight=draw.uniform(0.5, 2.0),
            advantage=draw.gauss(0, 1),
            # Near the model's own, so that some ratios are clipped and some are not.
            old_logp=[draw.gauss(-4.0, 0.7) for _ in range(length)],
        )

    system = [draw.randrange(VOCABULARY) for _ in range(common)]
    prompts = [
        system
        + [draw.randrange(VOCABULARY) for _ in range(draw.choice([1, 2, draw.randint(3, 12)]))]
        for _ in range(draw.randint(1, 4))
    ]
    groups = [[sample(prompt) for _ in range(draw.randint(1, 5))] for prompt in prompts]
    rare = [
        Sample(prompt_ids=[*system, 3], completion_ids=[n] * n, advantage=1.0, old_logp=[-4.0] * n)
        for n in (1, 0, 6)
    ]
    alike = [[5, 6, 5], [5, 6, 5], [5, 6], [5, 6, 5, 5, 6], [5, 6, 8], [6], []]
    one_beginning = [[5, 6, 7, 8], [5, 6, 7, 9, 9], [5, 6], [5, 6, 4, 4]]
    written = [
        [
            Sample(
                prompt_ids=[*system, 4],
                completion_ids=ids,
                token_weight=draw.uniform(0.5, 2.0),
                advantage=draw.gauss(0, 1),
                old_logp=[draw.gauss(-4.0, 0.7) for _ in ids],
            )
            for ids in group
        ]
        for group in (alike, one_beginning)
    ]
    return [*groups, rare, *written]


def stock(model, sample):
    """Hidden states that predict the completion, and the sample's loss by its definition."""
    tokens = torch.tensor([[*sample.prompt_ids, *sample.completion_ids]])
    hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state[0]
    first = len(sample.prompt_ids) - 1
    hidden = hidden[first : first + len(sample.completion_ids)]
    logp = model.lm_head(hidden).log_softmax(-1)
    logp = logp[torch.arange(len(logp)), torch.tensor(sample.completion_ids, dtype=torch.int64)]
    ratio = (logp - torch.tensor(sample.old_logp)).exp()
    surrogate = torch.minimum(
        ratio * sample.advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * sample.advantage
    )
    return hidden, -sample.token_weight * surrogate.sum()


def ours(model, groups):
    packed = pack(groups)
    hidden = attention.hidden_states(model, packed).index_select(0, packed.hidden_index)
    objective = ClippedSurrogate(clip_low=CLIP, clip_high=CLIP)
    return hidden, policy_loss(hidden, model.lm_head.weight, packed.scored, objective).loss


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).detach().norm() / wanted.detach().norm())


# Newer transformers call it activation checkpointing; older ones know this name only.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("common", [0, 15], ids=["", "common beginning"])
def test_an_update_is_that_of_repeated_prompts_through_stock_attention(kind, seed, common):
    groups, plain, model = groups_of(seed, common), model_of(kind), model_of(kind)
    assert pack(groups).prefix_length >= common
    plain.set_attn_implementation("eager")
    samples = [sample for group in groups for sample in group]
    rows, losses = zip(*(stock(plain, sample) for sample in samples), strict=True)
    wanted = gradients(plain, torch.stack(losses).sum())

    hidden, loss = ours(model, groups)
    got = gradients(model, loss)
    model.gradient_checkpointing_enable()
    again = gradients(model, ours(model.train(), groups)[1])

    assert distance(hidden, torch.cat(rows)) < LIMIT
    assert distance(loss, torch.stack(losses).sum()) < LIMIT
    for name, gradient in wanted.items():
        assert distance(got[name], gradient) < LIMIT, name
        assert distance(again[name], gradient) < LIMIT, name
