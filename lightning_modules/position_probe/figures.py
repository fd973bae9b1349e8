"""Figures of a position matrix and its controls, drawn from files of a run, so that they can be drawn again."""

import csv
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_modules.common.figures import new_figure, save_figure
from lightning_modules.position_probe import geometry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLES: dict[str, dict[str, Any]] = {  # of the lines, in every figure
    "real": {"color": "tab:blue", "linewidth": 2.2, "zorder": 5},
    "random_labels": {"color": "tab:brown", "linewidth": 1.2},
    "shuffled": {"color": "tab:orange", "linewidth": 1.2},
    "gaussian": {"color": "tab:green", "linewidth": 1.2},
    "sinusoids": {"color": "tab:red", "linewidth": 1.2, "linestyle": "--"},
    "initialization": {"color": "tab:gray", "linewidth": 1.2},
}
_TITLES = {"real": "the matrix", "random_labels": "random labels"}


def draw_geometry(positions: Path, folder: Path) -> list[Path]:
    """Draw similarity, similarity by distance, the curve of the rows, and spectra; return the files.

    Args:
        positions: `positions.npz` of a run.
        folder: Folder for the PNG files.
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
    """Draw the cosine similarity of any two positions."""
    figure, axes = _panels(tables, 2.7, sharey=True)
    for ax, rows in zip(axes, tables.values(), strict=True):
        image = ax.imshow(geometry.cosine_similarity(rows), vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        ax.set_xlabel("position")
    axes[0].set_ylabel("position")
    figure.colorbar(image, ax=axes, shrink=0.8, label="cosine")
    return save_figure(figure, file)


def _draw_similarity_by_distance(tables: dict[str, np.ndarray], file: Path) -> Path:
    """Draw mean and standard deviation of the similarity over the pairs of each distance."""
    figure, axes = _panels(tables, 2.7, sharey=True)
    for ax, (name, rows) in zip(axes, tables.items(), strict=True):
        mean, spread = geometry.by_distance(geometry.cosine_similarity(rows))
        distances = np.arange(1, len(rows))
        color = _STYLES[name]["color"]
        ax.fill_between(distances, mean - spread, mean + spread, color=color, alpha=0.25, linewidth=0)
        ax.plot(distances, mean, color=color)
        ax.axhline(0, color="black", linewidth=0.6)
        ax.set_xlabel("distance")
        _tidy(ax)
    axes[0].set_ylabel("cosine of two rows")
    axes[0].set_ylim(-1.05, 1.05)
    return save_figure(figure, file)


def _draw_curve(tables: dict[str, np.ndarray], file: Path) -> Path:
    """Draw the rows, joined in order, in their first three principal components."""
    figure, axes = _panels(tables, 2.9, subplot_kw={"projection": "3d"})
    for ax, (name, rows) in zip(axes, tables.items(), strict=True):
        scores, variance, _ = geometry.principal_components(rows)
        x, y, z = scores[:, :3].T
        ax.plot(x, y, z, color="black", linewidth=0.4, alpha=0.6)
        points = ax.scatter(x, y, zs=z, c=np.arange(len(rows)), cmap="viridis", s=7, depthshade=False)
        ax.set_title(f"{_title(name)}\n{variance[:3].sum():.0%} of the variance", fontsize=10)
        ax.set(xticklabels=[], yticklabels=[], zticklabels=[])
        ax.tick_params(length=0)
    figure.colorbar(points, ax=figure.axes, shrink=0.7, label="position")
    return save_figure(figure, file)


def _draw_spectra(tables: dict[str, np.ndarray], file: Path) -> Path:
    """Draw the variance of the rows by principal component, and by frequency along the positions."""
    figure = new_figure(9, 3.4)
    by_component, by_frequency = figure.subplots(1, 2)
    for name, rows in tables.items():
        scores, variance, _ = geometry.principal_components(rows)
        cumulated = np.cumsum(variance)
        by_component.plot(np.arange(1, len(variance) + 1), cumulated, label=_title(name), **_STYLES[name])
        power = geometry.power_spectrum(scores) @ variance  # (T // 2,), of the whole matrix
        power = power[: (len(rows) - 1) // 2]  # without T / 2 cycles, at which every sine is 0
        by_frequency.plot(np.arange(1, len(power) + 1), power, label=_title(name), **_STYLES[name])
    by_component.set(xscale="log", xlabel="principal components", ylabel="share of the variance", ylim=(0, 1.03))
    by_frequency.set(xscale="log", yscale="log", xlabel="cycles over the positions", ylabel="share of the variance")
    by_frequency.set_ylim(bottom=1e-5)
    by_component.legend(fontsize=8)
    for ax in (by_component, by_frequency):
        _tidy(ax)
    return save_figure(figure, file)


def draw_probes(by_distance: Path, file: Path) -> Path:
    """Draw the errors of the probes by the distance of two unseen positions, and return the file.

    Args:
        by_distance: `probes_by_distance.csv` of a run.
        file: PNG file to create or replace.
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
    figure = new_figure(11, 3.6)
    axes = figure.subplots(1, len(panels))
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
    return save_figure(figure, file)


def draw_shifted_perplexity(table: Path, file: Path) -> Path:
    """Draw the perplexity of a model by the position at which its text starts, and return the file.

    Args:
        table: `shifted_perplexity.csv` of a run.
        file: PNG file to create or replace.
    """
    with table.open(newline="") as opened:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(opened)]
    figure = new_figure(6, 3.6)
    ax = figure.subplots()
    starts = [row["start"] for row in rows]
    for column, case in (("perplexity", "real"), ("perplexity_shuffled", "shuffled")):
        ax.plot(starts, [row[column] for row in rows], marker="o", markersize=3.5, label=_title(case), **_STYLES[case])
    ax.set(xlabel="position of the first token", ylabel="perplexity", yscale="log")
    ax.set_ylim(ax.get_ylim()[0] / 1.5, ax.get_ylim()[1] * 1.5)  # small changes must look small
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.yaxis.set_minor_formatter("{x:,.0f}")
    ax.legend(fontsize=8)
    _tidy(ax)
    return save_figure(figure, file)


def _range_of(octave: int) -> str:
    first, last = 2 ** (octave - 1), 2**octave - 1
    return str(first) if first == last else f"{first}–{last}"


def _title(name: str) -> str:
    return _TITLES.get(name, name)


def _panels(tables: dict[str, np.ndarray], height: float, **options: Any) -> tuple["Figure", list["Axes"]]:
    """Return a figure with one panel for each table, which has its title."""
    figure = new_figure(2.4 * len(tables) + 0.6, height)
    axes = list(figure.subplots(1, len(tables), squeeze=False, **options)[0])
    for ax, name in zip(axes, tables, strict=True):
        ax.set_title(_title(name), fontsize=10)
    return figure, axes


def _tidy(ax: "Axes") -> None:
    ax.grid(alpha=0.3)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
