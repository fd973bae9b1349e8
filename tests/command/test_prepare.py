"""The command `prepare`: what a run reads is there before the run."""

from pathlib import Path

import pytest
import torch

from datamodules import sources
from datamodules.base import ExperimentDataModule
from experiments.prepare import prepare


@pytest.mark.slow
def test_a_run_finds_what_was_prepared(llm_train, tiny):
    config = tiny(trainer__max_steps=8)
    prepared = llm_train("prepare", "-c", config, "--processes=1", "--trainer.max_steps", "4")
    assert (prepared.code, prepared.out) == (0, f"next    llm-train fit -c {config} --trainer.max_steps 4\n"), (
        prepared.err
    )
    assert "prepared text in " in prepared.err
    assert "\ndata    " in prepared.err
    assert not Path("runs").exists()
    fitted = llm_train("fit", "-c", config, "--trainer.fast_dev_run", "1")
    assert fitted.code == 0, fitted.err
    assert "prepared text" not in fitted.err


def test_several_processes_prepare_a_large_text(llm_train, tiny, monkeypatch):
    monkeypatch.setattr(sources, "PART_SIZE", 2_000)
    monkeypatch.setattr(sources, "PIECE_SIZE", 200)
    config = tiny()
    Path("text.txt").write_text(Path("text.txt").read_text().replace(". ", ".\n"))
    prepared = llm_train("prepare", "-c", config, "--processes", "2")
    assert prepared.code == 0, prepared.err
    assert "preparing text in 6 parts in " in prepared.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "prepare: give an experiment by -c NAME; "),
        (["tiny.yaml"], "prepare tiny.yaml: a file needs -c (did you mean 'llm-train prepare -c tiny.yaml'?)"),
        (["-c", "tiny.yaml", "--processes", "0"], "argument --processes: must be a whole number of at least 1, got 0"),
        (["-c", "nothing.yaml"], "nothing.yaml"),
        (["-c", "tiny.yaml", "--data.sorce", "a.txt"], "did you mean 'source'?"),
    ],
)
def test_a_mistake_is_one_line(llm_train, tiny, flags, said):
    tiny()
    failed = llm_train("prepare", *flags)
    assert failed.code > 0
    assert failed.err.startswith("error: ")
    assert failed.err.count("\n") == 1
    assert said in failed.err


def test_data_that_is_read_when_a_run_begins_needs_no_preparation(capsys):
    class Rows(ExperimentDataModule):
        def setup(self, stage):
            self.rows = torch.arange(4)

    prepare(Rows(batch_size=2), n_processes=1)
    assert "Rows reads its data when a run begins: there is nothing to prepare" in capsys.readouterr().err
