"""Compiles every kernel for one GPU that need not be there: `python compile_all.py 90`.

Prints a line of JSON for each: registers, stack, instructions. The launchers run as they are; only
the driver is made up, and a launch becomes a compilation.
"""

import json
import re
import runpy
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from rlvr_fast.objectives import (
    KL3,
    ClippedSurrogate,
    DynamicClipSurrogate,
    EntropyBonus,
    Objective,
    PolicyGradient,
)
from rlvr_fast.ops import group_advantages, logprobs
from rlvr_fast.ops.fused_rows import GroupRewards, fused_rows
from rlvr_fast.ops.group_advantages import GroupNormalisation, Scale
from rlvr_fast.tracing.tokens import TokenFields
from rlvr_fast.tracing.trace import trace

VOCAB, STRIDE = 151_665, 151_680  # odd, in aligned rows: the loads must stay wide
compiled = []
launch = JITFunction.run


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
    compiled.append(launch(self, *args, grid=grid, warmup=True, **kwargs))


def variants(kernel) -> int:
    return len(kernel.device_caches[0][0])


def measured(name: str) -> dict[str, object]:
    kernel = compiled.pop()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return {
        "kernel": f"{kernel.metadata.name} {name}",
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]) + int(found["LOCAL"]),
        "nan_aware": sorted(set(re.findall(r"(min|max)\.NaN\.f32", kernel.asm["ptx"]))),
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", kernel.asm["ptx"])),
    }


def rows(dtype: torch.dtype, num_tokens: int = 2):
    logits = torch.zeros(num_tokens, STRIDE, dtype=dtype)[:, :VOCAB]
    return logits, torch.zeros(num_tokens, dtype=torch.int64)


def logprob_kernels():
    for dtype, cap, entropy in (
        (torch.float32, 0.0, False),
        (torch.bfloat16, 0.0, True),
        (torch.float32, 30.0, True),
        (torch.float16, 30.0, False),
    ):
        logits, targets = rows(dtype)
        stats = logprobs.triton(logits, targets, 1.0, cap)
        yield measured(f"{dtype} {cap}")
        dentropy = stats[1] if entropy else None
        logprobs.triton_grad(logits, targets, stats, stats[0], dentropy, 1.0, cap, logits)
        yield measured(f"{dtype} {cap} {entropy}")


def group_kernels():
    for scale in Scale:
        group_advantages.triton(torch.zeros(4), torch.tensor([0, 4]), scale.value, 1, 1e-6)
        yield measured(scale.name)


def fused(objective: Objective, dtype: torch.dtype, num_tokens: int = 2, *,
          eps: float = 1e-6, ddof: int = 1, temperature: float = 1.0,
          groups: bool = False, narrow: bool = False):  # fmt: skip
    logits, targets = rows(dtype, num_tokens)
    floats = torch.zeros(num_tokens)
    fields = TokenFields(
        weight=floats, old_logp=floats, ref_logp=floats, rollout_logp=floats,
        advantage=None if groups else floats, extras={"temperature": floats},
    )  # fmt: skip
    rewards = GroupRewards(
        rewards=torch.zeros(4),
        group_offsets=torch.tensor([0, 4]),
        seq_of_token=torch.zeros(num_tokens, dtype=torch.int32),
        group_of_seq=torch.zeros(4, dtype=torch.int32),
        normalisation=GroupNormalisation(eps=eps, ddof=ddof),
    )
    out = logits.view(torch.bfloat16)[:, :VOCAB] if narrow else logits
    fused_rows(logits, targets, fields, rewards if groups else None, objective, trace(objective),
               scale=1 / temperature, cap=0.0, out=out)  # fmt: skip


def policy_kernels():
    everything = DynamicClipSurrogate() + KL3() + EntropyBonus()
    for objective, dtype in (
        (PolicyGradient(), torch.float32),
        (EntropyBonus(), torch.bfloat16),
        (everything, torch.float32),
        (everything, torch.bfloat16),
        (ClippedSurrogate(dual_clip=3.0), torch.float16),
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


def recompilations():
    """How many further programs other lengths and other values ask for."""
    from rlvr_fast.kernels.logprobs import logprobs_bwd_kernel, logprobs_fwd_kernel
    from rlvr_fast.kernels.policy_loss import policy_loss_kernel

    kernels = (logprobs_fwd_kernel, logprobs_bwd_kernel, policy_loss_kernel)
    fused(ClippedSurrogate(), torch.float32, groups=True)
    before = sum(map(variants, kernels))
    for num_tokens in (1, 7, 16):
        logits, targets = rows(torch.float32, num_tokens)
        stats = logprobs.triton(logits, targets, 1 / num_tokens, 0.0)
        logprobs.triton_grad(logits, targets, stats, stats[0], None, 2.0, 0.0, logits)
        fused(
            ClippedSurrogate(clip_low=1.0, clip_high=num_tokens / 16), torch.float32, num_tokens,
            eps=1.0, ddof=num_tokens % 2, temperature=num_tokens, groups=True,
        )  # fmt: skip
    return {"recompilations": sum(map(variants, kernels)) - before}


if __name__ == "__main__":
    triton.runtime.driver.set_active(NoDevice(int(sys.argv[1])))
    JITFunction.run = compile_only
    lines = [*logprob_kernels(), *group_kernels(), *policy_kernels(), recompilations()]
    sys.stdout.write("".join(json.dumps(line) + "\n" for line in lines))
