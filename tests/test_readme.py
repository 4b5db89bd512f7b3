"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

from rlvr_fast import ScoredTokens, policy_loss

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_every_python_block_runs(code, tmp_path):
    script = tmp_path / "block.py"  # dataclasses look their module's source up
    script.write_text(code)
    exec(compile(code, script, "exec"), {"__name__": "readme"})


def test_the_own_objective_trains():
    names: dict[str, object] = {"__name__": "readme"}
    exec(next(code for code in BLOCKS if "class SoftClip" in code), names)
    hidden = torch.randn(4, 8, requires_grad=True)
    tokens = ScoredTokens(
        targets=torch.arange(4), weight=torch.full((4,), 0.25), advantage=torch.ones(4)
    )
    out = policy_loss(hidden, torch.randn(9, 8), tokens, names["SoftClip"]())
    out.loss.backward()
    assert (hidden.grad != 0).any()
