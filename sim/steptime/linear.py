"""Step times that are linear in their coefficients: parameters in, a `StepTime` out.

Coefficients are seconds per unit and never negative; `basis` says what each multiplies. `affine` is what an unpadded
(flash) server does; `padded` is the same for a server that pads every row to the longest, where the work is in
`sequences × longest`. `levels` is padded with a time of its own for every batch size (kernels are chosen by size, so
time is not affine in it): parameters `level_4`, … are the decode step of 4 rows without its context, interpolated
between, and continued with slope b1. `affine_levels` is the same for a server that does not pad. `mixed` is a step
that holds chunks of prompts beside decodes: one constant, and what each part adds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np

from sim.steptime.basis import AFFINE, COLUMNS, DECODE, DROP, GROWING, JOIN, MIXED, PADDED, PASS, PREFILL, Term
from sim.steptime.work import NOTHING, StepWork

LEVEL = "level_"


class Form(NamedTuple):
    """A step-time form: its terms by the names of their coefficients, and the parameters that it requires.

    `LEVEL` stands for one level at least. No server does a prompt token or a decode step for nothing, and a parameter
    that got lost must not pass for one that is zero. All others are 0 where a calibration leaves them out: a fit to a
    table drops terms that do not earn their place.
    """

    basis: Mapping[str, Term]
    required: tuple[str, ...]

    def missing(self, names: Iterable[str]) -> str | None:
        """The first required parameter that `names` lack (`level_1` for any level); None if none."""
        given = {LEVEL if name.startswith(LEVEL) else name for name in names}
        lacking = next((name for name in self.required if name not in given), None)
        return f"{LEVEL}1" if lacking == LEVEL else lacking


# with levels, b1 continues them beyond the largest batch that was seen
FORMS = {
    "affine": Form(AFFINE, ("a1", "b0")),
    "affine_levels": Form(AFFINE, ("a1", "b1", LEVEL)),
    "padded": Form(PADDED, ("a1", "b0")),
    "levels": Form(PADDED, ("a1", "b1", LEVEL)),
    "mixed": Form(MIXED, ("s0", "s1")),
}
MEANING = {name: (term.unit, term.meaning) for name, term in sorted((PADDED | MIXED).items())}


class Line(msgspec.Struct, frozen=True, gc=False):
    """How long steps take, s: the first, by how much each further one is longer, and for how many steps that holds."""

    first: float
    growth: float
    steps: int


class StepTime(Protocol):
    """How long the work of steps takes."""

    def line(self, work: StepWork, growth: StepWork = NOTHING, steps: int = 1) -> Line:
        """The time of `steps` steps, the first of which computes `work` and each further one `growth` more."""


class Linear:
    """A step time from a basis and its coefficients."""

    def __init__(self, model: str, parameters: Mapping[str, float]):
        self.model, self.parameters = model, dict(parameters)

    @cached_property
    def line(self) -> Callable[..., Line]:
        """See `StepTime.line`."""
        model, parameters = self.model, self.parameters
        coefficients = {name: float(parameters[name]) for name in FORMS[model].basis if parameters.get(name)}
        level = None
        if model.endswith("levels"):
            level = _ByBatch(parameters, coefficients.pop("b1", 0.0))
            coefficients.pop("b0", None)
        return _compiled(FORMS[model].basis, coefficients, level)

    def __reduce__(self) -> tuple[type[Linear], tuple[str, dict[str, float]]]:
        return Linear, (self.model, self.parameters)

    def prefill(self, sequences: int, tokens: int, tokens_sq: int, longest: int) -> float:
        """The time of one prefill of whole prompts, s, from their lengths n: how many, Σ n, Σ n² and the longest."""
        return self.line(StepWork(1, tokens, sequences, (tokens_sq + tokens) // 2, longest)).first

    def decode(self, sequences: int, context: int, longest: int) -> tuple[float, float]:
        """The time of the first decode step of a batch, and by how much each following one is longer, s."""
        work = StepWork(passes=1, decode_sequences=sequences, decode_context=context, decode_longest=longest)
        line = self.line(work, StepWork(decode_context=sequences, decode_longest=1), 2)
        return line.first, line.growth


def affine(**coefficients: float) -> Linear:
    """The step time of a server that does not pad."""
    return Linear("affine", coefficients)


def step_time(model: str, parameters: Mapping[str, float]) -> Linear:
    """The named form with these parameters; names that are not the form's (a token budget) are left to others.

    `LookupError` where one is missing that the form requires.
    """
    if (lacking := FORMS[model].missing(parameters)) is not None:
        raise LookupError(f"the form {model} requires {lacking}")
    return Linear(model, parameters)


def _compiled(
    basis: Mapping[str, Term], coefficients: Mapping[str, float], level: _ByBatch | None
) -> Callable[..., Line]:
    """`StepTime.line` for these coefficients, compiled since it is called for every segment of a simulation."""
    sums: dict[str, list[str]] = {of: [] for of in (PASS, PREFILL, DECODE, JOIN, DROP)}
    differences = []
    if level is not None:
        sums[DECODE].append("level(decode_sequences)")
    for name, coefficient in coefficients.items():
        term = basis[name]
        sums[term.of].append(f"{coefficient!r} * {term.value}")
        later = re.sub(rf"\b({'|'.join(GROWING)})\b", r"(\1 + more_\1)", term.value)
        if later != term.value:  # counts are whole numbers, so the difference is exact
            differences.append(f"{coefficient!r} * (({later}) - ({term.value}))")
    total = {of: " + ".join(terms) or "0.0" for of, terms in sums.items()}
    lines = [
        "def line(work, growth=NOTHING, steps=1):",
        "    if passes:",
        f"        first = {total[PASS]}",
        f"        if {PREFILL}: first += {total[PREFILL]}",
        f"        if {DECODE}: first += {total[DECODE]}",
        "    else:",
        f"        first = {total[JOIN]} if {JOIN} else 0.0",
        f"        if {DROP}: first += {total[DROP]}",
        f"    return Line(first, 0.0 if growth is NOTHING else {' + '.join(differences) or '0.0'}, steps)",
    ]
    source = "\n".join(lines)
    columns = "|".join(COLUMNS)
    source = re.sub(rf"\bmore_({columns})\b", r"growth.\1", source)
    source = re.sub(rf"(?<!growth\.)\b({columns})\b", r"work.\1", source)
    names: dict[str, Any] = {"Line": Line, "NOTHING": NOTHING, "level": level.at if level is not None else None}
    exec(source, names)
    made: Callable[..., Line] = names["line"]
    return made


class _ByBatch:
    """A time for every batch size, from parameters `level_<sequences>`, s, at least one; `slope` continues them."""

    def __init__(self, parameters: Mapping[str, float], slope: float):
        levels = {int(k.removeprefix(LEVEL)): v for k, v in parameters.items() if k.startswith(LEVEL)}
        knots = sorted(levels)
        low, high = knots[0], knots[-1]
        between = np.interp(np.arange(high + 1), knots, [levels[k] for k in knots])
        below = levels[low] - slope * (low - np.arange(low))
        between[:low] = np.maximum(below, 0.5 * levels[low])  # a step of one row costs something, whatever the slope
        self._levels: list[float] = between.tolist()
        self._slope = slope

    def at(self, sequences: int) -> float:
        """The time at this batch size, s."""
        beyond = sequences - len(self._levels) + 1
        return self._levels[sequences] if beyond <= 0 else self._levels[-1] + self._slope * beyond
