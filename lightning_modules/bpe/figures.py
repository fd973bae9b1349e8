"""Figures of a tokenizer, drawn from the files that its run left, so that they can be drawn again."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE = "tab:blue", "tab:orange"
_PASTELS = ("#cfe3f7", "#fde2bf", "#d3efcf", "#f6d0d9", "#e3d8f3")  # of neighbours, no two are the same
_COLUMNS = 84  # characters in a line of the drawn sample


def draw_compression(compression_csv: Path, figure: Path) -> Path:
    """Draws bytes per token of the held-out text against the size of the vocabulary.

    Args:
        compression_csv: A run's `compression.csv`.
        figure: PNG file to write.
    """
    with compression_csv.open(newline="", encoding="utf-8") as file:
        rows = [
            (row["tokenizer"], int(row["vocabulary_size"]), float(row["bytes_per_token"]))
            for row in csv.DictReader(file)
        ]
    ours = [(size, value) for name, size, value in rows if name == rows[0][0]]
    others = [row for row in rows if row[0] != rows[0][0]]

    picture, axes = _axes()
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
    axes.set_xlabel("tokens in the vocabulary")
    axes.set_ylabel("bytes per token, held-out text")
    if others:
        axes.legend(loc="lower right")
    return _save(picture, figure)


def draw_token_lengths(vocabulary_txt: Path, figure: Path) -> Path:
    """Draws how long tokens are: each once, as the vocabulary lists them, and as often as the text has them.

    Args:
        vocabulary_txt: A run's `vocabulary.txt`.
        figure: PNG file to write.
    """
    lines = vocabulary_txt.read_text(encoding="utf-8").split("\n")[1:-1]
    tokens = [(int(length), int(count)) for _, count, length, *_ in (line.split(maxsplit=3) for line in lines)]
    longest = 16
    listed, used = [0] * (longest + 1), [0] * (longest + 1)
    for length, count in tokens:
        if length:  # special tokens stand for no text
            listed[min(length, longest)] += 1
            used[min(length, longest)] += count

    picture, axes = _axes()
    for shares, side, color, label in (
        (listed, -1, _BLUE, "of the vocabulary"),
        (used, 1, _ORANGE, "of the text's tokens"),
    ):
        heights = [100 * share / max(1, sum(shares)) for share in shares[1:]]
        axes.bar([length + 0.2 * side for length in range(1, longest + 1)], heights, 0.4, color=color, label=label)
    axes.set_xticks(range(1, longest + 1), [*map(str, range(1, longest)), f"≥{longest}"])
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("length of a token, bytes")
    axes.set_ylabel("share, %")
    axes.grid(visible=False, axis="x")
    axes.legend()
    return _save(picture, figure)


def draw_tokenization(samples: Mapping[str, Sequence[tuple[int, bytes]]], figure: Path) -> Path:
    """Draws a text with a coloured box around each token; bytes that are no whole character are grey, in hexadecimal.

    Args:
        samples: Tokens of the text (id, bytes), by the name of the tokenizer.
        figure: PNG file to write.
    """
    from matplotlib.figure import Figure

    layouts = {name: _lay_out([token for _, token in tokens]) for name, tokens in samples.items()}
    heights = [2 + max(row for row, *_ in boxes) + 1 for boxes in layouts.values()]  # a heading and a line's room
    font_size = 10
    cell_width, cell_height = 0.602 * font_size / 72, 1.75 * font_size / 72  # inches; the width is the font's own
    picture = Figure(figsize=((_COLUMNS + 2) * cell_width, (sum(heights) + 0.5) * cell_height))
    axes = picture.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-1, _COLUMNS + 1), ylim=(sum(heights), -0.5))
    axes.axis("off")
    top = 0
    for (name, boxes), height in zip(layouts.items(), heights, strict=True):
        tokens = samples[name]
        n_bytes = sum(len(token) for _, token in tokens)
        axes.text(
            0, top + 0.5, f"{name}: {len(tokens)} tokens, {n_bytes / len(tokens):.2f} bytes per token",
            fontsize=font_size, fontweight="bold", va="center",
        )  # fmt: skip
        _draw_boxes(axes, boxes, top + 1, font_size)
        top += height
    return _save(picture, figure)


Cells = list[tuple[str, bool]]  # what stands in each cell of a line, and whether it is part of the text
Box = tuple[int, int, Cells, int]  # row, column, cells, number of the token


def _cells(token: bytes) -> list[Cells]:
    """The token's characters, one a cell, on as many lines as it reaches into; half a character as its bytes."""
    lines: list[Cells] = [[]]
    for character in token.decode("utf-8", "surrogateescape"):
        if character == "\n":
            lines[-1].append(("↵", False))
            lines.append([])
        elif "\udc80" <= character <= "\udcff":  # a byte that is no character by itself
            lines[-1] += [(digit, False) for digit in f"{ord(character) - 0xDC00:02x}"]
        else:
            lines[-1].append((character, True))
    return lines


def _lay_out(tokens: Sequence[bytes]) -> list[Box]:
    """Places tokens on lines; a token with a line end in it has a box on each of its lines."""
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
        box = FancyBboxPatch(
            (column + 0.06, top + row + 0.08), len(cells) - 0.12, 0.84,
            boxstyle="round,pad=0,rounding_size=0.2", facecolor=_PASTELS[number % len(_PASTELS)], edgecolor="none",
        )  # fmt: skip
        axes.add_patch(box)
        for place, (character, is_text) in enumerate(cells):  # one by one, so that each stands in its cell
            axes.text(
                column + place + 0.5, top + row + 0.52, character, color="#222222" if is_text else "#999999",
                fontsize=font_size, family="monospace", ha="center", va="center_baseline",
            )  # fmt: skip


def _axes() -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure  # no pyplot: no global state, no window system

    picture = Figure(figsize=(7, 4), layout="constrained")
    axes = picture.add_subplot()
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return picture, axes


def _save(picture: "Figure", figure: Path) -> Path:
    figure.parent.mkdir(parents=True, exist_ok=True)
    temporary = figure.with_suffix(".tmp.png")
    picture.savefig(temporary, dpi=120)
    temporary.replace(figure)
    return figure
