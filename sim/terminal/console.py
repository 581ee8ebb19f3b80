"""Terminals as `rich` sees them, with one difference: no text that is printed can command the terminal."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

from sim.model.text import escaped

WIDTH = 80  # columns where stdout is no terminal


class Console(RichConsole):
    """A console that takes no markup (`[red]` in a name is text) and escapes control characters in all that it prints.

    What a closed pipe means is left to `cli`: that somebody has seen enough.
    """

    def __init__(self, **options: Any):
        width = os.environ.get("COLUMNS", "")
        environment = os.environ if width.isdecimal() and int(width[:9]) > 0 else _without("COLUMNS")
        super().__init__(**({"markup": False, "emoji": False, "_environ": environment} | options))

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """See `rich.console.Console`; every segment is text, but for the control codes of rich itself."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else escaped(text), style, control)

    def on_broken_pipe(self) -> None:
        """See `rich.console.Console`."""
        raise BrokenPipeError


def console() -> Console:
    """stdout as rich sees it; where it is no terminal, without colour and 80 columns wide (or COLUMNS, if set)."""
    terminal = Console()
    if terminal.is_terminal:
        return terminal
    width = os.environ.get("COLUMNS", "")
    columns = int(width) if width.isdecimal() and int(width[:9]) > 0 else WIDTH
    return Console(width=columns, no_color=True, highlight=False)


def _without(name: str) -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != name}
