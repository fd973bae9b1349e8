"""The plan of a study: its folder, the number of its runs and their commands."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.errors import UserError
from experiments.study.names import folder_name
from experiments.study.sweep_file import Sweep


@dataclass(frozen=True)
class Plan:
    """What the user asks for."""

    sweep: Sweep
    folder: Path
    flags: list[str]  # of every run
    n_runs: int
    jobs: int  # runs at a time
    seed: int  # of the draws

    def command(self, arm: str, settings: Mapping[str, Any]) -> list[str]:
        """Return the command of a run."""
        root, topic = self.folder.parent.parent, self.folder.parent.name
        place = {"root": root, "topic": topic, "study": self.folder.name, "name": arm}
        words = self.sweep.words(settings, self.folder / "logs" / f"{arm}.json")
        return [*words, *self.flags, *(f"--run.{key}={value}" for key, value in place.items())]


def number_of_runs(sweep: Sweep, at_most: int | None) -> int:
    """Return how many runs a study has. A search without end must be limited by the file or the user."""
    limits = [limit for limit in (at_most, sweep.run_cap) if limit is not None]
    if sweep.method == "grid":
        limits.append(math.prod(len(spec.grid() or ()) for spec in sweep.distributions.values()))
    if not limits:
        raise UserError(f"{sweep.path}: method {sweep.method} has no end; add run_cap: to the file, or use --runs N")
    return min(limits)


def study_folder(sweep: Sweep, flags: Sequence[str], name: str | None) -> Path:
    """Return the folder of a study, in the folder of the topic that its command trains."""
    place: dict[str, str] = {"root": "runs"}
    words = [*sweep.words({}, Path()), *flags]
    pairs = list(itertools.pairwise(words)) + [word.split("=", 1) for word in words if "=" in word]
    for flag, value in pairs:
        if flag in ("-c", "--config"):
            config = _config(sweep, Path(value))
            model = config.get("model")
            class_path = str(model.get("class_path") if isinstance(model, dict) else model)
            if "." in class_path:
                place["topic"] = class_path.split(".")[-2]
            place |= {key: given for key, given in (config.get("run") or {}).items() if given is not None}
    place |= {flag.removeprefix("--run."): value for flag, value in pairs if flag in ("--run.root", "--run.topic")}
    if "topic" not in place:
        raise UserError(f"{sweep.path}: its command has no `-c FILE` with a model; add --run.topic=NAME to it")
    return Path(place["root"]) / place["topic"] / folder_name(name or sweep.name or sweep.path.stem)


def _config(sweep: Sweep, file: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{sweep.path}: its command runs {file}, and there is no such file in {Path.cwd()}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{file}: {error}") from error
    return config if isinstance(config, dict) else {}
