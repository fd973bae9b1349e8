"""Figures of a tokenizer, drawn from the files of its run, so that they can be redrawn."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lightning_modules.common.figures import new_figure, save_figure, tidy

if TYPE_CHECKING:  # matplotlib is imported where it is used: it is slow to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE = "tab:blue", "tab:orange"
_PASTELS = ("#cfe3f7", "#fde2bf", "#d3efcf", "#f6d0d9", "#e3d8f3")  # of the boxes around tokens, in turn
_COLUMNS = 84  # characters in a line of the sample


def draw_compression(compression_csv: Path, file: Path) -> Path:
    """Draw bytes per token of the held-out text by size of the vocabulary, from the `compression.csv` of a run."""
    with compression_csv.open(newline="", encoding="utf-8") as table:
        _, *cells = csv.reader(table)
    rows = [(name, int(size), float(value)) for name, size, value in cells]
    ours = [(size, value) for name, size, value in rows if name == rows[0][0]]
    others = [row for row in rows if row[0] != rows[0][0]]

    figure, axes = _axes()
    axes.plot(*zip(*ours, strict=True), color=_BLUE, marker="o", markersize=4, label=rows[0][0])
    for name, size, value in others:
        axes.plot(size, value, color=_ORANGE, marker="D", markersize=6, linestyle="none", label=name)
    for _, size, value in rows:
        axes.annotate(f"{value:.2f}", (size, value), textcoords="offset points", xytext=(-5, 5), ha="right", fontsize=9)
    axes.set_xscale("log", base=2)
    sizes = [size for _, size, _ in rows]
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=45, ha="right")
    axes.minorticks_off()
    axes.set_xlim(left=min(sizes) / 1.6)  # room for the first label
    axes.set_ylim(0, 1.15 * max(value for _, _, value in rows))
    axes.set(xlabel="tokens in the vocabulary", ylabel="bytes per token, held-out text")
    if others:
        axes.legend(loc="lower right")
    return save_figure(figure, file)


def draw_token_lengths(vocabulary_txt: Path, file: Path) -> Path:
    """Draw the distribution of the lengths of tokens, in the vocabulary and in the text, from `vocabulary.txt`."""
    lines = vocabulary_txt.read_text(encoding="utf-8").split("\n")[1:-1]
    tokens = np.array([line.split(maxsplit=3)[1:3] for line in lines], dtype=np.int64)  # (V, 2)
    counts, lengths = tokens[tokens[:, 1] > 0].T  # a special token stands for no text
    longest = 16
    lengths = lengths.clip(max=longest)

    figure, axes = _axes()
    for weights, side, color, label in (
        (np.ones_like(counts), -1, _BLUE, "of the vocabulary"),
        (counts, 1, _ORANGE, "of the text's tokens"),
    ):
        shares = np.bincount(lengths, weights, minlength=longest + 1)[1:] / max(1, weights.sum())
        axes.bar(np.arange(1, longest + 1) + 0.2 * side, 100 * shares, 0.4, color=color, label=label)
    axes.set_xticks(range(1, longest + 1), [*map(str, range(1, longest)), f"≥{longest}"])
    axes.tick_params(axis="x", length=0)
    axes.set(xlabel="length of a token, bytes", ylabel="share, %")
    axes.grid(visible=False, axis="x")
    axes.legend()
    return save_figure(figure, file)


def draw_tokenization(text: str, samples: Mapping[str, Sequence[tuple[int, bytes]]], file: Path) -> Path:
    """Draw a text with a coloured box around each token, and return the file.

    Args:
        text: The text.
        samples: Its tokens (id, bytes), by the name of the tokenizer. Bytes that are not a whole character are
            drawn in grey and in hexadecimal.
        file: PNG file to create or replace.
    """
    layouts = {name: _lay_out([token for _, token in tokens]) for name, tokens in samples.items()}
    heights = [2 + max(row for row, *_ in boxes) + 1 for boxes in layouts.values()]  # a heading and an empty line
    font_size = 10
    cell_width, cell_height = 0.602 * font_size / 72, 1.75 * font_size / 72  # inches; the width is that of the font
    figure = new_figure((_COLUMNS + 2) * cell_width, (sum(heights) + 0.5) * cell_height)
    figure.set_layout_engine("none")  # the axes fill the figure, so that a cell is as wide as a character
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-1, _COLUMNS + 1), ylim=(sum(heights), -0.5))
    axes.axis("off")
    top = 0
    for (name, boxes), height in zip(layouts.items(), heights, strict=True):
        tokens = samples[name]
        axes.text(
            0, top + 0.5, f"{name}: {len(tokens)} tokens, {len(text.encode()) / len(tokens):.2f} bytes per token",
            fontsize=font_size, fontweight="bold", va="center",
        )  # fmt: skip
        _draw_boxes(axes, boxes, top + 1, font_size)
        top += height
    return save_figure(figure, file)


Cells = list[tuple[str, bool]]  # the character in each cell of a line, and whether it is part of the text
Box = tuple[int, int, Cells, int]  # row, column, cells, number of the token


def _cells(token: bytes) -> list[Cells]:
    """Return the characters of a token by line, one in each cell; incomplete characters are shown as their bytes."""
    lines: list[Cells] = [[]]
    for character in token.decode("utf-8", "surrogateescape"):
        if character == "\n":
            lines[-1].append(("↵", False))
            lines.append([])
        elif "\udc80" <= character <= "\udcff":  # a byte that is a part of a character
            lines[-1] += [(digit, False) for digit in f"{ord(character) - 0xDC00:02x}"]
        else:
            lines[-1].append((character, True))
    return lines


def _lay_out(tokens: Sequence[bytes]) -> list[Box]:
    """Place tokens on lines; a token that contains a line end has a box on each of its lines."""
    boxes: list[Box] = []
    row = column = 0
    for number, token in enumerate(tokens):
        for line, cells in enumerate(_cells(token)):
            if line or (column and column + len(cells) > _COLUMNS):
                row, column = row + 1, 0
            if cells:
                boxes.append((row, column, cells, number))
                column += len(cells)
    return boxes


def _draw_boxes(axes: "Axes", boxes: Sequence[Box], top: float, font_size: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    for row, column, cells, number in boxes:
        corner, color = (column + 0.06, top + row + 0.08), _PASTELS[number % len(_PASTELS)]
        style = "round,pad=0,rounding_size=0.2"
        box = FancyBboxPatch(corner, len(cells) - 0.12, 0.84, boxstyle=style, facecolor=color, edgecolor="none")
        axes.add_patch(box)
        for offset, (character, is_text) in enumerate(cells):  # one by one, so that each is centred in its cell
            axes.text(
                column + offset + 0.5, top + row + 0.52, character, color="#222222" if is_text else "#999999",
                fontsize=font_size, family="monospace", ha="center", va="center_baseline",
            )  # fmt: skip


def _axes() -> "tuple[Figure, Axes]":
    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    tidy(axes)
    return figure, axes
