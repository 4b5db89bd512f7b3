"""`FastGRPOTrainer` with weights cut over two processes. Run as a program, this file is one.

accelerate shards on accelerators only: on a CPU it trains under DDP whatever the settings say. That
one choice is overruled here; what it leads to, accelerate's and TRL's code for FSDP, runs as it is.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from rlvr_fast.models import resolve

trl = pytest.importorskip("trl", reason="stock TRL is the oracle; the test extra installs it")
accelerate = pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
"""Relative, of norms; plus the same share of 1 % of the whole gradient."""
TRAINING = {
    "gradient_accumulation_steps": 2,
    "num_iterations": 2,
    "beta": 0.04,
    "max_steps": 2,
    "optim": "sgd",  # Adam makes as much of a gradient that is nothing but rounding as of any.
    "learning_rate": 0.1,
}
COARSE = MixedPrecisionPolicy(
    param_dtype=torch.float32, reduce_dtype=torch.float32, output_dtype=torch.bfloat16
)
LORA = {"peft_config": peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])}

CAST = "FSDP2, results cast to bf16"
OFFLOAD = "weights kept on the CPU"

# Settings of FSDP, of the trainers, of ours alone.
Case = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
CASES: dict[str, Case] = {
    "FSDP2": ({}, {}, {}),
    "FSDP2, padded rows": ({}, {"top_entropy_quantile": 0.5}, {"share_prompts": False}),
    "FSDP2, head not tied": ({}, {"model": "untied"}, {}),
    CAST: ({"policy": COARSE}, {}, {}),
    "FSDP2, its checkpoints": (
        {"activation_checkpointing": True},
        {"gradient_checkpointing": False},
        {},
    ),
    "FSDP2, rank 0 loads": ({"cpu_ram_efficient_loading": True}, {}, {}),
    "FSDP2, adapters": ({}, LORA, {}),
    "FSDP1": ({"version": 1, "sync_module_states": False}, {}, {}),
}


def shard_here(monkeypatch: pytest.MonkeyPatch, policy: MixedPrecisionPolicy | None) -> None:
    """Lets accelerate take the branch that it takes on GPUs."""
    state = accelerate.state.AcceleratorState
    plain = state.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            fsdp_plugin.mixed_precision_policy = policy
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = accelerate.DistributedType.FSDP
            # The device is "cpu:0" else, which FSDP1 holds for another one than "cpu".
            accelerate.PartialState._shared_state |= {
                "distributed_type": self.distributed_type,
                "device": torch.device("cpu"),
            }

    monkeypatch.setattr(state, "__init__", init)


def save_untied(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(resolve("tiny"))
    model.config.tie_word_embeddings = False
    weight = model.lm_head.weight.detach()
    model.lm_head.weight = torch.nn.Parameter(
        weight + 0.05 * torch.cos(torch.arange(100.0))[:, None]
    )
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(resolve("tiny")).save_pretrained(folder)


def norm(tensors: dict[str, Tensor]) -> Tensor:
    return torch.stack([x.norm() for x in tensors.values()]).norm()


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Gradients(transformers.TrainerCallback):
    """Whole gradients of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        model = given["model"]
        one = isinstance(model, FullyShardedDataParallel)
        summon = FullyShardedDataParallel.summon_full_params
        with summon(model, with_grads=True) if one else nullcontext():
            self.steps.append(
                {
                    name.replace("_fsdp_wrapped_module.", ""): whole(p.grad)
                    for name, p in model.named_parameters()
                    if p.requires_grad
                }
            )


def scores(trainer: Any, model: Any, rank: int) -> Tensor:
    """Of other sequences on each rank, of other lengths."""
    draw, width = torch.Generator().manual_seed(rank), 4 + 3 * rank
    ids = torch.randint(4, 100, (2, 3 + width), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[1, -2:] = 0
    with torch.no_grad():
        logp, _, _ = trainer._get_per_token_logps_and_entropies(
            model, ids, mask, width, batch_size=1
        )
    return logp * mask[:, -width:]


def trained(kind: Any, case: Case, out: Path) -> dict[str, Any]:
    """What a whole run gives."""
    settings, args, own = dict(case[0]), dict(case[1]), case[2]
    settings.pop("policy", None)
    model = out.parent / args.pop("model") if "model" in args else resolve("tiny")
    config = {
        "output_dir": str(out.parent / "runs"),
        "use_cpu": True,
        "ddp_backend": "gloo",
        "bf16": False,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "fsdp": True,
        "fsdp_config": {"version": 2, **settings},
    }
    gradients = Gradients()
    trainer = kind(
        model=str(model),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=trl.GRPOConfig(
            **(config | TRAINING | {k: v for k, v in args.items() if k != "peft_config"})
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["1+1=", "2+22="] * 4}),
        callbacks=[gradients],
        peft_config=args.get("peft_config"),
        **(own if kind is not trl.GRPOTrainer else {}),
    )
    trainer.train()
    models = [x for x in (trainer.model, trainer.ref_model) if x is not None]
    found = [scores(trainer, each, trainer.accelerator.process_index) for each in models]
    split = all(isinstance(p, DTensor) for each in models for p in each.parameters())
    ids = torch.arange(4, 12)[None]
    entered = trainer.model(input_ids=ids).logits.detach()
    if kind is not trl.GRPOTrainer:
        trainer.restore_model()
    return {
        "logs": trainer.state.log_history,
        "gradients": gradients.steps,
        "scores": found,
        "split": split,
        "logits": [entered, trainer.model(input_ids=ids).logits.detach()],
        "kind": type(trainer.model_wrapped).__name__,
    }


def one_rank(out: Path) -> None:
    from rlvr_fast.integrations.trl import FastGRPOTrainer

    found: dict[str, Any] = {}
    for name, case in CASES.items():
        for kind in (trl.GRPOTrainer, FastGRPOTrainer):
            with pytest.MonkeyPatch.context() as patch:
                # Stock TRL's probabilities would be those of the coarse copies.
                coarse = None if kind is trl.GRPOTrainer else case[0].get("policy")
                shard_here(patch, coarse)
                found.setdefault(name, []).append(trained(kind, case, out))
    with pytest.MonkeyPatch.context() as patch:
        shard_here(patch, None)
        with pytest.raises(ValueError, match="cpu_offload") as refused:
            trained(FastGRPOTrainer, ({"cpu_offload": True}, {"beta": 0.0}, {}), out)
    found[OFFLOAD] = [{"refused": str(refused.value)}]
    torch.save(found, out)


EXACT = [name for name in CASES if name != CAST]
Runs = dict[str, list[list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """By case, of stock TRL and ours, what each rank found."""
    from ranks import run_two  # Not on the path of a program.

    folder = tmp_path_factory.mktemp("fsdp")
    save_untied(folder / "untied")
    ranks = [torch.load(out) for out in run_two(__file__, folder)]
    return {
        name: list(map(list, zip(*(rank[name] for rank in ranks), strict=True)))
        for name in (*CASES, OFFLOAD)
    }


@pytest.mark.parametrize("name", EXACT)
def test_losses_and_gradients_equal_stock_trl_with_weights_cut(runs, name):
    (stock, _), (own, _) = runs[name]

    names = ("loss", "grad_norm", "reward")

    assert own["kind"] == stock["kind"]
    assert own["kind"].startswith(("FSDP", "FullyShardedDataParallel"))
    assert len(own["logs"]) == len(stock["logs"]) == 1 + len(own["gradients"])
    for step, wanted in zip(own["logs"][:-1], stock["logs"][:-1], strict=True):
        found = {key: step.get(key) for key in names if key in wanted}
        assert found == pytest.approx({key: wanted[key] for key in found}, rel=1e-5, abs=1e-6)
    for step, wanted in zip(own["gradients"], stock["gradients"], strict=True):
        total = norm(wanted)
        assert step.keys() == wanted.keys()
        for key, value in wanted.items():
            assert (step[key] - value).norm() <= TOLERANCE * (value.norm() + 0.01 * total), key


@pytest.mark.parametrize("name", EXACT)
def test_scores_of_policy_and_reference_equal_stock_trl_with_weights_cut(runs, name):
    stock, own = ([rank["scores"] for rank in kind] for kind in runs[name])

    assert own[0][0].shape != own[1][0].shape
    for found, wanted in zip(own, stock, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_results_are_not_rounded_where_fsdp_casts_them(runs):
    (stock, _), (own, _) = runs[CAST]

    scores, steps = own["scores"][0], zip(own["gradients"], stock["gradients"], strict=True)

    # FSDP also casts what each layer gives; a score itself is finer.
    assert (scores != scores.bfloat16().float()).sum() > 0.8 * (scores != 0).sum()
    for found, wanted in steps:
        error = norm({key: found[key] - wanted[key] for key in wanted})
        assert error <= torch.finfo(torch.bfloat16).eps * norm(wanted)


@pytest.mark.parametrize("name", [name for name in CASES if name != "FSDP1"])
def test_weights_are_put_away_after_scoring(runs, name):
    assert all(rank["split"] for rank in runs[name][1])


def test_weights_that_wait_on_the_cpu_are_refused(runs):
    (found,) = runs[OFFLOAD]

    assert all("cpu_offload" in rank["refused"] for rank in found)


@pytest.mark.parametrize("name", CASES)
def test_restored_a_cut_model_computes_as_before(runs, name):
    before, after = runs[name][1][0]["logits"]

    assert torch.equal(before, after)


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]))
