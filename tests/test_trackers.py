import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from rlvr_fast import trackers
from rlvr_fast.trackers import TrackedRun


def test_trackers_are_named_in_a_list():
    assert trackers.names("tensorboard") == trackers.DEFAULT
    assert trackers.names("wandb, trackio") == ("wandb", "trackio")
    assert trackers.names("none") == ()


@pytest.mark.parametrize("text", ["", "wandb,none", "wandb,wandb", "mlflow", "none,none", "wandb,"])
def test_a_list_of_something_else_is_refused(text):
    with pytest.raises(ValueError, match=r"^trackers: wanted none, or some of tensorboard, wandb"):
        trackers.names(text)


def test_a_tracker_that_is_not_installed_says_what_to_install(monkeypatch, caplog, tmp_path):
    # wandb leaves a folder of its name behind, which can be imported and is not it.
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    for name in ("wandb", "trackio", "tensorboard"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    with pytest.raises(ValueError, match=r"\(pip install wandb trackio\), got wandb, trackio$"):
        trackers.available(("wandb", "trackio"))
    with pytest.raises(ValueError, match=r"\(pip install tensorboard wandb\)"):
        trackers.available(("tensorboard", "wandb"))
    with caplog.at_level("INFO"):
        assert trackers.available(trackers.DEFAULT) == ()
    assert "tensorboard is not installed" in caplog.text


def tracked(folder, name, *, step, last):
    """The steps after `step` as one process reports them."""
    run = TrackedRun(folder=folder, values={"seed": 1, "options": {"a": None}}, step=step)
    (tracker,) = trackers.start((name,), run)
    for number in range(step + 1, last + 1):
        tracker.log(number, {"reward": number / 10, "loss": float("nan")})
    tracker.close(failed=False)


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_goes_on_where_the_checkpoint_was(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked(tmp_path, "tensorboard", step=0, last=3)
    tracked(tmp_path, "tensorboard", step=2, last=4)

    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [each.step for each in found.Scalars("reward")] == [1, 2, 3, 4]


@pytest.mark.skipif(find_spec("wandb") is None, reason="needs wandb")
def test_wandb_goes_on_with_the_same_run_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")

    tracked(tmp_path, "wandb", step=0, last=3)
    tracked(tmp_path, "wandb", step=2, last=4)

    own = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert {file.name for file in files} == {f"run-{own}.wandb"}


@pytest.mark.skipif(find_spec("trackio") is None, reason="needs trackio")
def test_trackio_goes_on_with_the_same_run_and_starts_no_server(tmp_path):
    code = (
        "import psutil, trackio; from pathlib import Path; from rlvr_fast import trackers\n"
        "for step, last in ((0, 3), (2, 4)):\n"
        f"    run = trackers.TrackedRun(folder=Path({str(tmp_path)!r}), values={{}}, step=step)\n"
        "    (tracker,) = trackers.start(('trackio',), run)\n"
        "    for number in range(step + 1, last + 1): tracker.log(number, {'reward': 0.5})\n"
        "    tracker.close(failed=False)\n"
        "listening = [c for c in psutil.Process().net_connections() if c.status == 'LISTEN']\n"
        "print('found', len(listening), *[r.name for r in trackio.Api().runs('rlvr-fast')])\n"
    )
    place = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | place, capture_output=True, text=True
    )

    own = json.loads((tmp_path / "trackers.json").read_text())["trackio"]
    assert f"found 0 {own}" in done.stdout.splitlines(), done.stderr
