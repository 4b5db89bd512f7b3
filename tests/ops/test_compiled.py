"""`policy_loss` inside torch.compile: no graph break, the same numbers."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from rlvr_fast import objectives
from rlvr_fast.ops.group_advantages import GroupNormalisation, Scale
from rlvr_fast.ops.policy_loss import policy_loss
from rlvr_fast.scored import ScoredTokens

NUM_TOKENS, HIDDEN, VOCAB = 20, 8, 33
OBJECTIVES = {
    "clipped": objectives.ClippedSurrogate(),
    "other bounds, entropy": objectives.ClippedSurrogate(clip_low=0.1) + objectives.EntropyBonus(),
    "sequence": objectives.SequenceClippedSurrogate(),
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def head() -> tuple[Tensor, Tensor]:
    hidden, weight = torch.randn(NUM_TOKENS, HIDDEN), torch.randn(VOCAB, HIDDEN)
    return hidden.requires_grad_(), weight.requires_grad_()


def tokens() -> ScoredTokens:
    return ScoredTokens(
        targets=torch.randint(0, VOCAB, (NUM_TOKENS,)),
        weight=torch.rand(NUM_TOKENS),
        seq_offsets=torch.tensor([0, 3, 8, 14, 20]),
        group_offsets=torch.tensor([0, 2, 4]),
        rewards=torch.tensor([1.0, 0.0, 1.0, 1.0]),
        extras={"unread": torch.rand(NUM_TOKENS)},
    )


def step(hidden: Tensor, weight: Tensor, scored: ScoredTokens, objective: objectives.Objective):
    out = policy_loss(hidden * 2, weight, scored, objective, temperature=0.7)
    return 3 * out.loss, out.logp, out.entropy, out.metrics.entropy


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_a_full_graph_gives_the_eager_results(objective):
    hidden, weight = head()
    scored = tokens()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ours, eager = (f(hidden, weight, scored, objective) for f in (compiled, step))
    for a, b in zip(ours[:3], eager[:3], strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(
        *(torch.autograd.grad(out[0], (hidden, weight)) for out in (ours, eager)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_another_objective_is_not_mistaken_for_the_first():
    hidden, weight = head()
    scored = replace(tokens(), old_logp=torch.full((NUM_TOKENS,), -3.0))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for objective in OBJECTIVES.values():
        ours, eager = (f(hidden, weight, scored, objective)[0] for f in (compiled, step))
        torch.testing.assert_close(ours, eager)


def test_an_objective_may_be_made_inside():
    hidden, weight = head()
    scored = replace(tokens(), old_logp=torch.full((NUM_TOKENS,), -3.0))

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        objective = objectives.ClippedSurrogate(clip_high=7.0) + objectives.EntropyBonus(coef=0.5)
        return policy_loss(hidden, weight, scored, objective).loss

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, weight), run(hidden, weight))


def test_numbers_that_change_are_constants_and_equal_ones_compile_nothing():
    hidden, weight = head()
    scored = replace(tokens(), old_logp=torch.full((NUM_TOKENS,), -3.0))
    counter = CompileCounterWithBackend("aot_eager")

    def run(hidden: Tensor, objective: objectives.Objective, temperature: float) -> Tensor:
        return policy_loss(hidden, weight, scored, objective, temperature=temperature).loss

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for clip, temperature in ((0.1, 0.5), (0.2, 0.6), (0.3, 0.7)):
        objective = objectives.ClippedSurrogate(clip_high=clip)
        wanted = run(hidden, objective, temperature)
        torch.testing.assert_close(compiled(hidden, objective, temperature), wanted)
        before = counter.frame_count
        torch.testing.assert_close(compiled(hidden, replace(objective), temperature), wanted)
        assert counter.frame_count == before


def test_the_normalisation_is_heard():
    hidden, weight = head()
    scored, normalisation = tokens(), GroupNormalisation(scale=Scale.NONE)

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        objective = objectives.PolicyGradient()
        return policy_loss(hidden, weight, scored, objective, normalisation=normalisation).loss

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, weight), run(hidden, weight))


def test_autocast_around_it_counts():
    hidden, weight = head()
    scored = tokens()

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return policy_loss(hidden, weight, scored, objectives.ClippedSurrogate()).logp

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden, weight), run(hidden, weight))


def test_without_gradients_none_are_computed():
    hidden, weight = head()
    scored = tokens()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        loss, *_ = compiled(hidden, weight, scored, objectives.ClippedSurrogate())
    assert not loss.requires_grad


def test_a_gradient_buffer_is_refused():
    hidden, weight = head()
    scored, buffer = tokens(), torch.zeros(VOCAB, HIDDEN)

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        objective = objectives.ClippedSurrogate()
        return policy_loss(hidden, weight, scored, objective, weight_grad=buffer).loss

    with pytest.raises(Exception, match="weight_grad: wanted None inside"):
        torch.compile(run, fullgraph=True, backend="aot_eager")(hidden, weight)


def test_who_does_not_compile_does_not_import_the_compiler():
    code = "import sys; from rlvr_fast import policy_loss; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
