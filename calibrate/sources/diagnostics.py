"""Diagnostics of a fit to published figures: how well it reproduces them, contradictions, what they leave open."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from calibrate.arrays import Bools, Floats
from calibrate.sources import published_priors
from calibrate.sources.constrained_prior import ConstrainedPrior
from calibrate.sources.figures import title
from calibrate.sources.importance_sampling import Sample
from sim.model.scenario import Figure, Scenario
from sim.model.warning import Notice, notice
from sim.steptime.linear import MEANING

CLOSE = 0.05  # relative: tolerance of a figure, or its rounding where that is wider
WIDE = 0.85  # of the prior's standard deviation: a parameter this wide was not identified


def deviation(figure: Figure, shown: Floats) -> Floats:
    """The deviation of simulated values from a figure, in units of its tolerance."""
    close = max(CLOSE * figure.value, figure.rounding)
    return np.abs(np.nan_to_num(shown, nan=np.inf) - figure.value) / close


def fitted(figures: Sequence[Figure], shown: Floats, center: int) -> str:
    """Each figure beside the value of the central draw and the 90 % band of all draws; `shown` is (draws, figures)."""
    said = []
    for i, figure in enumerate(figures):
        low, high = np.quantile(shown[:, i], [0.05, 0.95], method="weibull")
        said.append(
            f"{title(figure)}: {shown[center, i]:.3g} ({low:.3g} to {high:.3g}) "
            f"against {figure.value:g} ± {figure.rounding:g}"
        )
    return "; ".join(said)


def contradictions(ladder: Sequence[Figure], found: Sample, center: Floats, figures: Sequence[Figure]) -> list[Notice]:
    """Warnings about figures that do not hold together, from all simulations.

    `ladder` are the figures that needed a simulation; `center` has the values of the central draw for all `figures`.
    """
    said = []
    # (figures, machines, factors); every simulated machine has the single-user latencies
    close = [deviation(figure, found.shown[:, i]) <= 1 for i, figure in enumerate(ladder)]
    machines = len(found.weights)
    everything = _together(close)
    off = [
        f"{title(figure)} {center[i]:.3g} instead of {figure.value:g}"
        for i, figure in enumerate(figures)
        if deviation(figure, center[i : i + 1])[0] > 1
    ]
    if off or (ladder and not everything):
        said.append(
            notice(
                "figures-inconsistent",
                f"the figures do not hold together in this model: of {machines} machines simulated {everything} show "
                f"all within {100 * CLOSE:.0f} % or their rounding; the central one shows "
                f"{', '.join(off) or 'each closely'}",
            )
        )
        for i, figure in enumerate(ladder if len(ladder) > 1 else []):
            others = _together(close[:i] + close[i + 1 :])
            said.append(
                notice("figure-left-out", f"without {title(figure)}, {others} of {machines} machines show the rest")
            )
    if (power := found.likelihood_power) < 1:
        said.append(
            notice(
                "figures-few-machines",
                f"few machines show the figures: the draws stand for {found.effective:.0f}, each figure taken "
                f"{power**-0.5 if power > 0 else np.inf:.1f} times less sharply than printed",
            )
        )
    return said


def _together(close: list[Bools]) -> int:
    """How many machines show all of these figures with one and the same onset factor."""
    return int(np.count_nonzero(np.logical_and.reduce(close).any(axis=-1))) if close else 0


def not_identified(space: ConstrainedPrior, found: Sample) -> list[Notice]:
    """A warning about the parameters that the figures leave as wide as the prior."""
    meaning = MEANING | published_priors.MEANING
    wide = [
        f"{name} ({meaning[name][1]})"
        for i, name in enumerate(space.free)
        if found.spread[i] > WIDE and name in meaning
    ]
    if not wide:
        return []
    return [
        notice(
            "figures-undetermined",
            f"the figures do not pin down {', '.join(wide)}: these stay as wide as such machines are known to be",
        )
    ]


def assumptions(scenario: Scenario) -> list[Notice]:
    """What no figure says and was assumed."""
    limits = [figure.lengths == "limit" for figure in scenario.published]
    said = [
        notice(
            "output-attained",
            "where a published figure says `lengths: limit`, only the fitted share output_attained of the tokens "
            "asked for is taken to have come back (an end-of-sequence token may end an answer early); a forecast "
            "shortens answers that end at their limit by the same share",
        )
        if any(limits)
        else notice(
            "output-in-full",
            "answers are taken to have come back in full, as output_tokens says",
        ),
        notice(
            "figures-no-noise",
            "figures do not tell noise from step to step, drift, or the client's delays: no noise, and delays of a few "
            "milliseconds, are assumptions; joining and dropping requests is taken as free",
        ),
    ]
    if any(figure.metric == "rps_takeoff" for figure in scenario.published):
        said.append(
            notice(
                "read-off-plot",
                "rps_takeoff was read off a plot by eye: the factor of latency at which it was read is inferred with "
                "the rest, and the plateau beyond it is a forecast, not a datum",
            )
        )
    if not published_priors.of_the_kind(scenario.machine):
        said.append(
            notice(
                "figures-prior",
                f"the laws that machines were drawn from are those of {published_priors.KIND}, slowed or sped up by "
                "one factor that the figures tell; this is another machine, and what of its time goes where may differ "
                "more",
            )
        )
    return said
