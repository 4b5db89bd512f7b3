"""Advantages of the sequences of a group: their rewards, centred and scaled within the group.

The formulas stand in `kernels/group_advantages.py`.
"""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class Scale(Enum):
    """What a centred reward is multiplied by."""

    STD = 0
    """`1 / (std + eps)`: 2402.03300, section 4.1.2."""
    NONE = 1
    """1: 2503.20783."""
    LEAVE_ONE_OUT = 2
    """`n / (n - 1)`, which centres on the mean of the others: 2402.14740."""


@dataclass(frozen=True, kw_only=True)
class GroupNormalisation:
    """How rewards become advantages.

    Raises:
        ValueError: for another ddof than 0 or 1, or a negative eps.
    """

    scale: Scale = Scale.STD
    ddof: int = 1
    """1 divides the variance by n - 1, 0 by n; `Scale.STD` only."""
    eps: float = 1e-6
    """Added to the standard deviation; `Scale.STD` only."""

    def __post_init__(self) -> None:
        if self.ddof not in (0, 1):
            raise ValueError(f"ddof: wanted 0 or 1, got {self.ddof}")
        if not 0 <= self.eps < float("inf"):
            raise ValueError(f"eps: wanted finite and not negative, got {self.eps}")


DEFAULT = GroupNormalisation()


def group_advantages(
    rewards: Tensor, group_offsets: Tensor, *, normalisation: GroupNormalisation = DEFAULT
) -> Tensor:
    """The advantage of each sequence over its group.

    Args:
        rewards: `[S]` floating point; NaN marks a sequence nobody could score, which is left out
            of its group's statistics.
        group_offsets: `[G+1]` int64 on the same device, ascending from 0 to S; not checked on CUDA.
        normalisation: see `GroupNormalisation`.

    Returns:
        `[S]` fp32 (fp64 for fp64 rewards). Exactly 0 for NaN rewards and for groups with fewer
        than two scored sequences or with equal rewards. Not differentiable.

    Raises:
        ValueError: for a shape, dtype, device or offsets other than these.
    """
    if rewards.dim() != 1 or not rewards.is_floating_point():
        raise ValueError(f"rewards: wanted floating point [S], got {_shown(rewards)}")
    if (
        group_offsets.dim() != 1
        or group_offsets.dtype != torch.int64
        or not len(group_offsets)
        or group_offsets.device != rewards.device
    ):
        raise ValueError(
            f"group_offsets: wanted int64 [G+1] on {rewards.device}, got {_shown(group_offsets)}"
        )
    if not group_offsets.is_cuda and not _partition(group_offsets, len(rewards)):
        raise ValueError(
            f"group_offsets: wanted ascending from 0 to {len(rewards)}, "
            f"got {group_offsets.tolist()[:8]}"
        )
    kind, ddof, eps = normalisation.scale.value, normalisation.ddof, normalisation.eps
    advantages: Tensor = _group_advantages(rewards, group_offsets, kind, ddof, eps)
    return advantages


def reference(rewards: Tensor, group_offsets: Tensor, scale: int, ddof: int, eps: float) -> Tensor:
    """The definition: any device, any float dtype."""
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    lengths = group_offsets.diff()
    num_groups = len(lengths)
    group = torch.arange(num_groups, device=rewards.device).repeat_interleave(
        lengths, output_size=len(rewards)
    )
    scored = ~rewards.isnan()

    def total(x: Tensor) -> Tensor:
        kept = torch.where(scored, x, torch.zeros_like(x))
        return kept.new_zeros(num_groups).index_add(0, group, kept)

    n = total(torch.ones_like(rewards))
    centred = rewards - (total(rewards) / n.clamp(min=1))[group]
    if scale == Scale.STD.value:
        factor = 1 / ((total(centred**2) / (n - ddof).clamp(min=1)).sqrt() + eps)
    elif scale == Scale.LEAVE_ONE_OUT.value:
        factor = n / (n - 1).clamp(min=1)
    else:
        factor = torch.ones_like(n)

    none = torch.full_like(n, float("inf"))
    low = none.scatter_reduce(0, group, rewards.nan_to_num(float("inf")), "amin")
    high = (-none).scatter_reduce(0, group, rewards.nan_to_num(float("-inf")), "amax")
    informative = scored & ((n >= 2) & (high > low))[group]
    return torch.where(informative, centred * factor[group], torch.zeros_like(centred))


def cpp(rewards: Tensor, group_offsets: Tensor, scale: int, ddof: int, eps: float) -> Tensor:
    """One pass a group."""
    if rewards.dtype != torch.float32:
        return reference(rewards, group_offsets, scale, ddof, eps)
    from rlvr_fast import _C

    out = torch.empty_like(rewards)
    _C.group_advantages(
        rewards.detach().contiguous().numpy(),
        group_offsets.contiguous().numpy(),
        scale,
        ddof,
        eps,
        out.numpy(),
    )
    return out


def triton(rewards: Tensor, group_offsets: Tensor, scale: int, ddof: int, eps: float) -> Tensor:
    """One program a group."""
    if rewards.dtype == torch.float64:
        return reference(rewards, group_offsets, scale, ddof, eps)
    from rlvr_fast.kernels.group_advantages import group_advantages_kernel
    from rlvr_fast.kernels.launch import launch

    out = torch.empty(len(rewards), dtype=torch.float32, device=rewards.device)
    num_groups = len(group_offsets) - 1
    if num_groups:
        launch(group_advantages_kernel, num_groups)(
            rewards.contiguous(),
            group_offsets.contiguous(),
            out,
            float(ddof),
            eps,
            KIND=scale,
            num_warps=1,
            enable_fp_fusion=False,
        )
    return out


BACKENDS = {"reference": reference, "cpp": cpp, "triton": triton}

_group_advantages = torch.library.custom_op(
    "rlvr_fast::group_advantages", reference, mutates_args=()
)
_group_advantages.register_kernel("cpu", cpp)
_group_advantages.register_kernel("cuda", triton)


@_group_advantages.register_fake
def _(rewards: Tensor, group_offsets: Tensor, scale: int, ddof: int, eps: float) -> Tensor:
    return rewards.new_empty(rewards.shape, dtype=torch.promote_types(rewards.dtype, torch.float32))


def _partition(offsets: Tensor, total: int) -> bool:
    return bool(offsets[0] == 0 and offsets[-1] == total and (offsets.diff() >= 0).all())


def _shown(value: Tensor) -> str:
    return f"{value.dtype} {list(value.shape)} on {value.device}"
