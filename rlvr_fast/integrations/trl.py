"""`FastGRPOTrainer`: TRL's `GRPOTrainer` with this package's loss and shared prompts.

Hidden states of the completion tokens go straight into `policy_loss`; the logits, padded rows and
repeated prompts are never computed. Everything else is TRL's own: its settings, data, generation,
rewards, advantages, metrics, checkpoints.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

try:
    import trl
    from trl.trainer.grpo_trainer import GRPOTrainer
except ImportError as error:
    raise ImportError(
        "trl: wanted version 1.16 for FastGRPOTrainer, `pip install 'trl==1.16.*'`, got none"
    ) from error

from rlvr_fast import attention
from rlvr_fast.integrations import trl_passes as passes
from rlvr_fast.integrations import trl_support as support
from rlvr_fast.integrations.trl_layout import Batch, Layout, layout, packed_window
from rlvr_fast.integrations.trl_problem import is_training, problem
from rlvr_fast.integrations.trl_regroup import is_neutral, regrouped
from rlvr_fast.methods.base import Method
from rlvr_fast.objectives import Objective
from rlvr_fast.ops.linear_logprobs import linear_logprobs
from rlvr_fast.ops.policy_loss import policy_loss

if not trl.__version__.startswith("1.16."):
    raise ImportError(
        f"trl: wanted version 1.16 for FastGRPOTrainer, whose loss it restates, "
        f"got {trl.__version__}"
    )

__all__ = ["FastGRPOTrainer"]

Scores = tuple[Tensor, Tensor]
"""Log-probability and entropy, nats."""
Function = Callable[[Layout, Tensor, dict[str, Any]], tuple[Tensor, ...]]
"""Of a layout, its hidden states `[n, D]`, and head and temperature as arguments of our ops."""
OBJECTIVE_FREE = ("kl", "entropy", "entropy_coef")
"""Metrics of TRL that mean the same whatever the objective."""


class FastGRPOTrainer(GRPOTrainer):
    """Trains as `GRPOTrainer` does, to rounding, in less time and memory."""

    def __init__(
        self,
        *args: Any,
        objective: Objective | None = None,
        method: str | Method | None = None,
        share_prompts: bool = True,
        **kwargs: Any,
    ) -> None:
        """Gives the `forward` of model and head one more entrance; see `restore_model`.

        Args:
            args, kwargs: of `GRPOTrainer`.
            objective: in place of the loss type's surrogate. The loss type still says how tokens
                are averaged; `beta`, the entropy bonus, the masks and vLLM's correction apply.
            method: name of a method of this package, or one: its objective and its averaging.
            share_prompts: lay sequences end to end, each prompt once, if the model allows; else
                the backbone runs on padded rows. Also bring the completions of a prompt together in
                one micro-batch of their optimiser step, where loss and gradient of the step stay
                the same; what TRL logs as a mean over micro-batches then is one over other ones.

        Raises:
            ValueError: for a setting, model or method that is not supported, by name.
        """
        super().__init__(*args, **kwargs)
        policy: Any = self.model
        support.check_settings(self)
        support.check_adapters(policy)
        self._goal = support.goal(self, objective, method)
        bases = [self._base(x) for x in (policy, self.ref_model) if x is not None]
        base = bases[0]
        support.check_parts(base)
        self._attention = [(each, each.config._attn_implementation) for each in bases]
        heads = [self._base(each.get_output_embeddings()) for each in bases]
        self._undo = [passes.add_entrance(each) for each in (*bases, *heads)]
        support.check_logits(base)
        shared = share_prompts and not self.use_transformers_continuous_batching
        self._window = {id(each): packed_window(each) if shared else 0 for each in bases}
        self._regroups = bool(self._window[id(base)]) and is_neutral(self, self._goal)
        self._known: Scores | None = None

    def restore_model(self) -> None:
        """Gives models their own `forward` and attention again, for use without this trainer."""
        for undo in self._undo:
            undo()
        for model, implementation in self._attention:
            model.set_attn_implementation(implementation)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """TRL's micro-batch, perhaps with other sequences of the same optimiser step."""
        before = self._buffered_inputs
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        if not self._regroups or self._buffered_inputs is before:
            return inputs
        window = self.args.gradient_accumulation_steps
        self._buffered_inputs = regrouped(self._buffered_inputs, window)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The loss of a micro-batch, whose backward hands out finished gradients."""
        scored = inputs["completion_mask"]
        scored = scored * inputs["tool_mask"] if "tool_mask" in inputs else scored
        batch = _batch(
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            scored,
        )

        def scored_loss(rows: Layout, hidden: Tensor, head: dict[str, Any]) -> tuple[Tensor, ...]:
            return self._loss(rows, inputs, hidden, head)

        loss, logp, entropy = self._pass(model, batch, scored_loss)
        self._record(model, inputs, (logp, entropy))
        return loss

    def _loss(
        self, rows: Layout, inputs: Mapping[str, Any], hidden: Tensor, head: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        """Loss, and `[B, C]` log-probability and entropy, detached."""
        chosen = None
        if self.top_entropy_quantile < 1.0:
            with torch.no_grad():
                targets = rows.targets.to(hidden.device)
                entropy = rows.spread(linear_logprobs(hidden.detach(), **head, targets=targets)[1])
                chosen = self.get_high_entropy_mask(
                    entropy, rows.batch.scored.to(hidden.device), 1 - self.top_entropy_quantile
                )
        objective, tokens = problem(self, self._goal, rows, inputs, chosen)
        out = policy_loss(hidden, tokens=tokens.to(hidden.device), objective=objective, **head)
        return out.loss, rows.spread(out.logp), rows.spread(out.entropy)

    def _record(self, model: nn.Module, inputs: dict[str, Any], scores: Scores) -> None:
        """TRL's own loss of these scores, for what it logs and remembers on the way."""
        metrics = self._metrics["train" if is_training(self) else "eval"]
        before = {name: len(values) for name, values in metrics.items()}
        self._known = scores
        try:
            with torch.no_grad():
                super()._compute_loss(model, inputs)  # type: ignore[no-untyped-call]
        finally:
            self._known = None
        if self._goal.objective is not None:
            for name in set(metrics) - set(OBJECTIVE_FREE):
                del metrics[name][before.get(name, 0) :]
                if not metrics[name]:
                    del metrics[name]

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`[B, C]` log-probability, entropy if wanted, and no auxiliary loss."""
        if self._known is not None:
            return (*self._known, None)
        found = []
        for ids, mask in zip(
            input_ids.split(batch_size or len(input_ids)),
            attention_mask.split(batch_size or len(input_ids)),
            strict=True,
        ):
            batch = _batch(ids, mask, mask[:, -logits_to_keep:])
            found.append(self._pass(model, batch, _scores))
        logp, entropy = (torch.cat(parts) for parts in zip(*found, strict=True))
        return logp, entropy if compute_entropy else None, None

    def _pass(self, model: nn.Module, batch: Batch, function: Function) -> tuple[Tensor, ...]:
        """What a function finds, run in the calls of the model and its head."""

        def in_model(base: PreTrainedModel) -> tuple[Tensor, ...]:
            rows = layout(batch, window=self._window[id(base)])

            def in_head(hidden: Tensor) -> tuple[Tensor, ...]:
                head = vars(attention.head(base)) | {"temperature": self.temperature}
                return function(rows, hidden.to(head["weight"].device), head)

            return passes.in_head(base, rows.hidden(base), in_head)

        with self.accelerator.autocast():
            return passes.in_model(model, in_model)

    def _base(self, module: Any) -> Any:
        """Inside of the wrappers of FSDP and peft, whose `forward` ends in this one's."""
        inner = self.accelerator.unwrap_model(module)
        adapted = hasattr(inner, "peft_config") and hasattr(inner, "get_base_model")
        return inner.get_base_model() if adapted else inner


def _batch(ids: Tensor, mask: Tensor, scored: Tensor) -> Batch:
    return Batch(ids=ids.cpu(), mask=mask.cpu() != 0, scored=scored.cpu() != 0)


def _scores(rows: Layout, hidden: Tensor, head: dict[str, Any]) -> tuple[Tensor, ...]:
    found = linear_logprobs(hidden, **head, targets=rows.targets.to(hidden.device))
    return rows.spread(found.logp), rows.spread(found.entropy)
