"""Work inside of a model's own call, where its weights are whole and its wrappers look on.

DDP, FSDP and autocast act on the call of a module: FSDP gathers the weights of what is called, and
puts them away afterwards. So a function that reads a model's weights is run by the model, and one
that reads the head's by the head, which FSDP may treat as a unit of its own.
"""

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlvr_fast import parallel

Found = tuple[Tensor, ...]


def add_entrance(module: nn.Module) -> Callable[[], None]:
    """`module(*args, rlvr_fast_call=f)` is `f(module, *args)`; other calls stay the same.

    Returns:
        What takes it away again.
    """
    plain, before = module.forward, vars(module).get("forward")

    # Generation looks at the signature.
    @functools.wraps(type(module).forward)
    def forward(self: nn.Module, *args: Any, rlvr_fast_call: Any = None, **kwargs: Any) -> Any:
        return plain(*args, **kwargs) if rlvr_fast_call is None else rlvr_fast_call(self, *args)

    def undo() -> None:
        if before is None:
            del module.forward
        else:
            module.forward = before

    module.forward = MethodType(forward, module)
    return undo


def in_model(model: nn.Module, function: Callable[[PreTrainedModel], Found]) -> Found:
    """What a function of a model finds while the model's weights are whole.

    Args:
        model: with an entrance, or a wrapper of one. All ranks call at the same time.
        function: given the model inside of its wrappers. The first of its results may have a
            gradient.
    """
    found = _called(model, function)
    if not torch.is_grad_enabled():  # Else the backward pass does it.
        parallel.put_away(model)
    return found


def in_head(model: PreTrainedModel, hidden: Tensor, function: Callable[[Tensor], Found]) -> Found:
    """As `in_model`, and inside of it, for one that reads the head and is given hidden states."""
    return _called(model.get_output_embeddings(), lambda _, given: function(given), hidden)


def _called(module: Any, function: Callable[..., Found], *args: Tensor) -> Found:
    own: list[Found] = []

    def call(inner: nn.Module, *given: Tensor) -> Found:
        own.append(function(inner, *given))
        return own[0]

    returned: Found = module(*args, rlvr_fast_call=call)
    # FSDP2 returns copies in its output dtype, bf16 for accelerate, too coarse for a probability.
    # Its hooks hang on the results themselves; those of DDP may hang on what it returns.
    return returned if returned[0].dtype == own[0][0].dtype else own[0]
