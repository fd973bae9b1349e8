"""Figures of a decoder's signal, drawn from what `SignalPropagation` saved, so that they can be drawn again."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lightning_modules.runtime.drawing import save_figure

Steps = Mapping[int, Mapping[str, np.ndarray]]  # step -> what `SignalPropagation` saved there


def draw_by_depth(steps: Steps, figure: Path) -> Path:
    """Draws the residual stream's standard deviation and the gradient's root mean square against the depth.

    Args:
        steps: What was measured, by step.
        figure: PNG file to write.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # no pyplot: no global state, no window system
    from matplotlib.ticker import MaxNLocator

    picture = Figure(figsize=(9, 4), layout="constrained")
    left, right = picture.subplots(1, 2)
    colors = colormaps["viridis"](np.linspace(0, 0.85, len(steps)))
    for (step, found), color in zip(steps.items(), colors, strict=True):
        for axes, values in ((left, found["residual_std"]), (right, found["gradient_rms"])):
            axes.plot(values, color=color, marker="o", markersize=4, label=f"step {step}")
    for axes, title in ((left, "residual stream, standard deviation"), (right, "gradient, root mean square")):
        axes.set(title=title, xlabel="depth (0: embedding)", yscale="log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(picture, figure)
    return figure


def draw_histograms(steps: Steps, figure: Path) -> Path:
    """Draws how the residual stream and the gradients are distributed: a column a step, a line a depth.

    Args:
        steps: What was measured, by step.
        figure: PNG file to write.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    n_depths = max(len(found["residual_std"]) for found in steps.values())
    color_of = ScalarMappable(Normalize(-0.5, n_depths - 0.5), colormaps["plasma"].resampled(n_depths))
    picture = Figure(figsize=(1 + 3.2 * len(steps), 5.5), layout="constrained")
    panels = picture.subplots(2, len(steps), sharex="row", sharey="row", squeeze=False)
    for column, (step, found) in enumerate(steps.items()):
        of_depths = np.stack(
            [found["gradient_histograms"][found["depths"] == depth].sum(0) for depth in range(n_depths)]
        )
        middles = (found["edges"][1:] + found["edges"][:-1]) / 2
        for axes, histograms in zip(panels[:, column], (found["residual_histograms"], of_depths), strict=True):
            for depth, counts in enumerate(histograms):
                seen = np.flatnonzero(counts)
                shares = 100 * counts / max(1, counts.sum())
                axes.plot(middles[seen], shares[seen], color=color_of.to_rgba(depth), linewidth=1)
            axes.grid(alpha=0.3)
            axes.xaxis.set_major_locator(MaxNLocator(5, prune="both"))  # outer labels would run into the next panel
        panels[0, column].set(title=f"step {step}", xlabel="log10 |residual stream|")
        panels[1, column].set(xlabel="log10 |gradient|")
    for axes in panels[:, 0]:
        axes.set_ylabel("share of the values, %")
    bar = picture.colorbar(color_of, ax=panels, label="depth (0: embedding)", pad=0.01, aspect=40)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    save_figure(picture, figure)
    return figure
