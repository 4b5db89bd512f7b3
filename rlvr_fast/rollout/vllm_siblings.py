"""The samples of a prompt in vLLM compute its last tokens once, too.

They share the full blocks of its cache; what is left over, up to a block, each would compute again.
Only vLLM imports this, by name, in whichever process it runs.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
)


@dataclass
class Copies(KVConnectorMetadata):
    """Blocks of the cache, and those that become copies of them in one step."""

    sources: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)


class SiblingBlocks(KVConnectorBase_V1):
    """A connector of vLLM's whose store is the cache itself, as another request fills it.

    Of requests for one prompt that start in the same step the first computes it. The others get its
    last block, in each layer between the writing of the cache and the attention, and compute the
    prompt's last token only. Wants a prompt computed in one piece: no chunked prefill.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._block_size: int = vllm_config.cache_config.block_size
        # Where layers have caches of several kinds, every request computes what it needs.
        self._one_kind = len(kv_cache_config.kv_cache_groups) == 1
        self._last_blocks: dict[tuple[int, ...], int] = {}
        self._copies = Copies()
        self._caches: dict[str, Tensor] = {}

    @property
    def requires_kv_delivery(self) -> bool:
        """Not: nothing outlives a step."""
        return False

    # The scheduler's side: these three are called for each request that starts, then for the step.

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """How many tokens a sibling computes in this step; vLLM wants the last one's logits."""
        left = request.num_tokens - 1 - num_computed_tokens
        known = tuple(request.all_token_ids) in self._last_blocks
        return left if known and left < self._block_size else 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Notes the copy, or that this request is the first."""
        if not self._one_kind:
            return
        prompt = tuple(request.all_token_ids)
        block = blocks.get_block_ids()[0][(len(prompt) - 1) // self._block_size]
        if num_external_tokens:
            self._copies.sources.append(self._last_blocks[prompt])
            self._copies.targets.append(block)
        else:
            self._last_blocks[prompt] = block

    def build_connector_meta(self, scheduler_output: Any) -> Copies:
        """The step's copies; the next step starts without siblings."""
        copies, self._copies = self._copies, Copies()
        self._last_blocks.clear()
        return copies

    # The worker's side.

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Each layer's cache; its first dimension counts blocks."""
        self._caches = kv_caches

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Copies the layer's blocks."""
        copies = self._connector_metadata
        if isinstance(copies, Copies) and copies.sources:
            cache = self._caches[layer_name]
            cache[copies.targets] = cache[copies.sources]

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing: before the layers run there is nothing to copy."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing, as in `wait_for_save`: nothing outlives the step."""

    def wait_for_save(self) -> None:
        """Nothing."""
