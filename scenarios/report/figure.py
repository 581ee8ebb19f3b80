"""What all pictures (SVG) share: colours, style, axes, and how they become bytes.

The same picture gives the same bytes: fixed ids, no date.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes as Axes  # for those that draw on them
from matplotlib.axis import Axis, YAxis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from sim.model.text import escaped

BLUE, ORANGE, GREEN, GREY, RED = "#2563a8", "#d9730d", "#2f7d4f", "#6b7280", "#b42318"
Drawing = Callable[[Axes], None]  # what puts one panel onto its axes
PANEL = (3.73, 3.3)  # inches: three beside each other on a page, and as wide as a telephone alone
MOST = 64  # characters of a text; the longest of ours has some fifty
NEAR = 0.055  # of an axis: a tick label nearer than this to the one before would run into it
STYLE: Any = {
    "svg.hashsalt": "servecast",
    "text.parse_math": False,  # a $ in a name is a dollar
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": "#374151",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.7,
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "legend.frameon": True,  # curves run behind it
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "lines.linewidth": 1.7,
}


def logarithmic(ax: Axes) -> None:
    """A logarithmic ordinate, where what is shown spans enough to need one; else one from 0."""
    shown = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in ax.get_lines()] or [np.empty(0)])
    shown = shown[shown > 0]
    if len(shown) and shown.max() > 4 * shown.min():
        ax.set_yscale("log")
    else:
        ax.set_ylim(0, None)
    plain(ax.yaxis)


def plain(axis: Axis) -> None:
    """Numbers without exponents."""
    if axis.get_scale() == "log" and isinstance(axis, YAxis):
        decades(axis)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def decades(axis: Axis) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5, of a long one at powers of ten."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)))
    axis.set_minor_locator(NullLocator())


def whole(axis: Axis, most: int | None = None) -> None:
    """Ticks at whole numbers only, between them `most` intervals."""
    axis.set_major_locator(MaxNLocator("auto" if most is None else most, integer=True, min_n_ticks=1))


def at_loads(axis: Axis, loads: Sequence[float]) -> None:
    """Ticks at the loads that were asked, and nowhere else; numbers where there is room for them."""
    low, high = axis.get_view_interval()
    place = np.log2 if axis.get_scale() == "log" else np.asarray
    at = (place(np.array(loads, dtype=np.float64)) - place(low)) / (place(high) - place(low))
    texts = [f"{load:g}" for load in loads]
    shown: list[int] = []
    for i in [0, len(loads) - 1, *range(1, len(loads) - 1)]:  # both ends first
        if all(abs(at[i] - at[j]) > NEAR * (len(texts[i]) + len(texts[j])) / 2 for j in shown):
            shown.append(i)
    axis.set_minor_locator(NullLocator())
    axis.set_major_locator(FixedLocator(list(loads)))
    axis.set_major_formatter(FixedFormatter([text if i in shown else "" for i, text in enumerate(texts)]))


def panels(drawings: Sequence[Drawing]) -> list[bytes]:
    """Each drawing as a picture of its own, for a page that lays them out as it has room."""
    made = []
    for draw in drawings:
        with figure(*PANEL, 1) as (picture, (ax,)):
            draw(ax)
            made.append(svg(picture))
    return made


def row(drawings: Sequence[Drawing]) -> bytes:
    """The drawings beside each other in one picture."""
    width, height = PANEL
    with figure(width * len(drawings), height, len(drawings)) as (picture, axes):
        for ax, draw in zip(axes, drawings, strict=True):
            draw(ax)
        return svg(picture)


@contextmanager
def figure(
    width: float,
    height: float,
    columns: int,
    rows: int = 1,
    heights: Sequence[float] | None = None,
    sharex: bool = True,
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of so many inches and its panels, row by row."""
    with mpl.rc_context(STYLE):
        drawn = Figure(figsize=(width, height), layout="constrained")
        axes = drawn.subplots(rows, columns, squeeze=False, height_ratios=heights, sharex=sharex and rows > 1)
        yield drawn, list(axes.flat)


def svg(drawn: Figure) -> bytes:
    """The picture; the same figure gives the same bytes."""
    for text in drawn.findobj(Text):
        said = escaped(text.get_text())
        text.set_text(said if len(said) <= MOST else f"{said[: MOST - 1]}…")  # or it leaves the axes no room
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # a name in a script that no font has
        drawn.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
