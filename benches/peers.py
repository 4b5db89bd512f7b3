"""How other people's packages are called; they are run as installed. Every import is in its use.

Each `build` function makes a `Step` out of a problem: loss, d_hidden, d_weight. Each `score`
function makes a call that returns log-probabilities and entropies (None: it has none).
"""

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benches.problems import HIGH, LOW, Problem, Solved, Step, differentiated
from benches.shapes import GROUP

Scores = tuple[Tensor, Tensor | None]
"""logp and entropy, `[T]` each."""
Score = Callable[[], Scores]

TRL_VOCAB_CHUNK = 32768
"""`_CHUNKED_LOGPROB_CHUNK_SIZE` of trl.trainer.utils."""


def attempt(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """What `call` returns, or None and the first line of its error.

    Any error: other people's packages fail in their own ways, and that is a result.
    """
    try:
        return call(), None
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        return None, f"{type(error).__name__}: {lines[0][:200]}"


def with_eager_loss(score: Callable[[Problem], Score]) -> Callable[[Problem], Step]:
    """The clipped surrogate in plain torch on what `score` computes, differentiated."""

    def build(given: Problem) -> Step:
        call = score(given)
        return lambda: differentiated(given.surrogate(call()[0]), given.hidden, given.weight)

    return build


def trl_score(given: Problem) -> Score:
    """The op with the vocabulary chunk and the outputs of TRL's trainer."""
    from trl.kernels import ChunkedLogProbFunction

    outputs, chunk = ("log_probs", "entropy"), TRL_VOCAB_CHUNK

    def score() -> Scores:
        head = (given.hidden, given.weight, None, given.targets, 1.0, chunk, None, 1.0, outputs)
        logp, entropy = ChunkedLogProbFunction.apply(*head)[:2]
        return logp, entropy

    return score


def liger_grpo(given: Problem, *, sequences_per_chunk: int = GROUP) -> Step:
    """The fused linear GRPO loss; its `loss_type="dapo"` is the mean over tokens. Padded."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    op = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=False,
        use_ref_model=False,
        chunk_size=sequences_per_chunk,
        epsilon_low=LOW,
        epsilon_high=HIGH,
        loss_type="dapo",
    )
    hidden = given.padded(given.hidden).requires_grad_()
    targets, old_logp = given.padded(given.targets), given.padded(given.old_logp)
    mask = given.padded(torch.ones_like(given.targets))

    def step() -> Solved:
        loss, _ = op(
            hidden, given.weight, targets, mask, given.advantage, old_per_token_logps=old_logp
        )
        loss, d_hidden, d_weight = differentiated(loss, hidden, given.weight)
        return loss, given.unpadded(d_hidden), d_weight

    return step


def liger_triton(given: Problem) -> Step:
    """The Triton loss on logits that lie ready, `[S, L + 1, V]`; with the GEMMs around it."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    hidden = F.pad(given.padded(given.hidden), (0, 0, 0, 1)).requires_grad_()
    targets, old_logp = given.padded(given.targets), given.padded(given.old_logp)
    mask = given.padded(torch.ones_like(given.targets))

    def step() -> Solved:
        loss, _ = triton_grpo_loss(
            hidden @ given.weight.t(),
            old_logp,
            None,
            targets,
            given.advantage,
            mask,
            temperature=1.0,
            beta=0.0,
            eps_low=LOW,
            eps_high=HIGH,
            loss_type="dapo",
            reduce=True,
        )
        loss, d_hidden, d_weight = differentiated(loss, hidden, given.weight)
        return loss, given.unpadded(d_hidden[:, :-1]), d_weight

    return step


def liger_scaled_score(given: Problem) -> Score:
    """The fused linear scaled cross-entropy: CuTe on Hopper, elsewhere a loop in torch."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    def score() -> Scores:
        nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
            given.hidden, given.weight, given.targets, 1.0, -100, 1, True
        )
        return -nll, entropy

    return score


def verl_torch_score(given: Problem) -> Score:
    """The default backend of its fused head: 512 tokens at a time in torch."""
    head = verl("verl.utils.experimental.torch_functional").FusedLinearForPPO(impl_backend="torch")

    def score() -> Scores:
        logp, entropy = head(given.hidden, given.weight, given.targets)
        return logp, entropy

    return score


def verl_triton_score(given: Problem) -> Score:
    op = verl("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy

    def score() -> Scores:
        logp, entropy = op(given.hidden, given.weight, given.targets, 1.0, "none", None)
        return logp, entropy

    return score


def verl(module: str) -> Any:
    """A module of verl without the `__init__` of the packages around it, which want Ray."""
    if "verl" not in sys.modules:
        spec = importlib.util.find_spec("verl")
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError("No module named 'verl'")
        (root,) = spec.submodule_search_locations
        for name in ("verl", "verl.utils"):
            package = sys.modules[name] = ModuleType(name)
            package.__path__ = [root + name.removeprefix("verl").replace(".", "/")]
    return importlib.import_module(module)


def cut_score(given: Problem) -> Score:
    """Apple's cut cross-entropy, per token; it has no entropy."""
    from cut_cross_entropy import linear_cross_entropy

    kind = "cce" if given.hidden.is_cuda else "torch_compile"

    def score() -> Scores:
        nll = linear_cross_entropy(
            given.hidden, given.weight, given.targets, reduction="none", impl=kind
        )
        return -nll.float(), None

    return score


def torch_cross_entropy(given: Problem) -> Step:
    """torch's own chunked head for plain cross-entropy, with its automatic options."""
    from torch.nn import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions()

    def step() -> Solved:
        loss = F.linear_cross_entropy(given.hidden, given.weight, given.targets, options=options)
        return differentiated(loss, given.hidden, given.weight)

    return step


def quack_cross_entropy(given: Problem) -> Step:
    """QuACK's chunked head for plain cross-entropy."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def step() -> Solved:
        loss = chunked_linear_cross_entropy(given.hidden, given.weight, given.targets)
        return differentiated(loss, given.hidden, given.weight)

    return step
