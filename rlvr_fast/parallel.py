"""Several processes train one model: who does what, and what they tell each other.

Under `torchrun` every rank generates and verifies its share of a step's prompts and tells the
others its rollouts. From then on all ranks hold the same batch: advantages and token weights are
those of one process, by the same code, and whatever a method remembers is the same everywhere.
Then each rank passes its share of the groups. The weights of tokens count the whole batch, so
gradients are added, not averaged, and the number of ranks changes none. The weights are either
replicated, and their gradients summed after the last micro-batch, or split over the ranks (FSDP2),
where every pass gathers them layer by layer.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from rlvr_fast.methods.rollouts import Groups, as_values, from_values
from rlvr_fast.ops.loss_metrics import LossMetrics
from rlvr_fast.prompts import Prompt
from rlvr_fast.rollout import Completion, Engine, SamplingParams

BUCKET = 16 << 20
"""Gradients that are summed in one message; fp32, that is 64 MiB."""
_METHOD = "rlvr_fast_pass"
_SCORING = "rlvr_fast_score"

Item = TypeVar("Item")
Found = TypeVar("Found")
Out = TypeVar("Out", bound="HasLoss")


class HasLoss(Protocol):
    """What a pass over a model gives."""

    @property
    def loss(self) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class World:
    """This process of a run. All ranks call what communicates, in one order; alone it does not."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    host: dist.ProcessGroup | None = None
    """For `exchange` alone, so that another thread may call that."""

    @property
    def leads(self) -> bool:
        """Writes files and talks to people; the other ranks do not."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This rank's part; those of all ranks end to end are the items. Perhaps empty."""
        start, stop = (len(items) * r // self.size for r in (self.rank, self.rank + 1))
        return list(items[start:stop])

    def balanced(self, items: Sequence[Item], sizes: Sequence[int]) -> list[Item]:
        """This rank's part, in the order given: the largest first, to whom has least so far."""
        loads, mine = [0] * self.size, []
        for index in sorted(range(len(items)), key=lambda index: -sizes[index]):
            rank = loads.index(min(loads))
            loads[rank] += sizes[index]
            if rank == self.rank:
                mine.append(index)
        return [items[index] for index in sorted(mine)]

    def exchange(self, values: Any) -> list[Any]:
        """What every rank gives, by rank: JSON values. Another thread may do all else meanwhile.

        Raises:
            ValueError: for something that is no JSON value.
        """
        if self.size == 1:
            return [values]
        text = json.dumps(values, default=_refused).encode()
        own = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        every = _end_to_end(own, self.size, self.host)
        return [json.loads(part.numpy().tobytes()) for part in every]

    def end_to_end(self, values: Tensor) -> Tensor:
        """`[n]` of every rank as one `[sum n]`, by rank; any n, one dtype."""
        if self.size == 1:
            return values
        return torch.cat(_end_to_end(values, self.size, None))

    def merged(self, parts: Sequence[LossMetrics]) -> LossMetrics:
        """Of all micro-batches of all ranks, at least one each."""
        own = LossMetrics.merge(parts)
        names = [each.name for each in fields(own)]
        values = torch.stack([getattr(own, name) for name in names])
        every = self.end_to_end(values).view(self.size, -1)
        rows = [dict(zip(names, row, strict=True)) for row in every]
        return LossMetrics.merge([LossMetrics(**row) for row in rows])

    def barrier(self) -> None:
        """Nobody goes on before all are here."""
        if self.size > 1:
            dist.barrier()


ALONE = World()


@dataclass(frozen=True)
class Shared(Engine):
    """Only generates: the engine of each rank takes a share of the prompts, and all get all."""

    engine: Engine
    world: World

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams
    ) -> list[list[Completion]]:
        """As the engine alone if it is greedy; all ranks call it with the same prompts."""
        mine = self.world.share(prompts)
        own = self.engine.generate(mine, sampling) if mine else []
        every = self.world.exchange([[asdict(each) for each in group] for group in own])
        return [[Completion(**each) for each in group] for part in every for group in part]

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None: ...

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


@contextmanager
def join(device: str) -> Iterator[World]:
    """The world of `torchrun`'s environment, or this process alone. Uses a group that is there.

    Args:
        device: cpu or cuda, of which every rank takes one; alone also cuda:N.

    Raises:
        ValueError: for one GPU that all ranks would share.
    """
    size, ours = int(os.environ.get("WORLD_SIZE", "1")), not dist.is_initialized()
    if size == 1:
        yield World(device=device)
        return
    if device.startswith("cuda:"):
        raise ValueError(f"device: wanted cpu, cuda or auto under torchrun, got {device}")
    rank, backend = int(os.environ["RANK"]), "gloo"
    if device == "cuda":
        device, backend = f"cuda:{os.environ['LOCAL_RANK']}", "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    if ours:
        dist.init_process_group(backend, rank=rank, world_size=size)
    try:
        yield World(rank=rank, size=size, device=device, host=dist.new_group(backend="gloo"))
    finally:
        if ours:
            dist.destroy_process_group()


def everybodys(world: World, groups: Groups, prompts: Sequence[Prompt]) -> Groups:
    """The groups of all ranks, by rank; `prompts` are those by whose index rollouts name theirs."""
    if world.size == 1:
        return groups
    own = [[as_values(rollout) for rollout in group] for group in groups]
    return [
        [from_values(values, prompts) for values in group]
        for part in world.exchange(own)
        for group in part
    ]


def split(model: PreTrainedModel, world: World) -> None:
    """Cuts every weight over the ranks, and with it its gradient and the optimiser's state.

    In place, layer by layer, and before the optimiser is made. Tied weights stay tied.

    Raises:
        ValueError: for a decoder without a list of layers.
    """
    if world.size == 1:
        return
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        raise ValueError(f"model: wanted a decoder with layers, got {type(model).__name__}")
    mesh = init_device_mesh(torch.device(world.device).type, (world.size,))
    for module in (*layers, model):
        sharded = fully_shard(module, mesh=mesh)
        # Token weights count the whole batch; and gloo has no sum with a factor.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def is_split(model: torch.nn.Module) -> bool:
    """Every pass is a collective: all ranks make as many, and through `passing`."""
    return isinstance(model, FSDPModule)


def passing(model: PreTrainedModel, function: Callable[[Item], Out]) -> Callable[[Item], Out]:
    """`function`, which runs a model from within, with the model's weights whole while it runs.

    Args:
        model: split or not.
        function: from a micro-batch to a result whose `loss` leads to all gradients. It may read
            any weight outside of the layers, such as the head's.
    """
    if not is_split(model):
        return function

    def forward(argument: Item) -> tuple[Tensor, Out]:
        out = function(argument)
        return out.loss, out  # Hooks of the backward pass hang on the tensors of the result.

    setattr(model, _METHOD, forward)
    register_fsdp_forward_method(model, _METHOD)
    return lambda argument: getattr(model, _METHOD)(argument)[1]


def scoring(model: PreTrainedModel, function: Callable[[Item], Found]) -> Callable[[Item], Found]:
    """As `passing`, for a function without gradients."""
    if not isinstance(model, FSDPModule):
        return function
    setattr(model, _SCORING, function)
    register_fsdp_forward_method(model, _SCORING)

    def run(argument: Item) -> Found:
        found: Found = getattr(model, _SCORING)(argument)
        put_away(model)
        return found

    return run


def put_away(model: torch.nn.Module) -> None:
    """Leaves each rank its part of the weights that are split, as a backward pass does."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def padded(world: World, model: torch.nn.Module, mine: list[Item], idle: Item) -> list[Item]:
    """At least one micro-batch; with a split model as many as whichever rank has most."""
    count = torch.tensor([max(len(mine), 1)])
    most = int(world.end_to_end(count).max() if is_split(model) else count)
    return mine + [idle] * (most - len(mine))


def sum_gradients(world: World, parameters: Iterable[Tensor]) -> None:
    """Replaces gradients by their sums over the ranks, bit for bit the same on each.

    Those of split parameters are sums already. The others are added up in messages of `BUCKET`
    numbers after the last micro-batch, not during it: a wrapper that does would have to run
    the forward pass, would average, and would want as many passes on every rank. Here a rank
    without any counts as zeros; a gradient that no rank has stays None.
    """
    if world.size == 1:
        return
    kept = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    own = torch.tensor([p.grad is not None for p in kept], dtype=torch.uint8)
    used = world.end_to_end(own).view(world.size, -1).any(0).tolist()
    found: list[Tensor] = []
    for parameter in itertools.compress(kept, used):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        found.append(parameter.grad)
    while found:
        bucket, size = [found.pop()], 0
        while found and found[-1].dtype == bucket[0].dtype and size < BUCKET:
            bucket.append(found.pop())
            size += bucket[-1].numel()
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be split, on every rank. A collective if it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def for_leader(world: World, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors by name, on the CPU of the rank that leads; none on the others."""
    found = {}
    for name, tensor in named:
        value = whole(tensor.detach())
        if world.leads:
            found[name] = value.cpu() if world.size > 1 else value
    return found


def like(value: Tensor, example: Tensor) -> Tensor:
    """This rank's part of a whole value, on the device of the example and split as that is."""
    value = value.to(example.device)
    if not isinstance(example, DTensor) or value.shape != example.shape:
        return value
    return distribute_tensor(value, example.device_mesh, example.placements, src_data_rank=None)


def _end_to_end(own: Tensor, size: int, group: dist.ProcessGroup | None) -> list[Tensor]:
    """What every rank gives, of different lengths."""
    counts = [torch.zeros(1, dtype=torch.int64, device=own.device) for _ in range(size)]
    dist.all_gather(counts, torch.tensor([len(own)], device=own.device), group=group)
    lengths = torch.cat(counts).tolist()
    padded = own.new_zeros(max(lengths))
    padded[: len(own)] = own
    every = [torch.zeros_like(padded) for _ in range(size)]
    dist.all_gather(every, padded, group=group)
    return [part[:length] for part, length in zip(every, lengths, strict=True)]


def _refused(value: object) -> object:
    raise ValueError(f"exchange: wanted JSON values, got {type(value).__name__}")
