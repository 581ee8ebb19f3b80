"""Fit 40 made-up articles and print how often the true plateau of a third profile lies in its 90 % band.

    python tools/check_published.py [--trials N] [--simulations N] [--seed N] [--jobs N]

Exit status 1 unless 80 to 100 % of the trials lie inside (32 to 40 of 40), which is what a 90 % band that keeps its
word shows in 97 of 100 such checks.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial

from calibrate.coverage import THIRD, trial
from sim.executors import processes


def main() -> int:
    """Run the trials and judge them."""
    parser = argparse.ArgumentParser(description="Fit made-up articles; count the true plateaus inside the bands.")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--simulations", type=int, default=250)
    parser.add_argument("--seed", type=int, default=2023)
    parser.add_argument("--jobs", type=int, default=None)
    asked = parser.parse_args()
    with processes(asked.jobs) as pool:
        done = pool.run(partial(trial, seed=asked.seed, simulations=asked.simulations), range(asked.trials))
    for number, one in enumerate(done):
        low, high = one.forecast.low, one.forecast.high
        print(f"{number:3}  truth {one.truth:6.3f}  band {low:6.3f} to {high:6.3f}  {'' if one.inside else 'outside'}")
    inside = sum(one.inside for one in done)
    width = statistics.median(one.width for one in done)
    print(
        f"the true plateau of {THIRD.prompt_tokens}/{THIRD.output_tokens}, which no figure mentions, lies in the 90 % "
        f"band in {inside} of {len(done)} trials; median width of the band {100 * width:.0f} % of the truth"
    )
    return 0 if inside >= 0.8 * len(done) else 1


if __name__ == "__main__":
    sys.exit(main())
