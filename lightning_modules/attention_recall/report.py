"""Files and figures of a run of associative recall: attention maps, and accuracy by distance."""

import csv
import json
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from lightning_modules.common.figures import new_figure, save_figure
from lightning_modules.common.files import write_csv, write_text
from lightning_modules.common.targets import IGNORED
from lightning_modules.models.attention import recorded_weights
from lightning_modules.runtime.drawing import DrawsAtTheEnd
from lightning_modules.runtime.sharded import whole_model
from lightning_modules.runtime.stages import validates_a_fit


class AttentionReport(DrawsAtTheEnd):
    """Callback that writes the attention weights of one sequence and the accuracy by distance, and draws both.

    - `attention.json`: the first sequence of the validation split, and the weights of every layer and head on it.
    - `recall.csv`: number of queries and of correct answers, by number of pairs and distance.
    - `figures/attention_maps.png` and `figures/accuracy_by_distance.png`, drawn from these files.

    Every validation replaces the files; the figures are drawn when the training ends. The callback reads
    `examples("val")` and `token_names` of the data.
    """

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the two files."""
        if not validates_a_fit(trainer) or trainer.fast_dev_run:
            return
        with whole_model(trainer, type(self).__name__) as usable:
            if usable:
                self._write(trainer, pl_module)

    @rank_zero_only
    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        run = Path(trainer.default_root_dir)
        example = pl_module.data.examples("val")[torch.arange(1)]
        with torch.no_grad(), recorded_weights(pl_module) as weights:
            pl_module(example["input_ids"].to(pl_module.device))
        write_attention(run / "attention.json", pl_module.data.token_names, example, weights)
        write_recall(run / "recall.csv", **{name: pl_module.last_validation[name] for name in ("asked", "correct")})

    def draw(self, run: Path) -> list[Path]:
        """Draw both figures, if there was a validation, and return their files."""
        if not (run / "attention.json").is_file():
            return []
        return [
            draw_attention(run / "attention.json", run / "figures" / "attention_maps.png"),
            draw_accuracy(run / "recall.csv", run / "figures" / "accuracy_by_distance.png"),
        ]


def write_attention(file: Path, token_names: list[str], example: dict[str, Tensor], weights: list[Tensor]) -> None:
    """Write the one sequence of a batch, and the attention weights of each layer on it, (1, H, T, T), as JSON."""
    asks = example["targets"][0] != IGNORED
    places = asks.nonzero().flatten()
    content = {
        "tokens": [token_names[token] for token in example["input_ids"][0].tolist()],
        # The position of each query, and that of its answer: one after the key.
        "answers": torch.stack([places, places - example["distances"][0, asks] + 1], dim=1).tolist(),
        "weights": [[[[round(w, 4) for w in row] for row in head] for head in layer[0].tolist()] for layer in weights],
    }
    write_text(file, json.dumps(content) + "\n")


def write_recall(file: Path, asked: Tensor, correct: Tensor) -> None:
    """Write the number of queries and of correct answers, both (pairs, distance), as CSV."""
    cells = asked.nonzero(as_tuple=True)
    rows = torch.stack([*cells, asked[cells], correct[cells]], dim=1).tolist()
    write_csv(file, ("n_pairs", "distance", "asked", "correct"), rows)


def draw_attention(attention_json: Path, file: Path) -> Path:
    """Draw the map of every layer and head from the `attention.json` of a run, and return the file.

    A row is a position that attends, a column one that it attends to; circles mark the answers.
    """
    content = json.loads(attention_json.read_text(encoding="utf-8"))
    tokens, answers, weights = content["tokens"], content["answers"], content["weights"]
    rows, columns = zip(*answers, strict=True)
    T, n_layer, n_head = len(tokens), len(weights), len(weights[0])  # noqa: N806
    side = min(max(2.2, 0.15 * T), 13 / n_head)  # inches; room for the names of the tokens, unless there are many heads
    cell = 72 * side / T  # points
    names = tokens if cell > 7 else []
    figure = new_figure(side * n_head + 1.9, (side + 0.5) * n_layer)
    grid = figure.subplots(n_layer, squeeze=False, sharex=True)[:, 0]
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
        axes.tick_params(length=0, pad=3, labelsize=7)
        axes.set_ylabel("query: the position that attends", fontsize=9)
    axes.set_xlabel("key: the position that it attends to", fontsize=9)  # below the last layer
    figure.colorbar(image, ax=grid, label="attention weight", shrink=0.5, aspect=40)
    return save_figure(figure, file)


def draw_accuracy(recall_csv: Path, file: Path) -> Path:
    """Draw the accuracy by distance for each number of pairs, and that of a guess, from the `recall.csv` of a run.

    The bars are 95 % intervals of a share by Wilson's formula: few queries have the largest distances.
    """
    from scipy.stats import binomtest  # slow to import

    _, *rows = csv.reader(recall_csv.read_text(encoding="utf-8").splitlines())
    counts = np.array(rows, dtype=np.int64)  # a row (pairs, distance, asked, correct)
    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    numbers = np.unique(counts[:, 0])
    for number, n_pairs in enumerate(numbers):
        _, distance, asked, correct = counts[counts[:, 0] == n_pairs].T
        color, size = f"C{number}", 3 * (len(numbers) - number)  # smaller markers on top of larger ones
        axes.plot(distance, correct / asked, "o-", color=color, markersize=size, label=f"{n_pairs} pairs")
        found = [binomtest(*each).proportion_ci(method="wilson") for each in zip(correct, asked, strict=True)]
        axes.vlines(distance, *zip(*found, strict=True), color=color, linewidth=1, alpha=0.4)
        axes.axhline(1 / n_pairs, color=color, linewidth=1, linestyle=":", label=f"a guess among {n_pairs}")
    axes.set(xlabel="distance between a key and its query, positions", ylabel="accuracy", ylim=(0, 1.05))
    axes.grid(alpha=0.3)
    axes.legend()
    return save_figure(figure, file)
