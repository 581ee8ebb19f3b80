"""Every term of a step time, once: its name, unit and meaning, and its value in the columns of `StepWork`.

A term is 0 in a step without the work it belongs to (`of`, a column). Its value is an expression: `linear` compiles it
for one step at a time, and `columns` evaluates it over a table of steps, which makes a design matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.steptime.work import StepWork

COLUMNS = StepWork.__struct_fields__
GROWING = ("prefill_attention", "decode_context", "decode_longest")  # from one step of a segment to the next


class Term(NamedTuple):
    """A coefficient's unit and meaning, and what it multiplies: `value` where `of` is above 0."""

    unit: str
    meaning: str
    of: str
    value: str

    def over(self, work: Mapping[str, Any]) -> NDArray[np.float64]:
        """Its values over columns of `StepWork`, shape as theirs; columns that are not there are 0."""
        columns = {name: np.asarray(work.get(name, 0), dtype=np.float64) for name in COLUMNS}
        return np.where(columns[self.of] > 0, eval(self.value, {"__builtins__": {}}, columns), 0.0)


PASS, PREFILL, DECODE, JOIN, DROP = "passes", "prefill_tokens", "decode_sequences", "joined", "dropped"
_PADDED = "(prefill_sequences * prefill_longest)"

AFFINE = {
    "a0": Term("s", "prefill, constant", PREFILL, "1"),
    "a1": Term("s/token", "prefill, per prompt token", PREFILL, "prefill_tokens"),
    "a2": Term("s/token²", "prefill, per pair of tokens attended", PREFILL, "prefill_attention"),
    "a3": Term("s/request", "prefill, per prompt", PREFILL, "prefill_sequences"),
    "b0": Term("s", "decode step, constant", DECODE, "1"),
    "b1": Term("s/request", "decode step, per running request", DECODE, "decode_sequences"),
    "b2": Term("s/token", "decode step, per token of summed context", DECODE, "decode_context"),
    "b3": Term("s/token", "decode step, per token of the longest context", DECODE, "decode_longest"),
    "c0": Term("s", "joining two batches, constant", JOIN, "1"),
    "c1": Term("s/request", "joining two batches, per request", JOIN, "(joined + kept)"),
    "f0": Term("s", "dropping finished requests, constant", DROP, "1"),
    "f1": Term("s/request", "dropping finished requests, per request kept", DROP, "kept"),
}
# One pass computes chunks of prompts beside decodes, so a step has one constant; a chunk's attention reaches back over
# what was computed of its prompt before.
MIXED = {
    "s0": Term("s", "step, constant", PASS, "1"),
    "s1": Term("s/token", "step, per prompt token", PREFILL, "prefill_tokens"),
    "s2": Term("s/position", "step, per position that a prompt token attends to", PREFILL, "prefill_attention"),
    "s3": Term("s/request", "step, per prompt or chunk of one", PREFILL, "prefill_sequences"),
    "s4": Term("s/request", "step, per decoding request", DECODE, "decode_sequences"),
    "s5": Term("s/token", "step, per token of the decoding requests' summed context", DECODE, "decode_context"),
}
PADDED = AFFINE | {
    "a1": Term("s/token", "prefill, per prompt token", PREFILL, _PADDED),
    "a2": Term("s/token²", "prefill, per pair of tokens attended", PREFILL, f"{_PADDED} * (prefill_longest + 1) / 2"),
    "a4": Term("s/token²", "prefill, per squared token of the whole batch", PREFILL, f"{_PADDED} ** 2"),
    # the cache of one row stays near the processor and costs next to nothing (b3); that of every further row is fetched
    "b2": Term(
        "s/token", "decode step, per token of summed context", DECODE, "(decode_sequences - 1) * decode_longest"
    ),
    "c2": Term("s/token", "joining two batches, per token of padded context", JOIN, "(joined + kept) * decode_longest"),
    "f2": Term(
        "s/token", "dropping finished requests, per token of padded context kept", DROP, "kept * decode_longest"
    ),
}


def columns(basis: Mapping[str, Term], *works: Mapping[str, Any]) -> dict[str, NDArray[np.float64]]:
    """What each coefficient multiplies in every row of a table, the columns of a design matrix.

    A row may hold several works (a pass, the joining before it, …), each given as columns of `StepWork`; its terms are
    the sums of theirs, not the terms of a summed work.
    """
    return {name: np.asarray(sum(term.over(work) for work in works)) for name, term in basis.items()}
