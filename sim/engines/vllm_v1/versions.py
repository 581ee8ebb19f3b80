"""Which versions of vLLM V1 have rules of their own, and what differs between them."""

from __future__ import annotations

import re
from bisect import bisect_right

KNOWN_VERSIONS = ("0.9.2", "0.11.2", "0.14.1", "0.17.1", "0.20.2", "0.25.1", "0.32.0")


def known_version(version: str) -> str:
    """The version whose rules are used: this one if it is known, else the newest known one that is not newer.

    A version without a number, or older than all known ones, has the rules of the newest or of the oldest.
    """
    numbers = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", version)
    if numbers is None:
        return KNOWN_VERSIONS[-1]
    known = [tuple(map(int, other.split("."))) for other in KNOWN_VERSIONS]
    return KNOWN_VERSIONS[max(bisect_right(known, tuple(int(part or 0) for part in numbers.groups())) - 1, 0)]


class Rules:
    """What differs between versions (their scheduler.py and block_pool.py)."""

    def __init__(self, version: str):
        index = KNOWN_VERSIONS.index(known_version(version))
        self.skips_long_prompts = index < KNOWN_VERSIONS.index("0.14.1")  # chunking off: those behind one may go
        self.reserves_whole_prompt = index >= KNOWN_VERSIONS.index("0.20.2")
        self.has_watermark = self.blank_first = index >= KNOWN_VERSIONS.index("0.25.1")
        self.spares_lone_prompt = self.delivers_to_preempted = index >= KNOWN_VERSIONS.index("0.32.0")
