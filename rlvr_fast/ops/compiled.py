"""`policy_loss` inside `torch.compile`: one opaque op, so that no graph breaks around it.

Tensors are arguments of the op; everything else is a constant of the compiled graph and waits in a
table under a number. Another objective is another constant: torch compiles the graph anew, and the
op itself nothing.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_scalar

from rlvr_fast.ops.loss_metrics import LossMetrics
from rlvr_fast.scored import ScoredTokens
from rlvr_fast.tracing.level import level
from rlvr_fast.tracing.objective import Objective
from rlvr_fast.tracing.trace import trace
from rlvr_fast.tracing.vanishing import vanishes

METRICS = tuple(f.name for f in fields(LossMetrics))


@dataclass(frozen=True)
class _Constants:
    objective: Objective
    settings: tuple[tuple[str, Any], ...]
    """Keyword arguments of `policy_loss` that are no tensors."""
    extras: tuple[str, ...]
    device: str
    autocast: torch.dtype | None


_constants: dict[_Constants, int] = {}
_by_number: list[_Constants] = []


def _spelled(value: Any) -> Any:
    """Dataclasses and tuples as `(class, values)`, numbers as constants.

    torch 2.11 makes no constant of a dataclass, 2.13 one without its fields where it was made
    inside the compiled function, and both make a variable of a number that was another one before.
    """
    if isinstance(value, tuple):
        return tuple, tuple([_spelled(x) for x in value])
    if is_dataclass(value):
        return type(value), tuple([_spelled(getattr(value, f.name)) for f in fields(value)])
    return guard_scalar(value) if type(value) in (int, float) else value


def _built(spelled: Any) -> Any:
    """The inverse of `_spelled`."""
    if not isinstance(spelled, tuple):
        return spelled
    kind, values = spelled[0], [_built(x) for x in spelled[1]]
    if kind is tuple:
        return tuple(values)
    return kind(**{f.name: x for f, x in zip(fields(kind), values, strict=True)})


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _number(spelled: Any, names: tuple[str, ...], extras: tuple[str, ...], device: str) -> int:
    """Runs while torch traces; its result is part of the graph."""
    objective, *values = _built(spelled)
    # Their results are cached. They trace as well, which inside the op is not possible.
    level(objective), vanishes(objective), trace(objective)
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    settings = tuple(zip(names, values, strict=True))
    found = _Constants(objective, settings, extras, device, autocast)
    if found not in _constants:
        _constants[found] = len(_by_number)
        _by_number.append(found)
    return _constants[found]


def run(
    hidden: Tensor,
    weight: Tensor,
    tokens: ScoredTokens,
    objective: Objective,
    bias: Tensor | None,
    settings: Mapping[str, Any],
) -> tuple[Tensor, Tensor, LossMetrics]:
    """The loss; `[4, T]` with the rows that were skipped scored; the metrics."""
    extras = tuple(tokens.extras)
    spelled = _spelled((objective, *settings.values()))
    number = _number(spelled, tuple(settings), extras, hidden.device.type)
    enabled = torch.is_grad_enabled()
    needed = [enabled and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    loss, rows, metrics, *_ = _policy_loss(
        hidden, weight, bias, tokens.targets, tokens.weight, tokens.seq_offsets,
        tokens.group_offsets, tokens.old_logp, tokens.ref_logp, tokens.rollout_logp,
        tokens.rewards, tokens.advantage, tokens.active,
        torch.stack([tokens.extras[name] for name in extras]) if extras else None, number, *needed,
    )  # fmt: skip
    return loss, rows, LossMetrics(**dict(zip(METRICS, metrics.unbind(), strict=True)))


@torch.library.custom_op("rlvr_fast::policy_loss", mutates_args=())
def _policy_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, token_weight: Tensor,
    seq_offsets: Tensor | None, group_offsets: Tensor | None, old_logp: Tensor | None,
    ref_logp: Tensor | None, rollout_logp: Tensor | None, rewards: Tensor | None,
    advantage: Tensor | None, active: Tensor | None, extras: Tensor | None, number: int,
    needs_hidden: bool, needs_weight: bool, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from rlvr_fast.ops.policy_loss import policy_loss

    known = _by_number[number]
    tokens = ScoredTokens(
        targets=targets,
        weight=token_weight,
        seq_offsets=seq_offsets,
        group_offsets=group_offsets,
        old_logp=old_logp,
        ref_logp=ref_logp,
        rollout_logp=rollout_logp,
        rewards=rewards,
        advantage=advantage,
        active=active,
        extras=dict(zip(known.extras, () if extras is None else extras, strict=True)),
    )
    h, w = hidden.detach().requires_grad_(needs_hidden), weight.detach()
    w.requires_grad_(needs_weight)
    b = None if bias is None else bias.detach().requires_grad_(needs_bias)
    autocast = torch.autocast(known.device, known.autocast, enabled=known.autocast is not None)
    with _recording(), autocast:
        out = policy_loss(h, w, tokens, known.objective, bias=b, **dict(known.settings))
        wanted = [x for x in (h, w, b) if x is not None and x.requires_grad]
        gradients = iter(torch.autograd.grad(out.loss, wanted) if wanted else ())
    metrics = torch.stack([getattr(out.metrics, name) for name in METRICS])
    d_hidden, d_weight, d_bias = (
        next(gradients) if x is not None and x.requires_grad else hidden.new_empty(0)
        for x in (h, w, b)
    )
    rows = out.rows.complete().clone()
    return out.loss.detach(), rows, metrics, d_hidden, d_weight, d_bias


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd works inside: torch runs the bodies of custom ops with it switched off."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    exclude = exclude.remove(torch._C.DispatchKey.AutogradFunctionality)
    include = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        yield


@_policy_loss.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, token_weight: Tensor,
    seq_offsets: Tensor | None, group_offsets: Tensor | None, old_logp: Tensor | None,
    ref_logp: Tensor | None, rollout_logp: Tensor | None, rewards: Tensor | None,
    advantage: Tensor | None, active: Tensor | None, extras: Tensor | None, number: int,
    needs_hidden: bool, needs_weight: bool, needs_bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    none = hidden.new_empty(0)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(4, len(hidden), dtype=dtype),
        hidden.new_empty(len(METRICS), dtype=dtype),
        torch.empty_like(hidden) if needs_hidden else none,
        torch.empty_like(weight) if needs_weight else none,
        torch.empty_like(bias) if needs_bias and bias is not None else none,
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[3:])
    ctx.needed = inputs[-3:]


def _backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Any, ...]:
    scaled = (
        (x * dloss).to(x.dtype) if needed else None
        for x, needed in zip(ctx.saved_tensors, ctx.needed, strict=True)
    )
    return (*scaled, *[None] * 15)


_policy_loss.register_autograd(_backward, setup_context=_save)
