"""One batch of rollouts in, optimiser updates and their metrics out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlvr_fast import lora, parallel
from rlvr_fast.config import KLEstimate, Schedule, TrainConfig
from rlvr_fast.methods.base import BatchShape, Method, group_offsets
from rlvr_fast.methods.rollouts import Groups
from rlvr_fast.microbatch import microbatches, model_inputs
from rlvr_fast.mismatch import Corrected, MismatchCorrection, Together, mismatch
from rlvr_fast.objectives import (
    KL1,
    KL2,
    KL3,
    MAX_LOG_RATIO,
    Distillation,
    EntropyBonus,
    Objective,
)
from rlvr_fast.ops.loss_metrics import LossMetrics
from rlvr_fast.ops.policy_loss import PolicyLossOutput
from rlvr_fast.packed import Packed, Sample, pack
from rlvr_fast.parallel import ALONE, World
from rlvr_fast.policy import Policy
from rlvr_fast.scoring import PolicyScorer
from rlvr_fast.tracing.level import Level, level
from rlvr_fast.tracing.vanishing import vanishes

KL_ESTIMATES: dict[KLEstimate, type[KL1 | KL2 | KL3]] = {
    KLEstimate.K1: KL1,
    KLEstimate.K2: KL2,
    KLEstimate.K3: KL3,
}


@dataclass(frozen=True)
class Microbatch:
    """What one forward and backward pass gave, still on the device."""

    loss: Tensor
    logp: Tensor
    metrics: LossMetrics


class Optimiser:
    """AdamW on what the model trains, fp32; the passes run in the config's precision."""

    def __init__(
        self,
        config: TrainConfig,
        method: Method,
        model: PreTrainedModel,
        reference: PreTrainedModel | None = None,
        *,
        vocab_size: int,
        world: World = ALONE,
    ) -> None:
        """Prepares for updates of `model`.

        Args:
            config, method: of the run.
            model: whose parameters are trained; its frozen ones stay, as under adapters.
            reference: frozen, on the same device; wanted where `needs_reference` says so, unless
                the model has adapters: then it is its own reference.
            vocab_size: the tokenizer's. An embedding may have more rows; engines never sample
                those, so the policy is the softmax over the others.
            world: whose ranks each pass their share of a batch that all of them have.

        Raises:
            ValueError: for settings that do not go together.
        """
        self._config, self._method = config, method
        self.model, self._world = model, world
        self.policy = Policy(config, model, vocab_size=vocab_size)
        self.reference = None
        if needs_reference(config, method):
            frozen = model if reference is None else reference
            self.reference = Policy(config, frozen, vocab_size=vocab_size, adapters=False)
        self._pass = parallel.passing(model, self._loss)
        wanted = method.objective()
        self.objective: Objective | Distillation = wanted
        self._corrected: Corrected | None = None
        self._level = Level.TOKEN
        if isinstance(wanted, Objective):
            self._corrected = _corrected(wanted, config)
            self.objective = _penalised(self._corrected or wanted, config)
            self._level = level(self.objective)
        else:
            _check_undisturbed(config)
        self.adamw = torch.optim.AdamW(
            [parameter for _, parameter in lora.trained(model)],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )

    def update(self, groups: Groups, step: int) -> dict[str, float]:
        """`updates_per_batch` updates at the learning rate of `step`, from 1.

        Sequences whose gradient is exactly zero are left out of the passes but not out of the
        weights' denominators. If none remains, the weights stay as they are.

        Raises:
            FloatingPointError: for a gradient that is not finite; the weights are untouched.
        """
        rate = learning_rate(self._config, step)
        for parameter_group in self.adamw.param_groups:
            parameter_group["lr"] = rate
        scorer = PolicyScorer(
            config=self._config, policy=self.policy, reference=self.reference, step=step
        )
        packs = self.packs(self.samples(self._method.shape(groups, scorer)))
        read = {"learning_rate": rate, "microbatches": float(len(packs))}
        if not packs:
            return read
        if self.reference is not None and isinstance(self.objective, Objective):
            packs = [self._with_reference(packed) for packed in packs]
        for update in range(self._config.updates_per_batch):
            packs = self._method.prepare(packs, scorer, update)
            passed = [self.backward(packed) for packed in packs]
            if update == 0:
                logps = [each.logp for each in passed]
                together = self._world.end_to_end
                read |= mismatch(packs, logps, self._corrected, together=together)
                read |= reference_kl(packs, logps, together=together)
                packs = [
                    replace(packed, scored=replace(packed.scored, old_logp=logp))
                    for packed, logp in zip(packs, logps, strict=True)
                ]
            read["grad_norm"] = self.apply()
        losses = torch.stack([each.loss for each in passed])
        read["loss"] = float(self._world.end_to_end(losses).sum())
        return read | self._world.merged([each.metrics for each in passed]).read()

    def samples(self, groups: Groups) -> list[list[Sample]]:
        """What has a gradient, with token weights from the shape of the whole batch."""
        lengths = [rollout.scored_tokens for group in groups for rollout in group]
        shape = BatchShape(
            seq_lengths=torch.tensor(lengths, dtype=torch.int64),
            group_offsets=group_offsets(groups),
            max_completion_tokens=self._config.max_completion_tokens,
        )
        weights = iter(self._method.seq_weights(shape).tolist())
        logp_known = all(rollout.rollout_logp is not None for group in groups for rollout in group)
        may_drop = (
            isinstance(self.objective, Objective)
            and self._level in (Level.TOKEN, Level.SEQUENCE)
            and vanishes(self.objective)
        )
        return [
            [
                Sample(
                    prompt_ids=rollout.train_prompt_ids,
                    completion_ids=rollout.completion_ids,
                    token_weight=weight,
                    loss_mask=rollout.loss_mask,
                    advantage=rollout.advantage,
                    reward=rollout.reward,
                    rollout_logp=rollout.rollout_logp if logp_known else None,
                    extras=rollout.extras,
                    teacher_prompt_ids=rollout.teacher_prompt_ids,
                )
                for rollout, weight in ((rollout, next(weights)) for rollout in group)
                if rollout.scored_tokens and not (may_drop and rollout.zero_advantage)
            ]
            for group in groups
        ]

    def packs(self, samples: Sequence[Sequence[Sample]]) -> list[Packed]:
        """The microbatches of this rank's share of a batch, on the model's device.

        A rank that has fewer than it has to make gets passes of weight 0.
        """
        share = self._config.share_prompts
        kept = [group for group in samples if group]
        if not kept:
            return []
        if self._level is Level.BATCH:
            cut = self._world.balanced([kept], [1])
        else:
            cut = microbatches(
                self._world.balanced(kept, [model_inputs(group, share) for group in kept]),
                self._config.tokens_per_microbatch,
                share_prompts=share,
                split_groups=self._level is not Level.GROUP,
            )
        shortest = min((s for group in kept for s in group), key=lambda s: len(s.completion_ids))
        idle: list[Sequence[Sample]] = [[replace(shortest, token_weight=0.0)]]
        cut = parallel.padded(self._world, self.model, cut, idle)
        return [pack(groups, share_prompts=share).to(self.model.device) for groups in cut]

    def backward(self, packed: Packed) -> Microbatch:
        """Adds the microbatch's gradient to every parameter."""
        found = self._pass(packed)
        # Rows without a gradient are scored only now, and split weights are whole until backward.
        logp = found.logp
        found.loss.backward()
        return Microbatch(found.loss.detach(), logp, found.metrics)

    def apply(self) -> float:
        """Clips, updates and forgets the gradient; gives its norm before clipping.

        Raises:
            FloatingPointError: for a norm that is not finite; the weights are untouched.
        """
        parallel.sum_gradients(self._world, self.model.parameters())
        limit = self._config.max_grad_norm
        total = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        norm = float(parallel.whole(total))
        if not math.isfinite(norm):
            raise FloatingPointError(f"gradient norm: wanted a finite number, got {norm}")
        self.adamw.step()
        self.adamw.zero_grad()
        return norm

    def _loss(self, packed: Packed) -> PolicyLossOutput:
        if isinstance(self.objective, Objective):
            return self.policy.loss(packed, self.objective)
        assert self.reference is not None, "wanted a method with needs_reference"
        return self.policy.distil(packed, self.objective, self.reference)

    def _with_reference(self, packed: Packed) -> Packed:
        assert self.reference is not None
        logp = self.reference.logprobs(packed).logp
        return replace(packed, scored=replace(packed.scored, ref_logp=logp))


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of a training step, from 1: linear warm-up, then the schedule."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - 1 - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    match config.schedule:
        case Schedule.CONSTANT:
            return config.learning_rate
        case Schedule.LINEAR:
            return config.learning_rate * (1 - progress)
        case Schedule.COSINE:
            return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def reference_kl(
    packs: Sequence[Packed], logps: Sequence[Tensor], *, together: Together = torch.clone
) -> dict[str, float]:
    """The k3 estimate of KL(policy || reference), nats per token; empty without a reference."""
    gaps = []
    for packed, logp in zip(packs, logps, strict=True):
        if packed.scored.ref_logp is None:
            return {}
        gaps.append((packed.scored.ref_logp - logp)[packed.scored.weight != 0])
    if not gaps:
        return {}
    gap = together(torch.cat(gaps)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if not len(gap):
        return {}
    return {"ref_kl": float((gap.expm1() - gap).mean())}


def needs_reference(config: TrainConfig, method: Method) -> bool:
    """Whether a frozen copy of the initial model has to be kept."""
    return config.kl_coef > 0 or method.needs_reference


def _check_undisturbed(config: TrainConfig) -> None:
    """A distillation has no policy gradient that could be corrected or penalised."""
    off = {"kl_coef": 0, "entropy_coef": 0, "mismatch_correction": MismatchCorrection.NONE}
    for name, wanted in off.items():
        got = getattr(config, name)
        if got != wanted:
            raise ValueError(
                f"{name}: wanted {wanted} for method {config.method}, which distils, got {got}"
            )


def _corrected(objective: Objective, config: TrainConfig) -> Corrected | None:
    if config.mismatch_correction is MismatchCorrection.NONE:
        return None
    return Corrected(
        objective=objective,
        correction=config.mismatch_correction,
        cap=config.mismatch_cap,
        floor=config.mismatch_floor,
        reduction=config.mismatch_reduction,
    )


def _penalised(objective: Objective, config: TrainConfig) -> Objective:
    if config.kl_coef > 0:
        objective = objective + KL_ESTIMATES[config.kl_estimate](coef=config.kl_coef)
    if config.entropy_coef > 0:
        objective = objective + EntropyBonus(coef=config.entropy_coef)
    return objective
