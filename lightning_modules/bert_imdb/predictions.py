"""What `llm-train predict` leaves: a line for each text, on the screen and in a table."""

import csv
import io
import textwrap
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_modules.common.files import write_text


class PredictedLabels(L.Callback):
    """Prints the label of each text and its probability, and writes them to `predictions.csv` in the run folder.

    The module's `predict_step` gives `probabilities`, (B, K), and `positions`, (B,); the datamodule has `classes` and,
    in `texts["predict"]`, what stands at the positions.
    """

    def __init__(self) -> None:
        self._found: list[tuple[int, list[float]]] = []

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: dict[str, Tensor], *_: Any
    ) -> None:
        """Keeps what was predicted."""
        self._found += zip(outputs["positions"].tolist(), outputs["probabilities"].tolist(), strict=True)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints and writes, in the order of the texts."""
        found, self._found = _of_all_processes(trainer, self._found), []
        if not trainer.is_global_zero:
            return
        table = io.StringIO()
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(["label", "probability", "text"])
        width = max(map(len, pl_module.data.classes))
        for position, probabilities in sorted(found):
            probability = max(probabilities)
            label = pl_module.data.classes[probabilities.index(probability)]
            text = pl_module.data.texts["predict"][position].text
            rows.writerow([label, f"{probability:.6f}", text])
            print(f"{label:<{width}}  {probability:.4f}  {textwrap.shorten(text, 80, placeholder=' ...')}")
        if not trainer.fast_dev_run:
            write_text(Path(trainer.default_root_dir) / "predictions.csv", table.getvalue())


def _of_all_processes(trainer: L.Trainer, found: list[Any]) -> list[Any]:
    if trainer.world_size == 1:
        return found
    parts: list[list[Any]] = [[] for _ in range(trainer.world_size)]
    torch.distributed.all_gather_object(parts, found)
    return [row for part in parts for row in part]
