"""What an engine samples, against one forward pass of transformers' own over all of it."""

import torch


def stock_logits(model, prompt, completion):
    """The logits that predict a completion."""
    logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
    return logits[len(prompt) - 1 : -1]


@torch.no_grad()
def stock_logp(model, prompt, completion, *, temperature=1.0, tokens=None):
    """Of a completion's tokens; only the first `tokens` ids can be sampled, if that is said."""
    logits = stock_logits(model, prompt, completion)[:, :tokens] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def assert_samples_of(model, prompts, groups, *, rtol=1e-4, atol=1e-4, **settings):
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            wanted = stock_logp(model, prompt, completion.token_ids, **settings)
            torch.testing.assert_close(torch.tensor(completion.logp), wanted, rtol=rtol, atol=atol)
