"""What warnings say, whether they are values or were read from a file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sim.model.warning import Notice


def texts(warnings: Iterable[Notice | dict[str, Any]]) -> list[str]:
    """The text of each."""
    return [said.text if isinstance(said, Notice) else said["text"] for said in warnings]
