"""The verifier here is mostly `eval` itself: no verifier can be worse to its worker."""

import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlvr_fast.rewards import Completion, completion_text, score
from rlvr_fast.rewards._sandbox import Limits, has_call_filter
from rlvr_fast.rewards.math import math_reward
from rlvr_fast.rewards.workers import VerifierPool

LIMITS = Limits(seconds=2.0, characters=50_000, megabytes=128)

FAILURES = {
    "any(False for _ in iter(int, 1))": "timeout",
    "__import__('time').sleep(1000)": "timeout",
    "9**9**9**9**9": "timeout",
    "bytearray(10**12)": "out of memory",
    "[0] * 10**8": "out of memory",
    "1 / 0": "raised",
    "exit()": "raised",
    "no python": "raised",
    "\0": "raised",
    "'a reward'": "raised",
    "__import__('os')._exit(0)": "crashed",
    "__import__('os').abort()": "crashed",
    "__import__('os').close(3)": "crashed",
    "__import__('os').write(3, bytes(1000)) and __import__('os')._exit(0)": "crashed",
    "__import__('os').write(3, b'!') and __import__('time').sleep(1000)": "crashed",
    "float('nan')": "not finite",
    "1e999": "not finite",
    "1.0" + " " * 50_000: "too long",
}

FORBIDDEN = {
    "open for writing": "open('{path}', 'w')",
    "open by number": "__import__('os').open('{path}', 65)",
    "shell": "__import__('os').system('touch {path}')",
    "subprocess": "__import__('subprocess').run(['touch', '{path}'])",
    "directory": "__import__('os').mkdir('{path}')",
    "named pipe": "__import__('os').mkfifo('{path}')",
    "link": "__import__('os').symlink('/', '{path}')",
    "removal": "__import__('os').remove('{victim}')",
    "rename": "__import__('os').rename('{victim}', '{path}')",
    "truncation": "__import__('os').truncate('{victim}', 0)",
    "C library": "__import__('ctypes').CDLL(None).creat(b'{path}', 511)",
    "database": "__import__('sqlite3').connect('{path}')",
    "socket": "__import__('socket').socket().fileno()",
    "fork": "__import__('os').fork() and 1.0 or __import__('time').sleep(9)",
    "killing the worker": "__import__('os').kill(__import__('os').getppid(), 9)",
}

HOSTILE_MATHS = {
    "ten megabytes of brackets": "[" * 10_000_000,
    "brackets": "(" * 20_000,
    "shell": "__import__('os').system('touch {path}')",
    "shell in a box": r"\boxed{{__import__('os').system('touch {path}')}}",
    "shell in dollars": "$__import__('os').system('touch {path}')$",
    "unbalanced": r"\boxed{\frac{1}{",
    "unbalanced boxes": r"\boxed{" * 1_000,
    "power tower": r"\boxed{9^{9^{9^{9^{9}}}}}",
    "plain power tower": "The answer is 9**9**9**9**9",
    "nested roots": r"\boxed{" + r"\sqrt{" * 1_000 + "2" + "}" * 1_001,
    "endless sum": r"\boxed{\sum_{n=1}^{10^{12}} \frac{1}{n^2}}",
    "factorials": r"\boxed{(99999999!)!}",
    "digits": r"\boxed{" + "9" * 40_000 + "}",
    "NUL bytes": "\0" * 1_000,
    "nothing": "",
}


@pytest.fixture(scope="module")
def evaluator() -> Iterator[VerifierPool]:
    with VerifierPool(eval, LIMITS, workers=8) as pool:
        yield pool


@pytest.fixture(scope="module")
def maths() -> Iterator[VerifierPool]:
    pytest.importorskip("math_verify")
    with math_reward(LIMITS, workers=8) as pool:
        yield pool


def run(pool: VerifierPool, *completions: str) -> list[float | None]:
    return pool.verify(completions, [{}] * len(completions))


def worker_of(pool: VerifierPool) -> int:
    (pid,) = run(pool, "__import__('os').getppid()")
    assert pid is not None
    return int(pid)


def processes(*, session: int) -> list[str]:
    """The processes of a session that are not yet dead; a worker leads its own session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _parent, _group, leader = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(leader) == session and state != "Z":
            found.append(stat.parent.name)
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_every_failure_costs_one_zero_and_is_counted(evaluator: VerifierPool) -> None:
    before = evaluator.failures.copy()
    completions = [text for n, hostile in enumerate(FAILURES) for text in (hostile, f"0.75 # {n}")]
    assert run(evaluator, *completions) == [0.0, 0.75] * len(FAILURES)
    assert evaluator.failures - before == Counter(FAILURES.values())


@pytest.mark.parametrize("text", FORBIDDEN.values(), ids=FORBIDDEN.keys())
def test_evaluated_text_cannot_reach_out_of_its_process(
    evaluator: VerifierPool, text: str, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("kept")
    text = text.format(path=tmp_path / "harm", victim=victim)
    assert run(evaluator, text, "1.0") == [0.0, 1.0]
    assert list(tmp_path.iterdir()) == [victim]
    assert victim.read_text() == "kept"
    assert "worker lost" not in evaluator.failures


@pytest.mark.parametrize("fence", ["_filter_calls", "_hook_audit"])
def test_either_fence_holds_without_the_other(fence: str, tmp_path: Path) -> None:
    if fence == "_filter_calls" and not has_call_filter():
        pytest.skip("the system call filter is for x86_64")
    attempts = "\n".join(
        f"try: {text}\nexcept PermissionError: pass\nelse: raise SystemExit({text!r})"
        for text in (
            f"os.open({str(tmp_path / 'harm')!r}, os.O_WRONLY | os.O_CREAT)",
            f"os.mkdir({str(tmp_path / 'harm')!r})",
            f"os.rmdir({str(tmp_path)!r})",
            "os.fork()",
            "os.execv('/bin/true', ['true'])",
            "os.kill(os.getppid(), 0)",
            "socket.socket()",
        )
    )
    setup = f"import os, socket\nfrom rlvr_fast.rewards import _sandbox\n_sandbox.{fence}()\n"
    code = f"import sys\nsys.path[:] = {sys.path!r}\n{setup}{attempts}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_completion_cannot_change_how_the_next_is_judged(evaluator: VerifierPool) -> None:
    poison = "__import__('builtins').__dict__.update(float=lambda _: 1.0, eval=lambda _: 1.0)"
    completions = [f"{text} # {n}" for n in range(8) for text in (poison, "0.25")]
    assert run(evaluator, *completions) == [None, 0.25] * 8


def test_equal_completions_of_equal_rows_are_verified_once(evaluator: VerifierPool) -> None:
    process, failing = "__import__('os').getpid()", "1/0"
    before = evaluator.failures.copy()
    first, zero, other, again, _ = run(evaluator, process, failing, process + " ", process, failing)
    assert first == again != other
    assert zero == 0.0
    assert evaluator.failures - before == Counter({"raised": 2})


def test_equal_completions_of_other_rows_are_verified_apart(maths: VerifierPool) -> None:
    rows = [{"answer": answer} for answer in ("2", "3", "2")]
    assert maths.verify([r"\boxed{2}"] * 3, rows) == [1.0, 0.0, 1.0]


def test_the_worker_never_executes_the_package_and_has_no_torch(evaluator: VerifierPool) -> None:
    modules = "__import__('sys').modules"
    package = f"float('__version__' in vars({modules}['rlvr_fast']))"
    assert run(evaluator, f"float('torch' in {modules})", package) == [0.0, 0.0]


def test_none_means_that_a_completion_cannot_be_scored(evaluator: VerifierPool) -> None:
    assert run(evaluator, "None", "1") == [None, 1.0]


def test_a_pool_is_a_reward_function_that_reads_the_columns_it_needs(maths: VerifierPool) -> None:
    completions: list[Completion] = [[{"role": "assistant", "content": r"\boxed{4}"}], "it is 5"]
    assert maths(["", ""], completions, answer=["4", "4"], trainer_state=object()) == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"needs columns \['answer'\], got \['solution'\]"):
        maths(["", ""], completions, solution=["4", "4"])


def test_a_lost_worker_is_replaced() -> None:
    with VerifierPool(eval, LIMITS, workers=1) as pool:
        os.kill(worker_of(pool), signal.SIGKILL)
        assert run(pool, "1.0", "2.0") == [1.0, 2.0]
        assert pool.failures == {"worker lost": 1}


def test_a_worker_that_cannot_start_raises() -> None:
    pool = VerifierPool(eval, LIMITS, warm_up=("1 / 0", {}))
    with pytest.raises(RuntimeError, match="did not start"):
        run(pool, "1.0")


def test_closing_a_pool_ends_its_processes_and_the_next_batch_starts_anew() -> None:
    pool = VerifierPool(eval, LIMITS)
    worker = worker_of(pool)
    assert processes(session=worker)
    pool.close()
    assert not processes(session=worker)
    assert run(pool, "1.0") == [1.0]
    pool.close()


def test_workers_die_with_a_killed_trainer() -> None:
    code = f"""
import sys
sys.path[:] = {sys.path!r}
from rlvr_fast.rewards.workers import Limits, VerifierPool
pool = VerifierPool(eval, Limits(seconds=1000))
print(int(pool.verify(["__import__('os').getppid()"], [{{}}])[0]), flush=True)
pool.verify(["any(False for _ in iter(int, 1))"] * 2, [{{}}] * 2)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout is not None
        worker = int(trainer.stdout.readline())
        wait_until(lambda: len(processes(session=worker)) > 1)
        trainer.kill()
    wait_until(lambda: not processes(session=worker))


def test_a_verifier_that_a_worker_cannot_import_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be picklable, .* got <function"):
        VerifierPool(lambda completion: 1.0)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"so it is \boxed{\frac{1}{2}}", "1/2"),
        (r"so it is \boxed{0.5}", r"\frac{1}{2}"),
        ("The answer is 1,234.", "1234"),
        (r"$x^2 + 2x + 1$", "(x+1)^2"),
        (r"\boxed{\{2, 1\}}", r"$\{1, 2\}$"),
    ],
)
def test_equal_answers_score_one_and_others_zero(
    maths: VerifierPool, completion: str, answer: str
) -> None:
    assert maths(["", ""], [completion, r"\boxed{99}"], answer=[answer] * 2) == [1.0, 0.0]


def test_a_list_of_guesses_is_no_answer(maths: VerifierPool) -> None:
    assert maths([""], [r"\boxed{4} or \boxed{5}"], answer=["4"]) == [0.0]


def test_an_answer_that_cannot_be_read_gives_none(maths: VerifierPool) -> None:
    assert maths(["", ""], [r"\boxed{4}"] * 2, answer=["", "4"]) == [None, 1.0]


def test_hostile_mathematics_scores_zero_without_harm(maths: VerifierPool, tmp_path: Path) -> None:
    harm = tmp_path / "harm"
    hostile = [text.replace("{path}", str(harm)) for text in HOSTILE_MATHS.values()]
    completions = [text for bad in hostile for text in (bad, r"\boxed{4}")]
    rewards = maths(completions, completions, answer=["4"] * len(completions))
    assert rewards == [0.0, 1.0] * len(hostile)
    assert not harm.exists()


def test_score_passes_finite_numbers_and_none() -> None:
    assert score(lambda **_: [1, True, None, -0.5], [""] * 4, [""] * 4, {}) == [
        1.0,
        1.0,
        None,
        -0.5,
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf, "1.0", [1.0]])
def test_score_refuses_what_is_no_finite_number(bad: object) -> None:
    with pytest.raises(
        ValueError, match=r"must return finite numbers or None, got .* completion 1"
    ):
        score(lambda **_: [1.0, bad], ["", ""], ["", ""], {})


def test_score_refuses_lists_of_another_length() -> None:
    with pytest.raises(ValueError, match="must hold 2 entries, one per completion, got 1"):
        score(lambda **_: [1.0], ["", ""], ["", ""], {})
    with pytest.raises(ValueError, match="column 'answer' must hold 2 entries"):
        score(lambda **_: [1.0, 1.0], ["", ""], ["", ""], {"answer": ["4"]})


def test_the_text_of_a_chat_is_its_last_message() -> None:
    chat = [{"role": "tool", "content": "1"}, {"role": "assistant", "content": "2"}]
    assert completion_text(chat) == completion_text("2") == "2"
