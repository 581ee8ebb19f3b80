"""`pytest --schedules FILE`: the recorded schedules that `test_sim_schedules.py` replays."""

from __future__ import annotations

from pathlib import Path

import pytest
from schedule import BadSchedules, Witness, read_witnesses

SHIPPED = Path(__file__).parent.parent / "data" / "router-0.9.4-traces.jsonl"
WITNESSES = pytest.StashKey[list[Witness]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--schedules",
        action="append",
        type=Path,
        metavar="FILE",
        help="replay the schedule witnesses of FILE (JSON lines, plain or .gz; repeatable) instead of the shipped ones",
    )


def pytest_configure(config: pytest.Config) -> None:
    files = config.getoption("schedules") or [SHIPPED]
    try:
        config.stash[WITNESSES] = [w for file in files for w in read_witnesses(file)]
    except BadSchedules as e:
        raise pytest.UsageError(str(e)) from e


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "witness" in metafunc.fixturenames:
        witnesses = metafunc.config.stash[WITNESSES]
        metafunc.parametrize("witness", witnesses, ids=[w.name for w in witnesses])
