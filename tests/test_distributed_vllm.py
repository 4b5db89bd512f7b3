"""vLLM in both processes of a run. Run as a program, this file is one of them."""

import sys
from pathlib import Path

import torch
from ranks import run_two
from transformers import AutoConfig, LlamaForCausalLM
from vllm_here import needs_vllm

from rlvr_fast import config as configs
from rlvr_fast import metrics, models, parallel
from rlvr_fast.run import train

pytestmark = needs_vllm


def main(out: Path) -> None:
    torch.set_num_threads(1)
    config = configs.load(
        "tiny",
        {
            "model": str(out.parent / "model"),
            "run_folder": str(out.parent / "run"),
            "engine": "vllm",
            "engine_options": {"kv_cache_gib": 0.05},
            "engine_precision": "fp32",
            "trackers": "none",
            "learning_rate": 1e-2,
            "steps": 3,
        },
    )
    with parallel.join("cpu") as world:
        train(config)
        found = world.exchange([world.rank])
    torch.save(found, out)


def test_every_rank_samples_from_the_policy_that_all_train(tmp_path):
    model = models.tiny(tmp_path / "model")
    config = AutoConfig.from_pretrained(model)
    config.head_dim = 32  # vLLM has no narrower heads on a CPU.
    LlamaForCausalLM(config).save_pretrained(model)

    found = [torch.load(out) for out in run_two(__file__, tmp_path)]

    assert found == [[[0], [1]]] * 2  # vLLM has left the processes' own group alone.
    rows = metrics.read(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["mismatch_kl"] < 1e-6 for row in rows[1:])
    assert rows[3]["sequences"] == 25 * 16


if __name__ == "__main__":
    main(Path(sys.argv[1]))
