"""Compiles every kernel for one GPU that need not be there: `python compile_all.py 90`.

Prints a line of JSON for each: registers, spills, widths of the loads and stores in its loops. The
launchers run as they are; only the driver is made up, and a launch becomes a compilation.
"""

import json
import logging
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benches.drawn import needed_options
from rlvr_fast.kernels import launch as launching
from rlvr_fast.kernels.group_advantages import group_advantages_kernel
from rlvr_fast.kernels.launch import LOG, launch
from rlvr_fast.methods import METHODS, method
from rlvr_fast.mismatch import Corrected, MismatchCorrection
from rlvr_fast.objectives import (
    KL3,
    ClippedSurrogate,
    DynamicClipSurrogate,
    EntropyBonus,
    Objective,
    PolicyGradient,
)
from rlvr_fast.ops import divergence, group_advantages, logprobs, row_statistics
from rlvr_fast.ops.divergence import Divergence
from rlvr_fast.ops.fused_rows import GroupRewards, fused_rows
from rlvr_fast.ops.group_advantages import GroupNormalisation, Scale
from rlvr_fast.tracing.tokens import TokenFields
from rlvr_fast.tracing.trace import trace

VOCAB, STRIDE = 151_665, 151_680  # odd, in aligned rows: the loads must stay wide
ROUND, SMOLLM = (151_936, 151_936), (49_152, 49_152)
SMALL = (1000, 1008)  # one block
METHODS_ON = 90
"""The architecture that the methods' objectives are compiled for: half a minute each."""
compiled = []
run = JITFunction.run


@dataclass(frozen=True)
class NoDevice:
    architecture: int

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only(self, *args, grid, warmup, **kwargs):
    compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))
    return compiled[-1]


def variants(kernel) -> int:
    return len(kernel.device_caches[0][0])


def tool(path: str, cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [path, *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def loops(sass: str) -> Iterator[str]:
    """The text from each label to a later branch back to it."""
    labels = {match[1]: match.end() for match in re.finditer(r"^(\.L_x_\d+):", sass, re.M)}
    for branch in re.finditer(r"\bBRA\S* .*`\((\.L_x_\d+)\)", sass):
        if labels[branch[1]] < branch.start():
            yield sass[labels[branch[1]] : branch.start()]


def wide(loop: str) -> str:
    """What the loop does 16 bytes (or more) a thread at a time; nothing if it has other accesses.

    `load`, `store`, `load store` or an empty string.
    """
    accesses = re.findall(r"\b(LD|ST)G(\S*)", loop)
    narrow = [kind for kind, rest in accesses if not re.search(r"\.(128|256)\b", rest)]
    kinds = {kind for kind, _ in accesses}
    return "" if narrow else " ".join({"LD": "load", "ST": "store"}[kind] for kind in sorted(kinds))


def measured(name: str) -> dict[str, object]:
    kernel = compiled.pop()
    cubin, knobs = kernel.asm["cubin"], triton.knobs.nvidia
    usage = tool(knobs.cuobjdump.path, cubin, "--dump-resource-usage")
    sass = tool(knobs.nvdisasm.path, cubin, "--print-code")
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return {
        "kernel": f"{kernel.metadata.name} {name}",
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]) + int(found["LOCAL"]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "nan_aware": sorted(set(re.findall(r"(min|max)\.NaN\.f32", kernel.asm["ptx"]))),
        "wide_loops": sorted({wide(loop) for loop in loops(sass)} - {""}),
    }


def rows(dtype: torch.dtype, num_tokens: int = 2, vocab: tuple[int, int] = (VOCAB, STRIDE)):
    logits = torch.zeros(num_tokens, vocab[1], dtype=dtype)[:, : vocab[0]]
    return logits, torch.zeros(num_tokens, dtype=torch.int64)


def front(logits: torch.Tensor) -> torch.Tensor:
    """Of the same rows, as bf16."""
    return logits.view(torch.bfloat16)[:, : logits.shape[1]]


def logprob_kernels():
    wide = (VOCAB, STRIDE)
    for vocab, dtype, cap, entropy in (
        (wide, torch.float32, 0.0, False),
        (wide, torch.bfloat16, 0.0, True),
        (wide, torch.float32, 30.0, True),
        (wide, torch.float16, 30.0, False),
        (SMALL, torch.bfloat16, 30.0, True),
    ):
        logits, targets = rows(dtype, vocab=vocab)
        stats = logprobs.triton(logits, targets, 1.0, cap)
        yield measured(f"{vocab[0]} {dtype} {cap}")
        dentropy = stats[1] if entropy else None
        logprobs.triton_grad(logits, targets, stats, stats[0], dentropy, 1.0, cap, logits)
        yield measured(f"{vocab[0]} {dtype} {cap} {entropy}")
    logits, targets = rows(torch.float32)
    logprobs.triton_grad(logits, targets, stats, stats[0], None, 1.0, 0.0, front(logits))
    yield measured("fp32 shrinking to bf16")


def divergence_kernels():
    softcapped = [(Divergence.FORWARD, torch.float32), (Divergence.JENSEN_SHANNON, torch.float16)]
    plain = [(kind, dtype) for kind in Divergence for dtype in (torch.float32, torch.bfloat16)]
    for cap, cases in ((0.0, plain), (30.0, softcapped)):
        for kind, dtype in cases:
            student, teacher = (rows(dtype)[0] for _ in range(2))
            divergence.triton(
                student, teacher, torch.zeros(2), kind.value, 1.0, cap, front(student)
            )
            yield measured(f"{kind.name} {dtype} {cap}")


def group_kernels():
    for scale in Scale:
        group_advantages.triton(torch.zeros(4), torch.tensor([0, 4]), scale.value, 1, 1e-6)
        yield measured(scale.name)


def statistics_kernels():
    for dtype, cap, min_p in ((torch.float32, 0.0, 0.1), (torch.bfloat16, 30.0, 0.0)):
        logits, targets = rows(dtype)
        stats, top_id = row_statistics.triton(logits, targets, 1.0, cap, min_p)
        yield measured(f"{dtype} {cap} {min_p}")
        row_statistics.triton_grad(
            logits, targets, stats, top_id, stats, 1.0, cap, min_p, front(logits)
        )
        yield measured(f"{dtype} {cap} {min_p}")


def fused(objective: Objective, dtype: torch.dtype, num_tokens: int = 2, *,
          eps: float = 1e-6, ddof: int = 1, temperature: float = 1.0,
          groups: bool = False, narrow: bool = False,
          vocab: tuple[int, int] = (VOCAB, STRIDE)):  # fmt: skip
    logits, targets = rows(dtype, num_tokens, vocab)
    floats = torch.zeros(num_tokens)
    traced = trace(objective)
    fields = TokenFields(
        weight=floats, old_logp=floats, ref_logp=floats, rollout_logp=floats,
        advantage=None if groups else floats, extras=dict.fromkeys(traced.extras, floats),
    )  # fmt: skip
    rewards = GroupRewards(
        rewards=torch.zeros(4),
        group_offsets=torch.tensor([0, 4]),
        seq_of_token=torch.zeros(num_tokens, dtype=torch.int32),
        group_of_seq=torch.zeros(4, dtype=torch.int32),
        normalisation=GroupNormalisation(eps=eps, ddof=ddof),
    )
    out = front(logits) if narrow else logits
    fused_rows(logits, targets, fields, rewards if groups else None, objective, traced,
               scale=1 / temperature, cap=0.0, out=out)  # fmt: skip


def policy_kernels():
    everything = DynamicClipSurrogate() + KL3() + EntropyBonus()
    corrected = Corrected(
        objective=ClippedSurrogate(), correction=MismatchCorrection.TOKEN_MASK, floor=0.5
    )
    for objective, dtype in (
        (PolicyGradient(), torch.float32),
        (EntropyBonus(), torch.bfloat16),
        (everything, torch.float32),
        (everything, torch.bfloat16),
        (ClippedSurrogate(dual_clip=3.0), torch.float16),
        (corrected, torch.float32),
    ):
        fused(objective, dtype)
        yield measured(f"{type(objective).__name__} {dtype}")
    zoo = runpy.run_path(str(Path(__file__).parents[1] / "test_tracing.py"))["Zoo"]
    fused(zoo(), torch.float32)
    yield measured("most of the table")
    fused(everything, torch.float32, groups=True)
    yield measured("from rewards")
    fused(everything, torch.float32, narrow=True)
    yield measured("fp32 shrinking to bf16")
    fused(everything, torch.bfloat16, vocab=SMALL)
    yield measured(f"{SMALL[0]}")


def method_kernels():
    """Of every method whose objective runs inside the kernel."""
    chosen = {
        method(name, needed_options(kind)).objective(): name for name, kind in METHODS.items()
    }
    for objective, name in chosen.items():
        if isinstance(objective, Objective) and trace(objective) is not None:
            fused(objective, torch.float32)
            yield measured(f"of method {name}")


def recompilations():
    """How many further programs other lengths, vocabularies and values ask for."""
    from rlvr_fast.kernels.logprobs import logprobs_bwd_kernel, logprobs_fwd_kernel
    from rlvr_fast.kernels.policy_loss import policy_loss_kernel

    kernels = (logprobs_fwd_kernel, logprobs_bwd_kernel, policy_loss_kernel)
    fused(ClippedSurrogate(), torch.float32, groups=True)
    before = sum(map(variants, kernels))
    for num_tokens, vocab in ((1, ROUND), (7, SMOLLM), (16, (VOCAB, STRIDE))):
        logits, targets = rows(torch.float32, num_tokens, vocab)
        stats = logprobs.triton(logits, targets, 1 / num_tokens, 0.0)
        logprobs.triton_grad(logits, targets, stats, stats[0], None, 2.0, 0.0, logits)
        fused(
            ClippedSurrogate(clip_low=1.0, clip_high=num_tokens / 16), torch.float32, num_tokens,
            eps=1.0, ddof=num_tokens % 2, temperature=num_tokens, groups=True, vocab=vocab,
        )  # fmt: skip
    return {"recompilations": sum(map(variants, kernels)) - before}


def messages():
    """What the log says of a program compiled, found in memory, and found on disk."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    launching.PATIENCE = 0.0
    kernel = group_advantages_kernel
    for found in ("nowhere", "in memory", "on disk"):
        if found == "on disk":
            kernel.device_caches.clear()
        launch(kernel, 1)(
            torch.zeros(4), torch.tensor([0, 4]), torch.zeros(4), 1.0, 1e-6, KIND=Scale.NONE.value,
            num_warps=2, enable_fp_fusion=False,
        )  # fmt: skip
    return {"messages": lines}


if __name__ == "__main__":
    architecture = int(sys.argv[1])
    triton.runtime.driver.set_active(NoDevice(architecture))
    JITFunction.run = compile_only
    lines = [
        *logprob_kernels(),
        *group_kernels(),
        *divergence_kernels(),
        *statistics_kernels(),
        *policy_kernels(),
        *(method_kernels() if architecture == METHODS_ON else ()),
        recompilations(),
        messages(),
    ]
    sys.stdout.write("".join(json.dumps(line) + "\n" for line in lines))
