"""`rlvr-fast model`: writes a model as a Hugging Face folder."""

from pathlib import Path

from rlvr_fast.cli.common import Parser, prepared, say

USAGE = "model NAME [--folder FOLDER]"


def run(arguments: list[str]) -> int:
    parser = Parser("rlvr-fast model", description="Writes a model as a Hugging Face folder.")
    parser.add_argument("name", help="smollm2-135m or tiny")
    parser.add_argument("--folder", type=Path, help="new or empty; default: the cache")
    chosen = parser.parse_args(arguments)
    say(str(prepared(chosen.name, chosen.folder)))
    return 0
