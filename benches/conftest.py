"""Benches hand in tables; they are printed after the run, with the machine and the command."""

import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict

import pytest
from _pytest.terminal import TerminalReporter
from pytest_benchmark.fixture import BenchmarkFixture

from benches.measure import load, machine
from benches.report import Table

TABLES = pytest.StashKey[list[Table]]()
MACHINE = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--curves",
        action="store_true",
        help="also measure the curves that benches/NOTES.md cites (minutes)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES], config.stash[MACHINE] = [], machine()
    config.addinivalue_line("markers", "curve: only with --curves")
    # pytest-benchmark's own table would show whole rounds of all contenders together.
    config.option.benchmark_quiet = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--curves"):
        for item in items:
            if item.get_closest_marker("curve"):
                item.add_marker(pytest.mark.skip(reason="a curve: --curves runs it"))


@pytest.fixture
def report(benchmark: BenchmarkFixture, pytestconfig: pytest.Config) -> Callable[[Table], None]:
    """Takes a table: for the end of the run, and for pytest-benchmark's JSON."""

    def take(table: Table) -> None:
        benchmark.extra_info["machine"] = machine()
        benchmark.extra_info.setdefault("tables", []).append(asdict(table))
        pytestconfig.stash[TABLES].append(table)

    return take


def pytest_terminal_summary(terminalreporter: TerminalReporter, config: pytest.Config) -> None:
    if not config.stash[TABLES]:
        return
    for table in config.stash[TABLES]:
        terminalreporter.write_line(f"\n{table.markdown()}")
    terminalreporter.write_line(f"\nMachine: {config.stash[MACHINE]}; at the end {load()}")
    terminalreporter.write_line(f"Command: {shlex.join(sys.orig_argv)}")
