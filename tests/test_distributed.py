"""Runs on two real processes. Run as a program, this file is one of them."""

import sys
from pathlib import Path

import pytest
import torch
from ranks import run_two
from rollouts import mixed_groups

from rlvr_fast import config as configs
from rlvr_fast import metrics, models, parallel
from rlvr_fast.methods import method
from rlvr_fast.optimise import Optimiser
from rlvr_fast.parallel import ALONE, World
from rlvr_fast.run import train

UPDATES = {
    "by token": {"method": "grpo", "tokens_per_microbatch": 20},
    "by sequence": {"method": "gspo", "updates_per_batch": 2},
    "with a reference": {"method": "grpo", "kl_coef": 0.1, "entropy_coef": 0.1},
}
RUNS = {"replicated": {}, "split": {"split_weights": True}}


def update(world: World, split: bool, overrides: dict[str, object]) -> tuple[dict, list]:
    """Metrics of an update on the same batch, and the weights after it."""
    config = configs.load("tiny", {"entropy_coef": 0.0, "learning_rate": 1e-3, **overrides})
    path = models.resolve("tiny")
    reference = models.load(path)[0] if config.kl_coef else None
    model, tokenizer = models.load(path)
    if split:
        parallel.split(model, world)
    made = Optimiser(
        config, method(config.method, {}), model, reference, vocab_size=len(tokenizer), world=world
    )
    read = made.update(mixed_groups(), step=1)
    return read, [parallel.whole(p.detach()).clone() for p in model.parameters()]


def tiny(folder: Path, **overrides: object):
    given = {"run_folder": str(folder), "trackers": "none", "steps": 4, "checkpoint_every": 2}
    return configs.load("tiny", given | overrides)


def main(out: Path) -> None:
    folder = out.parent
    torch.set_num_threads(1)
    with parallel.join("cpu") as world:
        updates = [update(world, s, given) for given in UPDATES.values() for s in (False, True)]
        for name, overrides in RUNS.items():
            train(tiny(folder / name, **overrides))
            train(tiny(folder / f"{name} in two", steps=2, **overrides))
            train(tiny(folder / f"{name} in two", **overrides), resume=True)
        train(tiny(folder / "ahead", pipeline=True, mismatch_correction="token_truncate"))
    torch.save(updates, out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the two processes have left their runs and updates."""
    folder = tmp_path_factory.mktemp("ranks")
    run_two(__file__, folder)
    return folder


@pytest.fixture(scope="module")
def updates(folder):
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("split", [False, True], ids=["replicated", "split"])
@pytest.mark.parametrize("name", UPDATES)
def test_an_update_is_that_of_one_process(updates, name, split, monkeypatch):
    place = list(UPDATES).index(name) * 2 + split
    if split:  # Split layers are transformers' own, which round elsewhere than the fused ones.
        monkeypatch.setattr("rlvr_fast.fused_layers.install", lambda model: None)
    wanted, weights = update(ALONE, False, UPDATES[name])

    for found, moved in (rank[place] for rank in updates):
        for key in wanted.keys() - {"microbatches", "skipped"}:
            assert found[key] == pytest.approx(wanted[key], rel=1e-5, abs=1e-7), key
        for mine, alone in zip(moved, weights, strict=True):
            assert float((mine - alone).norm() / alone.norm()) < 1e-5


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_bit_for_bit_after_a_break(folder, name):
    whole, broken = (
        (folder / each / "model" / "model.safetensors").read_bytes()
        for each in (name, f"{name} in two")
    )

    assert whole == broken


def test_split_weights_train_like_replicated_ones(folder):
    split, replicated = (metrics.read(folder / name) for name in ("split", "replicated"))

    for mine, theirs in zip(split, replicated, strict=True):
        for key in mine.keys() & {"reward", "loss", "grad_norm", "eval_reward", "tokens"}:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4)


def test_ranks_that_generate_ahead_do_not_wait_for_each_other_forever(folder):
    rows = metrics.read(folder / "ahead")

    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[-1]["sequences"] == 25 * 16


def test_one_process_goes_on_with_the_run_of_two(folder):
    done = train(tiny(folder / "split", steps=5, split_weights=True), resume=True)

    assert done.steps == 5


if __name__ == "__main__":
    main(Path(sys.argv[1]))
