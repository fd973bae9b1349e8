"""Names of the files in a run folder, `runs/<topic>/<name>/`."""

from pathlib import Path

CONFIG = "config.yaml"  # the resolved settings: `fit -c` with this file repeats the run
ENVIRONMENT = "environment.json"  # one entry for each session: command, versions, hardware, settings that it changed
METRICS = "metrics.csv"  # what was logged
SUMMARY = "summary.json"  # how the training ended; it is missing while the run is alive, and if it was killed
CHECKPOINTS = "checkpoints"


def checkpoint(name: str) -> str:
    """Return the name of the file of the checkpoint `best` or `last`."""
    return f"{CHECKPOINTS}/{name}.ckpt"


def checkpoints_in(run: Path) -> list[Path]:
    """Return the files of the checkpoints that a run has, the best first."""
    return [file for name in ("best", "last") if (file := run / checkpoint(name)).is_file()]


def run_around(path: Path) -> Path | None:
    """Return the innermost folder with the configuration of a run that a path lies in, or `None`."""
    return next((folder for folder in path.parents if (folder / CONFIG).is_file()), None)


def of_command(file: str, command: str) -> str:
    """Return the name of a file of a command: `summary.json` for `fit`, and `summary_test.json` for `test`."""
    stem, ending = file.split(".")
    return file if command == "fit" else f"{stem}_{command}.{ending}"
