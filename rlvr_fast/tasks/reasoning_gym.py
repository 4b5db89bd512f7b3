"""Any dataset of the package reasoning-gym, with its own verifier in confined workers.

Several of those verifiers evaluate the answer as Python (countdown, through sympy), so none of them
runs in the trainer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from rlvr_fast.rewards.answers import final_answer, text_key
from rlvr_fast.rewards.workers import VerifierPool
from rlvr_fast.tasks import Example, Task, check_options, user_message

_INSTRUCTION = "\n\nGive your final answer between <answer> and </answer>."
_DEFAULTS = {"size": 500, "seed": 0, "holdout": 64}


def load(name: str, options: Mapping[str, Any]) -> Task:
    """The task `reasoning_gym:<name>`.

    Args:
        name: of the dataset, as in `reasoning_gym.create_dataset`.
        options: `size` (500 examples to train on; fewer remain where one repeats a held-out
            question), `holdout` (64 others; 0 evaluates on the training examples), `seed` (0), and
            the dataset's own.

    Raises:
        ValueError: for an unknown dataset or option, or a value that the dataset refuses.
        ImportError: without the package reasoning-gym.
    """
    own = {field.name for field in fields(_registered(name)[1])}
    check_options(f"reasoning_gym:{name}", options, own | _DEFAULTS.keys())
    config = {**_DEFAULTS, **options}
    holdout = config.pop("holdout")
    if holdout < 0 or config["size"] < 1:
        raise ValueError(f"size must be >= 1 and holdout >= 0, got {config['size']} and {holdout}")
    config["size"] += holdout
    verifier = DatasetVerifier(name, config)
    entries = [verifier.dataset[index] for index in range(config["size"])]
    held_out = {entry["question"] for entry in entries[:holdout]}
    train = _examples(entry for entry in entries[holdout:] if entry["question"] not in held_out)
    if not train:
        raise ValueError(
            f"reasoning_gym:{name} has nothing left to train on: every question is held out"
        )
    warm_up = (str(entries[0]["answer"]), {"entry": entries[0]})
    return Task(
        f"reasoning_gym:{name}",
        train,
        _examples(entries[:holdout]) or train,
        VerifierPool(verifier, warm_up=warm_up),
        text_key,
    )


class DatasetVerifier:
    """A dataset and its own `score_answer`; pickled as its arguments and built anew in the worker.

    Many datasets do not pickle, or are megabytes.
    """

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        self._arguments = (name, config)
        self.__name__ = name
        self.dataset = _created(name, config)

    def __reduce__(self) -> tuple[type["DatasetVerifier"], tuple[str, Mapping[str, Any]]]:
        return DatasetVerifier, self._arguments

    def __call__(self, completion: str, entry: Mapping[str, Any]) -> float:
        return float(self.dataset.score_answer(final_answer(completion), dict(entry)))


def _examples(entries: Iterable[Mapping[str, Any]]) -> list[Example]:
    return [
        Example(
            user_message(entry["question"] + _INSTRUCTION),
            {"answer": entry["answer"], "entry": entry},
        )
        for entry in entries
    ]


def _registered(name: str) -> tuple[type[Any], type[Any]]:
    """The dataset's class and that of its config."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        needs = "needs reasoning-gym: pip install reasoning-gym"
        raise ImportError(f"task reasoning_gym:{name} {needs}") from error
    if name not in DATASETS:
        near = get_close_matches(name, DATASETS) or sorted(DATASETS)
        raise ValueError(f"dataset of reasoning_gym must be one like {near}, got {name!r}")
    dataset, config = DATASETS[name]
    return dataset, config


def _created(name: str, config: Mapping[str, Any]) -> Any:
    dataset, settings = _registered(name)
    try:
        return dataset(config=settings(**config))
    except AssertionError as error:  # how its configs refuse a value
        raise ValueError(f"options of reasoning_gym:{name}: {error}") from error
