"""The output of `llm-train predict` for classifiers: a line for each text, on the screen and in a table."""

import textwrap
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L

from lightning_modules.base import ExperimentModule
from lightning_modules.common.files import write_csv
from lightning_modules.runtime.processes import gathered


class PredictedLabels(L.Callback):
    """Callback that prints the label of each text and its probability, and writes them to `predictions.csv`.

    The module's `predict_step` returns `probabilities`, (B, K), and `positions`, (B,). The datamodule has `classes`,
    and its `texts["predict"]` is the list of the reviews, by position.
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
        width = max(map(len, data.classes))
        rows = []
        for position, probabilities in sorted(chain.from_iterable(shares)):
            probability = max(probabilities)
            label, text = data.classes[probabilities.index(probability)], data.texts["predict"][position].text
            rows.append((label, f"{probability:.6f}", text))
            print(f"{label:<{width}}  {probability:.4f}  {textwrap.shorten(text, 80, placeholder=' ...')}")
        if not trainer.fast_dev_run:
            write_csv(Path(trainer.default_root_dir) / "predictions.csv", ("label", "probability", "text"), rows)
