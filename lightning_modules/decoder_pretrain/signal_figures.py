"""Figures of the signal in a decoder, drawn from the files of `SignalPropagation`, so that they can be redrawn."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lightning_modules.common.figures import log_scale, new_figure, save_figure

Steps = Mapping[int, Mapping[str, np.ndarray]]  # by step, the arrays that `SignalPropagation` saved there


def draw_by_depth(steps: Steps, file: Path) -> Path:
    """Draw the standard deviation of the residual stream and the RMS of the gradient against depth; return the file."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(9, 4)
    left, right = figure.subplots(1, 2)
    colors = colormaps["viridis"](np.linspace(0, 0.85, len(steps)))
    for axes, name, title in (
        (left, "residual_std", "residual stream, standard deviation"),
        (right, "gradient_rms", "gradient, root mean square"),
    ):
        for (step, arrays), color in zip(steps.items(), colors, strict=True):
            axes.plot(arrays[name], color=color, marker="o", markersize=4, label=f"step {step}")
        axes.set(title=title, xlabel="depth (0: embedding)")
        log_scale(axes, "y")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    return save_figure(figure, file)


def draw_histograms(steps: Steps, file: Path) -> Path:
    """Draw the distributions of the residual stream and of the gradients, and return the file.

    The figure has a column for each step and a line for each depth.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    n_depths = max(len(arrays["residual_std"]) for arrays in steps.values())
    color_of: Any = ScalarMappable(Normalize(-0.5, n_depths - 0.5), colormaps["plasma"].resampled(n_depths))
    figure = new_figure(1 + 3.2 * len(steps), 5.5)
    panels: Any = figure.subplots(2, len(steps), sharex="row", sharey="row", squeeze=False)
    for column, (step, arrays) in enumerate(steps.items()):
        gradients = [arrays["gradient_histograms"][arrays["depths"] == depth].sum(0) for depth in range(n_depths)]
        middles = (arrays["edges"][1:] + arrays["edges"][:-1]) / 2
        for axes, histograms in ((panels[0, column], arrays["residual_histograms"]), (panels[1, column], gradients)):
            for depth, counts in enumerate(histograms):
                occupied = np.flatnonzero(counts)
                percentages = 100 * counts / max(1, counts.sum())
                axes.plot(middles[occupied], percentages[occupied], color=color_of.to_rgba(depth), linewidth=1)
            axes.grid(alpha=0.3)
            axes.xaxis.set_major_locator(MaxNLocator(5, prune="both"))  # outer labels would overlap the next panel
        panels[0, column].set(title=f"step {step}", xlabel="log10 |residual stream|")
        panels[1, column].set(xlabel="log10 |gradient|")
    for axes in panels[:, 0]:
        axes.set_ylabel("share of the values, %")
    bar = figure.colorbar(color_of, ax=panels, label="depth (0: embedding)", pad=0.01, aspect=40)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    return save_figure(figure, file)
