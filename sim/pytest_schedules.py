"""`pytest --schedules FILE` and `--balancers FILE`: a pytest plugin that knows the options from the start.

A conftest is read too late for them: pytest would take FILE for a place to look for tests in, and conftests with it.
What the options do is in `tests/conftest.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register `--schedules` and `--balancers`."""
    for option, recorded in (("--schedules", "schedules"), ("--balancers", "choices of balancers")):
        parser.addoption(
            option,
            action="append",
            type=Path,
            metavar="FILE",
            help=f"replay the recorded {recorded} in FILE (JSON lines, plain or .gz; repeatable), not the shipped ones",
        )
