"""One objective on some rows: from row statistics to losses and coefficients, in plain torch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlvr_fast.scored import ScoredTokens
from rlvr_fast.tracing.level import Level
from rlvr_fast.tracing.objective import Objective
from rlvr_fast.tracing.tokens import Segments, TokenFields, Tokens


@dataclass(frozen=True, kw_only=True)
class ObjectiveRows:
    """What an objective says of `t` rows; each field is `[t]`."""

    token_loss: Tensor
    """Before the weight; 0 where masked."""
    dlogp: Tensor
    """d(sum(weight * token_loss)) / d(logp)."""
    dentropy: Tensor | None
    """The same for the entropy; None if the objective does not read it."""


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """Where sequences and groups begin, as token offsets on the CPU; None if nobody looks."""

    seq: Tensor | None = None
    """`[S+1]`."""
    group: Tensor | None = None
    """`[G+1]`."""

    @staticmethod
    def of(tokens: ScoredTokens, level: Level) -> "Segmentation":
        """What an objective of this level may look at."""
        seq, group = tokens.seq_offsets, tokens.group_offsets
        if level is Level.TOKEN:
            return Segmentation()
        if level is Level.SEQUENCE or seq is None or group is None:
            return Segmentation(seq=seq)
        return Segmentation(seq=seq, group=seq[group])

    def view(self, logp: Tensor, entropy: Tensor, fields: TokenFields, rows: slice) -> Tokens:
        """What an objective sees of `rows`, which lie at whole segments."""
        kept = fields.weight != 0
        seq, group = segments(self.seq, rows, kept), segments(self.group, rows, kept)
        return Tokens(logp, entropy, fields, seq, group)


def token_fields(tokens: ScoredTokens, advantage: Tensor | None) -> TokenFields:
    """All `[T]` fields, with `advantage [T]` in place of the tokens' own."""
    return TokenFields(
        weight=tokens.weight,
        old_logp=tokens.old_logp,
        ref_logp=tokens.ref_logp,
        rollout_logp=tokens.rollout_logp,
        advantage=advantage,
        extras=tokens.extras,
    )


def sliced(fields: TokenFields, rows: slice, dtype: torch.dtype) -> TokenFields:
    """The same fields for some rows only."""

    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[rows].to(dtype)

    return TokenFields(
        weight=fields.weight[rows].to(dtype),
        old_logp=cut(fields.old_logp),
        ref_logp=cut(fields.ref_logp),
        rollout_logp=cut(fields.rollout_logp),
        advantage=cut(fields.advantage),
        extras={name: value[rows].to(dtype) for name, value in fields.extras.items()},
    )


def masked_loss(objective: Objective, tokens: Tokens) -> Tensor:
    """`[t]`, 0 where masked.

    Raises:
        ValueError: for a token loss of another shape, or a field the objective wants and lacks.
    """
    token_loss = objective.token_loss(tokens)
    if not isinstance(token_loss, Tensor) or token_loss.shape != tokens.logp.shape:
        got = list(token_loss.shape) if isinstance(token_loss, Tensor) else type(token_loss)
        raise ValueError(
            f"{type(objective).__name__}.token_loss: wanted {list(tokens.logp.shape)}, got {got}"
        )
    return torch.where(tokens.kept, token_loss, torch.zeros_like(token_loss))


def evaluate(
    objective: Objective, stats: Tensor, fields: TokenFields, cut: Segmentation, rows: slice
) -> ObjectiveRows:
    """Runs the objective on `rows` and differentiates it with autograd. O(t) work.

    Args:
        stats: `[4, t]` from `row_stats`.
        fields: of these rows only.

    Raises:
        ValueError: as `masked_loss`.
    """
    with torch.enable_grad():
        logp, entropy = (x.detach().requires_grad_() for x in stats[:2])
        token_loss = masked_loss(objective, cut.view(logp, entropy, fields, rows))
        total = (fields.weight * token_loss).sum()
        if not total.requires_grad:
            zeros = torch.zeros_like(logp)
            return ObjectiveRows(token_loss=token_loss, dlogp=zeros, dentropy=None)
        dlogp, dentropy = torch.autograd.grad(total, (logp, entropy), allow_unused=True)
    return ObjectiveRows(
        token_loss=token_loss.detach(),
        dlogp=torch.zeros_like(logp) if dlogp is None else dlogp,
        dentropy=dentropy,
    )


def segments(offsets: Tensor | None, rows: slice, kept: Tensor) -> Segments | None:
    """Segments of `rows`, which lie at whole segments of `offsets` (tokens, on the CPU)."""
    if offsets is None:
        return None
    first, last = torch.searchsorted(offsets, torch.tensor([rows.start, rows.stop])).tolist()
    lengths = offsets[first : last + 1].diff().to(kept.device, non_blocking=True)
    index = torch.arange(last - first, device=kept.device).repeat_interleave(
        lengths, output_size=rows.stop - rows.start
    )
    return Segments(index=index, count=last - first, kept=kept)
