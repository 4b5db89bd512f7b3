"""Every arrangement of a pack's attention against the definition of who sees whom, in fp64."""

import itertools
import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rlvr_fast.attention_plans import (
    layout,
    plan_blocks,
    plan_cpp,
    plan_pack,
    plan_varlen,
    varlen,
)
from rlvr_fast.packed import Sample, pack

SCALE = 0.3
LENGTHS = {
    "unequal prompts and completions": [(5, [3, 7, 1]), (9, [2, 2]), (1, [6, 4, 5, 1])],
    "empty completions": [(4, [0, 3, 0]), (3, [0, 0]), (2, [5, 0, 1])],
    "groups of one": [(4, [3]), (7, [5]), (1, [1])],
    "completions that begin alike": [(4, [(9, 3), (7, 5), 6, (5, 2), (2, 2)]), (2, [3, (8, 1)])],
    "only prompts": [(4, []), (1, [0])],
    "one token": [(1, [0])],
    "more than one rectangle": [(150, [60, 3, 90, 2]), (6, [140, 5]), (2, [300])],
}
HEADS = {"grouped": (4, 2), "one key head": (3, 1), "a key head each": (2, 2)}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def pack_of(lengths, common=0):
    """Prompts and their completions by model inputs: of a completion all but its last token.

    Every prompt begins with `common` tokens that all have, on top of its length. No completions
    begin alike, but those of which two numbers say their length and how much of it is the same.
    """

    def written(place, size):
        size, alike = size if isinstance(size, tuple) else (size, 0)
        return [1] * alike + [place] * (size - alike + 1)

    return pack(
        [
            [
                Sample(prompt_ids=[0] * common + [n] * prompt, completion_ids=written(place, size))
                for place, size in enumerate(sizes or [0], 2)
            ]
            for n, (prompt, sizes) in enumerate(lengths, 3)
        ]
    )


def drawn(packed, heads, dtype=torch.float64, device="cpu", width=16):
    """Queries, keys and values of a layer, and the gradient of its output."""
    rows = len(packed.input_ids)
    inputs = [
        torch.randn(1, count, rows, width, dtype=dtype).to(device).requires_grad_()
        for count in (heads[0], heads[1], heads[1])
    ]
    return inputs, torch.randn(1, rows, heads[0], width, dtype=dtype).to(device)


def visible(packed):
    """`[N, N]` bool, row by row as the docstring of `Packed` says it."""
    bounds, seen = packed.cu_seqlens.tolist(), packed.seen.tolist()
    related = torch.zeros(bounds[-1], bounds[-1], dtype=torch.bool)
    related[:, : packed.prefix_length] = True
    for first, last in itertools.pairwise(packed.block_offsets.tolist()):
        for s in range(first, last):
            rows = slice(bounds[s], bounds[s + 1])
            related[rows, rows] = True
            related[rows, bounds[first] : bounds[first] + seen[s]] = True
    return related.tril()  # What a row sees lies before it.


def dense(packed, query, key, value):
    """Attention by its definition, over all pairs of tokens."""
    ratio = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(ratio, 1) for x in (key, value))
    hidden = ~visible(packed).to(query.device)
    scores = (query @ key.transpose(2, 3) * SCALE).masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def one_by_one(query, key, value, spans, *, scale):
    """What a variable-length kernel computes: each sequence by itself, its ends lined up."""
    ratio, outputs = query.shape[1] // key.shape[1], []
    bounds = [itertools.pairwise(x.tolist()) for x in (spans.query_offsets, spans.key_offsets)]
    for (q0, q1), (k0, k1) in zip(*bounds, strict=True):
        assert q1 - q0 <= min(spans.longest_query, k1 - k0)
        assert k1 - k0 <= spans.longest_key
        k, v = (x[k0:k1].repeat_interleave(ratio, 1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[q0:q1], k) * scale
        seen = torch.ones(q1 - q0, k1 - k0).tril((k1 - k0) - (q1 - q0)).bool()
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs)


ARRANGEMENTS = {
    "rectangles": plan_blocks,
    "variable length": lambda packed: plan_varlen(packed, one_by_one),
    "chosen": plan_pack,
}


@pytest.mark.parametrize("arrange", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("common", [0, 12], ids=["", "common beginning"])
def test_output_and_gradients_are_those_of_the_definition(arrange, heads, lengths, common):
    packed = pack_of(lengths, common)
    assert packed.prefix_length == (common if len(lengths) > 1 else 0)
    inputs, upstream = drawn(packed, heads)
    truth = dense(packed, *inputs)
    wanted = torch.autograd.grad(truth, inputs, upstream)

    output = arrange(packed).attend(0, *inputs, scale=SCALE, dropout=0.0)
    got = torch.autograd.grad(output, inputs, upstream)

    torch.testing.assert_close(output, truth, rtol=1e-12, atol=1e-12)
    for gradient, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("common", [0, 12], ids=["", "common beginning"])
def test_on_a_cpu_the_chosen_one_rounds_no_more_than_rectangles(
    lengths, common, width, dtype, as_exact_as_torch
):
    packed = pack_of(lengths, common)
    inputs, upstream = drawn(packed, (6, 2), dtype, width=width)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = dense(packed, *exact)
    wanted = torch.autograd.grad(truth, exact, upstream.double())
    chosen = plan_pack(packed)

    found = []
    for plan in (chosen, plan_blocks(packed)):
        output = plan.attend(0, *inputs, scale=SCALE, dropout=0.0)
        found.append([output, *torch.autograd.grad(output, inputs, upstream)])

    assert "_cpp" in vars(chosen)
    for each in zip(*found, [truth, *wanted], strict=True):
        as_exact_as_torch(*each)


def test_on_a_cpu_dropout_goes_through_rectangles():
    packed = pack_of(LENGTHS["one token"])
    inputs, _ = drawn(packed, (4, 2), torch.float32)
    plan = plan_pack(packed)

    plan.attend(0, *inputs, scale=SCALE, dropout=0.5)

    assert "_cpp" not in vars(plan)


@pytest.mark.parametrize("arrange", [*ARRANGEMENTS.values(), plan_cpp], ids=[*ARRANGEMENTS, "C++"])
def test_the_longest_is_a_prompt_with_its_longest_completion(arrange):
    assert arrange(pack_of([(5, [3, 7, 1]), (9, [2, 2]), (4, [6])])).longest == 12
    assert arrange(pack_of([(5, [3]), (11, [])])).longest == 11
    assert arrange(pack_of([(5, [3, 7]), (11, [])], common=20)).longest == 32


def test_a_variable_length_call_copies_no_query():
    plan = plan_varlen(pack_of([(4, [3, 2]), (6, [5])]), one_by_one)

    assert plan.spans.query_offsets.tolist() == [0, 7, 9, 20]
    assert plan.spans.key_offsets.tolist() == [0, 7, 13, 24]
    assert plan.spans.query_offsets.dtype == plan.spans.key_offsets.dtype == torch.int32
    assert plan.keys.rows.tolist()[:7] == [0, 1, 2, 3, 4, 5, 6]
    assert plan.keys.rows.tolist()[7:13] == [0, 1, 2, 3, 7, 8]


def test_rows_copied_many_times_add_their_gradients_and_others_get_none():
    source = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    wanted = layout.copies(torch.tensor([3, 0, 3, 3, 1]), 4, torch.device("cpu"))

    copied = layout.gather(source, wanted)
    copied.backward(torch.arange(30.0).view(5, 2, 3).double())

    assert torch.equal(copied, source[[3, 0, 3, 3, 1]])
    assert torch.equal(source.grad[2], torch.zeros(2, 3))
    assert source.grad[3, 0].tolist() == [0 + 12 + 18, 1 + 13 + 19, 2 + 14 + 20]


def test_torchs_kernel_takes_the_call_forward_and_backward():
    """Only its arguments: without a GPU there is nothing to compute with."""
    plan = plan_varlen(pack_of([(4, [3, 5, 0]), (2, [1])]), varlen.torch_kernel())
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [
            torch.randn(1, heads, 15, 64, dtype=torch.bfloat16).requires_grad_()
            for heads in (6, 2, 2)
        ]
        output = plan.attend(0, *inputs, scale=SCALE, dropout=0.0)
        gradients = torch.autograd.grad(output.sum(), inputs)

    assert output.shape == (1, 15, 6, 64)
    assert [g.shape for g in gradients] == [x.shape for x in inputs]


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    """The signature of flash-attn 2; the package itself needs a GPU to be built."""
    assert causal
    spans = varlen.Spans(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return one_by_one(q, k, v, spans, scale=softmax_scale)


@pytest.fixture
def flash_attn(monkeypatch):
    def install(version):
        package = types.ModuleType("flash_attn")
        package.__version__ = version
        package.flash_attn_varlen_func = flash_attn_varlen_func
        monkeypatch.setitem(sys.modules, "flash_attn", package)

    return install


def test_flash_attns_kernel_takes_the_call(flash_attn):
    flash_attn("2.8.3.post1")
    packed = pack_of([(4, [3, 5, 0]), (2, [1])])
    inputs, _ = drawn(packed, (4, 2))

    plan = plan_varlen(packed, varlen.flash_attn_kernel())

    output = plan.attend(0, *inputs, scale=SCALE, dropout=0.0)
    torch.testing.assert_close(output, dense(packed, *inputs), rtol=1e-12, atol=1e-12)


def test_a_flash_attn_that_lines_up_beginnings_is_not_used(flash_attn):
    flash_attn("2.0.9")
    with pytest.raises(ImportError, match=r"wanted 2\.1 or later, got 2\.0\.9"):
        varlen.flash_attn_kernel()


def test_on_a_cpu_no_variable_length_kernel_is_asked():
    query = torch.randn(1, 2, 3, 64, dtype=torch.bfloat16)
    assert not varlen.takes(query, query, 0.0)


@needs_gpu
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_on_a_gpu_the_kernel_rounds_no_more_than_plain_attention(lengths, width, as_exact_as_torch):
    packed = pack_of(lengths)
    inputs, upstream = drawn(packed, (4, 2), torch.bfloat16, "cuda", width)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth, plain = dense(packed, *exact), dense(packed, *inputs)
    plan = plan_pack(packed.to("cuda"))
    assert varlen.takes(inputs[0], inputs[2], 0.0)

    output = plan.attend(0, *inputs, scale=SCALE, dropout=0.0)

    assert "_varlen" in vars(plan)
    as_exact_as_torch(output, plain, truth)
    got, rounded = (torch.autograd.grad(x, inputs, upstream) for x in (output, plain))
    wanted = torch.autograd.grad(truth, exact, upstream.double())
    for each in zip(got, rounded, wanted, strict=True):
        as_exact_as_torch(*each)


@needs_gpu
def test_on_a_gpu_fp32_goes_through_rectangles():
    packed = pack_of(LENGTHS["unequal prompts and completions"])
    inputs, _ = drawn(packed, (4, 2), torch.float32, "cuda", 64)
    plan = plan_pack(packed.to("cuda"))

    output = plan.attend(0, *inputs, scale=SCALE, dropout=0.0)

    torch.testing.assert_close(output, dense(packed, *inputs), rtol=1e-4, atol=1e-4)
