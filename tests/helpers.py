"""Helpers of several tests: text, settings, and comparisons of runs."""

import random
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

TINY = next(Path(__file__).parent.glob("*/tiny.yaml"))  # the run of the fixture `tiny`, by the topic that it belongs to
RUNS = Path("runs") / TINY.parent.name
LAST, BEST = "checkpoints/last.ckpt", "checkpoints/best.ckpt"


def text(n_words: int, seed: int = 0) -> str:
    """Return sentences of random words from a small vocabulary."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("aeioumnrst", k=draw.randint(2, 6))) for _ in range(50)]
    return " ".join(draw.choice(words) + ("." if draw.random() < 0.1 else "") for _ in range(n_words))


def with_settings(config: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Replace values of a configuration: `trainer__max_steps=8` sets `max_steps` of the section `trainer`."""
    for path, value in settings.items():
        *parents, last = path.split("__")
        section = config
        for key in parents:
            section = section.setdefault(key, {})
        section[last] = value
    return config


def write_tiny(file: Path, text_file: Path, settings: dict[str, Any]) -> Path:
    """Write the YAML of the tiny run on a text, with some settings, and return it."""
    config = yaml.safe_load(TINY.read_text())
    config["data"]["init_args"]["source"]["init_args"]["paths"] = str(text_file)
    file.write_text(yaml.safe_dump(with_settings(config, settings), sort_keys=False))
    return file


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint, or of a safetensors file."""
    if checkpoint.suffix == ".safetensors":
        return load_file(checkpoint)
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def assert_same_weights(one: Path, other: Path) -> None:
    """Compare the weights of two files, bit for bit."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


def assert_close_weights(one: Path, other: Path) -> None:
    """Compare the weights of two files up to rounding: processes sum in another order, which Adam amplifies."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=1e-4, msg=f"{one} {name}")


def metrics_that_repeat(run: Path) -> list[list[str]]:
    """Return the header and the rows of the metrics of a run, without those of its speed."""
    lines = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    kept = [i for i, name in enumerate(lines[0]) if not name.startswith("perf/")]
    return [[line[i] for i in kept] for line in lines]


def contents(folder: Path) -> dict[Path, bytes]:
    """Return the bytes of each file in a folder and below it."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
