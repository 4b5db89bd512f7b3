"""Published methods, one short file each; a new one is its file and a line here."""

from collections.abc import Mapping

from rlvr_fast import options as option_parsing
from rlvr_fast.methods.base import Method
from rlvr_fast.methods.cispo import CISPO
from rlvr_fast.methods.dr_grpo import DrGRPO
from rlvr_fast.methods.grpo import GRPO
from rlvr_fast.methods.gspo import GSPO
from rlvr_fast.methods.reinforce import Reinforce

METHODS: dict[str, type[Method]] = {
    "cispo": CISPO,
    "dr_grpo": DrGRPO,
    "grpo": GRPO,
    "gspo": GSPO,
    "reinforce": Reinforce,
}


def method(name: str, options: Mapping[str, object]) -> Method:
    """The method of that name; option values as in a config or as text.

    Raises:
        ValueError: for an unknown name or option (with the nearest that exists), or its value.
    """
    option_parsing.check_known("method", name, METHODS)
    return option_parsing.build(f"option of method {name}", METHODS[name], options)
