"""Files and figures of a run of position_probe: the rows, tables of measures and of scores."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.common.files import atomic_file, write_csv
from lightning_modules.position_probe import geometry
from lightning_modules.position_probe.figures import draw_geometry, draw_probes
from lightning_modules.position_probe.measures import RANDOM_LABELS, REAL, SIDES
from lightning_modules.position_probe.probes import TARGETS
from lightning_modules.runtime.drawing import show_figures, show_table
from lightning_modules.runtime.stages import validates_a_fit

_COMPONENTS = ("case", "component", "share_of_variance", "dominant_frequency", "share_of_power")  # columns
_PROBES = ("case", "side", "target", "score", "selectivity", "error")
_DISTANCES = ("case", "target", "distance", "error", "pairs")
_N_COMPONENTS = 10


class PositionReport(L.Callback):
    """Callback that writes tables and figures: of the untrained measures at the start, and of the probes.

    - `positions.npz`: the rows of the matrix and of each control, by name.
    - `geometry.csv`: the measures of `geometry.measures`, one column for the matrix and for each control.
    - `components.csv`: share of the variance and dominant frequency of the first principal components.
    - `probes.csv`: scores and errors of the last validation, for each case, side and target.
    - `probes_by_distance.csv`: errors of the last validation by the distance of the two positions.
    - `figures/`: `similarity.png`, `similarity_by_distance.png`, `curve.png`, `spectra.png` and
      `probes_by_distance.png`, drawn from these files.

    The measures of the matrix itself are logged with every validation, as `geometry/<measure>`.

    The callback reads `cases`, `rows` and `matrix.tokens` of the data, and `scores` and `cases` of the module.
    """

    def __init__(self) -> None:
        self.measures: dict[str, float] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure and draw the matrix and its controls."""
        data = pl_module.data
        tables = dict(zip(data.cases, data.rows.double().numpy(), strict=True))
        del tables["random_labels"]  # has the rows of the matrix
        tokens = data.matrix.tokens
        self.measures = geometry.measures(tables["real"], tokens)
        if not trainer.fast_dev_run:
            self._write_geometry(trainer, tables, tokens)

    @rank_zero_only
    def _write_geometry(self, trainer: L.Trainer, tables: dict[str, np.ndarray], tokens: np.ndarray | None) -> None:
        folder = Path(trainer.default_root_dir)
        controls = [geometry.measures(rows, tokens) for name, rows in tables.items() if name != "real"]
        columns = ["measure", *tables]
        rows = [[name, value, *(control[name] for control in controls)] for name, value in self.measures.items()]
        write_csv(folder / "geometry.csv", columns, _rounded(rows))
        write_csv(folder / "components.csv", _COMPONENTS, _rounded(_components(tables)))
        with atomic_file(folder / "positions.npz") as file:
            np.savez(file, **{name: rows.astype(np.float32) for name, rows in tables.items()})  # type: ignore[arg-type]
        show_figures(trainer, draw_geometry(folder / "positions.npz", folder / "figures"))
        show_table(trainer, "geometry", columns, rows)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the measures of the matrix."""
        if self.measures:
            pl_module.log_dict({f"geometry/{name}": value for name, value in self.measures.items()}, sync_dist=True)

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the scores and errors of the probes."""
        if not validates_a_fit(trainer) or trainer.fast_dev_run:
            return
        folder, found = Path(trainer.default_root_dir), (pl_module.cases, pl_module.scores)
        write_csv(folder / "probes.csv", _PROBES, _rounded(_probe_rows(*found)))
        write_csv(folder / "probes_by_distance.csv", _DISTANCES, _rounded(_distance_rows(*found)))

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the errors of the last validation."""
        folder = Path(trainer.default_root_dir)
        table = folder / "probes_by_distance.csv"
        if trainer.fast_dev_run or not table.is_file():
            return
        show_figures(trainer, [draw_probes(table, folder / "figures" / "probes_by_distance.png")])
        with (folder / "probes.csv").open(newline="") as file:
            columns, *rows = csv.reader(file)
        show_table(trainer, "probes", columns, rows)


def _components(tables: dict[str, np.ndarray]) -> Iterable[list[Any]]:
    for name, rows in tables.items():
        scores, variance, _ = geometry.principal_components(rows)
        frequencies, power = geometry.dominant_frequencies(scores[:, :_N_COMPONENTS])
        for k, (frequency, share) in enumerate(zip(frequencies, power, strict=True)):
            yield [name, k + 1, variance[k], int(frequency), share]


def _probe_rows(cases: Sequence[str], scores: dict[str, torch.Tensor]) -> Iterable[list[Any]]:
    for c, case in enumerate(cases):
        for s, side in enumerate(SIDES):
            for k, target in enumerate(TARGETS):
                score, error = scores["score"][s, c, k].item(), scores["error"][s, c, k].item()
                # Only the matrix has been trained on random labels too.
                selectivity = score - scores["score"][s, RANDOM_LABELS, k].item() if c == REAL else ""
                yield [case, side, target, score, selectivity, error]


def _distance_rows(cases: Sequence[str], scores: dict[str, torch.Tensor]) -> Iterable[list[Any]]:
    """Yield the errors in interpolation; the error of the order is the share of mistakes."""
    s = SIDES.index("interpolation")
    for c, case in enumerate(cases):
        for k, target in enumerate(TARGETS):
            for distance, pairs in enumerate(scores["count_by_distance"][s].tolist()):
                if pairs:
                    yield [case, target, distance, scores["error_by_distance"][s, distance, c, k].item(), int(pairs)]


def _rounded(rows: Iterable[Iterable[Any]]) -> Iterable[list[Any]]:
    for row in rows:
        yield [f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row]
