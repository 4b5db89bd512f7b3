"""`rlvr-fast eval`: reward, pass@k and majority votes of a model, alone or against another."""

import json
import sys
from pathlib import Path

from rlvr_fast import options
from rlvr_fast.cli.common import document, prepared, say, wants_help
from rlvr_fast.config import EvalConfig

USAGE = "eval MODEL --task TASK [--against MODEL] [--field value ...]"


def run(arguments: list[str]) -> int:
    if wants_help(arguments):
        return document(USAGE, EvalConfig)
    if not arguments or arguments[0].startswith("--"):
        raise ValueError("eval: wanted a model folder, hub id or name first")
    name, *rest = arguments
    given = options.merge(EvalConfig, {}, options.parse("option of eval", EvalConfig, rest))
    config = options.build("option of eval", EvalConfig, given)
    from rlvr_fast import report
    from rlvr_fast.compare import evaluate_models

    if config.plot:
        report.check_plots()
    names = [name, *filter(None, [config.against])]
    for model in names:
        prepared(model)
    values, answers = evaluate_models(names, config)
    if config.completions:
        report.write_completions(Path(config.completions), values, answers)
    if config.plot:
        report.draw(Path(config.plot), values, answers)
    text = json.dumps(values, indent=2)
    if config.output:
        Path(config.output).write_text(text + "\n")
    say(report.table(values), to=sys.stderr)  # stdout is for programs
    say(text)
    return 0
