"""Figures of a position matrix and its controls, drawn from files of a run, so that they can be redrawn."""

import csv
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_modules.common.figures import log_scale, new_figure, save_figure, tidy
from lightning_modules.position_probe import geometry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Tables = dict[str, np.ndarray]  # rows (T, d) by name

_STYLES: dict[str, dict[str, Any]] = {  # of the lines, in every figure; they differ without their colours too
    "real": {"label": "the matrix", "color": "tab:blue", "linewidth": 2.2, "zorder": 5},
    "random_labels": {"label": "random labels", "color": "tab:brown", "linewidth": 1.2, "linestyle": ":"},
    "shuffled": {"label": "shuffled", "color": "tab:orange", "linewidth": 1.2},
    "gaussian": {"label": "Gaussian", "color": "tab:green", "linewidth": 1.2, "linestyle": "-."},
    "sinusoids": {"label": "sinusoids", "color": "tab:red", "linewidth": 1.2, "linestyle": "--"},
    "initialization": {"label": "untrained", "color": "tab:gray", "linewidth": 1.2, "linestyle": (0, (6, 1, 1, 1))},
}
_MARKERS = dict(zip(_STYLES, "oxs^Dv", strict=True))


def draw_geometry(positions: Path, folder: Path) -> list[Path]:
    """Draw the tables of `positions.npz` of a run in four figures, and return the files."""
    with np.load(positions) as saved:
        tables = {name: saved[name].astype(np.float64) for name in saved.files}
    draws = (_similarity, _similarity_by_distance, _curve, _spectra)
    return [save_figure(draw(tables), folder / f"{draw.__name__.removeprefix('_')}.png") for draw in draws]


def _similarity(tables: Tables) -> "Figure":
    """Draw the cosine similarity of any two positions."""
    figure, axes = _panels(tables, 2.7, sharey=True)
    for ax, rows in zip(axes, tables.values(), strict=True):
        image = ax.imshow(geometry.cosine_similarity(rows), vmin=-1, vmax=1, cmap="RdBu_r", interpolation="antialiased")
        ax.set_xlabel("position")
    axes[0].set_ylabel("position")
    figure.colorbar(image, ax=axes, shrink=0.8, label="cosine")
    return figure


def _similarity_by_distance(tables: Tables) -> "Figure":
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
        tidy(ax)
    axes[0].set(ylabel="cosine of two rows", ylim=(-1.05, 1.05))
    return figure


def _curve(tables: Tables) -> "Figure":
    """Draw the rows, joined in order, in their first three principal components."""
    figure, axes = _panels(tables, 2.9, subplot_kw={"projection": "3d"})
    for ax, (name, rows) in zip(axes, tables.items(), strict=True):
        scores, variance, _ = geometry.principal_components(rows)
        x, y, z = scores[:, :3].T
        ax.plot(x, y, z, color="black", linewidth=0.4, alpha=0.6)
        points = ax.scatter(x, y, zs=z, c=np.arange(len(rows)), cmap="viridis", s=7, depthshade=False)
        ax.set_title(f"{_STYLES[name]['label']}\n{variance[:3].sum():.0%} of the variance", fontsize=10)
        ax.set(xticklabels=[], yticklabels=[], zticklabels=[])
        ax.tick_params(length=0)
    figure.colorbar(points, ax=figure.axes, shrink=0.7, label="position")
    return figure


def _spectra(tables: Tables) -> "Figure":
    """Draw the variance of the rows by principal component, and by frequency along the positions."""
    figure = new_figure(9, 3.4)
    by_component, by_frequency = figure.subplots(1, 2)
    for name, rows in tables.items():
        scores, variance, _ = geometry.principal_components(rows)
        by_component.plot(np.arange(1, len(variance) + 1), np.cumsum(variance), **_STYLES[name])
        power = geometry.power_spectrum(scores) @ variance  # (T // 2,), of the whole matrix
        power = power[: (len(rows) - 1) // 2]  # without T / 2 cycles, at which every sine is 0
        by_frequency.plot(np.arange(1, len(power) + 1), power, **_STYLES[name])
    by_component.set(xlabel="number of principal components", ylabel="cumulative share of the variance", ylim=(0, 1.03))
    by_frequency.set(xlabel="cycles over the positions", ylabel="share of the variance")
    for ax in (by_component, by_frequency):
        log_scale(ax, "x")
    log_scale(by_frequency, "y")
    by_frequency.set_ylim(bottom=1e-5)
    by_component.legend(fontsize=8)
    tidy(by_component)
    tidy(by_frequency)
    return figure


def draw_probes(by_distance: Path, file: Path) -> Path:
    """Draw the errors of the probes in `probes_by_distance.csv` of a run, and return the file."""
    errors: Counter[tuple[str, str, int]] = Counter()  # by target, case and octave of the distance: 1, 2 to 3, ...
    pairs: Counter[tuple[str, str, int]] = Counter()
    for row in _read(by_distance):
        key = row["target"], row["case"], int(row["distance"]).bit_length()
        errors[key] += float(row["error"]) * int(row["pairs"])  # type: ignore[assignment]  # a sum, no count
        pairs[key] += int(row["pairs"])
    panels = {
        "order": "order: share of pairs right",
        "signed_distance": "signed distance: mean error, positions",
        "distance": "distance: mean error, positions",
    }
    figure = new_figure(11, 3.6)
    axes = figure.subplots(1, len(panels))
    for ax, (target, title) in zip(axes, panels.items(), strict=True):
        for name in dict.fromkeys(case for t, case, _ in pairs if t == target):
            octaves = sorted(octave for t, case, octave in pairs if (t, case) == (target, name))
            means = np.array([errors[target, name, octave] / pairs[target, name, octave] for octave in octaves])
            values = 1 - means if target == "order" else means
            ax.plot(octaves, values, marker=_MARKERS[name], markersize=4.5, **_STYLES[name])
        ax.set_xticks(octaves, [_range_of(octave) for octave in octaves], fontsize=8, rotation=30, ha="right")
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("distance of the two positions")
        ax.set_ylim(0, 1.03 if target == "order" else None)
        if target == "order":
            ax.legend(fontsize=8)
        tidy(ax)
    axes[0].axhline(0.5, color="black", linewidth=0.6)
    return save_figure(figure, file)


def draw_shifted_perplexity(table: Path, file: Path) -> Path:
    """Draw the perplexities in `shifted_perplexity.csv` of a run, and return the file."""
    rows = [{name: float(value) for name, value in row.items()} for row in _read(table)]
    figure = new_figure(6, 3.6)
    ax = figure.subplots()
    starts = [row["start"] for row in rows]
    for column, case in (("perplexity", "real"), ("perplexity_shuffled", "shuffled")):
        ax.plot(starts, [row[column] for row in rows], marker="o", markersize=3.5, **_STYLES[case])
    ax.set(xlabel="position of the first token", ylabel="perplexity", yscale="log")
    ax.set_ylim(ax.get_ylim()[0] / 1.5, ax.get_ylim()[1] * 1.5)  # small changes must look small
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.yaxis.set_minor_formatter("{x:,.0f}")
    ax.legend(fontsize=8)
    tidy(ax)
    return save_figure(figure, file)


def _read(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def _range_of(octave: int) -> str:
    first, last = 2 ** (octave - 1), 2**octave - 1
    return str(first) if first == last else f"{first}–{last}"


def _panels(tables: Tables, height: float, **options: Any) -> tuple["Figure", list["Axes"]]:
    """Return a figure with one titled panel for each table."""
    figure = new_figure(2.4 * len(tables) + 0.6, height)
    axes = list(figure.subplots(1, len(tables), squeeze=False, **options)[0])
    for ax, name in zip(axes, tables, strict=True):
        ax.set_title(_STYLES[name]["label"], fontsize=10)
    return figure, axes
