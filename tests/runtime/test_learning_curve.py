"""The learning curve of a run, drawn from its metrics."""

import pytest

from lightning_modules.runtime import learning_curve
from lightning_modules.runtime.learning_curve import LearningCurve


@pytest.mark.parametrize(("metric", "marked"), [("val/loss", ["0.400"]), ("val/accuracy", [])])
def test_the_smallest_value_is_marked_if_it_is_a_loss(tmp_path, monkeypatch, metric, marked):
    (tmp_path / "metrics.csv").write_text(f"step,train/loss,{metric}\n1,1.0,\n2,0.5,0.4\n3,0.4,\n4,0.3,0.6\n")
    figures = []
    monkeypatch.setattr(learning_curve, "save_figure", lambda figure, file: figures.append(figure) or file)
    assert LearningCurve(val_metric=metric).draw(tmp_path) == [tmp_path / "figures/learning_curve.png"]
    assert [text.get_text() for text in figures[0].axes[0].texts] == marked
