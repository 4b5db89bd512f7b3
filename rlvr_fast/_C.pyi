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
def divergence(
    student: NDArray[Any],
    teacher: NDArray[Any],
    coef: NDArray[np.float32],
    kind: int,
    scale: float,
    cap: float,
    kl: NDArray[np.float32],
    out: NDArray[Any] | None,
    threads: int,
) -> None: ...
def token_statistics_fwd(
    logits: NDArray[Any],
    targets: NDArray[np.int64],
    scale: float,
    cap: float,
    log_min_p: float,
    stats: NDArray[np.float32],
    top_id: NDArray[np.int64],
    threads: int,
) -> None: ...
def token_statistics_bwd(
    logits: NDArray[Any],
    targets: NDArray[np.int64],
    stats: NDArray[np.float32],
    top_id: NDArray[np.int64],
    grads: NDArray[np.float32],
    scale: float,
    cap: float,
    log_min_p: float,
    out: NDArray[Any],
    threads: int,
) -> None: ...
def accumulate(
    total: NDArray[np.float32],
    product: NDArray[Any],
    first: bool,
    out: NDArray[Any] | None,
    threads: int,
) -> None: ...
def linear_f32(
    hidden: NDArray[np.uint16],
    weight: NDArray[np.uint16],
    bias: NDArray[np.float32] | None,
    out: NDArray[np.float32],
    threads: int,
) -> None: ...
def linear_f32_supported() -> bool: ...
def group_advantages(
    rewards: NDArray[np.float32],
    offsets: NDArray[np.int64],
    scale: int,
    ddof: int,
    eps: float,
    advantages: NDArray[np.float32],
) -> None: ...
