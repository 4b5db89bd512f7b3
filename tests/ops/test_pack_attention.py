"""Attention within a pack in C++ against its definition in fp64, and that it stays the same."""

import itertools

import numpy as np
import pytest
import torch

from rlvr_fast.ops import pack_attention as module
from rlvr_fast.ops.pack_attention import pack_attention, supported

# Lengths of what all share, then of trunks with their branches, which see all of the trunk or as
# much as is said.
PACKS = {
    "unequal prompts and completions": (0, [(5, [3, 7, 1]), (9, [2, 2]), (1, [6, 4, 5, 1])]),
    "common beginning": (12, [(5, [3, 7, 1]), (9, [2, 2]), (1, [6, 4, 0, 1])]),
    "groups of one": (8, [(4, [3]), (17, []), (1, [1])]),
    "one token": (0, [(1, [])]),
    "one long sequence": (0, [(0, [333])]),
    "long ones": (40, [(70, [33, 150, 100]), (260, [3, 16])]),
    "at different places": (10, [(40, [(3, 38), (7, 38), (1, 20), (9, 5)]), (5, [(2, 5), (2, 1)])]),
    "long ones at different places": (0, [(200, [(150, 190), (120, 190), (100, 77), (130, 3)])]),
}
HEADS = {"a key head each": (2, 2, 16), "grouped": (6, 2, 64), "one key head": (3, 1, 128)}
SCALE = 0.2


def stretches_of(pack):
    """`[S, 5]`: length, trunk's seen, start, start of the trunk, length of what all share."""
    prefix, blocks = pack
    table = [(prefix, 0, 0, 0, 0)] if prefix else []
    row = prefix
    for trunk, branches in blocks:
        start = row
        if trunk:
            table.append((trunk, 0, start, start, prefix))
        row += trunk
        for branch in branches:
            length, seen = branch if isinstance(branch, tuple) else (branch, trunk)
            table.append((length, seen, row, start, prefix))
            row += length
    return np.array(table, dtype=np.int64)


def drawn(pack, heads, dtype=torch.float32):
    rows = sum(length for length, *_ in stretches_of(pack))
    query_heads, key_heads, size = heads
    shapes = [(query_heads, rows, size), (key_heads, rows, size), (key_heads, rows, size)]
    # As they come out of a layer: one row holds all heads.
    inputs = [torch.randn(shape).to(dtype).transpose(0, 1).requires_grad_() for shape in shapes]
    return inputs, torch.randn(rows, query_heads, size).to(dtype)


def definition(pack, query, key, value):
    """Over all pairs of rows, in the dtype of the inputs."""
    rows, ratio = len(query), query.shape[1] // key.shape[1]
    seen = torch.zeros(rows, rows, dtype=torch.bool)
    for length, trunk_length, start, trunk, prefix in stretches_of(pack).tolist():
        stretch = slice(start, start + length)
        seen[stretch, :prefix] = seen[stretch, trunk : trunk + trunk_length] = True
        seen[stretch, stretch] = torch.ones(length, length).tril().bool()
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    key, value = (x.repeat_interleave(ratio, 0) for x in (key, value))
    scores = (query @ key.transpose(1, 2) * SCALE).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(0, 1)


def run(pack, inputs, upstream):
    output = pack_attention(*inputs, stretches_of(pack), scale=SCALE)
    return [output, *torch.autograd.grad(output, inputs, upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_output_and_gradients_are_as_exact_as_torchs(pack, heads, dtype, as_exact_as_torch):
    inputs, upstream = drawn(pack, heads, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = definition(pack, *exact)
    plain = definition(pack, *inputs)

    ours = run(pack, inputs, upstream)

    wanted = torch.autograd.grad(truth, exact, upstream.double())
    rounded = torch.autograd.grad(plain, inputs, upstream)
    for each in zip(ours, [plain, *rounded], [truth, *wanted], strict=True):
        as_exact_as_torch(*each)


def test_dtypes_may_differ_and_each_gradient_has_its_inputs(as_exact_as_torch):
    pack = PACKS["common beginning"]
    inputs, upstream = drawn(pack, (6, 2, 32))
    narrow = inputs[2].detach().bfloat16().requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (*inputs[:2], narrow)]
    truth = definition(pack, *exact)
    wanted = torch.autograd.grad(truth, exact, upstream.bfloat16().double())

    output, *gradients = run(pack, [*inputs[:2], narrow], upstream.bfloat16())

    assert output.dtype == torch.bfloat16
    assert [g.dtype for g in gradients] == [torch.float32, torch.float32, torch.bfloat16]
    as_exact_as_torch(output, truth.bfloat16(), truth)
    for ours, gradient in zip(gradients, wanted, strict=True):
        as_exact_as_torch(ours, gradient.to(ours.dtype), gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_the_count_of_threads_does_not_change_a_bit(pack, dtype, monkeypatch):
    monkeypatch.setattr(module, "_WORK", 1)
    inputs, upstream = drawn(pack, (6, 2, 16), dtype)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(run(pack, inputs, upstream))
    for one, other in itertools.combinations(found, 2):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_a_row_does_not_see_does_not_reach_it():
    pack = PACKS["common beginning"]
    inputs, upstream = drawn(pack, HEADS["grouped"])
    clean = run(pack, inputs, upstream)
    second = slice(17, 20)  # The first prompt's first completion.
    with torch.no_grad():
        for x in inputs:
            x[second] = torch.nan

    dirty = run(pack, inputs, upstream)

    others = torch.ones(len(upstream), dtype=torch.bool)
    others[second] = False
    assert torch.equal(dirty[0][others], clean[0][others])
    assert dirty[0][second].isnan().all()
    behind = others.clone()
    behind[:17] = False  # It reaches the gradients of what it saw.
    for ours, before in zip(dirty[1:], clean[1:], strict=True):
        assert torch.equal(ours[behind], before[behind])


def test_large_scores_overflow_nothing(as_exact_as_torch):
    pack = PACKS["unequal prompts and completions"]
    inputs, upstream = drawn(pack, HEADS["grouped"])
    inputs = [(30.0 * x).detach().requires_grad_() for x in inputs]
    exact = [x.detach().double() for x in inputs]

    ours = run(pack, inputs, upstream)

    assert all(x.isfinite().all() for x in ours)
    as_exact_as_torch(ours[0], definition(pack, *inputs), definition(pack, *exact))


def test_a_gradient_may_come_without_strides():
    pack = PACKS["groups of one"]
    inputs, upstream = drawn(pack, HEADS["grouped"])
    output = pack_attention(*inputs, stretches_of(pack), scale=SCALE)

    output.sum().backward()

    wanted = run(pack, inputs, torch.ones_like(upstream))[1:]
    assert all(torch.equal(x.grad, g) for x, g in zip(inputs, wanted, strict=True))


def test_it_runs_without_autograd_too():
    pack = PACKS["long ones"]
    inputs, upstream = drawn(pack, HEADS["grouped"])
    with torch.inference_mode():
        made_here = [x * 1.0 for x in inputs]
        found = pack_attention(*made_here, stretches_of(pack), scale=SCALE)

    assert torch.equal(found, run(pack, inputs, upstream)[0])


def test_kinds_without_a_kernel_are_known():
    known, double, odd = (
        torch.empty(2, size, dtype=dtype)
        for size, dtype in ((64, torch.float32), (64, torch.float64), (24, torch.float32))
    )
    assert supported(known, known, known.bfloat16())
    assert not supported(double, double, double)
    assert not supported(odd, odd, odd)
    assert not supported(known, known, torch.empty(2, 32))
