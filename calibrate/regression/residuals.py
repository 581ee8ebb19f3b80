"""Residuals of a run's own steps against a calibration.

Of a fitted run they are those of the fit; of another run they show where the model errs.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pandas as pd

from calibrate.regression.design import build_rows
from calibrate.schedule.schedule import schedule_of, works
from sim.model.calibration import Calibration
from sim.run import Run
from sim.steptime.linear import step_time
from sim.steptime.work import StepWork


def residuals(run: Run, calibration: Calibration, rungs: Collection[int] | None = None) -> pd.DataFrame:
    """One row per rebuilt step of known duration (of `rungs`, if given), in order of time.

    Columns: `kind` (prefill, decode), `rung`, `time` (its end, s since the run began), `sequences`, `seconds` (as
    measured, with the filter before it and the joining of batches), `predicted` (the same by the calibration's central
    values) and `relative` (seconds / predicted − 1). Raises `NotEnoughData` when the run shows no steps.
    """
    rows = build_rows([run], [schedule_of(run, rungs)])
    form, clocks = step_time(calibration.model, calibration.values), calibration.clocks
    latency = clocks.uplink.mean + clocks.downlink.mean
    # on an idle server a step begins when its request is sent, before the server has it
    predicted = rows.table["idle"].to_numpy() * (latency + clocks.uplink.per_token * rows.longest)
    for work in works(rows.table):
        each = zip(*(column.astype(np.int64).tolist() for column in work.values()), strict=True)
        predicted += [form.line(StepWork(**dict(zip(work, values, strict=True)))).first for values in each]
    table = rows.table[["kind", "rung", "end", "sequences", "seconds"]].rename(columns={"end": "time"})
    return table.assign(predicted=predicted, relative=table["seconds"] / predicted - 1)
