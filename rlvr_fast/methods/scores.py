"""What a method may ask of the models that are trained and that training started from."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor

from rlvr_fast.methods.rollouts import Groups
from rlvr_fast.ops.token_statistics import TokenStatistics
from rlvr_fast.packed import Packed

Value = TypeVar("Value")


class Scores(NamedTuple):
    """Of the tokens of one completion, `[t]` fp32 on the CPU each; see `TokenStatistics`."""

    logp: Tensor
    entropy: Tensor
    mean_logit: Tensor
    logsumexp: Tensor
    sum_squared_prob: Tensor
    kept_mass: Tensor
    max_prob: Tensor


class Scorer(Protocol):
    """Forward passes without gradients, with the weights of the moment.

    Each call costs one forward pass of the trunk and 2 T D V flops of the head for all that it is
    given. All ranks of a run call it together, and each makes the whole pass.
    """

    @property
    def step(self) -> int:
        """Of training, from 1."""

    @property
    def steps(self) -> int:
        """Of the whole run."""

    @property
    def temperature(self) -> float:
        """Of sampling, and of the log-probabilities that are trained."""

    @property
    def updates(self) -> int:
        """Optimiser updates on each batch."""

    def rollouts(
        self,
        groups: Groups,
        *,
        reference: bool = False,
        min_p: float = 0.0,
        temperature: float | None = None,
    ) -> list[list[Scores]]:
        """The completions after their `train_prompt_ids`, in the same nesting.

        Args:
            groups: any rollouts.
            reference: under the frozen initial model, which the method's `needs_reference` keeps.
            min_p: of `kept_mass`.
            temperature: instead of the config's.
        """

    def prompts(self, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        """`[n - 1]` fp32 each: the log-probability of every token but the first, nats."""

    def hidden(self, groups: Groups, reduce: Callable[[Tensor], Value]) -> list[list[Value]]:
        """`reduce` of each completion's `[t, D]` fp32 hidden states, on the model's device, taken
        after the final norm where each token is predicted.
        """

    def statistics(
        self, packed: Packed, *, reference: bool = False, min_p: float = 0.0
    ) -> TokenStatistics:
        """`[T]` each, beside the pack's scored tokens."""
