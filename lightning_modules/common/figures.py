"""Figures drawn without pyplot, for commands that import neither torch nor Lightning."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from lightning_modules.common.files import atomic_file

if TYPE_CHECKING:  # matplotlib is imported where it is used: it is slow to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of a size in inches, without the window and the global state of pyplot."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["text.parse_math"] = False  # a dollar in a name is a dollar
    return Figure(figsize=(width, height), layout="constrained")


def tidy(axes: "Axes") -> None:
    """Give axes a faint grid behind what is drawn, and no frame at the top and on the right."""
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: "Figure", file: Path) -> Path:
    """Create or replace a PNG file with a figure, and return the file."""
    with atomic_file(file) as target:
        figure.savefig(target, format="png", dpi=120)
    return file


def integer_steps(axes: "Axes", logged: Sequence[float] = ()) -> None:
    """Put the ticks of the horizontal axis at whole steps: at those that were logged, if they are at most eight."""
    from matplotlib.ticker import MaxNLocator

    if 0 < len(logged) <= 8:
        axes.set_xticks(logged)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 2.5, 5, 10], integer=True))


def annotate(
    axes: "Axes", text: str, place: tuple[float, float], offset: tuple[float, float], ha: str = "left"
) -> None:
    """Write a text near a point, at an offset in points, on a white ground over the curves."""
    ground = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    axes.annotate(text, place, textcoords="offset points", xytext=offset, ha=ha, bbox=ground, zorder=10)


def log_scale(axes: "Axes", axis: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, with plain numbers at its ticks; call it when the curves are drawn.

    Matplotlib's own labels are formulas, which are not parsed here.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    drawn = axes.dataLim.intervalx if axis == "x" else axes.dataLim.intervaly
    low, high = (max(float(end), 1e-300) for end in drawn)
    decades = math.log10(high / low)
    (axes.set_xscale if axis == "x" else axes.set_yscale)("log")
    ticks = axes.xaxis if axis == "x" else axes.yaxis
    ticks.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: _tick_label(value)))
    ticks.set_minor_formatter(NullFormatter())


def _tick_label(value: float) -> str:
    if value >= 1e6:
        return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def smoothed(values: Sequence[float]) -> list[float] | None:
    """Return the mean of each value and its neighbours, a tenth of all; `None` if there are too few values to smooth.

    Near the beginning there are fewer, equally many on both sides, as a loss falls fast there. Near the end the values
    that are missing on the right are left out, so that the last mean is not one value alone.
    """
    reach = len(values) // 20
    if reach < 1:
        return None
    array = np.asarray(values, dtype=float)
    begin = [float(array[: 2 * n + 1].mean()) for n in range(reach)]
    end = [float(array[-n - reach - 1 :].mean()) for n in reversed(range(reach))]
    # Each window has a sum of its own: with differences of running sums, one NaN would be in all that follow.
    inner = np.lib.stride_tricks.sliding_window_view(array, 2 * reach + 1).mean(axis=1)
    return [*begin, *inner.tolist(), *end]
