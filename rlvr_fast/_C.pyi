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
def sample(
    logits: NDArray[Any],
    noise: NDArray[np.float64] | None,
    scale: float,
    cap: float,
    tokens: NDArray[np.int64],
    logp: NDArray[np.float32],
    threads: int,
) -> None: ...
def decode_attention(
    query: NDArray[Any],
    key: NDArray[Any],
    value: NDArray[Any],
    prompt_keys: NDArray[Any],
    prompt_values: NDArray[Any],
    own_keys: NDArray[Any],
    own_values: NDArray[Any],
    prompt: NDArray[np.int64],
    own: NDArray[np.int64],
    length: NDArray[np.int64],
    used: int,
    scale: float,
    out: NDArray[Any],
    threads: int,
) -> None: ...
def pack_attention_fwd(
    query: NDArray[Any],
    key: NDArray[Any],
    value: NDArray[Any],
    stretches: NDArray[np.int64],
    scale: float,
    out: NDArray[Any],
    threads: int,
) -> None: ...
def pack_attention_bwd(
    query: NDArray[Any],
    key: NDArray[Any],
    value: NDArray[Any],
    stretches: NDArray[np.int64],
    scale: float,
    d_out: NDArray[Any],
    d_query: NDArray[Any],
    d_key: NDArray[Any],
    d_value: NDArray[Any],
    threads: int,
) -> None: ...
def rms_norm_fwd(
    x: NDArray[Any],
    added: NDArray[Any] | None,
    weight: NDArray[Any],
    eps: float | None,
    total: NDArray[Any] | None,
    normed: NDArray[Any],
    rstd: NDArray[np.float32],
    threads: int,
) -> None: ...
def rms_norm_bwd(
    total: NDArray[Any],
    weight: NDArray[Any],
    rstd: NDArray[np.float32],
    d_normed: NDArray[Any],
    d_total: NDArray[Any] | None,
    d_x: NDArray[Any],
    d_added: NDArray[Any] | None,
    d_weight: NDArray[np.float32],
    threads: int,
) -> None: ...
def gated_fwd(
    gate: NDArray[Any], up: NDArray[Any], product: NDArray[Any], threads: int
) -> None: ...
def gated_bwd(
    gate: NDArray[Any],
    up: NDArray[Any],
    d_product: NDArray[Any],
    d_gate: NDArray[Any],
    d_up: NDArray[Any],
    threads: int,
) -> None: ...
def rotate(
    x: NDArray[Any],
    cosine: NDArray[Any],
    sine: NDArray[Any],
    sign: float,
    turned: NDArray[Any],
    threads: int,
) -> None: ...
