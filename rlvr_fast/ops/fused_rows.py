"""A tile of rows from logits to gradient in one kernel, with the traced objective inside.

CUDA only: elsewhere `row_stats`, the objective in plain torch and `row_grad` do the same.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlvr_fast import tuning
from rlvr_fast.ops.group_advantages import GroupNormalisation
from rlvr_fast.tracing.objective import Objective
from rlvr_fast.tracing.tokens import TokenFields
from rlvr_fast.tracing.trace import Traced
from rlvr_fast.tracing.triton_source import device_function


@dataclass(frozen=True, kw_only=True)
class GroupRewards:
    """From a row to the rewards of its group; all on the device of the logits."""

    rewards: Tensor
    """`[S]`; NaN marks a sequence nobody could score."""
    group_offsets: Tensor
    """`[G+1]` int64."""
    seq_of_token: Tensor
    """`[t]` int32 or int64."""
    group_of_seq: Tensor
    """`[S]` int32 or int64."""
    normalisation: GroupNormalisation

    def arguments(self) -> tuple[Any, ...]:
        return (
            self.rewards.contiguous(),
            self.group_offsets.contiguous(),
            self.seq_of_token.contiguous(),
            self.group_of_seq.contiguous(),
            float(self.normalisation.ddof),  # a whole number would be compiled in
            self.normalisation.eps,
        )


def fused_rows(
    logits: Tensor,
    targets: Tensor,
    fields: TokenFields,
    groups: GroupRewards | None,
    objective: Objective,
    traced: Traced,
    *,
    scale: float,
    cap: float,
    out: Tensor | None,
) -> Tensor:
    """Statistics, token loss and coefficients of each row; its gradient goes to `out`.

    Args:
        logits: `[t, V]` fp32, bf16 or fp16, rows contiguous (any row stride).
        targets: `[t]` int64, each in `[0, V)`; not checked.
        fields: of these rows. Without `old_logp` the row's own logp takes its place.
        groups: makes the advantage from the group's rewards when `fields` has none.
        objective: its floats become kernel arguments.
        traced: `trace(objective)`, of any objective of the same structure.
        scale, cap: see `LogitTransform`.
        out: `[t, V]`, any float dtype and row stride: d(sum(weight * token_loss)) / d(logits). May
            be `logits`, or the front of the same rows in a narrower dtype. None: not wanted.

    Returns:
        `[6, t]` fp32: logp, entropy, token loss (before the weight, 0 where masked), its
        derivatives with respect to logp and to the entropy, times the weight, and the advantage
        (0 where masked, or if the objective reads none).

    Raises:
        ValueError: for a field that the objective reads and that is missing.

    Cost: one read of the logits; with `out` a second one, and one write. No host sync.
    """
    from rlvr_fast.kernels.launch import launch
    from rlvr_fast.kernels.policy_loss import policy_loss_kernel

    num_tokens, vocab_size = logits.shape
    results = torch.empty(6, num_tokens, dtype=torch.float32, device=logits.device)
    others = [_wanted(name, getattr(fields, name)) for name in traced.other_fields]
    others += [_wanted(f"extras[{name!r}]", fields.extras.get(name)) for name in traced.extras]
    advantage = fields.advantage if "advantage" in traced.reads else None
    if "advantage" in traced.reads and advantage is None:
        groups = _wanted("advantage (or rewards with both offsets)", groups)
    else:
        groups = None
    if num_tokens == 0:
        return results
    launch(policy_loss_kernel, num_tokens)(
        logits,
        targets.contiguous(),
        out,
        results,
        num_tokens,
        vocab_size,
        logits.stride(0),
        0 if out is None else out.stride(0),
        (scale, cap),
        _contiguous(fields.old_logp if "old_logp" in traced.reads else None),
        _contiguous(advantage),
        tuple(x.contiguous() for x in (fields.weight, *others)),
        traced.scalars(objective) or (0.0,),  # an empty tuple is no kernel argument
        None if groups is None else groups.arguments(),
        OBJECTIVE=device_function(traced.source),
        ENTROPY=traced.reads_entropy,
        KIND=None if groups is None else groups.normalisation.scale.value,
        HAS_CAP=cap > 0,
        **tuning.row_launch("fused", vocab_size, logits.dtype, logits.device),
    )
    return results


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _wanted(name: str, value: Any) -> Any:
    if value is None:
        raise ValueError(f"this objective reads {name}: wanted it in ScoredTokens, got None")
    return value
