"""verl's own losses and estimators are the oracle."""

import logging
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
WANTED = "wants verl 0.9.1 and what importing it needs, see the section on verl in the README"

verl = pytest.importorskip("verl", reason=WANTED)
core = pytest.importorskip("verl.trainer.ppo.core_algos", reason=WANTED)

from verl.utils.kernel import linear_cross_entropy as head_module  # noqa: E402
from verl.workers.config import ActorConfig  # noqa: E402

from rlvr_fast.integrations import verl as ours  # noqa: E402
from rlvr_fast.integrations.outcome import ADVANTAGES  # noqa: E402
from rlvr_fast.integrations.padded import LOSSES  # noqa: E402

GLOBAL = {"dp_size": 2, "batch_num_tokens": 37, "global_batch_size": 9}
MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)


@pytest.fixture(autouse=True, scope="module")
def activated():
    ours.activate()
    yield
    ours.deactivate()


def config(**values) -> ActorConfig:
    known = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1}
    return ActorConfig(**{**known, **values})


def batch(*, per_sequence: bool = False) -> dict:
    """Ratios on both sides of every bound, a hole in a mask, a row with one token."""
    generator = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(4, 8, generator=generator)
    advantages = torch.randn(4, 1 if per_sequence else 8, generator=generator).expand(4, 8)
    mask = torch.arange(8) < torch.tensor([8, 5, 1, 6])[:, None]
    mask[0, 3] = False
    return {
        "old_log_prob": old,
        "log_prob": old + 0.8 * torch.randn(4, 8, generator=generator),
        "advantages": advantages.contiguous(),
        "response_mask": mask,
    }


def run(name: str, tensors: dict, actor: ActorConfig, mode: str, **more):
    logp = tensors["log_prob"].clone().requires_grad_()
    loss, metrics = core.get_policy_loss_fn(name)(
        **{**tensors, "log_prob": logp}, loss_agg_mode=mode, config=actor, **more
    )
    loss.backward()
    return loss.detach(), logp.grad, {key: float(value) for key, value in metrics.items()}


@pytest.mark.parametrize(
    ("name", "own", "mode", "values"),
    [
        *(("ppo", "vanilla", mode, {"clip_ratio_high": 0.28}) for mode in MODES),
        ("grpo", "vanilla", "token-mean", {"clip_ratio_c": 1.5}),
        ("gspo", "gspo", "seq-mean-token-mean", {"clip_ratio_low": 0.03, "clip_ratio_high": 0.04}),
        ("gpg", "gpg", "token-mean", {}),
        ("reinforce", "gpg", "seq-mean-token-sum", {}),
        ("cispo", "cispo", "token-mean", {"clip_ratio_low": 1.0, "clip_ratio_high": 0.5}),
        ("sapo", "sapo", "seq-mean-token-mean", {"tau_pos": 1.1, "tau_neg": 1.4}),
        ("dppo_tv", "dppo_tv", "token-mean", {"clip_ratio_low": 0.1, "clip_ratio_high": 0.15}),
    ],
)
def test_a_policy_loss_and_its_gradient_are_those_of_verl(name, own, mode, values):
    tensors = batch()
    actor = config(global_batch_info=GLOBAL, **values)
    weights = torch.rand(4, 8, generator=torch.Generator().manual_seed(1))

    loss, gradient, _ = run(f"rlvr_fast_{name}", tensors, actor, mode, rollout_is_weights=weights)
    wanted, wanted_gradient, _ = run(own, tensors, actor, mode, rollout_is_weights=weights)

    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-5, atol=1e-6)
    assert gradient.abs().max() > 0.01


def test_the_geometric_mean_is_that_of_verl_where_it_means_over_sequences():
    tensors = batch(per_sequence=True)
    actor = config(clip_ratio_low=0.4, clip_ratio_high=0.5)

    loss, gradient, _ = run("rlvr_fast_gmpo", tensors, actor, "seq-mean-token-mean")
    wanted, wanted_gradient, _ = run("geo_mean", tensors, actor, "seq-mean-token-mean")

    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-5, atol=1e-6)


def test_the_metrics_are_those_of_verl_with_both_kinds_of_clipping_added_up():
    tensors, actor = batch(), config(clip_ratio_c=1.5)

    _, _, found = run("rlvr_fast_ppo", tensors, actor, "token-mean")
    _, _, wanted = run("vanilla", tensors, actor, "token-mean")

    clipped = wanted["actor/pg_clipfrac"] + wanted["actor/pg_clipfrac_lower"]
    assert wanted["actor/pg_clipfrac_lower"] > 0
    assert found["actor/pg_clipfrac"] == pytest.approx(clipped, abs=1e-6)
    assert found["actor/ppo_kl"] == pytest.approx(wanted["actor/ppo_kl"], abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_every_offered_method_is_a_loss_mode_with_a_gradient(name):
    _, gradient, _ = run(f"rlvr_fast_{name}", batch(per_sequence=True), config(), "token-mean")

    assert gradient.isfinite().all()
    assert gradient.any()


def test_an_option_that_verl_has_no_field_for_comes_by_a_registration_of_ones_own():
    tensors = batch()
    ours.register_loss("rlvr_fast_mine", "dcpo", {"max_ratio": 1.1})

    loss, _, _ = run("rlvr_fast_mine", tensors, config(), "token-mean")

    assert loss != run("rlvr_fast_dcpo", tensors, config(), "token-mean")[0]


def rewards_of(groups: str, generator: torch.Generator) -> dict:
    mask = torch.rand(len(groups), 7, generator=generator) < 0.7
    mask[:, 0] = True
    rewards = torch.zeros(len(groups), 7)
    last = mask.long().cumsum(1).argmax(1)
    rewards[torch.arange(len(groups)), last] = torch.randn(len(groups), generator=generator)
    return {
        "token_level_rewards": rewards,
        "response_mask": mask.float(),
        "index": np.array(list(groups), dtype=object),
    }


@pytest.mark.parametrize(
    ("name", "options", "own", "values"),
    [
        ("grpo", {}, "grpo", {}),
        ("dapo", {}, "grpo_vectorized", {}),
        ("dr_grpo", {}, "grpo", {"norm_adv_by_std_in_grpo": False}),
        ("rloo", {}, "rloo", {}),
        ("reinforce", {}, "rloo_vectorized", {}),
        ("opo", {}, "opo", {}),
        ("reinforce_pp", {}, "reinforce_plus_plus", {}),
        ("reinforce_pp", {"baseline": "group_mean"}, "reinforce_plus_plus_baseline", {}),
    ],
)
def test_advantages_are_those_of_verl(name, options, own, values):
    from verl.trainer.config import AlgoConfig

    tensors = rewards_of("abcabacbcaab", torch.Generator().manual_seed(2))
    ours.register_advantages("rlvr_fast_mine", name, options)

    found, returns = core.get_adv_estimator_fn("rlvr_fast_mine")(**tensors, config=AlgoConfig())
    wanted, _ = core.get_adv_estimator_fn(own)(
        **{
            key: value.copy() if key == "index" else value.clone() for key, value in tensors.items()
        },
        config=AlgoConfig(),
        **values,
    )

    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-6)
    assert returns is found
    assert found.abs().max() > 0.1


def test_a_sequence_alone_in_its_group_has_no_advantage():
    tensors = rewards_of("aab", torch.Generator().manual_seed(3))

    found, _ = core.get_adv_estimator_fn("rlvr_fast_grpo")(**tensors)

    assert found[0].any()
    assert not found[2].any()


def test_the_variable_chooses_the_parts(monkeypatch, caplog):
    ours.deactivate()
    monkeypatch.setenv("RLVR_FAST_VERL", "advantages")

    with caplog.at_level(logging.WARNING, logger=ours.__name__):
        ours.load()
    losses, estimators = core.POLICY_LOSS_REGISTRY, core.ADV_ESTIMATOR_REGISTRY
    found = [[name for name in table if "rlvr" in name] for table in (losses, estimators)]
    head = head_module.linear_cross_entropy
    ours.activate()

    assert found == [[], [f"rlvr_fast_{name}" for name in ADVANTAGES]]
    assert head is not ours.linear_cross_entropy
    assert "rlvr_fast in verl: advantages" in caplog.text


@pytest.mark.parametrize(
    ("value", "version", "reason"),
    [
        ("all", "0.10.0", "verl: wanted 0.9.*, got 0.10.0"),
        ("heads", "0.9.1", "wanted all, none or some of losses,advantages,head, got heads"),
    ],
)
def test_what_cannot_be_active_says_why(monkeypatch, caplog, value, version, reason):
    monkeypatch.setenv("RLVR_FAST_VERL", value)
    monkeypatch.setattr(verl, "__version__", version)

    with caplog.at_level(logging.WARNING, logger=ours.__name__):
        ours.load()

    assert "NOT active" in caplog.text
    assert reason in caplog.text


def test_without_triton_on_cuda_nothing_is_half_active(monkeypatch, caplog):
    ours.deactivate()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "triton", None)

    with caplog.at_level(logging.WARNING, logger=ours.__name__):
        ours.load()
    active = [name for name in core.POLICY_LOSS_REGISTRY if "rlvr" in name]
    monkeypatch.undo()
    ours.activate()

    assert active == []
    assert "NOT active in verl: the head wants Triton on CUDA" in caplog.text


def test_a_fresh_import_of_verl_finds_us_by_the_entry_point(tmp_path):
    """The entry point is the one of pyproject.toml, whether this checkout is installed or not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = tmp_path / "checkout-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: checkout\nVersion: 0\n")
    lines = [f"{key} = {value}" for key, value in project["entry-points"]["verl.plugins"].items()]
    (info / "entry_points.txt").write_text("\n".join(["[verl.plugins]", *lines]))
    code = (
        "import verl; from verl.trainer.ppo.core_algos import get_policy_loss_fn as find;"
        "from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy as head;"
        "print(find('rlvr_fast_dapo').args[0], head.__module__)"
    )

    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.split() == ["dapo", "rlvr_fast.integrations.verl"]
    assert "rlvr_fast in verl: losses, advantages, head" in done.stderr
