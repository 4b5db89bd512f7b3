from types import SimpleNamespace

import pytest
import torch
from vllm_here import needs_vllm

pytestmark = needs_vllm

ROWS, VOCAB = 12, 300
NO_PROCESSORS = SimpleNamespace(non_argmax_invariant=[], argmax_invariant=[])


@pytest.fixture(scope="module")
def sampler():
    from rlvr_fast.rollout.vllm_sampler import OneSweep

    return OneSweep("processed_logprobs")


def _metadata(temperatures, seed=0):
    """As vLLM describes a batch; requests without a temperature are greedy."""
    from vllm.v1.sample.metadata import SamplingMetadata

    greedy = not any(temperatures)
    nothing = torch.empty(0)
    return SamplingMetadata(
        temperature=None if greedy else torch.tensor(temperatures),
        all_greedy=greedy,
        all_random=all(temperatures),
        top_p=None,
        top_k=None,
        generators={
            row: torch.Generator().manual_seed(seed + row) for row in range(len(temperatures))
        },
        max_num_logprobs=0,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=nothing,
        presence_penalties=nothing,
        repetition_penalties=nothing,
        output_token_ids=[[] for _ in temperatures],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=NO_PROCESSORS,
    )


@pytest.mark.parametrize(
    "temperatures",
    [[1.0] * ROWS, [0.0] * ROWS, [0.5, 0.0, 2.0, 1.0] * 3],
    ids=["random", "greedy", "mixed"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logp_is_of_the_drawn_token_under_its_own_temperature(sampler, temperatures, dtype):
    logits = (4 * torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(1))).to(dtype)

    output = sampler(logits.clone(), _metadata(temperatures))

    tokens = output.sampled_token_ids.long()
    divisors = torch.tensor(temperatures).where(torch.tensor(temperatures) > 0, 1.0)
    wanted = (logits.double() / divisors[:, None]).log_softmax(-1).gather(1, tokens)
    logp = output.logprobs_tensors.logprobs.double()
    torch.testing.assert_close(logp, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(output.logprobs_tensors.logprob_token_ids, output.sampled_token_ids)
    greedy = torch.tensor(temperatures) == 0
    assert torch.equal(tokens[greedy, 0], logits[greedy].argmax(-1))


def test_each_row_draws_from_its_own_generator(sampler):
    logits = torch.zeros(2 * ROWS, VOCAB)
    metadata = _metadata([1.0] * (2 * ROWS))
    first, second = (sampler(logits, metadata).sampled_token_ids for _ in range(2))
    alone = _metadata([1.0] * ROWS, seed=ROWS)

    assert torch.equal(sampler(logits[ROWS:], alone).sampled_token_ids, first[ROWS:])
    assert len(set(first.flatten().tolist())) > ROWS
    assert (first != second).sum() > ROWS


def test_frequencies_are_the_probabilities_of_the_temperature(sampler):
    count, temperature = 20_000, 0.7
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, 0.5]])
    p = (logits / temperature).softmax(-1)[0]

    tokens = sampler(logits.expand(count, -1).clone(), _metadata([temperature] * count))

    found = torch.bincount(tokens.sampled_token_ids.flatten().long(), minlength=5) / count
    assert ((found - p).abs() < 4 * (p * (1 - p) / count).sqrt()).all()
