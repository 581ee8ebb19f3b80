"""Text from outside (files, servers, names) made safe for a terminal or a page: it must not be able to command either.

Control characters move the cursor and recolour a terminal, bidirectional overrides and zero-width characters make a
text look like another one, and a lone surrogate (part of a file name that is not UTF-8) cannot be written at all. Each
is shown as `\\u001b`: an escape that JSON and Python have too.
"""

from __future__ import annotations

import codecs
import re

LINE = 1000  # characters of one line from outside: more than any sentence of ours, less than would hide the rest
NAME_BYTES = 200  # of a name that becomes a folder's: 255 is what file systems take, the rest is for suffixes

_BREAKS = re.compile("[\t\n\v\f\r\x85\u2028\u2029]+")
_UNSAFE = re.compile(
    "["
    "\x00-\x09\x0b-\x1f\x7f-\x9f"  # C0 but for the line feed, DEL, C1
    "\xad\u034f\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # joiners, overrides, isolates
    "\u115f\u1160\u3164\uffa0"  # letters that cannot be seen
    "\ud800-\udfff\U000e0000-\U000e0fff"  # lone surrogates, tags
    "]"
)


def escaped(text: str) -> str:
    """A text of any number of lines with every unsafe character shown as an escape; line feeds stay."""
    return _UNSAFE.sub(_escape, text)


def printable(text: str, limit: int = LINE) -> str:
    """A text as one line of at most `limit` characters, with every unsafe character shown as an escape.

    Of a longer one the middle is left out: a complaint begins with where, and ends with what was expected.
    """
    if len(text) > 4 * limit:  # no time is spent on what is not shown
        text = f"{text[: 2 * limit]}…{text[-2 * limit :]}"
    line = escaped(_BREAKS.sub(" ", text))
    if len(line) <= limit:
        return line
    head = 2 * limit // 3
    return f"{line[:head]}…{line[head + 1 - limit :]}"


def shortened_name(text: str) -> str:
    """A name from outside that can be a folder's: one line, at most `NAME_BYTES` long in UTF-8."""
    return printable(text).encode()[:NAME_BYTES].decode(errors="ignore")


def _escape(found: re.Match[str]) -> str:
    units = found[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))


# what our own output has beyond ASCII, for streams that cannot encode it
_PLAIN = dict(zip("–—−±×≤≥≈…·²", ("-", "-", "-", "+/-", "x", "<=", ">=", "~", "...", ".", "2"), strict=True))


def _replaced(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lost), error.end


ENCODING_ERRORS = "servecast"  # an error handler's name, for streams that should never fail to encode
codecs.register_error(ENCODING_ERRORS, _replaced)
