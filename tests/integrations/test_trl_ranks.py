"""`FastGRPOTrainer` on two real processes. Run as a program, this file is one of them."""

import sys
from pathlib import Path

import pytest
import torch

from rlvr_fast.models import resolve

trl = pytest.importorskip("trl", reason="stock TRL is the oracle; the test extra installs it")
datasets = pytest.importorskip("datasets")

SETTINGS = {
    "gradient_accumulation_steps": 2,
    "num_iterations": 2,
    "beta": 0.04,
    "top_entropy_quantile": 0.5,
    "max_steps": 4,
}


def one_rank(out: Path) -> None:
    """Trains with both under DDP and writes their logs."""
    from rlvr_fast.integrations.trl import FastGRPOTrainer

    logs = []
    for kind in (trl.GRPOTrainer, FastGRPOTrainer):
        trainer = kind(
            model=str(resolve("tiny")),
            reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
            args=trl.GRPOConfig(
                output_dir=str(out.parent / "runs"),
                use_cpu=True,
                ddp_backend="gloo",
                bf16=False,
                per_device_train_batch_size=4,
                num_generations=4,
                max_completion_length=6,
                learning_rate=1e-3,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **SETTINGS,
            ),
            train_dataset=datasets.Dataset.from_dict({"prompt": ["1+1=", "2+22="] * 4}),
        )
        trainer.train()
        assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
        logs.append(trainer.state.log_history)
    torch.save(logs, out)


def test_under_ddp_losses_gradients_and_metrics_equal_stock_trl(tmp_path):
    from ranks import run_two  # Not on the path of a program.

    stock, own = torch.load(run_two(__file__, tmp_path)[0])

    names = ("loss", "grad_norm", "entropy", "kl", "reward", "clip_ratio/region_mean")

    assert len(own) == len(stock) == 5
    for step, wanted in zip(own[:4], stock[:4], strict=True):
        found = {name: step.get(name) for name in names if name in wanted}
        assert found == pytest.approx({name: wanted[name] for name in found}, rel=1e-4, abs=1e-5)


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]))
