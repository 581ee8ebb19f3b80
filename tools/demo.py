"""`make demo`: from the article's published figures to what its server does at loads nobody measured, in about a minute.

Everything goes through the command line, as a user would type it; each command is printed before it runs.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from pathlib import Path

from scenarios.cli import status

OUT = Path("out")
PROFILES = ("llama2-70b-1500-100", "llama2-70b-50-500")


def step(title: str, *arguments: str) -> None:
    """Say what comes, run it, stop at the first failure."""
    print(f"\n== {title}\n$ servecast {shlex.join(arguments)}\n", flush=True)
    found = status(arguments)
    if found:
        sys.exit(found)


def main() -> None:
    """Run the steps into a fresh `out/`."""
    began = time.monotonic()
    shutil.rmtree(OUT / "article", ignore_errors=True)
    calibration = str(OUT / "article" / "calibration.json")
    step("1. Fit a model of the server to the article's four figures", "calibrate", "llama2-70b", "-o", calibration)
    step(
        "2. Forecast both profiles at loads nobody measured",
        *("simulate", *PROFILES, "--set", f"calibration={calibration}", "-o", str(OUT / "article")),
    )
    sources = [str(OUT / "article" / name) for name in PROFILES]
    title = "Llama-2-70B on 4 A100-40GB: what it will do under load"
    print(f"\n{time.monotonic() - began:.0f} s so far", file=sys.stderr)
    step("3. All of it on one page", "report", *sources, "--title", title, "-o", str(OUT / "report.html"))


if __name__ == "__main__":
    main()
