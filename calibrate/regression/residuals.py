"""How far a run's own steps are from what a calibration says of them, one by one.

The residuals of the fit, where the run was fitted; where it was not, what the model has to be mended by.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import pandas as pd

from calibrate.regression.design import build_rows
from calibrate.schedule.rebuild import rebuild
from sim.model.calibration import Calibration
from sim.run import Run
from sim.steptime.linear import step_time


def residuals(run: Run, calibration: Calibration, rungs: Collection[int] | None = None) -> pd.DataFrame:
    """One row per rebuilt step of known length (of `rungs`, if given), in order of time.

    Columns: `kind` (prefill, decode), `rung`, `time` (its end, s since the run began), `sequences`, `seconds` (as
    measured, with the filter before it and the joining of batches in it), `predicted` (the same, of the calibration's
    central values) and `relative` (seconds / predicted − 1). `NotEnoughData` when the run shows no steps.
    """
    rows = build_rows([run], [rebuild(run, rungs)])
    form, clocks = step_time(calibration.model, calibration.values), calibration.clocks
    way = clocks.uplink.mean + clocks.downlink.mean
    predicted = np.empty(len(rows.table))
    steps: Iterator[Any] = rows.table.itertuples(index=False)
    for i, step in enumerate(steps):
        if step.kind == "prefill":
            seconds = form.prefill(step.sequences, step.tokens, step.prompt_sq, step.longest)
            if step.idle:  # the server's clock begins only when the request is there
                seconds += way + clocks.uplink.per_token * step.longest
        else:
            seconds = form.decode(step.sequences, step.tokens, step.longest)[0]
            if step.concat:
                seconds += form.joining(step.old, step.new, step.longest)
        if step.filtered:
            seconds += form.dropping(step.kept, step.finished, step.kept_longest)
        predicted[i] = seconds
    table = rows.table[["kind", "rung", "end", "sequences", "seconds"]].rename(columns={"end": "time"})
    return table.assign(predicted=predicted, relative=table["seconds"] / predicted - 1)
