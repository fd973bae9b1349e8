"""The output of `llm-train predict` for classifiers: lines on the screen, and a table of all texts."""

import textwrap
from itertools import chain, count
from pathlib import Path
from typing import Any

import lightning as L

from lightning_modules.base import ExperimentModule
from lightning_modules.common.files import unused, write_csv
from lightning_modules.runtime.processes import gathered

_SHOWN = 10  # texts whose labels are printed


class PredictedLabels(L.Callback):
    """Callback that writes the probabilities of each text to `predictions.csv`, and prints the label of the first ones.

    The table has the columns of the rows that were read, then `predicted`, its `probability`, and the probability of
    each class; for an empty text, these are empty. The second of two columns with the same name has a number, as has a
    second table: `predictions.2.csv`.

    The module's `predict_step` returns `probabilities`, (B, K), and `positions`, (B,). The datamodule has `classes`,
    and by position its `texts["predict"]`, the reviews, and `rows_to_predict`, dictionaries of what was read.
    """

    def __init__(self) -> None:
        self._predictions: list[tuple[int, list[float]]] = []  # positions and probabilities

    def on_predict_batch_end(self, trainer: L.Trainer, pl_module: ExperimentModule, outputs: Any, *_: Any) -> None:
        """Keep the predictions of a batch."""
        self._predictions += zip(outputs["positions"].tolist(), outputs["probabilities"].tolist(), strict=True)

    def on_predict_end(self, trainer: L.Trainer, pl_module: ExperimentModule) -> None:
        """Print and write the predictions of all processes, ordered by position."""
        shares, self._predictions = gathered(trainer, self._predictions), []
        if not trainer.is_global_zero:
            return
        data = pl_module.data
        predictions = dict(sorted(chain.from_iterable(shares)))
        width = max(map(len, data.classes))
        lines, found = [], {}
        for position, review in enumerate(data.texts["predict"]):
            if probabilities := predictions.get(position):
                label = data.classes[probabilities.index(max(probabilities))]
                found[position] = [label, *(f"{value:.6f}" for value in (max(probabilities), *probabilities))]
                text = textwrap.shorten(review.text, 80, placeholder=" ...")
                lines.append(f"{label:<{width}}  {max(probabilities):.4f}  {text}")
            elif not review.text:
                found[position] = [""] * (2 + len(data.classes))
        shown = len(lines) if trainer.fast_dev_run else _SHOWN
        for line in lines[:shown]:
            print(line)
        if trainer.fast_dev_run:
            return
        if len(lines) > shown:
            print(f"... and {len(lines) - shown:,} more")
        given = [data.rows_to_predict[position] for position in found]
        file = unused(Path(trainer.default_root_dir) / "predictions.csv")
        names = list(dict.fromkeys(chain.from_iterable(given)))  # a row of JSON may have other fields than the first
        rows = ([*map(row.get, names), *values] for row, values in zip(given, found.values(), strict=True))
        write_csv(file, _distinct([*names, "predicted", "probability", *data.classes]), rows)
        pl_module.result_files.append(file)


def _distinct(names: list[str]) -> list[str]:
    """Return the names of columns, those that are there already with a number: `predicted.2`."""
    distinct: dict[str, None] = {}
    for name in names:
        numbered = (f"{name}.{number}" for number in count(2))
        distinct[next(free for free in chain([name], numbered) if free not in distinct)] = None
    return list(distinct)
