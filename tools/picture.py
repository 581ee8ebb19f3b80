"""Draw the README's picture: the article's first profile as `servecast simulate` forecasts it."""

from __future__ import annotations

from pathlib import Path

from scenarios.load.parameters import calibration_of
from scenarios.report import plots
from scenarios.report.figure import row
from servecast import load, simulate

NAME = "llama2-70b-1500-100"
PICTURE = Path(__file__).parent.parent / "docs" / f"{NAME}.svg"

if __name__ == "__main__":
    scenario = load(NAME)
    PICTURE.write_bytes(row(plots.overview(simulate(scenario, calibration_of(NAME, scenario)))))
    print(PICTURE)
