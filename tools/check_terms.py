"""Would another term improve the step times of the recorded vLLM runs? Printed: error at what was left out.

For each candidate beside the terms of the form `mixed`: Σ |Σ (forecast − measured)| over Σ measured, over steps of one
rung with and without chunks and decodes, for every run and for every rung forecast from the others; least squares in
relative error, without priors and random effects.
"""

from __future__ import annotations

import numpy as np
from held_out import DATA, runs_in

from calibrate.regression.design import Rows, build_rows, terms
from calibrate.regression.selection import fit_relative
from calibrate.schedule.schedule import schedule_of
from calibrate.sources.streamed import MIXED

KNOTS = (2, 4, 8, 16)


def main() -> None:
    """Print a line for each candidate."""
    runs = runs_in(DATA / "vllm-cpu")
    rows = build_rows(runs, [schedule_of(run) for run in runs])
    known = terms(rows, "mixed")
    plain = [known[name] for name in MIXED]
    print(f"{'term':<34}{'runs left out':>15}{'rungs left out':>15}")
    for name, column in candidates(rows).items():
        matrix = np.stack([*plain, *([] if column is None else [column])], axis=1)
        errors = [100 * float(np.mean(left_out(rows, matrix, group))) for group in (rows.run, rows.rung)]
        print(f"{name:<34}{errors[0]:>13.2f} %{errors[1]:>13.2f} %")


def candidates(rows: Rows) -> dict[str, np.ndarray | None]:
    """A column for each candidate, (rows,)."""
    decodes, tokens = (rows.table[name].to_numpy(np.float64) for name in ("decode_sequences", "prefill_tokens"))
    both = {f"decodes, up to {k}": np.minimum(decodes, k) for k in KNOTS}
    both |= {f"tokens and decodes, up to {k}": np.minimum(tokens + decodes, k) for k in KNOTS}
    return {
        "none": None,
        "longest context": rows.table["decode_longest"].to_numpy(np.float64),
        **both,
        "square root of decodes": np.sqrt(decodes),
        "logarithm of decodes + 1": np.log1p(decodes),
        "prompts beside decodes": ((tokens > 0) & (decodes > 0)).astype(np.float64),
    }


def left_out(rows: Rows, matrix: np.ndarray, group: np.ndarray) -> list[float]:
    """The error of each group, fitted to all others."""
    mixed = (rows.table["prefill_tokens"] > 0).to_numpy() + 2 * (rows.table["decode_sequences"] > 0).to_numpy()
    cell = rows.rung * 4 + mixed
    errors = []
    for number in np.unique(group):
        out = group == number
        missed = matrix[out] @ fit_relative(matrix[~out], rows.seconds[~out]) - rows.seconds[out]
        errors.append(float(np.abs(np.bincount(cell[out], weights=missed)).sum() / rows.seconds[out].sum()))
    return errors


if __name__ == "__main__":
    main()
