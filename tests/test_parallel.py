"""Two real processes train one model like one. Run as a program, this file is one of them."""

import sys
from dataclasses import dataclass, replace

import pytest
import torch
from ranks import run_two
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlvr_fast import attention, models, parallel
from rlvr_fast.methods.rollouts import Rollout
from rlvr_fast.objectives import ClippedSurrogate
from rlvr_fast.ops.loss_metrics import LossMetrics
from rlvr_fast.ops.policy_loss import PolicyLossOutput, policy_loss
from rlvr_fast.packed import Packed, Sample, pack
from rlvr_fast.parallel import ALONE, World
from rlvr_fast.prompts import Prompt
from rlvr_fast.rollout import Completion, Engine, SamplingParams
from rlvr_fast.tasks import Example

SAMPLING = SamplingParams(temperature=0.0, n=2)
SHARES = {"two and one": [[0, 1], [2]], "three and none": [[0, 1, 2], []]}
CASES = [
    (split, tied, share) for split in (False, True) for tied in (False, True) for share in SHARES
]


def load(tied: bool):
    model, _ = models.load(models.resolve("tiny"))
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(1.1 * model.lm_head.weight.detach())
    return model


def packs() -> list[Packed]:
    """Three micro-batches of one group each."""
    draw = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(4, 90, (count,), generator=draw).tolist()

    made = []
    for length in (5, 9, 3):
        prompt = ids(length)
        group = [
            Sample(prompt_ids=prompt, completion_ids=ids(n), token_weight=0.05, advantage=advantage)
            for n, advantage in ((4, 1.0), (length, -0.5))
        ]
        made.append(pack([group]))
    return made


def run(model, packed: Packed) -> PolicyLossOutput:
    hidden = attention.hidden_states(model, packed).index_select(0, packed.hidden_index)
    return policy_loss(hidden, model.lm_head.weight, packed.scored, ClippedSurrogate())


@dataclass(frozen=True)
class Step:
    """What one step on all micro-batches gave."""

    values: dict[str, Tensor]
    """Gradients, weights and AdamW's state after the step, by name."""
    scalars: list[float]
    """Loss, gradient norm, metrics."""


def step(world: World, split: bool, tied: bool, share: list[int], *, size: int = 1) -> Step:
    """Passes the micro-batches of this rank, and as many idle ones as the others have more."""
    model = load(tied)
    if split:
        parallel.split(model, world)
    forward = parallel.passing(model, lambda packed: run(model, packed))
    every = packs()
    idle = replace(every[2].scored, weight=torch.zeros_like(every[2].scored.weight))
    mine = [every[i] for i in share]
    mine += [replace(every[2], scored=idle)] * ((size if split else 1) - len(mine))
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    passed = []
    for packed in mine:
        passed.append(forward(packed))
        passed[-1].loss.backward()
    parallel.sum_gradients(world, model.parameters())
    named = dict(model.named_parameters())
    kept = {f"gradient of {name}": parallel.whole(p.grad).clone() for name, p in named.items()}
    norm = float(parallel.whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
    adamw.step()
    kept |= parallel.for_leader(ALONE, model.named_parameters())
    for (name, _), state in zip(named.items(), adamw.state.values(), strict=True):
        kept |= parallel.for_leader(ALONE, ((f"{key} of {name}", x) for key, x in state.items()))
    loss = world.end_to_end(torch.stack([out.loss.detach() for out in passed])).sum()
    metrics = world.merged([out.metrics for out in passed]).read()
    counts = [value for name, value in metrics.items() if name != "skipped"]  # idle rows count
    return Step(kept, [float(loss), norm, *counts])


def rollouts(rank: int) -> list[list[Rollout]]:
    """`rank + 1` groups of one rollout."""
    return [
        [
            Rollout(
                prompt=PROMPTS[index],
                gen_prompt_ids=[1, 2],
                train_prompt_ids=[1, 2],
                completion_ids=[3 + index, 4],
                text="\ud800 caf\u00e9",
                finished=bool(rank),
                rollout_logp=[-0.1, -1e-300],
                reward=None if rank else 1 / 3,
                metadata={"parent": index},
            )
        ]
        for index in range(rank, 2 * rank + 1)
    ]


PROMPTS = [Prompt(index=i, example=Example("?"), ids=[1, 2]) for i in range(3)]


class Echo(Engine):
    """Completes a prompt with itself."""

    def generate(self, prompts, sampling):
        assert prompts
        return [
            [Completion(token_ids=[*prompt, n], logp=[-1 / 3] * 2, finished=n == 0)
             for n in range(sampling.n)]
            for prompt in prompts
        ]  # fmt: skip


def refused(world: World) -> str:
    try:
        world.exchange({"value": torch.ones(1)})
    except ValueError as error:
        return str(error)
    return "nothing"


def split_again(world: World) -> bool:
    """A whole value, cut like a parameter, is that parameter again."""
    model = load(tied=True)
    parallel.split(model, world)
    parameters = list(model.parameters())
    assert all(isinstance(p, DTensor) for p in parameters)
    return all(
        torch.equal(parallel.like(parallel.whole(p.detach()), p).to_local(), p.to_local())
        for p in parameters
    )


def main(out: str) -> None:
    torch.set_num_threads(1)
    with parallel.join("cpu") as world:
        assert world == World(rank=world.rank, size=2, device="cpu", host=world.host)
        values = torch.arange(3.0 * world.rank)
        found = {
            "steps": [
                vars(
                    step(world, split, tied, SHARES[share][world.rank], size=len(SHARES[share][0]))
                )
                for split, tied, share in CASES
            ],
            "exchange": world.exchange({"rank": world.rank, "nan": float("nan")}),
            "end to end": world.end_to_end(values),
            "completions": all(
                parallel.Shared(Echo(), world).generate(prompts, SAMPLING)
                == Echo().generate(prompts, SAMPLING)
                for prompts in ([[5], [6], [7]], [[5]])
            ),
            "rollouts": parallel.everybodys(world, rollouts(world.rank), PROMPTS)
            == [*rollouts(0), *rollouts(1)],
            "for the leader": list(parallel.for_leader(world, [("x", torch.ones(1))])),
            "refused": refused(world),
            "split again": split_again(world),
            "unused": unused(world),
        }
        world.barrier()
    torch.save(found, out)


def unused(world: World) -> list[object]:
    """Gradients that only one rank has, that none has, and of a frozen parameter."""
    one, none, frozen = (torch.ones(2, requires_grad=i < 2) for i in range(3))
    if world.leads:
        one.grad = torch.tensor([1.0, 2.0])
    parallel.sum_gradients(world, [one, none, frozen])
    return [one.grad.tolist(), none.grad, frozen.grad]


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of the two found."""
    outs = run_two(__file__, tmp_path_factory.mktemp("ranks"))
    return [torch.load(out) for out in outs]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_ranks_step_like_one_process(processes, case):
    _, tied, _ = case
    alone = step(ALONE, False, tied, [0, 1, 2])

    for found in processes:
        values, scalars = found["steps"][CASES.index(case)].values()
        assert values.keys() == alone.values.keys()
        for name, wanted in alone.values.items():
            # AdamW divides by the root of its second moment: where a gradient is next to nothing,
            # what it rounds to decides the direction.
            exact = 1e-6 if " of " in name else 3e-5
            assert float((values[name] - wanted).norm() / wanted.norm()) < exact, name
        assert scalars == pytest.approx(alone.scalars, rel=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_ranks_go_on_with_the_same_bits(processes, case):
    first, second = (found["steps"][CASES.index(case)] for found in processes)

    assert first["scalars"] == second["scalars"]
    assert all(torch.equal(first["values"][n], x) for n, x in second["values"].items())


def test_ranks_tell_each_other_what_they_have(processes):
    for found in processes:
        assert [part["rank"] for part in found["exchange"]] == [0, 1]
        assert all(part["nan"] != part["nan"] for part in found["exchange"])
        assert found["end to end"].tolist() == [0, 1, 2]
        assert found["rollouts"] is True


def test_shared_generation_is_that_of_one_engine(processes):
    assert [found["completions"] for found in processes] == [True, True]


def test_only_the_leader_gets_what_is_written(processes):
    assert [found["for the leader"] for found in processes] == [["x"], []]


def test_what_is_no_json_is_refused(processes):
    for found in processes:
        assert found["refused"] == "exchange: wanted JSON values, got Tensor"


def test_whole_weights_are_cut_again_as_they_were(processes):
    assert [found["split again"] for found in processes] == [True, True]


def test_a_rank_without_a_gradient_counts_as_zeros(processes):
    for found in processes:
        assert found["unused"] == [[1.0, 2.0], None, None]


def test_alone_nothing_is_shared_or_communicated():
    items, metrics = [3, 1, 2], run(load(tied=True), packs()[0]).metrics

    assert ALONE.share(items) == ALONE.balanced(items, items) == items
    assert ALONE.exchange("x") == ["x"]
    assert ALONE.merged([metrics, metrics]).read() == LossMetrics.merge([metrics] * 2).read()
    assert parallel.everybodys(ALONE, rollouts(1), PROMPTS) == rollouts(1)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_end_to_end_are_all_items_in_order(size):
    items = list(range(5))

    shares = [World(rank=rank, size=size).share(items) for rank in range(size)]

    assert [item for share in shares for item in share] == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_balanced_shares_are_all_items_once_and_of_similar_size():
    sizes = [3, 6, 1, 5, 2, 4]

    shares = [World(rank=r, size=3).balanced(range(6), sizes) for r in range(3)]

    assert sorted(item for share in shares for item in share) == list(range(6))
    assert [sum(sizes[item] for item in share) for share in shares] == [7, 7, 7]
    assert all(share == sorted(share) for share in shares)


def test_one_gpu_for_all_ranks_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")

    with pytest.raises(ValueError, match=r"^device: wanted cpu, cuda or auto under torchrun"):
        parallel.join("cuda:1").__enter__()


def test_without_torchrun_a_process_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    with parallel.join("cuda:1") as world:
        assert world == World(rank=0, size=1, device="cuda:1")


if __name__ == "__main__":
    main(sys.argv[1])
