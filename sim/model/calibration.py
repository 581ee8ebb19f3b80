"""The parameters of one machine with their uncertainty.

A calibration is a file (`calibration.json`) and a frozen value. `draws` is the joint distribution of all parameters:
every replicate of a forecast takes one row, so that the bands show what the data could not tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import msgspec

from sim.model.files.document import Document
from sim.model.files.format import FORMAT
from sim.model.files.shape import Key, check_shape, known
from sim.model.identity import Identity, check_engine, is_engine, named
from sim.model.quantity import MOST, Countable, Seconds
from sim.model.scenario import Hardware
from sim.model.server import Declaration
from sim.model.warning import Notice, notice
from sim.steptime.linear import FORMS, LEVEL, MEANING, step_time
from sim.steptime.noise_parameters import Noise

MOST_SEQUENCES = 100_000  # in a batch; one of 1,024 is large
OFF_ONE = 0.1  # that the mean of a law of factors may be: fits leave 0.002, by the ends of a table of quantiles
ROUNDING = 1e-5  # draws are kept to six digits
RANGES = ("prompt_tokens", "batch_prefill_tokens", "sequences", "context_tokens", "users")


class SystemParameters(msgspec.Struct, frozen=True, kw_only=True):
    """The parameters of one draw that are no coefficients of a step time; None for those a calibration does not have.

    `max_batch_total_tokens` and `kv_cache_tokens` are the size of the KV cache, tokens, under the flag of the engine.
    `uplink` is the mean time from `sent` to the queue, s, and `uplink_per_token` what each prompt token adds, s/token.
    `output_attained` is the share of `max_new_tokens` that comes back where a workload only limits an answer.
    `takeoff_factor` is how many times the one-user latency was read as the onset of queueing.
    """

    max_batch_total_tokens: Annotated[float, msgspec.Meta(ge=1, le=MOST)] | None = None
    kv_cache_tokens: Annotated[float, msgspec.Meta(ge=1, le=MOST)] | None = None
    uplink: Seconds | None = None
    uplink_per_token: Seconds | None = None
    output_attained: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    takeoff_factor: Annotated[float, msgspec.Meta(ge=1, le=1000)] | None = None

    @classmethod
    def of(cls, values: Mapping[str, float]) -> SystemParameters:
        """Those among all parameters of a draw."""
        return cls(**{name: values[name] for name in cls.__struct_fields__ if name in values})

    def capacity(self, declared: Declaration) -> float | None:
        """The size of the KV cache of such an engine, tokens."""
        found: float | None = getattr(self, declared.capacity)
        return found


BESIDES: dict[str, Any] = get_type_hints(SystemParameters, include_extras=True)


class Parameter(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One fitted number; `low`..`high` is its 95 % interval."""

    value: float
    stderr: Countable
    low: float
    high: float
    unit: str = ""
    meaning: str = ""


class SourceFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file the fit read, by name and content; `bytes` is how long it was then, since a run can be resumed."""

    path: str
    sha256: str
    bytes: int | None = None


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the parameters were found (`run`, `table`, `published`, `assumed`), and from which files."""

    kind: str
    files: list[SourceFile] = []
    note: str = ""


class Delay(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A time distribution on the client's side of the clock.

    `quantiles` are seconds at evenly spaced probabilities from 0 to 1 (one value: a constant); `per_token` adds seconds
    per prompt token.
    """

    quantiles: Annotated[list[Seconds], msgspec.Meta(min_length=1)] = msgspec.field(default_factory=lambda: [0.0])
    per_token: Seconds = 0.0

    @property
    def mean(self) -> float:
        """The mean of what `quantiles` stand for, s: straight lines lie between them."""
        q = self.quantiles
        return q[0] if len(q) == 1 else (sum(q) - (q[0] + q[-1]) / 2) / (len(q) - 1)

    def shifted(self, mean: float, per_token: float | None = None) -> Delay:
        """The same delay with another mean, s, no part of it below zero, and another cost per token if one is given."""
        by = mean - self.mean
        cost = self.per_token if per_token is None else per_token
        return Delay(quantiles=[max(0.0, q + by) for q in self.quantiles], per_token=cost)


class Clocks(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the client's clock differs from the server's.

    `uplink` runs from `sent` to the queue (per token of a prompt, which one of the router's two workers has to count
    first), `downlink` from a token made to a token seen, `turnaround` from an answer's end to the same user's next
    request, beyond the scenario's `think` (per token of that request, which has to be written, and `reading` s per
    request still running, since a client reads the tokens of one step one by one).

    A load generator does one thing at a time: users whose answers end in the same step come back one after another,
    `spacing` apart (per token of the next prompt, which has to be written). With `seen` the time of an answer's last
    token, its turn is the later of `seen` and `spacing` after the turn before, and the next request is sent `think` and
    `turnaround` after its turn. Without think time the requests of such a burst are all written after its last turn:
    there their uplinks begin.
    """

    uplink: Delay = Delay()
    downlink: Delay = Delay()
    turnaround: Delay = Delay()
    spacing: Delay = Delay()
    reading: Seconds = 0.0


class Residual(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far the fitted form is from its rows: `rms` in seconds, and the 95 % quantile of |relative error|."""

    rms: Countable
    p95_relative: Countable
    rows: Annotated[int, msgspec.Meta(ge=0)] = 0


class Checked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One figure that was fitted, and the same simulated; `low`..`high` is its 90 % band, where there is one.

    `missed`: outside the band, by more than a client can tell. `far`: missed by more than twice its goal.
    """

    of: str
    at: str
    metric: str
    measured: float
    simulated: float | None
    low: float | None
    high: float | None
    relative_error: float | None
    missed: bool
    far: bool


class FitCheck(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a calibration shows of what it was fitted to: `missed` of the `rows`, of which chance allows `allowed`.

    `replicates` is how many simulations that took (0: none was needed).
    """

    rows: list[Checked]
    missed: int
    allowed: int
    passed: bool
    replicates: int


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything `sim` needs to know of a machine. `range` is what was observed; outside it a forecast says so.

    `engine` is whose step times these are, None where nothing tells. `server` has the flags of each run that was
    fitted, under `run` its name and under `sources` where each flag is from (`sim.model.flags`).
    """

    format: int = FORMAT
    source: Source
    model: str
    machine: Hardware = Hardware()
    engine: Identity | None = None
    parameters: dict[str, Parameter]
    draws: dict[str, Annotated[list[float], msgspec.Meta(min_length=1)]] = {}
    range: dict[str, tuple[Countable, Countable]] = {}
    server: list[dict[str, Any]] = []
    residuals: dict[str, Residual] = {}
    noise: Noise = Noise()
    clocks: Clocks = Clocks()
    correlations: list[tuple[str, str, Annotated[float, msgspec.Meta(ge=-1, le=1)]]] = []
    warnings: list[Notice] = []
    check: FitCheck | None = None

    @property
    def values(self) -> dict[str, float]:
        """The central value of every parameter."""
        return {name: p.value for name, p in self.parameters.items()}

    @property
    def n_draws(self) -> int:
        """How many joint draws there are (0: only central values)."""
        return len(next(iter(self.draws.values()), []))

    def draw(self, place: float) -> dict[str, float]:
        """The joint draw of all parameters at that place among them, from 0 up to 1; the central values where there are
        no draws."""
        if not self.n_draws:
            return self.values
        return self.row(int(place * self.n_draws))

    def row(self, number: int) -> dict[str, float]:
        """Joint draw `number`; what has no draws keeps its central value."""
        return self.values | {name: column[number] for name, column in self.draws.items()}


def check_suits(
    calibration: Calibration, declared: Declaration, taken_as: str | None = None, path: str | Path | None = None
) -> list[Notice]:
    """Raise `NotTheEngine` for a calibration from runs not known to be of an engine, unless the user takes them for it;
    the warning that then belongs to every number. Tables of other engines' step times only get a warning: what
    a step takes is the machine's in the first place.
    """
    found, engine = calibration.engine, declared.name
    if is_engine(found, declared) or (found is None and calibration.source.kind not in ("run", "table")):
        return []
    if calibration.source.kind == "table":
        return [
            notice(
                "other-engine-table",
                f"the step times are of {named(found)}, scheduled here as {engine} does, which takes its own time "
                "for a step; a run of your own server (`servecast measure`) would tell",
            )
            if found is not None
            else notice(
                "unknown-engine-table",
                f"the table does not say which engine was timed; its steps are scheduled as {engine} does, which may "
                "take another time for a step (a column `engine` would say)",
            )
        ]
    check_engine(found, declared, taken_as, "what this calibration was fitted to", path)
    return [
        notice(
            "taken-as",
            f"the calibration was fitted to {named(found)} and is taken for {engine} (--as): the scheduler is "
            "assumed, and a forecast can be far off",
        )
    ]


def _check_form(calibration: Calibration, document: Document) -> None:
    """Check that a step-time form takes these parameters, and that a prefill and a decode step take some time."""
    rows = [(calibration.values, ("parameters",))]
    rows += [(calibration.row(i), ("draws",)) for i in range(calibration.n_draws)]
    for values, key in rows:
        try:
            form = step_time(calibration.model, values)
            first, _ = form.decode(1, 1, 1)
            prefill = form.prefill(1, 1000, 1000**2, 1000)
        except (TypeError, ValueError, LookupError) as e:
            raise document.fail(key, f"not those of the form {calibration.model} ({e})") from e
        if not first > 0:
            raise document.fail(key, "expected a decode step to take some time; it takes none")
        if not prefill > 0:
            raise document.fail(key, "expected a prefill to take some time; it takes none")


def _check_parameter(name: str, parameter: Parameter, document: Document) -> None:
    key: Key = ("parameters", name)
    if name.startswith(LEVEL):
        size = name.removeprefix(LEVEL)
        if not (size.isdecimal() and size == str(int(size[:9])) and 0 < int(size) <= MOST_SEQUENCES):
            raise document.fail(key, f"expected a batch of 1 to {MOST_SEQUENCES} requests after {LEVEL}")
    else:
        known(name, (*MEANING, *BESIDES), "parameter", key, document.fail)
    for what in ("low", "high", "value"):
        check_shape(getattr(parameter, what), BESIDES.get(name, Seconds), document.fail, (*key, what))
    if not parameter.low <= parameter.high:
        raise document.fail((*key, "low"), f"expected at most high ({parameter.high}), found {parameter.low}")
    if not parameter.low <= parameter.value <= parameter.high:
        raise document.fail(
            (*key, "value"), f"expected low to high ({parameter.low} to {parameter.high}), found {parameter.value}"
        )


def _check_draws(calibration: Calibration, document: Document) -> None:
    """Check the draws: of all uncertain parameters, equally many, possible, and around the parameters' values."""
    if not calibration.draws:
        return
    for name, column in calibration.draws.items():
        if name not in calibration.parameters:
            raise document.fail(("draws", name), "expected only names of parameters")
        if len(column) != calibration.n_draws:
            raise document.fail(("draws", name), f"expected {calibration.n_draws} draws, found {len(column)}")
        check_shape(column, list[BESIDES.get(name, Seconds)], document.fail, ("draws", name))  # type: ignore[misc]
        said, middle = calibration.parameters[name], sorted(column)[len(column) // 2]
        slack = ROUNDING * abs(middle)
        if not said.low - slack <= middle <= said.high + slack:
            raise document.fail(
                ("draws", name),
                f"expected draws around the interval of the parameter ({said.low:g} to {said.high:g}); "
                f"the middle one is {middle:g}",
            )
    if (lacking := FORMS[calibration.model].missing(calibration.draws)) is not None:
        raise document.fail(("draws", lacking), f"missing; the form {calibration.model} requires it in every draw")
    for name, said in calibration.parameters.items():
        if name not in calibration.draws and said.low < said.high:
            raise document.fail(
                ("draws", name), f"missing; expected draws of it, whose interval is {said.low:g} to {said.high:g}"
            )


def _check_quantiles(quantiles: list[float], key: Key, document: Document) -> None:
    for i, (before, after) in enumerate(pairwise(quantiles), 1):
        if after < before:
            raise document.fail((*key, i), f"expected no less than the quantile before ({before}), found {after}")


def _check_noise(noise: Noise, document: Document) -> None:
    if noise.memory + noise.returned > 1:
        raise document.fail(("noise", "returned"), f"expected at most 1 with memory, found {noise.returned}")
    for name in ("prefill", "decode"):
        law = getattr(noise, name)
        _check_quantiles(law, ("noise", name), document)
        mean = Delay(quantiles=law).mean if law else 1.0
        if abs(mean - 1.0) > OFF_ONE:
            raise document.fail(("noise", name), f"expected factors whose mean is 1, found a mean of {mean:.3g}")


def read_calibration(path: str | Path) -> Calibration:
    """Read `calibration.json`; `BadInput` names the file, the line and the key."""
    document = Document(Path(path), "a calibration file")
    calibration = document.read_as(Calibration)
    known(calibration.model, FORMS, "step-time form", ("model",), document.fail)
    for name, parameter in calibration.parameters.items():
        _check_parameter(name, parameter, document)
    if (lacking := FORMS[calibration.model].missing(calibration.parameters)) is not None:
        raise document.fail(("parameters", lacking), f"missing; the form {calibration.model} requires it")
    _check_draws(calibration, document)
    _check_form(calibration, document)
    _check_noise(calibration.noise, document)
    for name in ("uplink", "downlink", "turnaround", "spacing"):
        _check_quantiles(getattr(calibration.clocks, name).quantiles, ("clocks", name, "quantiles"), document)
    for name, (low, high) in calibration.range.items():
        known(name, RANGES, "range", ("range", name), document.fail)
        if low > high:
            raise document.fail(("range", name), f"expected low up to high, found {low} to {high}")
    for i, (first, second, _) in enumerate(calibration.correlations):
        for name in (first, second):
            known(name, calibration.parameters, "parameter", ("correlations", i), document.fail)
    return upgraded_attention(calibration) if document.format == 1 else calibration


def upgraded_attention(old: Calibration) -> Calibration:
    """A calibration of format 1 with the coefficients that multiply `StepWork`'s `prefill_attention`.

    In format 1 a prefill took a1 Σ n + a2 Σ n² over its prompts of n tokens. With Σ n² = 2 Σ n (n + 1) / 2 − Σ n, that
    is a1 − a2 per token and 2 a2 per pair attended. Draws with a1 < a2 keep the same times, with a negative a1.
    """
    if "a2" not in old.parameters:
        return old
    linear, square = old.parameters["a1"], old.parameters["a2"]
    a1 = {name: getattr(linear, name) - square.value for name in ("value", "low", "high")}
    a2 = {name: 2 * getattr(square, name) for name in ("value", "stderr", "low", "high")}
    unit, meaning = MEANING["a2"]
    parameters = old.parameters | {
        "a1": msgspec.structs.replace(linear, **a1),
        "a2": Parameter(**a2, unit=unit, meaning=meaning),
    }
    rows = [old.row(i) for i in range(old.n_draws)]
    drawn = {"a1": [row["a1"] - row["a2"] for row in rows], "a2": [2 * row["a2"] for row in rows]}
    return msgspec.structs.replace(old, parameters=parameters, draws=old.draws | drawn if rows else {})
