"""A model as a policy over packs: what it scores and what it loses, in the config's precision."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlvr_fast import attention, lora
from rlvr_fast.config import Precision, TrainConfig
from rlvr_fast.devices import DTYPES
from rlvr_fast.objectives import Distillation, Objective
from rlvr_fast.ops.linear_kl import linear_kl
from rlvr_fast.ops.linear_logprobs import linear_logprobs
from rlvr_fast.ops.logprobs import TokenLogprobs
from rlvr_fast.ops.loss_metrics import loss_metrics
from rlvr_fast.ops.objective_rows import token_fields
from rlvr_fast.ops.policy_loss import PolicyLossOutput, policy_loss
from rlvr_fast.ops.row_results import RowResults
from rlvr_fast.ops.token_statistics import TokenStatistics, linear_statistics
from rlvr_fast.packed import Packed


class Policy:
    """The softmax over the tokens that engines may sample, after each prefix of a pack."""

    def __init__(
        self,
        config: TrainConfig,
        model: PreTrainedModel,
        *,
        vocab_size: int,
        adapters: bool = True,
    ) -> None:
        """Changes nothing of the model.

        Args:
            config: its precisions, temperature and budget.
            model: on its device.
            vocab_size: the tokenizer's; an embedding may have more rows.
            adapters: False: the model as it is without them.

        Raises:
            ValueError: for precisions that do not go together.
        """
        self._config, self.model, self._adapters = config, model, adapters
        self._vocab_size = vocab_size
        self._logits_dtype = _logits_dtype(config)

    def loss(self, packed: Packed, objective: Objective) -> PolicyLossOutput:
        """`policy_loss` of a pack; its backward reaches every parameter."""
        with self._precision():
            so_far = attention.head(self.model).weight.grad
            head, hidden = self._head(), self._hidden(packed)
            return policy_loss(
                hidden,
                head.weight,
                packed.scored,
                objective,
                temperature=self._config.temperature,
                # In the first micro-batch there is none: autograd makes it.
                weight_grad=None if so_far is None else so_far[: len(head.weight)],
                **self._settings(head),
            )

    def distil(
        self, packed: Packed, objective: Distillation, teacher: "Policy"
    ) -> PolicyLossOutput:
        """The divergence from a teacher, who has read `packed.teacher`; else as `loss`.

        Raises:
            ValueError: for a pack without the teacher's prompts.
        """
        if packed.teacher is None:
            raise ValueError("teacher_prompt_ids: wanted them on every rollout, got none")
        with torch.no_grad(), teacher._precision():
            shown, shown_head = teacher._hidden(packed.teacher), teacher._head()
        with self._precision():
            head, hidden = self._head(), self._hidden(packed)
            settings = self._settings(head)
            bias = settings.pop("bias")
            found = linear_kl(
                hidden,
                head.weight,
                shown,
                shown_head.weight,
                packed.scored.weight * objective.scale,
                kind=objective.kind,
                student_bias=bias,
                teacher_bias=shown_head.bias,
                temperature=objective.temperature,
                **settings,
            )
            rows = torch.stack([*self._scored(hidden.detach(), packed), found.kl, found.kl])
        metrics = loss_metrics(rows[0], rows[1], found.kl, token_fields(packed.scored, None))
        return PolicyLossOutput(loss=found.loss, metrics=metrics, rows=RowResults(rows))

    @torch.no_grad()
    def logprobs(self, packed: Packed) -> TokenLogprobs:
        """`[T]` each, nats: of every scored token, and the entropy there."""
        with self._precision():
            return self._scored(self._hidden(packed), packed)

    @torch.no_grad()
    def statistics(
        self, packed: Packed, *, min_p: float = 0.0, temperature: float | None = None
    ) -> TokenStatistics:
        """`linear_statistics` of every scored token; at the config's temperature if none is given.

        Raises:
            ValueError: for a min_p or temperature that cannot be.
        """
        with self._precision():
            head = self._head()
            return linear_statistics(
                self._hidden(packed),
                head.weight,
                packed.scored.targets,
                min_p=min_p,
                temperature=self._config.temperature if temperature is None else temperature,
                **self._settings(head),
            )

    @torch.no_grad()
    def hidden(self, packed: Packed) -> Tensor:
        """`[T, D]`, after the final norm, where each scored token is predicted."""
        with self._precision():
            return self._hidden(packed)

    def _scored(self, hidden: Tensor, packed: Packed) -> TokenLogprobs:
        head = self._head()
        with torch.no_grad():
            return linear_logprobs(
                hidden,
                head.weight,
                packed.scored.targets,
                temperature=self._config.temperature,
                **self._settings(head),
            )

    def _hidden(self, packed: Packed) -> Tensor:
        with nullcontext() if self._adapters else lora.reference(self.model):
            # Not hidden[index]: its backward adds in an order that threads decide.
            return attention.hidden_states(self.model, packed).index_select(0, packed.hidden_index)

    def _head(self) -> attention.Head:
        head, size = attention.head(self.model), self._vocab_size
        if size >= len(head.weight):
            return head
        bias = None if head.bias is None else head.bias[:size]
        return replace(head, weight=head.weight[:size], bias=bias)

    def _settings(self, head: attention.Head) -> dict[str, Any]:
        return {
            "bias": head.bias,
            "softcap": head.softcap,
            "logit_scale": head.logit_scale,
            "logits_dtype": self._logits_dtype,
            "logits_budget": self._config.logits_budget,
        }

    def _precision(self) -> torch.autocast:
        return torch.autocast(
            self.model.device.type,
            dtype=torch.bfloat16,
            enabled=self._config.precision is Precision.BF16,
        )


def _logits_dtype(config: TrainConfig) -> torch.dtype | None:
    """None: the op's default for the device."""
    wanted = config.head_precision
    if wanted is Precision.BF16 and config.precision is Precision.FP32:
        raise ValueError("head_precision: wanted fp32 or none with precision fp32, got bf16")
    return None if wanted is None else DTYPES[wanted]
