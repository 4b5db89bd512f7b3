"""Results by row, where some rows were skipped and perhaps nobody asks for theirs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlvr_fast.ops.policy_rows import PolicyCall
from rlvr_fast.scored import ScoredTokens


@dataclass(frozen=True, kw_only=True)
class SkippedRows:
    """What it takes to score them, all of it detached."""

    hidden: Tensor
    """`[T, D]`, of all rows."""
    weight: Tensor
    bias: Tensor | None
    call: PolicyCall
    active: Tensor
    """`[T]` bool on the CPU; these are the others."""
    versions: tuple[int, ...]

    @staticmethod
    def of(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, call: PolicyCall, tokens: ScoredTokens
    ) -> "SkippedRows":
        """The rows that are not `tokens.active`."""
        assert tokens.active is not None
        return SkippedRows(
            hidden=hidden.detach(),
            weight=weight.detach(),
            bias=None if bias is None else bias.detach(),
            call=call,
            active=tokens.active,
            versions=_versions(hidden, weight, bias),
        )

    @property
    def index(self) -> Tensor:
        """`[n]` int64, beside the hidden states."""
        rows = (~self.active).nonzero().squeeze(1)
        return rows.to(self.hidden.device, non_blocking=True)

    @torch.no_grad()
    def score(self, index: Tensor) -> Tensor:
        """`[2, n]` logp and entropy.

        Raises:
            RuntimeError: if what they are made from has changed since.
        """
        if _versions(self.hidden, self.weight, self.bias) != self.versions:
            raise RuntimeError(
                "logp, entropy: rows without a gradient are scored when first asked for, wanted "
                "that before hidden or weight change, got it after; read them (or pass "
                "score_all=True) before the optimiser's step"
            )
        return self.call.score(self.hidden, self.weight, self.bias, index)


class RowResults:
    """`[4, T]`: logp, entropy, d(loss)/d(logp), advantage; of skipped rows the first two only once
    somebody asks.
    """

    def __init__(self, rows: Tensor, skipped: SkippedRows | None = None) -> None:
        self._rows, self._skipped = rows, skipped

    def complete(self) -> Tensor:
        """All of them; scores what was skipped. See `SkippedRows.score`."""
        if self._skipped is not None:
            index = self._skipped.index
            self._rows[:2].index_copy_(1, index, self._skipped.score(index))
            self._skipped = None
        return self._rows


def _versions(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if x is None or x.is_inference() else x._version for x in tensors)
