"""What a user can fix: one tree of errors, each printed as a single line. Anything else is a bug of ours."""

from __future__ import annotations

from pathlib import Path


class UserError(Exception):
    """An error that the user can fix; its text is one line that says how."""


class BadInput(UserError):
    """A file (or an option) says something that cannot be meant: file, line, key, what was expected."""

    def __init__(
        self, message: str, *, path: str | Path | None = None, line: int | None = None, key: str | None = None
    ):
        where = "" if path is None else str(path) + ("" if line is None else f":{line}") + ": "
        super().__init__(f"{where}{'' if key is None else key + ': '}{message}")
        self.message, self.path, self.line, self.key = message, path, line, key


class CannotFit(UserError):
    """A request that the real 0.9.4 would keep at the head of its queue for ever."""


class NotEnoughData(UserError):
    """The data do not determine what was asked."""
