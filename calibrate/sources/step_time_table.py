"""Parameters from a table of step times: a micro-benchmark, or somebody's published table.

Every timing is linear in the coefficients of a static batch, so the fit is nonnegative least squares in relative error.
Terms are selected by leaving out each batch size (of prefills: each number of tokens), the largest too, because
forecasts extrapolate upward. Draws are a Bayesian bootstrap: random weights on the configurations that were timed
(Rubin 1981).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np

from calibrate.arrays import Floats, Ints
from calibrate.regression.draws import correlations, parameter, residual
from calibrate.regression.selection import Selection, fit_relative, select, subsets
from calibrate.sources.static_batch import (
    DECODE_TERMS,
    PREFILL_TERMS,
    TERMS,
    batch_terms,
    decode_terms,
    prefill_terms,
)
from calibrate.sources.table_layout import Row, read_table
from calibrate.sources.table_machines import choose_machine, engine_of, machine_of
from sim.engines.tgi_0_9_4 import Flags
from sim.model.calibration import Calibration, Residual, Source, SourceFile, check_suits
from sim.model.errors import NotEnoughData
from sim.model.files.atomic import read_file
from sim.model.scenario import Hardware
from sim.model.server import Declaration
from sim.model.warning import Notice, notice
from sim.steptime.basis import MIXED
from sim.steptime.linear import MEANING

NOT_IDENTIFIED = ("a2", "a3", "b1")  # not identified beside a1, b0 and b2 by batches with as many tokens out as in
LONGEST = "b3"  # per token of the longest context: the form `mixed` has no such term
DRAWS = 400
# s, of a plausible decode step: a few kernel launches take 0.1 ms, and no server takes 10 s for a token
SHORTEST, SLOWEST = 1e-4, 10.0
WAVES = 1.25  # a batch that takes so many times as long as predicted ran in waves


def calibrate_table(
    paths: Sequence[Path],
    rng: np.random.Generator,
    *,
    where: Mapping[str, str] | None = None,
    machine: Hardware | None = None,
    declared: Declaration = Flags.declared,
    draws: int = DRAWS,
) -> Calibration:
    """Fit one machine's rows of one or more tables, in the usual step-time form of the engine that is `declared` to
    schedule the steps.

    `where` ({column: value}) or `machine` chooses among several; with neither, the machine with most rows is taken, of
    equals the slowest, with a warning. Raises `BadInput` for what cannot be read, `NotEnoughData` for tables that leave
    prefill or decode open.
    """
    warnings: list[Notice] = []
    rows = choose_machine(
        [row for path in paths for row in read_table(path)], where or {}, machine or Hardware(), warnings
    )
    rows = _one_pass(rows, warnings)
    design, seconds = _design(rows), np.array([row.seconds for row in rows])
    _enough(rows)
    steps = [row.seconds for row in rows if row.phase == "decode"]
    if steps and not SHORTEST <= (middle := float(np.median(steps))) <= SLOWEST:
        warnings.append(
            notice(
                "table-unit-odd",
                f"the middle decode step takes {middle:.3g} s, as no machine is known to: is the table in another "
                "unit?",
            )
        )
    mixed = declared.forms[0] == "mixed"
    fitted = tuple(term for term in TERMS if not (mixed and term == LONGEST))
    together = any(row.phase == "batch" for row in rows)  # a whole batch has prefill and decode in one number
    equal_lengths = together and all(row.phase == "batch" and row.tokens == row.output for row in rows)
    blocks: list[tuple[str, tuple[str, ...]]] = [
        (phase, tuple(term for term in terms if term in fitted))
        for phase, terms in (("prefill", PREFILL_TERMS), ("decode", DECODE_TERMS))
    ]
    if together:
        blocks = [("batch", tuple(term for term in fitted if not (equal_lengths and term in NOT_IDENTIFIED)))]
    chosen: list[str] = []
    reports = []
    for phase, terms in blocks:
        of = np.array([together or row.phase == phase for row in rows])
        folds = _folds([row for row, member in zip(rows, of, strict=True) if member], phase)
        columns = [list(TERMS).index(term) for term in terms]
        selection = select(terms, design[of][:, columns], seconds[of], folds, _forms(terms))
        chosen += selection.chosen.terms
        reports.append(f"{phase}: {selection}")
        warnings += _not_identified(selection, rows, phase)
    columns = [list(TERMS).index(term) for term in chosen]
    values = fit_relative(design[:, columns], seconds)
    drawn = _bootstrap(design[:, columns], seconds, _configurations(rows), rng, draws)
    residuals = _residuals(rows, design[:, columns] @ values, seconds)
    if equal_lengths:
        chosen, values, drawn = _share(chosen, values, drawn, rng, warnings)
    if mixed:
        chosen, values, drawn = _mixed(chosen, values, drawn)
        warnings.append(
            notice(
                "table-no-mixed-steps",
                "the table times prefills and decode steps apart; a step that mixes them is taken to cost one decode "
                "step's constant and what either part adds to it",
            )
        )
    calibration = Calibration(
        source=Source(
            kind="table",
            files=[SourceFile(path=path.name, sha256=hashlib.sha256(read_file(path)).hexdigest()) for path in paths],
            note="; ".join(reports),
        ),
        model="mixed" if mixed else "affine",
        machine=machine_of(rows[0].machine, machine or Hardware()),
        engine=engine_of(rows),
        parameters={
            name: parameter(float(value), drawn[:, i], *MEANING[name])
            for i, (name, value) in enumerate(zip(chosen, values, strict=True))
        },
        draws={name: drawn[:, i].tolist() for i, name in enumerate(chosen)},
        range=_range(rows),
        residuals=residuals,
        correlations=correlations(chosen, drawn),
        warnings=[
            *warnings,
            notice(
                "table-no-joining",
                "a table of static batches times neither joining two batches nor dropping finished requests: taken as "
                "free",
            ),
            notice(
                "table-no-noise",
                "a table of averages tells neither the noise from step to step nor the machine's drift: taken as none",
            ),
            notice("table-no-budget", f"a table does not tell {declared.capacity}: the scenario must"),
        ],
    )
    foreign = check_suits(calibration, declared)
    return msgspec.structs.replace(calibration, warnings=[*foreign, *calibration.warnings])


def _mixed(chosen: list[str], values: Floats, drawn: Floats) -> tuple[list[str], Floats, Floats]:
    """The coefficients of the form `mixed` from those of `affine`, which are along the last axis: a step has the
    constant of a decode step, and what a prefill's exceeds it by is charged to each prompt."""

    def turned(of: Floats) -> Floats:
        given = {name: of[..., i] for i, name in enumerate(chosen)}
        a0, a1, a2, a3, b0, b1, b2 = (given.get(t, np.zeros(of.shape[:-1])) for t in TERMS if t != LONGEST)
        return np.stack([b0, a1, a2, a3 + np.maximum(a0 - b0, 0), b1, b2], axis=-1)

    return list(MIXED), turned(values), turned(drawn)


def _one_pass(rows: list[Row], warnings: list[Notice]) -> list[Row]:
    """Leave out whole batches that ran in waves because their KV cache did not fit, with a warning that says where that
    begins.

    Batches are taken in order of the tokens they hold at the end; the first that takes `WAVES` times as long as those
    before it predict ends the list.
    """
    whole = sorted((row for row in rows if row.phase == "batch"), key=_held)
    levels = sorted({_held(row) for row in whole})
    for below, level in pairwise(levels):
        before = [row for row in whole if _held(row) <= below]
        if len(before) < 6:  # too few to predict the next
            continue
        fitted = fit_relative(_design(before), np.array([row.seconds for row in before]))
        at = [row for row in whole if _held(row) == level]
        ratios = np.array([row.seconds for row in at]) / (_design(at) @ fitted)
        if ratios.max() > WAVES:
            out = [row for row in whole if _held(row) >= level]
            far = np.array([row.seconds for row in out]) / (_design(out) @ fitted)
            warnings.append(
                notice(
                    "table-waves",
                    f"{len(out)} of {len(whole)} batches, those of {level} tokens and more, took {far.min():.1f} to "
                    f"{far.max():.1f} times one pass: their KV cache did not fit and they ran in waves; left out. "
                    f"The cache holds {below} to {level} tokens",
                )
            )
            return [row for row in rows if row.phase != "batch" or _held(row) < level]
    return rows


def _held(row: Row) -> int:
    """The tokens that a whole batch holds at its end."""
    return row.sequences * (int(row.tokens) + row.output)


def _design(rows: Sequence[Row]) -> Floats:
    """What each coefficient of `TERMS` multiplies in each timing, (rows, terms)."""
    return np.array([[float(x) for x in _terms(row).values()] for row in rows])


def _terms(row: Row) -> dict[str, Floats]:
    if row.phase == "prefill":
        return prefill_terms(row.sequences, row.tokens)
    if row.phase == "decode":
        return decode_terms(row.sequences, row.tokens)
    return batch_terms(row.sequences, row.tokens, row.output)


def _enough(rows: Sequence[Row]) -> None:
    """Raise `NotEnoughData` where cross-validation has nothing to leave out."""
    phases = Counter(row.phase for row in rows)
    if phases["batch"]:
        if len({_level(row, "batch") for row in rows}) < 2:
            raise NotEnoughData(f"{rows[0].path}: every batch is of the same size; a fit needs at least two sizes")
        return
    for phase in ("prefill", "decode"):
        levels = {_level(row, phase) for row in rows if row.phase == phase}
        levels |= {row.tokens for row in rows if row.phase == phase} if len(levels) < 2 else set()
        if len(levels) < 2:
            found = "none" if not phases[phase] else "a single size"
            raise NotEnoughData(
                f"{rows[0].path}: {phase} times of at least two sizes are needed, found {found}; "
                "add rows, or give another table beside this one"
            )


def _level(row: Row, phase: str) -> float:
    """The batch size that is left out as a whole: tokens of a prefill, sequences otherwise."""
    return row.sequences * row.tokens if phase == "prefill" else row.sequences


def _forms(terms: Sequence[str]) -> list[tuple[str, ...]]:
    """Every form with a cost per prompt token and a constant of a decode step, which no server lacks."""
    needed = {"a1", "b0"} & set(terms)
    return [form for form in subsets(terms) if needed <= set(form)]


def _folds(rows: Sequence[Row], phase: str) -> Ints:
    """The fold of each row, (rows,): one per batch size, or per context where all batches have one size."""
    levels = np.array([_level(row, phase) for row in rows])
    if len(np.unique(levels)) < 2:
        levels = np.array([row.tokens for row in rows])
    return np.unique(levels, return_inverse=True)[1].astype(np.int64)


def _configurations(rows: Sequence[Row]) -> Ints:
    """A number for each configuration, (rows,): repetitions share it, and a weight in the bootstrap."""
    keys = [(row.phase, row.sequences, round(row.tokens), row.output) for row in rows]
    order = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return np.array([order[key] for key in keys], dtype=np.int64)


def _bootstrap(design: Floats, seconds: Floats, configuration: Ints, rng: np.random.Generator, n: int) -> Floats:
    """Refits with exponential weights on the configurations, (n, terms)."""
    weights = rng.exponential(size=(n, int(configuration.max()) + 1))
    return np.array([fit_relative(design, seconds, weight[configuration]) for weight in weights])


def _share(
    names: list[str], values: Floats, drawn: Floats, rng: np.random.Generator, warnings: list[Notice]
) -> tuple[list[str], Floats, Floats]:
    """Split the coefficient fitted as `a1` between prompt tokens and steps, at random in draws, in half at the
    centre."""
    at = names.index("a1")
    shares = rng.random(len(drawn))
    for_answers = drawn[:, at] * (1 - shares)
    drawn = np.column_stack([drawn, for_answers])
    drawn[:, at] *= shares
    values = np.append(values, values[at] / 2)
    values[at] /= 2
    warnings.append(
        notice(
            "table-collinear",
            "every batch has as many tokens out as in, so that a cost per prompt token (a1) and one per request and "
            "step (b1) look alike: each draw splits their sum at random; what grows as length squared is laid on "
            "decode (b2)",
        )
    )
    return [*names, "b1"], values, drawn


def _residuals(rows: Sequence[Row], predicted: Floats, seconds: Floats) -> dict[str, Residual]:
    phases = np.array([row.phase for row in rows])
    kinds = {phase: phases == phase for phase in dict.fromkeys(phases.tolist())}
    return {phase: residual((predicted - seconds)[of], seconds[of]) for phase, of in kinds.items()}


def _range(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """What the table covers, under the names that a forecast checks."""
    prefill = [row for row in rows if row.phase != "decode"]
    decode = [row for row in rows if row.phase != "prefill"]
    context = [row.sequences * row.tokens for row in decode] + [_held(row) for row in decode if row.phase == "batch"]

    def span(values: Sequence[float]) -> tuple[float, float]:
        return float(min(values)), float(max(values))

    return {
        "prompt_tokens": span([row.tokens for row in prefill]),
        "batch_prefill_tokens": span([row.sequences * row.tokens for row in prefill]),
        "sequences": span([row.sequences for row in decode]),
        "context_tokens": span(context),
    }


def _not_identified(selection: Selection, rows: Sequence[Row], phase: str) -> list[Notice]:
    """Warnings about what this table cannot show."""
    warnings = []
    if selection.chosen.error > 0.15:
        warnings.append(
            notice(
                "table-no-form",
                f"{phase}: left-out batches are missed by {100 * selection.chosen.error:.0f} % on average: "
                "no form here follows this table",
            )
        )
    sizes = {row.sequences for row in rows if row.phase == phase or phase == "batch"}
    if len(sizes) == 1:
        warnings.append(
            notice(
                "table-one-batch",
                f"{phase}: every row is of {sizes.pop()} sequences; what a larger batch costs is extrapolated",
            )
        )
    return warnings
