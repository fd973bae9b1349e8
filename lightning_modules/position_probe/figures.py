"""Figures of a position matrix and its controls, drawn from the files that a run left, so they can be drawn again."""

import csv
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lightning_modules.position_probe import geometry
from lightning_modules.runtime.drawing import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLES = {  # the matrix stands out; each control has its colour in every figure
    "real": {"color": "tab:blue", "linewidth": 2.2, "zorder": 5},
    "random_labels": {"color": "tab:brown", "linewidth": 1.2},
    "shuffled": {"color": "tab:orange", "linewidth": 1.2},
    "gaussian": {"color": "tab:green", "linewidth": 1.2},
    "sinusoids": {"color": "tab:red", "linewidth": 1.2, "linestyle": "--"},
    "initialization": {"color": "tab:gray", "linewidth": 1.2},
}
_TITLES = {"real": "the matrix", "random_labels": "random labels"}


def draw_geometry(positions: Path, folder: Path) -> list[Path]:
    """Draws what needs no training: similarity, its fall with distance, the curve of the rows, spectra.

    Args:
        positions: A run's `positions.npz`.
        folder: Folder for the PNG files.

    Returns:
        The files.
    """
    with np.load(positions) as saved:
        tables = {name: saved[name].astype(np.float64) for name in saved.files}
    return [
        _draw_similarity(tables, folder / "similarity.png"),
        _draw_similarity_by_distance(tables, folder / "similarity_by_distance.png"),
        _draw_curve(tables, folder / "curve.png"),
        _draw_spectra(tables, folder / "spectra.png"),
    ]


def _draw_similarity(tables: dict[str, np.ndarray], file: Path) -> Path:
    """The cosine similarity of each two positions."""
    picture = _figure(2.4 * len(tables) + 0.6, 2.7)
    axes = picture.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for ax, (name, rows) in zip(axes, tables.items(), strict=True):
        image = ax.imshow(geometry.cosine_similarity(rows), vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        ax.set_title(_title(name), fontsize=10)
        ax.set_xlabel("position")
    axes[0].set_ylabel("position")
    picture.colorbar(image, ax=axes, shrink=0.8, label="cosine")
    save_figure(picture, file)
    return file


def _draw_similarity_by_distance(tables: dict[str, np.ndarray], file: Path) -> Path:
    """Mean and standard deviation of the similarity over the pairs of each distance."""
    picture = _figure(2.4 * len(tables) + 0.6, 2.7)
    axes = picture.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for ax, (name, rows) in zip(axes, tables.items(), strict=True):
        mean, spread = geometry.by_distance(geometry.cosine_similarity(rows))
        distances = np.arange(1, len(rows))
        color = _STYLES[name]["color"]
        ax.fill_between(distances, mean - spread, mean + spread, color=color, alpha=0.25, linewidth=0)
        ax.plot(distances, mean, color=color)
        ax.axhline(0, color="black", linewidth=0.6)
        ax.set_title(_title(name), fontsize=10)
        ax.set_xlabel("distance")
        _tidy(ax)
    axes[0].set_ylabel("cosine of two rows")
    axes[0].set_ylim(-1.05, 1.05)
    save_figure(picture, file)
    return file


def _draw_curve(tables: dict[str, np.ndarray], file: Path) -> Path:
    """The rows, joined in order, in their first three principal components."""
    picture = _figure(2.4 * len(tables) + 0.6, 2.9)
    for place, (name, rows) in enumerate(tables.items(), start=1):
        scores, variance, _ = geometry.principal_components(rows)
        ax = picture.add_subplot(1, len(tables), place, projection="3d")
        ax.plot(*scores[:, :3].T, color="black", linewidth=0.4, alpha=0.6)
        points = ax.scatter(*scores[:, :3].T, c=np.arange(len(rows)), cmap="viridis", s=7, depthshade=False)
        ax.set_title(f"{_title(name)}\n{variance[:3].sum():.0%} of the variance", fontsize=10)
        ax.set(xticklabels=[], yticklabels=[], zticklabels=[])
        ax.tick_params(length=0)
    picture.colorbar(points, ax=picture.axes, shrink=0.7, label="position")
    save_figure(picture, file)
    return file


def _draw_spectra(tables: dict[str, np.ndarray], file: Path) -> Path:
    """The variance of the rows by principal component, and by frequency along the positions."""
    picture = _figure(9, 3.4)
    by_component, by_frequency = picture.subplots(1, 2)
    for name, rows in tables.items():
        scores, variance, _ = geometry.principal_components(rows)
        cumulated = np.cumsum(variance)
        by_component.plot(np.arange(1, len(variance) + 1), cumulated, label=_title(name), **_STYLES[name])
        power = geometry.power_spectrum(scores) @ variance  # (T // 2,), the whole matrix's
        power = power[: (len(rows) - 1) // 2]  # without the frequency of T / 2, which has a sine only in name
        by_frequency.plot(np.arange(1, len(power) + 1), power, label=_title(name), **_STYLES[name])
    by_component.set(xscale="log", xlabel="principal components", ylabel="share of the variance", ylim=(0, 1.03))
    by_frequency.set(xscale="log", yscale="log", xlabel="cycles over the positions", ylabel="share of the variance")
    by_frequency.set_ylim(bottom=1e-5)
    by_component.legend(fontsize=8)
    for ax in (by_component, by_frequency):
        _tidy(ax)
    save_figure(picture, file)
    return file


def draw_probes(by_distance: Path, file: Path) -> Path:
    """Draws how the probes' errors grow with the distance of two unseen positions, for the matrix and its controls.

    Args:
        by_distance: A run's `probes_by_distance.csv`.
        file: PNG file to write.
    """
    sums: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
    with by_distance.open(newline="") as opened:
        for row in csv.DictReader(opened):
            octave = int(row["distance"]).bit_length()  # 1, 2 to 3, 4 to 7, ...
            total = sums[row["target"], row["case"]][octave]
            total[0] += float(row["error"]) * int(row["pairs"])
            total[1] += int(row["pairs"])
    panels = {
        "order": "order: share of pairs right",
        "signed_distance": "signed distance: mean error",
        "distance": "distance: mean error",
    }
    picture = _figure(11, 3.6)
    axes = picture.subplots(1, len(panels))
    for ax, (target, title) in zip(axes, panels.items(), strict=True):
        for name in [case for t, case in sums if t == target]:
            octaves = sorted(sums[target, name])
            errors = np.array([sums[target, name][o][0] / sums[target, name][o][1] for o in octaves])
            values = 1 - errors if target == "order" else errors
            ax.plot(octaves, values, marker="o", markersize=3.5, label=_title(name), **_STYLES[name])
        ax.set_xticks(octaves, [_range_of(octave) for octave in octaves], fontsize=8)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("distance of the two positions")
        _tidy(ax)
    axes[0].axhline(0.5, color="black", linewidth=0.6)
    axes[0].set_ylim(0, 1.03)
    axes[1].set_ylim(bottom=0)
    axes[2].set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    save_figure(picture, file)
    return file


def draw_shifted_perplexity(table: Path, file: Path) -> Path:
    """Draws the perplexity of a model against the position at which its text starts.

    Args:
        table: A run's `shifted_perplexity.csv`.
        file: PNG file to write.
    """
    with table.open(newline="") as opened:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(opened)]
    picture = _figure(6, 3.6)
    ax = picture.subplots()
    starts = [row["start"] for row in rows]
    for column, case in (("perplexity", "real"), ("perplexity_shuffled", "shuffled")):
        ax.plot(starts, [row[column] for row in rows], marker="o", markersize=3.5, label=_title(case), **_STYLES[case])
    ax.set(xlabel="position of the first token", ylabel="perplexity", yscale="log")
    ax.set_ylim(ax.get_ylim()[0] / 1.5, ax.get_ylim()[1] * 1.5)  # or the smallest of changes would fill the figure
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.yaxis.set_minor_formatter("{x:,.0f}")
    ax.legend(fontsize=8)
    _tidy(ax)
    save_figure(picture, file)
    return file


def _range_of(octave: int) -> str:
    first, last = 2 ** (octave - 1), 2**octave - 1
    return str(first) if first == last else f"{first}–{last}"


def _title(name: str) -> str:
    return _TITLES.get(name, name)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # no pyplot: no global state, no window system

    return Figure(figsize=(width, height), layout="constrained")


def _tidy(ax: "Axes") -> None:
    ax.grid(alpha=0.3)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
