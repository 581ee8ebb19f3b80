"""The step-time forms a calibration can name: parameters in, a `StepTime` out.

Coefficients are seconds per unit and never negative. `affine` is what an unpadded (flash) server does; `padded` is the
same for a server that pads every row to the longest, where the work is in `sequences × longest`. `levels` is padded
with a time of its own for every batch size (kernels are chosen by size, so time is not affine in it): parameters
`level_4`, … are the decode step of 4 rows without its context, interpolated between, and continued with slope b1.
`affine_levels` is the same for a server that does not pad.

Every form needs a cost per prompt token and a decode step (`REQUIRED`): no server does either for nothing, and a
parameter that got lost must not pass for one that is zero. All others are 0 where a calibration leaves them out: a fit
to a table drops terms that do not earn their place.

    prefill = a0 + a1·Σin + a2·Σin² + a3·n
    decode  = b0 + b1·B + b2·K + b3·longest        (K: summed contexts; padded: (B − 1) × longest)
    joining = c0 + c1·(old + new)     dropping = f0 + f1·kept
    padded:   joining and dropping copy the cache: + c2·(old + new)·longest, + f2·kept·longest; and a prefill of many
              tokens outgrows the processor's caches: + a4·(n·longest)²
    levels:   decode = level(B) + b2·(B − 1)·longest + b3·longest
    affine_levels: decode = level(B) + b2·K + b3·longest
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from sim.steptime import StepTime

LEVEL = "level_"
MEANING = {
    "a0": ("s", "prefill, constant"),
    "a1": ("s/token", "prefill, per prompt token"),
    "a2": ("s/token²", "prefill, per squared prompt token"),
    "a3": ("s/request", "prefill, per prompt"),
    "a4": ("s/token²", "prefill, per squared token of the whole batch"),
    "b0": ("s", "decode step, constant"),
    "b1": ("s/request", "decode step, per running request"),
    "b2": ("s/token", "decode step, per token of summed context"),
    "b3": ("s/token", "decode step, per token of the longest context"),
    "c0": ("s", "joining two batches, constant"),
    "c1": ("s/request", "joining two batches, per request"),
    "c2": ("s/token", "joining two batches, per token of padded context"),
    "f0": ("s", "dropping finished requests, constant"),
    "f1": ("s/request", "dropping finished requests, per request kept"),
    "f2": ("s/token", "dropping finished requests, per token of padded context kept"),
}


class Affine:
    """Time affine in tokens, sequences, summed and longest context (`tgi-0.9.4` flash path)."""

    def __init__(
        self,
        *,
        a0: float = 0.0,
        a1: float = 0.0,
        a2: float = 0.0,
        a3: float = 0.0,
        b0: float = 0.0,
        b1: float = 0.0,
        b2: float = 0.0,
        b3: float = 0.0,
        c0: float = 0.0,
        c1: float = 0.0,
        f0: float = 0.0,
        f1: float = 0.0,
    ):
        self.a0, self.a1, self.a2, self.a3 = a0, a1, a2, a3
        self.b0, self.b1, self.b2, self.b3 = b0, b1, b2, b3
        self.c0, self.c1, self.f0, self.f1 = c0, c1, f0, f1

    def prefill(self, sequences: int, tokens: int, tokens_sq: int, longest: int) -> float:
        """See `StepTime.prefill`."""
        return self.a0 + self.a1 * tokens + self.a2 * tokens_sq + self.a3 * sequences

    def decode(self, sequences: int, context: int, longest: int) -> tuple[float, float]:
        """See `StepTime.decode`."""
        first = self.b0 + self.b1 * sequences + self.b2 * context + self.b3 * longest
        return first, self.b2 * sequences + self.b3

    def concat(self, old: int, new: int, longest: int) -> float:
        """See `StepTime.concat`."""
        return self.c0 + self.c1 * (old + new)

    def filter(self, kept: int, finished: int, longest: int) -> float:
        """See `StepTime.filter`."""
        return self.f0 + self.f1 * kept


class Padded(Affine):
    """The affine form of a server that pads: every row costs as much as the longest."""

    def __init__(self, *, a4: float = 0.0, c2: float = 0.0, f2: float = 0.0, **parameters: float):
        super().__init__(**parameters)
        self.a4, self.c2, self.f2 = a4, c2, f2

    def prefill(self, sequences: int, tokens: int, tokens_sq: int, longest: int) -> float:
        """See `StepTime.prefill`."""
        padded = sequences * longest
        return super().prefill(sequences, padded, padded * longest, longest) + self.a4 * padded * padded

    def concat(self, old: int, new: int, longest: int) -> float:
        """See `StepTime.concat`."""
        return super().concat(old, new, longest) + self.c2 * (old + new) * longest

    def filter(self, kept: int, finished: int, longest: int) -> float:
        """See `StepTime.filter`."""
        return super().filter(kept, finished, longest) + self.f2 * kept * longest

    def decode(self, sequences: int, context: int, longest: int) -> tuple[float, float]:
        """See `StepTime.decode`."""
        # one row's cache stays near the processor and costs next to nothing (b3); every further row's has to be fetched
        growth = self.b2 * (sequences - 1) + self.b3
        return self.b0 + self.b1 * sequences + growth * longest, growth


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


class Levels(Padded):
    """The padded form with free levels by batch size."""

    def __init__(self, *, b0: float = 0.0, **parameters: float):
        super().__init__(**_without_levels(parameters))
        self._level = _ByBatch(parameters, self.b1)

    def decode(self, sequences: int, context: int, longest: int) -> tuple[float, float]:
        """See `StepTime.decode`."""
        growth = self.b2 * (sequences - 1) + self.b3
        return self._level.at(sequences) + growth * longest, growth


class AffineLevels(Affine):
    """The affine form with free levels by batch size."""

    def __init__(self, *, b0: float = 0.0, **parameters: float):
        super().__init__(**_without_levels(parameters))
        self._level = _ByBatch(parameters, self.b1)

    def decode(self, sequences: int, context: int, longest: int) -> tuple[float, float]:
        """See `StepTime.decode`."""
        growth = self.b2 * sequences + self.b3
        return self._level.at(sequences) + self.b2 * context + self.b3 * longest, growth


def _without_levels(parameters: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in parameters.items() if not name.startswith(LEVEL)}


FORMS: dict[str, Callable[..., StepTime]] = {
    "affine": Affine,
    "affine_levels": AffineLevels,
    "padded": Padded,
    "levels": Levels,
}
# `LEVEL` stands for one level at least; b1 continues the levels beyond the largest batch that was seen
REQUIRED = {
    "affine": ("a1", "b0"),
    "affine_levels": ("a1", "b1", LEVEL),
    "padded": ("a1", "b0"),
    "levels": ("a1", "b1", LEVEL),
}


def missing(model: str, names: Iterable[str]) -> str | None:
    """The first parameter that the form requires and `names` lack (`level_1` stands for any level); None if none."""
    given = {LEVEL if name.startswith(LEVEL) else name for name in names}
    lacking = next((name for name in REQUIRED[model] if name not in given), None)
    return f"{LEVEL}1" if lacking == LEVEL else lacking


def step_time(model: str, parameters: Mapping[str, float]) -> StepTime:
    """The named form with these parameters; names that are not the form's (a token budget) are left to others.

    `LookupError` where one is missing that the form requires.
    """
    if (lacking := missing(model, parameters)) is not None:
        raise LookupError(f"the form {model} requires {lacking}")
    known = {name: value for name, value in parameters.items() if name in MEANING or name.startswith(LEVEL)}
    return FORMS[model](**known)
