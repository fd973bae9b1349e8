"""The line that shows how far a run is."""

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
