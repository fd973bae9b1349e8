"""The line that shows how far a run is."""

from types import SimpleNamespace

import pytest

from lightning_modules.runtime.progress import RunProgress


@pytest.mark.parametrize(
    ("total", "shown"), [(40, "/40"), (None, "3 steps"), (float("inf"), "3 steps"), (-1, "3 steps")]
)
def test_a_run_without_a_length_shows_its_steps(total, shown):
    progress = RunProgress()
    progress._open("train", total, initial=3)
    assert shown in str(progress._bar)
    progress._bar.close()


def test_metrics_are_read_when_they_are_logged_and_not_when_the_line_is_drawn(monkeypatch):
    read = []

    class Metrics(dict):
        def __contains__(self, name):
            read.append(trainer.global_step)
            return False

    trainer = SimpleNamespace(callback_metrics=Metrics(), global_step=0, log_every_n_steps=4)
    trainer.estimated_stepping_batches = 8
    progress = RunProgress(refresh_seconds=0)
    progress.on_train_start(trainer, None)
    for trainer.global_step in range(1, 9):
        progress.on_train_batch_end(trainer)
    assert set(read) == {4, 8}  # a reading makes the host wait for the GPU
    progress._bar.close()


def test_the_last_step_has_one_line_in_a_file(llm_train, tiny):
    done = llm_train("fit", "-c", tiny())  # validates at the last step
    lines = [line.strip() for line in done.err.splitlines() if line.startswith("train")]
    assert "24/24" in lines[-1]
    assert len(lines) == len(set(lines))
