"""Offline experiments made small enough for tests and benchmarks, as tests/<topic>/conf.yaml says."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def needs(path: Path) -> list[Path]:
    """Return the experiments whose runs an experiment reads, from its lines `# Needs: llm-train fit -c FILE`."""
    commands = re.findall(r"^# Needs: llm-train (fit -c .*)", path.read_text(), re.MULTILINE)
    return [ROOT / command.split()[-1] for command in commands]


def offline_experiments() -> list[Path]:
    """Return all experiments `offline*` and `modern*`, which download nothing, each after those that it needs."""
    ordered: list[Path] = []

    def add(path: Path) -> None:
        for needed in needs(path):
            add(needed)
        if path not in ordered:
            ordered.append(path)

    for path in sorted(path for name in ("offline", "modern") for path in ROOT.glob(f"experiments/*/{name}*.yaml")):
        add(path)
    return ordered


def shortened(path: Path, *sections: str) -> tuple[str, ...]:
    """Write the overlays that make an experiment small, and return the flags that apply them.

    Args:
        path: YAML of the experiment.
        *sections: Sections of conf.yaml to apply; by default `all`, and then the one with the name of the file.
    """
    conf = yaml.safe_load((ROOT / "tests" / path.parent.name / "conf.yaml").read_text())
    flags: list[str] = []
    for section in sections or ("all", path.stem):
        if section in conf:
            overlay = Path(f"{path.parent.name}.{section}.conf.yaml")
            overlay.write_text(yaml.safe_dump(conf[section], sort_keys=False))
            flags += ["-c", str(overlay)]
    return tuple(flags)


def length(path: Path, steps: int, every: int) -> tuple[str, ...]:
    """Return flags that set the length of an experiment.

    Args:
        path: YAML of the experiment; one that is a single pass over its data ends with its data, if that is earlier.
        steps: Optimiser steps.
        every: Optimiser steps between two validations.
    """
    single_pass = yaml.safe_load(path.read_text())["trainer"].get("max_epochs") == 1
    return (
        f"--trainer.max_steps={steps}",
        f"--trainer.val_check_interval={every}",
        "--trainer.check_val_every_n_epoch=null",
        *(() if single_pass else ("--trainer.max_epochs=-1",)),
    )


def run_of(path: Path) -> Path:
    """Return the folder of the run that a YAML makes by default."""
    return Path("runs") / path.parent.name / path.stem
