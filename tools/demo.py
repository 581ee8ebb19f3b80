"""`make demo`: both halves of the project in under two minutes, through the command line as a user would type it.

From the article's published figures to what its server does at loads nobody measured; then, on the stand-in over real
HTTP, the whole loop: measure, calibrate, forecast, compare with what was held out.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from standin import standin

from scenarios.cli.main import FAILED, status

OUT = Path("out")
PROFILES = ("llama2-70b-1500-100", "llama2-70b-50-500")
USERS = [1, 2, 4, 8, 16, 32, 64]  # past both knees; the scenarios' own ladders, to 128, take twice as long


def step(title: str, *arguments: str) -> None:
    """Say what comes and run it; stop where it cannot go on. A check that failed has said so, and is no reason to."""
    print(f"\n== {title}\n$ servecast {shlex.join(arguments)}\n", flush=True)
    found = status(arguments)
    if found not in (0, FAILED):
        sys.exit(found)


@contextmanager
def ticking(seconds: float = 4.0) -> Iterator[None]:
    """Say every few seconds that something is going on: where there is no terminal, a rung is measured in silence."""
    over, began = threading.Event(), time.monotonic()

    def tick() -> None:
        while not over.wait(seconds):
            print(f"... {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        over.set()
        ticker.join()


def main() -> None:
    """Run the steps into fresh folders of `out/`."""
    began = time.monotonic()
    article, loop = OUT / "article", OUT / "standin"
    for folder in (article, loop):
        shutil.rmtree(folder, ignore_errors=True)
    calibration = str(article / "calibration.json")
    step("1. Fit a model of the server to the article's four figures", "calibrate", "llama2-70b", "-o", calibration)
    step(
        "2. Forecast both profiles at loads nobody measured",
        *("simulate", *PROFILES, "--set", f"calibration={calibration}", "--set", f"load.users={USERS}"),
        *("-o", str(article)),
    )
    with standin() as url, ticking():
        print(f"\n$ servecast standin --port 0 &\n{url}", flush=True)
        step("3. Measure a server, fit it, forecast it, compare", "run", "standin", "--url", url, "-o", str(loop))
    sources = [*(article / name for name in PROFILES), loop, loop / "run", loop / "comparison.json"]
    title = "Llama-2-70B on 4 A100-40GB: what it will do under load"
    print(f"\n{time.monotonic() - began:.0f} s so far", file=sys.stderr)
    page = ["--title", title, "-o", str(OUT / "report.html")]
    step("4. All of it on one page", "report", *map(str, sources), *page)


if __name__ == "__main__":
    main()
