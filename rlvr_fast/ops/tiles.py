"""How many rows of logits a tile has."""

import torch

WAVE_TILE = (128, 256)
"""Rows and columns of the output tiles that cuBLAS likes best for large bf16 products."""


def tile_rows(num_tokens: int, limit: int, hidden_size: int, device: torch.device) -> int:
    """Rows of a tile, at most `limit` but at least one.

    On CUDA several tiles have, of the sizes that need no further tile, the one whose d_hidden GEMM
    leaves the fewest processors without an output tile in its last wave.
    """
    limit = max(1, limit)
    if device.type != "cuda" or num_tokens <= limit:
        return limit
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return whole_waves(num_tokens, limit, hidden_size, processors)


def whole_waves(num_tokens: int, limit: int, hidden_size: int, processors: int) -> int:
    """The multiple of 128 up to `limit` that wastes least; see `tile_rows`."""
    count = -(-num_tokens // limit)
    step, width = WAVE_TILE
    columns = -(-hidden_size // width)

    def waste(rows: int) -> float:
        tiles = rows // step * columns
        return -(-tiles // processors) * processors / tiles

    least = -(-num_tokens // (count * step)) * step
    sizes = range(least, limit + 1, step)
    return min(sizes, key=waste) if sizes else limit
