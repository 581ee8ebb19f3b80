"""Draw the README's picture: the article's first profile as `servecast simulate` forecasts it."""

from __future__ import annotations

from pathlib import Path

from scenarios import load, plots, simulate
from scenarios.doors import calibration_of
from scenarios.figure import row

NAME = "llama2-70b-1500-100"
PICTURE = Path(__file__).parent.parent / "docs" / f"{NAME}.svg"

if __name__ == "__main__":
    scenario = load(NAME)
    PICTURE.write_bytes(row(plots.overview(simulate(scenario, calibration_of(NAME, scenario)))))
    print(PICTURE)
