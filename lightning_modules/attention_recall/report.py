"""What attention looks at and where it recalls, as files and figures of a run."""

import csv
import io
import json
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from lightning_modules.common.files import write_text
from lightning_modules.common.targets import IGNORED
from lightning_modules.models.attention import recorded_weights
from lightning_modules.runtime.drawing import DrawsAtTheEnd, save_figure
from lightning_modules.runtime.stages import validates_a_fit


class AttentionReport(DrawsAtTheEnd):
    """Draws the attention maps of one sequence, and the accuracy by distance, of a run of associative recall.

    - `attention.json`: the first sequence of the validation set, and the weights of every layer and head on it.
    - `recall.csv`: how often was asked, and how often answered correctly, by number of pairs and distance.
    - `figures/attention_maps.png` and `figures/accuracy_by_distance.png`, drawn from these files.

    The files are renewed by every validation; the figures are drawn when the training ends.
    """

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the two files."""
        if not validates_a_fit(trainer) or trainer.fast_dev_run:
            return
        run = Path(trainer.default_root_dir)
        example = pl_module.data.examples("val")[torch.arange(1)]
        with torch.no_grad(), recorded_weights(pl_module) as weights:
            pl_module(example["input_ids"].to(pl_module.device))
        write_attention(run / "attention.json", pl_module.data.token_names, example, weights)
        write_recall(run / "recall.csv", **{name: pl_module.last_validation[name] for name in ("asked", "correct")})

    def draw(self, run: Path) -> list[Path]:
        """Draws both figures from the two files.

        Args:
            run: The run's folder.
        """
        if not (run / "attention.json").is_file():
            return []
        return [
            draw_attention(run / "attention.json", run / "figures" / "attention_maps.png"),
            draw_accuracy(run / "recall.csv", run / "figures" / "accuracy_by_distance.png"),
        ]


def write_attention(file: Path, token_names: list[str], example: dict[str, Tensor], weights: list[Tensor]) -> None:
    """Writes a sequence and the attention on it.

    Args:
        file: JSON file to write.
        token_names: Name of each token.
        example: A batch of one sequence.
        weights: Of each layer, (1, H, T, T).
    """
    asks = example["targets"][0] != IGNORED
    places = asks.nonzero().flatten()
    content = {
        "tokens": [token_names[token] for token in example["input_ids"][0].tolist()],
        # Where a value is asked for, and where it stands: one after its key.
        "answers": torch.stack([places, places - example["distances"][0, asks] + 1], dim=1).tolist(),
        "weights": [[[[round(w, 4) for w in row] for row in head] for head in layer[0].tolist()] for layer in weights],
    }
    write_text(file, json.dumps(content) + "\n")


def write_recall(file: Path, asked: Tensor, correct: Tensor) -> None:
    """Writes how often was asked and answered correctly.

    Args:
        file: CSV file to write.
        asked: Counts by number of pairs and distance, (pairs, distance).
        correct: As many of them were answered correctly.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["n_pairs", "distance", "asked", "correct"])
    for n_pairs, distance in asked.nonzero().tolist():
        writer.writerow([n_pairs, distance, int(asked[n_pairs, distance]), int(correct[n_pairs, distance])])
    write_text(file, text.getvalue())


def draw_attention(attention_json: Path, figure: Path) -> Path:
    """Draws a map for every layer and head: what a position (row) looks at (column); circles where the answers stand.

    Args:
        attention_json: A run's `attention.json`.
        figure: PNG file to write.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no window system

    content = json.loads(attention_json.read_text(encoding="utf-8"))
    tokens, answers, weights = content["tokens"], content["answers"], content["weights"]
    rows, columns = zip(*answers, strict=True)
    T, n_layer, n_head = len(tokens), len(weights), len(weights[0])  # noqa: N806
    side = min(max(2.2, 0.13 * T), 14 / n_head)  # inches; room for the tokens' names, unless there are many heads
    cell = 72 * side / T  # points
    names = tokens if cell > 6 else []
    picture = Figure(figsize=(side * n_head + 0.8, (side + 0.3) * n_layer), layout="constrained")
    grid = picture.subplots(n_layer, squeeze=False, sharex=True)[:, 0]
    for layer, axes in enumerate(grid):
        image = axes.imshow(np.hstack(weights[layer]), cmap="Blues", vmin=0, vmax=1)  # the heads side by side
        for head in range(n_head):
            axes.scatter(
                np.array(columns) + head * T, rows, (cell / 2) ** 2, facecolors="none", edgecolors="tab:orange", lw=0.7
            )
            axes.axvline(head * T - 0.5, color="black", linewidth=0.8)
        axes.set_title(f"layer {layer}" + (f", heads 0 to {n_head - 1}" if n_head > 1 else ""), fontsize=9)
        axes.set_xticks(range(n_head * len(names)), names * n_head, rotation=90)
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(length=0, pad=1, labelsize=5)
    picture.colorbar(image, ax=grid, label="attention weight", shrink=0.5, aspect=40)
    save_figure(picture, figure)
    return figure


def draw_accuracy(recall_csv: Path, figure: Path) -> Path:
    """Draws the accuracy against the distance, a line for each number of pairs, with what a guess among them has.

    Args:
        recall_csv: A run's `recall.csv`.
        figure: PNG file to write.
    """
    from matplotlib.figure import Figure

    with recall_csv.open(newline="", encoding="utf-8") as file:
        rows = [{name: int(value) for name, value in row.items()} for row in csv.DictReader(file)]
    picture = Figure(figsize=(7, 4), layout="constrained")
    axes = picture.add_subplot()
    numbers = sorted({row["n_pairs"] for row in rows})
    for number, n_pairs in enumerate(numbers):
        points = [(row["distance"], row["correct"] / row["asked"]) for row in rows if row["n_pairs"] == n_pairs]
        color, size = f"C{number}", 3 * (len(numbers) - number)  # a line that lies on another hides none
        axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=size, label=f"{n_pairs} pairs")
        axes.axhline(1 / n_pairs, color=color, linewidth=1, linestyle=":", label=f"a guess among {n_pairs}")
    axes.set_xlabel("distance between a key and its query, positions")
    axes.set_ylabel("accuracy")
    axes.set_ylim(0, 1.05)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(picture, figure)
    return figure
