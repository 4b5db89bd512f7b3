"""Small copies of other trainers' interfaces, written here: only names and shapes are theirs."""

import enum
import sys
from argparse import Namespace
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from rlvr_fast.integrations import nemo_rl, prime_rl, skyrl, slime

MASK = torch.arange(6) < torch.tensor([6, 4, 1])[:, None]


def tensors() -> dict[str, Tensor]:
    """Three sequences, padded with NaN: no hook may read it."""
    generator = torch.Generator().manual_seed(0)
    old = -2 * torch.rand(3, 6, generator=generator)
    found = {
        "logp": old + 0.7 * torch.randn(3, 6, generator=generator),
        "old": old,
        "rollout": old + 0.3 * torch.randn(3, 6, generator=generator),
        "advantage": torch.randn(3, 6, generator=generator),
    }
    return {name: value.masked_fill(~MASK, torch.nan) for name, value in found.items()}


def clipped_surrogate(logp: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """PPO's, with the bounds 0.8 and 1.3."""
    ratio = (logp - old).exp()
    return -torch.min(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage)


def by_hand(old_name: str = "old") -> tuple[Tensor, Tensor]:
    """Token losses, 0 in the padding, and their slopes."""
    given = tensors()
    logp = given["logp"].nan_to_num().requires_grad_()
    old, advantage = given[old_name].nan_to_num(), given["advantage"].nan_to_num()
    loss = torch.where(MASK, clipped_surrogate(logp, old, advantage), 0.0)
    loss.sum().backward()
    return loss.detach(), logp.grad


def module(monkeypatch, name: str, **members) -> None:
    made = ModuleType(name)
    vars(made).update(members)
    monkeypatch.setitem(sys.modules, name, made)


def close(found: Tensor | float, wanted: Tensor | float) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found), torch.as_tensor(wanted), rtol=1e-6, atol=1e-6
    )


@dataclass
class LossInputs:
    """prime-rl's, of one sequence."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = None


@dataclass
class LossOutputs:
    """prime-rl's."""

    loss: Tensor
    metrics: dict[str, Tensor]


def test_prime_rl_gets_a_weighted_sum_over_each_sequence(monkeypatch):
    module(monkeypatch, "prime_rl.trainer.rl.loss", LossOutputs=LossOutputs)
    known, (wanted, slopes) = tensors(), by_hand("rollout")
    logp = known["logp"].clone().requires_grad_()
    weight = torch.tensor([1.0, 0.5, 2.0])[:, None].expand(3, 6)

    outputs = [
        prime_rl.loss(
            LossInputs(
                logp[i], known["rollout"][i], None, known["advantage"][i], MASK[i], weight[i]
            ),
            method="grpo",
            clip_high=0.3,
        )
        for i in range(3)
    ]
    sum(each.loss for each in outputs).backward()

    for each, expected in zip(outputs, (weight * wanted).sum(1), strict=True):
        close(each.loss, expected)
        assert set(each.metrics) == {"ppo_kl", "pg_clipfrac"}
    close(logp.grad, weight * slopes)


def test_prime_rl_has_the_gradient_of_its_default_loss_from_our_method_of_that_paper(monkeypatch):
    """Its own loss without the KL term: `-r A` where the probability has not moved too far."""
    module(monkeypatch, "prime_rl.trainer.rl.loss", LossOutputs=LossOutputs)
    known = {name: value[0] for name, value in tensors().items()}
    ours, theirs = (known["logp"].clone().requires_grad_() for _ in range(2))
    advantage, sampled = known["advantage"], known["rollout"]

    bounds = {"increase": 0.2, "decrease": 0.2, "cap": 1e9}
    inputs = LossInputs(ours, sampled, None, advantage, MASK[0])
    prime_rl.loss(inputs, method="dppo_tv", **bounds).loss.backward()
    moved = theirs.detach().exp() - sampled.exp()
    kept = torch.where(advantage > 0, moved <= 0.2, moved >= -0.2)
    (-(theirs - sampled).exp() * advantage * kept).sum().backward()

    close(ours.grad, theirs.grad)
    assert not kept.all()


class Registry:
    """SkyRL's, of this process only."""

    losses: ClassVar[dict] = {}

    @classmethod
    def register(cls, name, function):
        cls.losses[name] = function


def test_skyrl_gets_a_sum_after_its_own_correction(monkeypatch):
    def correction(loss, old, rollout, mask, settings):
        return loss * settings.factor, mask * settings.keep, {"corrected": 1.0}

    module(
        monkeypatch,
        skyrl.UTILS,
        PolicyLossRegistry=Registry,
        apply_off_policy_correction=correction,
        reduce_loss=lambda loss, mask: (loss * mask).sum(),
    )
    known, (wanted, slopes) = tensors(), by_hand()
    logp = known["logp"].clone().requires_grad_()
    keep = torch.tensor([1.0, 1.0, 0.0])[:, None]
    settings = Namespace(off_policy_correction=Namespace(factor=0.5, keep=keep))

    skyrl.register("rlvr_fast_grpo", "grpo", {"clip_high": 0.3})
    loss, metrics = Registry.losses["rlvr_fast_grpo"](
        logp,
        known["old"],
        known["advantage"],
        config=settings,
        loss_mask=MASK.float(),
        rollout_logprobs=known["rollout"],
    )
    loss.backward()

    close(loss, (0.5 * keep * wanted).sum())
    close(logp.grad, 0.5 * keep * slopes)
    assert metrics["clip_ratio"] == pytest.approx(float((slopes == 0)[MASK].float().mean()))
    assert metrics["corrected"] == 1.0


def slime_run(monkeypatch, **settings):
    """slime's loss on logits that *are* the log-probabilities, end to end."""
    known = tensors()

    def head(logits, **_):
        rows = logits[0, :, 0].split(MASK.sum(1).tolist())
        return torch.empty(0), {"log_probs": list(rows), "entropy": [-row for row in rows]}

    module(
        monkeypatch,
        "slime.backends.megatron_utils.loss",
        get_log_probs_and_entropy=head,
        get_rollout_top_p_logprob_kwargs=lambda args, batch: {},
    )

    def rows(name: str) -> list[Tensor]:
        return [row[own] for row, own in zip(known[name], MASK, strict=True)]

    batch = {
        "advantages": rows("advantage"),
        "log_probs": rows("old"),
        "rollout_log_probs": rows("rollout"),
        "loss_masks": [torch.ones(int(n)) for n in MASK.sum(1)],
        "unconcat_tokens": None,
        "total_lengths": None,
        "response_lengths": None,
    }
    args = {"use_rollout_logprobs": False, "entropy_coef": 0.0, "context_parallel_size": 1}
    method = {"rlvr_fast_method": "grpo", "rlvr_fast_options": {"clip_high": 0.3}}
    logits = known["logp"][MASK][None, :, None].clone().requires_grad_()
    loss, metrics = slime.loss(
        Namespace(**{**args, **method, **settings}),
        batch,
        logits,
        lambda x: sum(part.mean() for part in x.split(MASK.sum(1).tolist())),
    )
    loss.backward()
    return loss.detach(), logits.grad[0, :, 0], metrics


def test_slime_gets_what_its_reducer_makes_of_the_tokens(monkeypatch):
    wanted, slopes = by_hand()
    of_sequence = 1 / MASK.sum(1, keepdim=True)

    loss, gradient, metrics = slime_run(monkeypatch)

    close(loss, (wanted * of_sequence).sum())
    close(gradient, (slopes * of_sequence)[MASK])
    assert set(metrics) == {"loss", "pg_loss", "entropy_loss", "pg_clipfrac", "ppo_kl"}
    assert not metrics["loss"].requires_grad


def test_slime_keeps_its_entropy_bonus_and_its_choice_of_the_old_policy(monkeypatch):
    wanted, slopes = by_hand("rollout")
    of_sequence = 1 / MASK.sum(1, keepdim=True)

    _, gradient, metrics = slime_run(monkeypatch, use_rollout_logprobs=True, entropy_coef=0.1)

    close(metrics["pg_loss"], (wanted * of_sequence).sum())
    close(gradient, ((slopes + 0.1) * of_sequence)[MASK])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_tis": True}, "use_tis: wanted it off"),
        (
            {"rlvr_fast_method": "gspo", "context_parallel_size": 2},
            "context_parallel_size: wanted 1 for a loss of whole sequences, got 2",
        ),
        ({"rlvr_fast_method": "grop"}, "method"),
    ],
)
def test_slime_refuses_what_the_loss_would_not_honour(monkeypatch, settings, reason):
    with pytest.raises(ValueError, match=reason):
        slime_run(monkeypatch, **settings)


LossType = enum.Enum("LossType", {"TOKEN_LEVEL": "token_level", "SEQUENCE_LEVEL": "sequence_level"})
LossInputType = enum.Enum("LossInputType", {"LOGPROB": "logprob"})
MetricNormalizer = enum.Enum("MetricNormalizer", ["TOKENS", "SEQUENCES", "NONE"])


@pytest.mark.parametrize("token_level", [True, False])
def test_nemo_rl_gets_a_mean_by_the_counts_of_the_whole_batch(monkeypatch, token_level):
    module(
        monkeypatch,
        nemo_rl.INTERFACES,
        LossType=LossType,
        LossInputType=LossInputType,
        MetricNormalizer=MetricNormalizer,
    )
    known, (wanted, slopes) = tensors(), by_hand()
    logp = known["logp"].clone().requires_grad_()

    def whole(value: Tensor) -> Tensor:
        """With the first token, which nothing predicts."""
        return torch.cat([value.new_ones(3, 1), value], 1)

    data = {
        "token_mask": whole(MASK.float()),
        "sample_mask": torch.tensor([1.0, 1.0, 0.0]),
        "advantages": whole(known["advantage"]),
        "prev_logprobs": whole(known["old"]),
        "generation_logprobs": whole(known["rollout"]),
    }
    valid = data["sample_mask"][:, None]
    each = 1 / 25 if token_level else 1 / 7 / MASK.sum(1, keepdim=True)

    function = nemo_rl.policy_loss("grpo", {"clip_high": 0.3}, token_level=token_level)
    loss, metrics = function(
        next_token_logprobs=logp,
        data=data,
        global_valid_seqs=torch.tensor(7),
        global_valid_toks=torch.tensor(25),
    )
    loss.backward()

    close(loss, (valid * wanted * each).sum())
    close(logp.grad, valid * slopes * each)
    assert set(metrics) == set(function.metric_normalizations)
    gap = (known["old"] - known["rollout"])[:2][MASK[:2]]
    close(metrics["token_mult_prob_error"], float(gap.abs().exp().sum() / 25))
    close(metrics["gen_kl_error"], float((gap.exp() - gap - 1).sum() / 25))
