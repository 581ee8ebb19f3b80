"""`pytest --schedules FILE`: a pytest plugin that knows the option from the start.

A conftest is read too late for it: pytest would take FILE for a place to look for tests in, and conftests with it. What
the option does is in `tests/conftest.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register `--schedules`."""
    parser.addoption(
        "--schedules",
        action="append",
        type=Path,
        metavar="FILE",
        help="replay the recorded schedules in FILE (JSON lines, plain or .gz; repeatable) instead of the shipped ones",
    )
