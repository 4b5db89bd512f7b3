import io
import re

import pytest

from rlvr_fast.progress import Plan, Progress, clock_time, time_split

STEP = {
    "reward": 0.5,
    "length": 10.0,
    "tokens_per_second": 100.0,
    "seconds_generate": 1.0,
    "seconds_update": 3.0,
    "seconds_total": 4.0,
}


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


# What a run's time consists of here: seconds of a step, an evaluation every 5, a checkpoint every 8
TIMES = {"train": 2.0, "evaluate": 30.0, "save": 7.0}
EVERY = {"evaluate": 5, "save": 8}


def played(progress, clock, plan):
    """Lets a run pass as the trainer does it; what was left by step: as shown, and in truth."""
    shown, at = {}, {}

    def does(part, step):
        progress.doing(part)
        if part == "train":
            shown[step - 1] = re.search(r", (\S+) left", progress.line())[1]
            at[step - 1] = clock.now
        clock.now += TIMES[part]

    if plan.done == 0:
        does("evaluate", 0)
        progress.done(0, {"eval_reward": 0.0})
    for step in range(plan.done + 1, plan.steps + 1):
        does("train", step)
        if step == plan.steps or step % EVERY["evaluate"] == 0:
            does("evaluate", step)
        progress.done(step, STEP)
        if step == plan.steps or step % EVERY["save"] == 0:
            does("save", step)
    return shown, {step: clock_time(clock.now - now) for step, now in at.items()}


# Step 40 would be evaluated and saved anyway, step 33 only because it is the last.
@pytest.mark.parametrize(("done", "steps"), [(0, 33), (3, 40), (16, 33), (16, 40)])
def test_the_time_left_is_what_it_will_be_with_evaluations_and_after_a_resume(done, steps):
    clock, plan = Clock(), Plan(steps=steps, done=done, every=EVERY)
    progress = Progress(Terminal(), plan, earlier={"evaluate": [30.0]}, clock=clock)

    shown, truth = played(progress, clock, plan)

    unknown = range(done, done + 8)  # until a checkpoint is written
    assert shown[done] == "?"
    known = {step: left for step, left in shown.items() if step not in unknown}
    assert known == {step: left for step, left in truth.items() if step not in unknown}


def test_the_first_step_which_compiles_does_not_count_once_there_is_another():
    clock, plan = Clock(), Plan(steps=10, every={})
    progress = Progress(Terminal(), plan, clock=clock)

    left = []
    for step, seconds in ((1, 50), (2, 2)):
        progress.doing("train")
        clock.now += seconds
        progress.done(step, STEP)
        left.append(re.search(r", (\S+) left", progress.line())[1])

    assert left == [clock_time(9 * 50), clock_time(8 * 2)]


def test_a_file_gets_a_line_about_every_thirty_seconds_and_the_last_one():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(stream, Plan(steps=50, every={}), clock=clock)

    for step in range(1, 51):
        progress.doing("train")
        clock.now += 2
        progress.done(step, STEP)
    progress.close()

    lines = stream.getvalue().splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [1, 16, 31, 46, 50]
    assert lines[-1] == (
        "step 50/50, 1:40 so far, 0:00 left, reward 0.500, length 10.0, 100 tok/s, "
        "generate 1.00s update 3.00s"
    )
    assert "\r" not in stream.getvalue()


def test_a_terminal_has_one_line_no_wider_than_itself(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    clock, stream = Clock(), Terminal()
    progress = Progress(stream, Plan(steps=3, every={}), clock=clock)

    for step in (1, 2, 3):
        progress.doing("train")
        clock.now += 1
        progress.done(step, STEP)
    progress.say("a word")
    progress.close()

    above, last, end = stream.getvalue().split("\n")
    assert above.endswith("\r\x1b[Ka word")
    assert end == ""
    drawn = re.split(r"\r\x1b\[K", above + last)
    assert max(map(len, drawn)) == 39
    assert drawn[-1] == "step 3/3, 0:00 left, reward 0.500, leng"


def test_the_parts_of_a_step_add_up_to_it_whether_or_not_they_overlap():
    one = {"seconds_generate": 3.0, "seconds_verify": 1.0, "seconds_wait": 4.1}
    other = {"seconds_update": 5.0, "seconds_sync": 0.5, "seconds_total": 9.6, "reward": 1.0}

    apart = time_split(one | other)
    beside = time_split(one | other | {"seconds_wait": 0.2, "seconds_total": 5.7})

    assert apart == {"generate": 3.0, "verify": 1.0, "update": 5.0, "sync": 0.5}
    assert beside == {"wait": 0.2, "update": 5.0, "sync": 0.5}
    assert time_split({"seconds_update": None}) == {}


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (65.4, "1:05"), (7261, "2:01:01")])
def test_times_read_like_a_clock(seconds, text):
    assert clock_time(seconds) == text
