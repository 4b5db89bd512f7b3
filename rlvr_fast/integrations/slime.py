"""slime: a custom loss, read at its commit 624b824a.

    --loss-type custom_loss --custom-loss-function-path rlvr_fast.integrations.slime.loss
    --custom-config-path loss.yaml        # rlvr_fast_method: dapo
                                          # rlvr_fast_options: {clip_high: 0.3}

slime's own head, entropies and reducer (`--calculate-per-token-loss` or not) stay in use.
"""

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlvr_fast.integrations.padded import PaddedTokens, objective_of, padded_loss
from rlvr_fast.objectives import Objective
from rlvr_fast.tracing.level import Level, level

NOT_READ = ("use_kl_loss", "use_tis", "use_opsm", "custom_pg_loss_reducer_function_path")
"""Settings of slime's own policy loss that this one has nothing for."""


def loss(
    args: Namespace,
    batch: Mapping[str, Any],
    logits: Tensor,
    sum_of_sample_mean: Callable[[Tensor], Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of `args.rlvr_fast_method` (default `dapo`) less slime's entropy bonus.

    Args:
        args: slime's; `rlvr_fast_options` are options of the method.
        batch: slime's micro-batch.
        logits: `[1, T, V]` fp32, of this rank.
        sum_of_sample_mean: slime's reducer of tokens end to end.

    Returns:
        The loss and detached `loss`, `pg_loss`, `entropy_loss`, `pg_clipfrac`, `ppo_kl`.

    Raises:
        ImportError: without slime.
        ValueError: for a method without such a loss or an unknown option, settings of `NOT_READ`,
            and a loss of whole sequences where context parallelism cuts them.
    """
    objective = _objective(args)
    module = import_module("slime.backends.megatron_utils.loss")
    _, found = module.get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        with_entropy=True,
        **module.get_rollout_top_p_logprob_kwargs(args, batch),
    )
    logps = found["log_probs"]
    old = batch["rollout_log_probs"] if args.use_rollout_logprobs else batch.get("log_probs")
    # With context parallelism the masks are those of whole sequences; the reducer cuts them.
    cut = args.context_parallel_size > 1
    padded = padded_loss(
        objective,
        PaddedTokens(
            logp=_padded(logps),
            advantage=_padded(batch["advantages"]),
            mask=_padded([torch.ones_like(x) for x in logps] if cut else batch["loss_masks"]),
            old_logp=_padded(old or [x.detach() for x in logps]),
        ),
    )
    lengths = [len(x) for x in logps]
    token_loss, kl, clipped = (sum_of_sample_mean(_end_to_end(x, lengths)) for x in padded)
    entropy = sum_of_sample_mean(torch.cat(found["entropy"]))
    # Keeps a rank without tokens in everybody's backward.
    total = token_loss - args.entropy_coef * entropy + 0 * logits.sum()
    metrics = {
        "loss": total,
        "pg_loss": token_loss,
        "entropy_loss": entropy,
        "pg_clipfrac": clipped,
        "ppo_kl": kl,
    }
    return total, {name: value.detach().clone() for name, value in metrics.items()}


def _objective(args: Namespace) -> Objective:
    refused = [name for name in NOT_READ if getattr(args, name, None)]
    if refused:
        raise ValueError(f"{refused[0]}: wanted it off, since this loss has nothing for it")
    objective = objective_of(
        getattr(args, "rlvr_fast_method", "dapo"), getattr(args, "rlvr_fast_options", None) or {}
    )
    if args.context_parallel_size > 1 and level(objective) is not Level.TOKEN:
        raise ValueError(
            "context_parallel_size: wanted 1 for a loss of whole sequences, "
            f"got {args.context_parallel_size}"
        )
    return objective


def _padded(rows: Sequence[Tensor]) -> Tensor:
    return pad_sequence(list(rows), batch_first=True)


def _end_to_end(values: Tensor, lengths: Sequence[int]) -> Tensor:
    return torch.cat([row[:length] for row, length in zip(values, lengths, strict=True)])
