"""Where a run's numbers go besides its own files: TensorBoard, wandb, trackio.

wandb writes into the run folder and follows its own settings: `WANDB_MODE=offline` keeps it off
the network, `WANDB_PROJECT` and `WANDB_ENTITY` say where runs go. trackio writes its own local
database (`TRACKIO_DIR`); its page is started by `trackio show`, never by a training run.
"""

import importlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

DEFAULT = ("tensorboard",)
PROJECT = "rlvr-fast"
"""Of wandb and trackio, unless `WANDB_PROJECT` or `TRACKIO_PROJECT` names another."""
IDS = "trackers.json"
"""In the run folder: under which name each tracker knows the run, so that it can go on."""

_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What a run reports to."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """All metrics of a step; step 0 is the model before training."""

    def close(self, *, failed: bool) -> None:
        """Everything is written after this; `failed` says whether training ended by an error."""


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a tracker is told about a run."""

    folder: Path
    """Of the run; its last part is the name that is shown."""
    values: Mapping[str, Any]
    """The config as JSON values."""
    step: int = 0
    """Training steps done so far."""


def names(text: str) -> tuple[str, ...]:
    """The trackers that a comma-separated list names, in its order; none of them for `none`.

    Raises:
        ValueError: for an unknown or repeated name, for an empty list, and for none with others.
    """
    found = tuple(name.strip() for name in text.split(","))
    if found == ("none",):
        return ()
    if set(found) - _START.keys() or len(set(found)) < len(found):
        raise ValueError(
            f"trackers: wanted none, or some of {', '.join(_START)}, separated by commas, "
            f"got {text!r}"
        )
    return found


def available(wanted: Sequence[str]) -> tuple[str, ...]:
    """The same trackers; without TensorBoard if that is all that is wanted and it is missing.

    Since TensorBoard alone is the default, a run does without it and says so.

    Raises:
        ValueError: for a tracker that is not installed; it says what to install.
    """
    missing = [name for name in wanted if not _installed(name)]
    if missing and tuple(wanted) == DEFAULT:
        _log.info("tensorboard is not installed: this run writes no event files")
        return ()
    if missing:
        raise ValueError(
            f"trackers: wanted installed ones (pip install {' '.join(missing)}), "
            f"got {', '.join(missing)}"
        )
    return tuple(wanted)


def start(wanted: Sequence[str], run: TrackedRun) -> list[Tracker]:
    """Trackers that go on with the run where they can: TensorBoard from `run.step`, the others
    with their run of the same id, in which a step that is done again appears twice.

    Args:
        wanted: names, as `names` gives them.
        run: what they are told about it.

    Raises:
        ValueError: as `available`, and where wandb refuses, for lack of a login say.
    """
    return [_START[name](run) for name in available(wanted)]


class _TensorBoard:
    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Events of steps that will be done again are hidden.
        purge = run.step + 1 if run.step else 0
        self._writer: Any = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run: TrackedRun) -> None:
        wandb: Any = importlib.import_module("wandb")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=_name(run),
                id=_id(run, "wandb", secrets.token_hex(4)),
                resume="allow",
                dir=str(run.folder),
                config=dict(run.values),
            )
        except wandb.Error as error:
            raise ValueError(
                f"trackers: wanted wandb to start (wandb login, or WANDB_MODE=offline), "
                f"got: {error}"
            ) from error
        # wandb's own counter would drop every step that is done again after a resume.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Trackio:
    def __init__(self, run: TrackedRun) -> None:
        trackio: Any = importlib.import_module("trackio")
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            # The database is shared: another folder may have the same name.
            name=_id(run, "trackio", f"{_name(run)}-{secrets.token_hex(2)}"),
            resume="allow",
            config=dict(run.values),
            embed=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish()


_START: Mapping[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}


def _installed(name: str) -> bool:
    # A folder of that name, such as wandb leaves behind, is found too, but has no origin.
    spec = find_spec(name)
    return spec is not None and spec.origin is not None


def _name(run: TrackedRun) -> str:
    return run.folder.resolve().name


def _id(run: TrackedRun, tracker: str, new: str) -> str:
    """The id that the run folder holds for the tracker; `new`, written there, if it has none."""
    file = run.folder / IDS
    ids: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    if tracker not in ids:
        ids[tracker] = new
        scratch = file.with_name(f".{file.name}")
        scratch.write_text(json.dumps(ids, indent=2) + "\n")
        scratch.replace(file)
    return ids[tracker]
