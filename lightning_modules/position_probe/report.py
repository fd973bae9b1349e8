"""What a run of position_probe leaves: tables of what was measured and probed, the rows themselves, and figures."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.common.files import write_text
from lightning_modules.position_probe import figures as position_figures
from lightning_modules.position_probe import geometry
from lightning_modules.position_probe.module import RANDOM_LABELS, REAL, SIDES
from lightning_modules.position_probe.probes import TARGETS
from lightning_modules.runtime.stages import validates_a_fit


class PositionReport(L.Callback):
    """Writes what can be measured without training when the run starts, and what the probes found as it goes on.

    - `positions.npz`: the rows of the matrix and of each control, by name.
    - `geometry.csv`: the measures of `models/position_geometry.py`, a column for the matrix and each control.
    - `components.csv`: share of the variance and dominant frequency of the first principal components.
    - `probes.csv`: what the last validation found, for each case, side and target; `probes_by_distance.csv`.
    - `figures/`: `similarity.png`, `similarity_by_distance.png`, `curve.png`, `spectra.png` and
      `probes_by_distance.png`, drawn from these files.

    The measures of the matrix itself are logged with every validation, as `geometry/<measure>`.
    """

    def __init__(self) -> None:
        self.measures: dict[str, float] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures the matrix and its controls, and draws them."""
        data = pl_module.data
        tables = dict(zip(data.cases, data.rows.double().numpy(), strict=True))
        del tables["random_labels"]  # the rows of the matrix once more
        tokens = data.matrix.tokens
        self.measures = geometry.measures(tables["real"], tokens)
        if not trainer.fast_dev_run:
            self._write_geometry(trainer, tables, tokens)

    @rank_zero_only
    def _write_geometry(self, trainer: L.Trainer, tables: dict[str, np.ndarray], tokens: np.ndarray | None) -> None:
        folder = Path(trainer.default_root_dir)
        measured = {"real": self.measures}
        measured |= {name: geometry.measures(rows, tokens) for name, rows in tables.items() if name != "real"}
        rows = [[measure, *(measured[name][measure] for name in tables)] for measure in self.measures]
        _write_csv(folder / "geometry.csv", ["measure", *tables], rows)
        _write_csv(folder / "components.csv", COMPONENT_COLUMNS, _components(tables))
        save_positions(folder / "positions.npz", tables)
        drawn = position_figures.draw_geometry(folder / "positions.npz", folder / "figures")
        _show(trainer, drawn, "geometry", ["measure", *tables], rows)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the measures of the matrix."""
        if self.measures:
            pl_module.log_dict({f"geometry/{name}": value for name, value in self.measures.items()}, sync_dist=True)

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes what the probes find now."""
        if not validates_a_fit(trainer) or trainer.fast_dev_run:
            return
        folder, scores, cases = Path(trainer.default_root_dir), pl_module.scores, pl_module.cases
        _write_csv(folder / "probes.csv", PROBE_COLUMNS, _probe_rows(cases, scores))
        _write_csv(folder / "probes_by_distance.csv", DISTANCE_COLUMNS, _distance_rows(cases, scores))

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws what the last validation found."""
        folder = Path(trainer.default_root_dir)
        table = folder / "probes_by_distance.csv"
        if trainer.fast_dev_run or not table.is_file():
            return
        drawn = position_figures.draw_probes(table, folder / "figures" / "probes_by_distance.png")
        with (folder / "probes.csv").open(newline="") as file:
            columns, *rows = csv.reader(file)
        _show(trainer, [drawn], "probes", columns, rows)


COMPONENT_COLUMNS = ("case", "component", "share_of_variance", "dominant_frequency", "share_of_power")
PROBE_COLUMNS = ("case", "side", "target", "score", "selectivity", "error")
DISTANCE_COLUMNS = ("case", "target", "distance", "error", "pairs")
_N_COMPONENTS = 10


def _components(tables: dict[str, np.ndarray]) -> Iterable[list]:
    for name, rows in tables.items():
        scores, variance, _ = geometry.principal_components(rows)
        frequencies, power = geometry.dominant_frequencies(scores[:, :_N_COMPONENTS])
        for k, (frequency, share) in enumerate(zip(frequencies, power, strict=True)):
            yield [name, k + 1, variance[k], int(frequency), share]


def _probe_rows(cases: Sequence[str], scores: dict[str, torch.Tensor]) -> Iterable[list]:
    for c, case in enumerate(cases):
        for s, side in enumerate(SIDES):
            for k, target in enumerate(TARGETS):
                score, error = scores["score"][s, c, k].item(), scores["error"][s, c, k].item()
                # Only the matrix has been trained on random labels too.
                selectivity = score - scores["score"][s, RANDOM_LABELS, k].item() if c == REAL else ""
                yield [case, side, target, score, selectivity, error]


def _distance_rows(cases: Sequence[str], scores: dict[str, torch.Tensor]) -> Iterable[list]:
    """In interpolation; the order's error is the share of mistakes."""
    s = SIDES.index("interpolation")
    for c, case in enumerate(cases):
        for k, target in enumerate(TARGETS):
            for distance, pairs in enumerate(scores["count_by_distance"][s].tolist()):
                if pairs:
                    yield [case, target, distance, scores["error_by_distance"][s, distance, c, k].item(), int(pairs)]


def save_positions(file: Path, tables: dict[str, np.ndarray]) -> None:
    """Saves the rows of each table, (T, d) float32, under its name.

    Args:
        file: NPZ file to write.
        tables: The tables.
    """
    fresh = file.with_name(f".{file.name}.tmp")
    with fresh.open("wb") as opened:
        np.savez(opened, **{name: rows.astype(np.float32) for name, rows in tables.items()})
    fresh.replace(file)


def _write_csv(file: Path, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    write_text(file, text.getvalue())


def _show(trainer: L.Trainer, figures: Iterable[Path], table: str, columns: Sequence[str], rows: Sequence) -> None:
    """Shows figures and a table to the loggers that take them."""
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            for figure in figures:
                logger.log_image(f"figures/{figure.stem}", [str(figure)])
        if hasattr(logger, "log_table"):
            logger.log_table(table, columns=list(columns), data=[list(row) for row in rows])
