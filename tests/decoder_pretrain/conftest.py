"""Runs that several tests look at. The first test that needs them makes them, and they are kept for the others."""

import shutil
from pathlib import Path

import pytest
from helpers import text

TOPIC = "lightning_modules.decoder_pretrain"
RUNTIME = "lightning_modules.runtime"


def entry(class_path: str, **arguments: object) -> dict[str, object]:
    """Return a class and its arguments as YAML names them."""
    return {"class_path": class_path, "init_args": arguments}


def text_file(path: Path, n_words: int, seed: int) -> dict[str, object]:
    """Write a text, and return the source that reads it as YAML names it."""
    path.write_text(text(n_words, seed))
    return entry("datamodules.sources.TextFiles", paths=str(path))


@pytest.fixture
def watched(llm_train, tiny, tmp_path, tmp_path_factory) -> tuple[Path, Path]:
    """Two runs of 16 steps: one with all callbacks of the topic, the other with the same settings and none of them.

    The validation text has other words than the training text, and the rate is so high that the first validation is
    the best. Residual projections start at zero.
    """
    settings = {
        "trainer__log_every_n_steps": 1,
        "trainer__max_steps": 16,
        "model__init_args__initialization": "zero_residual",
        "model__init_args__bias": False,
        "data__init_args__val_source": text_file(tmp_path / "other.txt", 200, seed=1),
        "optimizer__init_args__lr": 0.05,
        "lr_scheduler": entry("lightning_modules.optim.schedules.Constant"),
    }
    callbacks = [
        entry(f"{TOPIC}.SignalPropagation", steps=[0, 5, 15, 1000]),
        entry(f"{TOPIC}.AblatedLoss", shares=[0, 0.5]),
        entry(f"{RUNTIME}.generalization.GeneralizationGap", n_windows=8),
        entry(f"{RUNTIME}.before_training.LossBeforeTraining"),
        entry(f"{RUNTIME}.export.ExportModel"),
    ]
    kept = tmp_path_factory.getbasetemp() / "decoder_pretrain"
    if not kept.exists():
        for name, added in (("watched", callbacks), ("unwatched", [])):
            done = llm_train("fit", "-c", tiny(name, **settings, **{"trainer__callbacks+": added}))
            assert done.code == 0, done.err
        shutil.copytree("runs/decoder_pretrain", kept)
    return kept / "watched", kept / "unwatched"
