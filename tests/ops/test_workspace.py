"""Memory is kept between calls, and never handed out while somebody holds it."""

import torch

from rlvr_fast import objectives
from rlvr_fast.ops.policy_loss import policy_loss
from rlvr_fast.ops.workspace import recycled, release_workspace, scratch
from rlvr_fast.scored import ScoredTokens

CPU = torch.device("cpu")


def test_a_dropped_result_gives_its_memory_to_the_next():
    first = recycled("x", (4, 5), torch.float32, CPU)
    address = first.data_ptr()
    del first
    assert recycled("x", (4, 5), torch.float32, CPU).data_ptr() == address


def test_a_result_that_somebody_holds_is_left_alone():
    first = recycled("x", (4, 5), torch.float32, CPU).fill_(1.0)
    view = first[1:3].numpy()
    del first
    recycled("x", (4, 5), torch.float32, CPU).fill_(2.0)
    assert (view == 1.0).all()


def test_another_size_gets_other_memory():
    recycled("x", (4, 5), torch.float32, CPU)
    assert recycled("x", (5, 5), torch.float32, CPU).shape == (5, 5)


def test_scratch_of_one_name_is_one_piece_of_memory():
    large, small = scratch("y", (8, 8), torch.float32, CPU), scratch("y", (4,), torch.bfloat16, CPU)
    assert small.data_ptr() == large.data_ptr()


def test_what_is_released_is_not_kept():
    scratch("y", (8, 8), torch.float32, CPU).fill_(3.0)
    release_workspace()
    assert scratch("y", (2, 2), torch.float32, CPU).isnan().all()  # fresh: the fixture's poison


def test_gradients_that_are_kept_survive_the_next_call():
    weight = torch.randn(33, 8, requires_grad=True)
    tokens = ScoredTokens(targets=torch.arange(5), weight=torch.ones(5), advantage=torch.ones(5))

    def gradient() -> torch.Tensor:
        hidden = torch.randn(5, 8)
        out = policy_loss(hidden, weight, tokens, objectives.PolicyGradient())
        (found,) = torch.autograd.grad(out.loss, weight)
        return found

    first = gradient()
    before = first.clone()
    gradient()
    assert torch.equal(first, before)


def test_a_buffer_left_by_a_narrower_dtype_is_no_obstacle():
    def loss(dtype: torch.dtype, num_tokens: int) -> torch.Tensor:
        hidden, weight = torch.randn(num_tokens, 8, dtype=dtype), torch.randn(33, 8, dtype=dtype)
        ones = torch.ones(num_tokens)
        tokens = ScoredTokens(targets=torch.arange(num_tokens), weight=ones, advantage=ones)
        return policy_loss(hidden, weight, tokens, objectives.PolicyGradient()).loss

    release_workspace()
    assert loss(torch.bfloat16, 13).isfinite()  # 858 bytes of logits
    assert loss(torch.float64, 3).isfinite()
