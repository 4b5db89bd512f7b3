"""What a process gives up before it runs a verifier on text that a model wrote. Linux only.

Three fences, each meant to hold without the others:

- resource limits: memory, and no byte written to any file;
- a system call filter (seccomp, on x86_64): computing and reading files, nothing else. No program
  or process started, no socket, no signal, no file written, removed or renamed;
- an audit hook, which refuses the same from inside Python with a readable error. By itself it is
  no boundary: Python code that tries can get around it, so other machines are less well protected.

None of them keeps text that reaches an `eval` from lying about its own reward.
"""

import ctypes
import math
import os
import resource
import signal
import struct
import sys
from dataclasses import dataclass
from typing import Any

_PR_SET_PDEATHSIG, _PR_GET_SECCOMP, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 21, 22, 38

_WRITING = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC

# fmt: off
_REFUSED_EVENTS = (
    "os", "socket", "subprocess", "ctypes", "shutil", "fcntl", "pty", "signal", "syslog",
    "resource", "gc", "code", "sqlite3", "tempfile", "webbrowser", "urllib", "http", "ftplib",
)
# fmt: on

# linux/audit.h, linux/seccomp.h and linux/bpf_common.h
_ARCH_X86_64 = 0xC000003E
_KILL, _REFUSE, _ALLOW = 0x80000000, 0x00050001, 0x7FFF0000  # refuse: errno 1, EPERM
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_AT_CALL, _AT_ARCH, _AT_OPEN_FLAGS = 0, 4, 32  # offsets in struct seccomp_data

_OPENAT = 257
# fmt: off
_CALLS = {
    "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14,
    "rt_sigreturn": 15, "pread64": 17, "access": 21, "sched_yield": 24, "mremap": 25, "madvise": 28,
    "nanosleep": 35, "getpid": 39, "exit": 60, "uname": 63, "getcwd": 79, "readlink": 89,
    "gettimeofday": 96, "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "times": 100,
    "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110,
    "sigaltstack": 131, "gettid": 186, "time": 201, "futex": 202, "sched_getaffinity": 204,
    "getdents64": 217, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
    "exit_group": 231, "newfstatat": 262, "readlinkat": 267, "faccessat": 269, "getrandom": 318,
    "statx": 332, "faccessat2": 439,
}
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one completion may cost before it scores 0.0."""

    seconds: float = 5.0
    """Wall-clock time of its verification."""
    characters: int = 200_000
    """Length of its text; a longer one is not verified at all."""
    megabytes: int = 512
    """Address space that its verification may add to that of the worker at rest."""


def confine(limits: Limits) -> None:
    """Raise all fences around this process, for good; it also dies with its parent from now on."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with open("/proc/self/statm") as statm:
        at_rest = int(statm.read().split()[0]) * resource.getpagesize()
    for what, most in (
        (resource.RLIMIT_AS, at_rest + limits.megabytes * 2**20),
        (resource.RLIMIT_CPU, math.ceil(limits.seconds) + 1),  # should nobody be left to kill it
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(what, (most, most))
    if has_call_filter():
        _filter_calls()
    _hook_audit()


def has_call_filter() -> bool:
    """Whether the system call filter is there for this machine and kernel."""
    return os.uname().machine == "x86_64" and _prctl(_PR_GET_SECCOMP) >= 0


def _hook_audit() -> None:
    # Locals, not globals of this module: hostile code could rebind those.
    writing = _WRITING
    harmless = frozenset({"os.listdir", "os.scandir", "os.walk", "os.fwalk"})
    families = frozenset(_REFUSED_EVENTS)

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            refused = not isinstance(arguments[2], int) or bool(arguments[2] & writing)
        else:
            refused = event.partition(".")[0] in families and event not in harmless
        if refused:
            raise PermissionError(f"a verifier may not do this: {event}")

    sys.addaudithook(refuse)


def _filter_calls() -> None:
    code = ctypes.create_string_buffer(_call_filter())
    program = ctypes.create_string_buffer(struct.pack("HP", len(code) // 8, ctypes.addressof(code)))
    # Without "no new privileges" only root may install a filter.
    for option, *arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1),
        (_PR_SET_SECCOMP, 2, ctypes.addressof(program)),
    ):
        if _prctl(option, *arguments) != 0:
            raise OSError(f"prctl option {option} failed")


def _prctl(option: int, *arguments: int) -> int:
    padded = (*arguments, 0, 0, 0, 0)[:4]
    return int(ctypes.CDLL(None).prctl(option, *map(ctypes.c_ulong, padded)))


def _call_filter() -> bytes:
    """The filter in classic BPF: listed calls and `openat` for reading pass, others get EPERM."""
    calls = sorted(_CALLS.values())
    steps = [(_LOAD, 0, 0, _AT_ARCH), (_EQUAL, 1, 0, _ARCH_X86_64), (_RETURN, 0, 0, _KILL)]
    steps += [(_LOAD, 0, 0, _AT_CALL)]
    steps += [(_EQUAL, len(calls) - i + 3, 0, call) for i, call in enumerate(calls)]
    steps += [(_EQUAL, 0, 2, _OPENAT), (_LOAD, 0, 0, _AT_OPEN_FLAGS), (_ANY_BIT, 0, 1, _WRITING)]
    steps += [(_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("HBBI", *step) for step in steps)
