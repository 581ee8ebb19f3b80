"""Every term of a step time, once: its name, unit and meaning, and its value in the columns of `StepWork`.

A term is 0 in a step without the work it belongs to (`of`, a column). Its value is an expression, compiled for one step
at a time where a simulation needs it, and evaluated over whole columns where a fit does.
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
        """Its values over columns of `StepWork`, shape as theirs."""
        columns = {name: np.asarray(work[name]) for name in COLUMNS}
        return np.where(columns[self.of] > 0, eval(self.value, {"__builtins__": {}}, columns), 0.0)


PREFILL, DECODE, JOIN, DROP = "prefill_tokens", "decode_sequences", "joined", "dropped"
_SQUARES = "(2 * prefill_attention - prefill_tokens)"  # Σ n² of whole prompts
_PADDED = "(prefill_sequences * prefill_longest)"

AFFINE = {
    "a0": Term("s", "prefill, constant", PREFILL, "1"),
    "a1": Term("s/token", "prefill, per prompt token", PREFILL, "prefill_tokens"),
    "a2": Term("s/token²", "prefill, per squared prompt token", PREFILL, _SQUARES),
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
PADDED = AFFINE | {
    "a1": Term("s/token", "prefill, per prompt token", PREFILL, _PADDED),
    "a2": Term("s/token²", "prefill, per squared prompt token", PREFILL, f"{_PADDED} * prefill_longest"),
    "a4": Term("s/token²", "prefill, per squared token of the whole batch", PREFILL, f"{_PADDED} ** 2"),
    # one row's cache stays near the processor and costs next to nothing (b3); every further row's has to be fetched
    "b2": Term(
        "s/token", "decode step, per token of summed context", DECODE, "(decode_sequences - 1) * decode_longest"
    ),
    "c2": Term("s/token", "joining two batches, per token of padded context", JOIN, "(joined + kept) * decode_longest"),
    "f2": Term(
        "s/token", "dropping finished requests, per token of padded context kept", DROP, "kept * decode_longest"
    ),
}
