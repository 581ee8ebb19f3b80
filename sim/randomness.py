"""Random numbers by what they belong to, never by the order of events: two options of a plan are asked the same.

A counter-based generator (Philox: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011) has a key, here the
seed, and a counter, here a kind of quantity, whom it belongs to and the number of a block. Quantities are drawn a block
at a time, since a block costs as much to begin as a hundred numbers.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum

import numpy as np

BLOCK = 128  # requests or cells of drift: a user of a short run makes few requests, and what is drawn beyond is lost
ARRIVALS = -1  # the owner of arrivals of which there is one stream only


class Kind(IntEnum):
    """What is random. The owner is a user, a stream of arrivals or a replica."""

    LENGTHS = 0  # of a user's k-th request, or of a stream's k-th arrival
    GAPS = 1  # between a stream's arrivals
    DELAYS = 2  # of a request
    RUN_EFFECT = 3  # of a replica
    DRIFT = 4  # of a replica in a cell of time
    STEP = 5  # of a replica's k-th forward pass
    CORRELATED_STEP = 6  # likewise, where one depends on those before
    TURNS = 7  # of a user's k-th session, or of a stream's k-th arrival
    BALANCER = 8  # of a user's or a stream's requests, in the order in which a balancer draws them
    CLASS = 9  # of a user's k-th request, or of a stream's k-th arrival, in a mix


class Randomness:
    """Everything random of one seed."""

    def __init__(self, seed: int | Sequence[int]):
        """Seeds that differ by zeros at the end are the same."""
        self._bits = np.random.Philox(key=np.random.SeedSequence(seed).generate_state(2, np.uint64))
        self._generator, self._state = np.random.Generator(self._bits), self._bits.state

    def block(self, kind: Kind, owner: int = 0, number: int = 0) -> np.random.Generator:
        """A generator of this block's numbers; it is the same object as before, so draw before you call again."""
        self._state["state"]["counter"][1:] = number, owner % 2**64, kind
        self._bits.state = self._state
        return self._generator


def arrivals_at(rate: float, before: int = 0) -> int:
    """The owner of arrivals at a rate, of which a ladder has had so many rungs before: other rungs do not matter."""
    # the bits of a positive rate are a larger number than any user's
    return int(struct.unpack("<Q", struct.pack("<d", rate))[0]) + before
