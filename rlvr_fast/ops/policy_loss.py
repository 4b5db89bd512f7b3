"""The heavy op: LM head, log-probabilities, objective and all gradients in one pass."""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from rlvr_fast.ops import logprobs as row_op
from rlvr_fast.ops.active_rows import advantages, mark_active
from rlvr_fast.ops.group_advantages import GroupNormalisation
from rlvr_fast.ops.loss_metrics import LossMetrics, loss_metrics
from rlvr_fast.ops.objective_rows import Segmentation, masked_loss, sliced, token_fields
from rlvr_fast.ops.policy_rows import PolicyCall
from rlvr_fast.ops.row_results import RowResults, SkippedRows
from rlvr_fast.ops.single_pass import single_pass
from rlvr_fast.ops.tiled_head import head_settings
from rlvr_fast.ops.transform import LogitTransform
from rlvr_fast.ops.vocab_shard import vocab_shard
from rlvr_fast.scored import ScoredTokens
from rlvr_fast.tracing.level import Level
from rlvr_fast.tracing.objective import Objective


@dataclass(frozen=True, kw_only=True)
class PolicyLossOutput:
    loss: Tensor
    """0-dim fp32, `sum(weight * token_loss)`; its backward hands out finished gradients."""
    metrics: LossMetrics
    rows: RowResults

    @property
    def logp(self) -> Tensor:
        """`[T]` fp32, nats, <= 0; detached. Rows that were skipped are scored on first use, for
        2 D V flops each, which has to be before the weights change (RuntimeError).
        """
        return self.rows.complete()[0]

    @property
    def entropy(self) -> Tensor:
        """`[T]` fp32, nats; detached. Skipped rows as for `logp`."""
        return self.rows.complete()[1]


def policy_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: ScoredTokens,
    objective: Objective,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    logits_budget: int | None = None,
    normalisation: GroupNormalisation | None = None,
    score_all: bool = False,
    batch_invariant: bool = False,
    skip_clipped: bool = False,
    weight_grad: Tensor | None = None,
    vocab_group: dist.ProcessGroup | None = None,
) -> PolicyLossOutput:
    """Loss of any objective over packed tokens, with gradients to hidden, weight and bias.

    The `[T, V]` logits never exist: tiles of rows go through GEMM, row sweep, objective, row sweep
    and the two gradient GEMMs before the next tile starts. An objective that looks at whole
    sequences or groups gets tiles cut at their boundaries; a segment longer than a tile has its
    logits computed twice.

    Rows whose gradient is known to be exactly zero are never multiplied: those of weight 0, and
    those without an advantage if the objective's gradient vanishes with it. On the CPU the op finds
    them; on CUDA they are those that `tokens.active` names (see `mark_active`). Rows that turn out
    without a gradient later (clipped ones) are left out of the gradient GEMMs: on the CPU always,
    on CUDA with `skip_clipped`.

    Args:
        hidden: `[T, D]` fp32, bf16, fp16 (or fp64 on the CPU): the rows that predict the targets.
        weight: `[V, D]` of the same dtype; under autocast any, as for `nn.Linear`.
        tokens: targets, weights and whatever the objective reads. See `ScoredTokens`.
        objective: see `rlvr_fast.objectives`.
        bias: `[V]`.
        temperature, softcap, logit_scale: see `LogitTransform`.
        logits_dtype: of the tile, fp32 or the GEMM's input dtype. Default: fp32, but on a CPU
            without avx512_bf16, or with AMX, the input dtype, to which torch's CPU GEMMs round
            their result. fp32 without avx512_bf16 costs a copy of the weight and an fp32 GEMM.
        logits_budget: bytes of logits alive at once; default 512 MiB on the CPU, 2 GiB on CUDA.
            On top come autocast's copies of the inputs and, with several tiles and a weight below
            fp32, an fp32 `[V, D]` accumulator. CPU buffers are kept for the next call; see
            `release_workspace`.
        normalisation: how rewards become advantages when `tokens.advantage` is missing; default
            `GroupNormalisation()`.
        score_all: skipped rows count in the metrics too, for 2 D V flops each.
        batch_invariant: the same row gives the same bits of logp and entropy whatever else is in
            the batch and however it is tiled. The logits GEMM then has a fixed number of rows.
        skip_clipped: for CUDA: count the rows of a tile that are clipped, and leave them out of the
            gradient GEMMs where that pays. The host waits for the count of one tile while the
            device computes the next, and the two share the budget. Not inside a CUDA graph.
        weight_grad: `[V, D]` fp32: the gradient of the weight is added to it during this call, and
            autograd gets none, so that micro-batches need no `[V, D]` pass to add theirs up. Only
            for a loss that is differentiated as it is: a factor on it would be lost.
        vocab_group: `weight` and `bias` are the rows of this rank, in the order of the ranks of
            this group, which together are the vocabulary; slices may differ in size. All ranks
            call at the same time, with the same hidden states, tokens and settings. All get the
            same bits of loss, metrics, logp and entropy, the gradient of their own rows, and the
            gradient of `hidden` summed over the group. Skipped rows are scored at once, since
            nobody should wait for other ranks by looking at a result.

    Returns:
        `PolicyLossOutput`.

    Raises:
        ValueError: for shapes, dtypes, devices, targets or settings other than these.

    Cost: 6 T D V flops for the rows not skipped (2 for logits, 2 for each of d_hidden and
    d_weight; a frozen operand, or `no_grad`, saves its 2), plus two reads and one write of each
    logit. No host sync on CUDA without `skip_clipped`. With `vocab_group` one all-gather of four
    numbers a row and tile, one all-reduce of d_hidden, and a host sync in the first call.
    """
    if torch.compiler.is_compiling():
        from rlvr_fast.ops import compiled  # which imports dynamo: a second of its own

        for name, given in (("weight_grad", weight_grad), ("vocab_group", vocab_group)):
            if given is not None:
                raise ValueError(f"{name}: wanted None inside torch.compile, got {type(given)}")
        settings_of_call = {
            "temperature": temperature,
            "softcap": softcap,
            "logit_scale": logit_scale,
            "logits_dtype": logits_dtype,
            "logits_budget": logits_budget,
            "normalisation": normalisation,
            "score_all": score_all,
            "batch_invariant": batch_invariant,
            "skip_clipped": skip_clipped,
        }
        loss, rows, metrics = compiled.run(
            hidden, weight, tokens, objective, bias, settings_of_call
        )
        return PolicyLossOutput(loss=loss, metrics=metrics, rows=RowResults(rows))
    settings = head_settings(
        hidden,
        weight,
        bias,
        logits_dtype=logits_dtype,
        logits_budget=logits_budget,
        batch_invariant=batch_invariant,
    )
    shard = None
    if vocab_group is not None:
        shard, settings = vocab_shard(vocab_group, hidden, weight, settings)
    vocab_size = len(weight) if shard is None else shard.vocab_size
    row_op.check_targets(tokens.targets, len(hidden), vocab_size)
    _check_weight_grad(weight_grad, weight)
    call = PolicyCall(
        settings=settings,
        tokens=tokens,
        objective=objective,
        transform=LogitTransform(temperature=temperature, softcap=softcap, logit_scale=logit_scale),
        normalisation=normalisation or GroupNormalisation(),
        weight_grad=weight_grad,
        skip_clipped=skip_clipped,
        shard=shard,
    )
    return _skipping(hidden, weight, bias, call, score_all)


def _skipping(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, call: PolicyCall, score_all: bool
) -> PolicyLossOutput:
    """Runs the call on its active rows and puts their results where they belong."""
    tokens = call.tokens
    if tokens.targets.device.type == "cpu":
        tokens = mark_active(tokens, call.objective, normalisation=call.normalisation)
    active, index = tokens.active_rows, tokens.segments.active
    if active is None or index is None:
        loss, rows = single_pass(hidden, weight, bias, call)
        return _output(loss, rows, tokens, RowResults(rows))
    part = replace(call, tokens=tokens.select(active, index))
    # index_select, not indexing: the backward of that adds in an order that threads decide.
    loss, found = single_pass(hidden.index_select(0, index), weight, bias, part)
    rows = found.new_zeros(len(found), len(hidden)).index_copy_(1, index, found)
    skipped = SkippedRows.of(hidden, weight, bias, call, tokens)
    if call.shard is None:
        results = RowResults(rows, skipped)
    else:
        rows[:2].index_copy_(1, skipped.index, call.score(hidden, weight, bias, skipped.index))
        results = RowResults(rows)
    if not score_all:
        return _output(loss, found, part.tokens, results, skipped=len(hidden) - len(active))
    advantage = advantages(tokens, call.normalisation)
    rows[3] = 0.0 if advantage is None else advantage
    return _output(loss, results.complete(), tokens, results)


def _output(
    loss: Tensor, rows: Tensor, tokens: ScoredTokens, results: RowResults, *, skipped: int = 0
) -> PolicyLossOutput:
    logp, entropy, dlogp, advantage = rows
    fields = token_fields(tokens, advantage)
    metrics = loss_metrics(logp, entropy, dlogp, fields, skipped=skipped)
    return PolicyLossOutput(loss=loss, metrics=metrics, rows=results)


def _check_weight_grad(weight_grad: Tensor | None, weight: Tensor) -> None:
    if weight_grad is None:
        return
    wanted = torch.promote_types(weight.dtype, torch.float32)
    fits = weight_grad.shape == weight.shape and weight_grad.device == weight.device
    if not fits or weight_grad.dtype != wanted or not weight_grad.is_contiguous():
        raise ValueError(
            f"weight_grad: wanted contiguous {wanted} {list(weight.shape)} on {weight.device}, "
            f"got {weight_grad.dtype} {list(weight_grad.shape)} on {weight_grad.device}"
        )


def reference(
    hidden: Tensor,
    weight: Tensor,
    tokens: ScoredTokens,
    objective: Objective,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform | None = None,
    normalisation: GroupNormalisation | None = None,
) -> Tensor:
    """The definition of the loss: all logits at once, any device; gradients are autograd's own."""
    transform = transform or LogitTransform()
    logits = hidden @ weight.t()
    logits = logits if bias is None else logits + bias
    stats = row_op.reference(logits, tokens.targets, transform.scale, transform.cap)
    advantage = advantages(tokens, normalisation or GroupNormalisation())
    everything = slice(0, tokens.num_tokens)
    fields = sliced(token_fields(tokens, advantage), everything, stats.dtype)
    view = Segmentation.of(tokens, Level.BATCH).view(stats[0], stats[1], fields, everything)
    return (fields.weight * masked_loss(objective, view)).sum()
