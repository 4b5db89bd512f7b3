"""The C++ extension: arrays are NumPy views that share memory with tensors."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

def logprobs_fwd(
    logits: NDArray[Any],
    targets: NDArray[np.int64],
    scale: float,
    cap: float,
    stats: NDArray[np.float32],
    threads: int,
) -> None: ...
def logprobs_bwd(
    logits: NDArray[Any],
    targets: NDArray[np.int64],
    stats: NDArray[np.float32],
    dlogp: NDArray[np.float32],
    dentropy: NDArray[np.float32] | None,
    scale: float,
    cap: float,
    out: NDArray[Any],
    threads: int,
) -> None: ...
def group_advantages(
    rewards: NDArray[np.float32],
    offsets: NDArray[np.int64],
    scale: int,
    ddof: int,
    eps: float,
    advantages: NDArray[np.float32],
) -> None: ...
