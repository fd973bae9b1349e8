"""The validation before the first step."""

import csv
import math
from types import SimpleNamespace

import lightning as L
import pytest
from helpers import RUNS
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.runtime.before_training import LossBeforeTraining
from lightning_modules.runtime.learning_curve import read_metric

RUN = RUNS / "tiny"
CALLBACK = {"class_path": "lightning_modules.runtime.before_training.LossBeforeTraining"}


@pytest.mark.slow
def test_the_curve_begins_with_the_loss_of_the_untrained_network_and_a_resumed_run_keeps_it(llm_train, tiny):
    still = tiny(**{"trainer__callbacks+": [CALLBACK]}, optimizer__init_args__lr=0.0)
    assert llm_train("fit", "-c", still).code == 0
    steps, losses = read_metric(RUN / "metrics.csv", "val/loss")
    assert steps == [0, 8, 16, 24]
    assert losses == [losses[0]] * 4  # nothing is learned at rate 0, so each is that of the untrained network
    assert losses[0] == pytest.approx(math.log(257), rel=0.01)
    with (RUN / "metrics.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "4", "8", "12", "16", "20", "24"]

    longer = llm_train("fit", "-c", still, "--ckpt_path", "last", "--trainer.max_steps", "32")
    assert longer.code == 0
    assert "finished at step 32" in longer.err
    assert read_metric(RUN / "metrics.csv", "val/loss")[0] == [0, 8, 16, 24, 32]
    assert read_metric(RUN / "metrics.csv", "init/loss") == ([0], [losses[0]])
    assert read_metric(RUN / "metrics.csv", "init/excess_loss") == ([0], [pytest.approx(losses[0] - math.log(257))])
    speeds = read_metric(RUN / "metrics.csv", "perf/tokens_per_second")[1]
    assert all(speed > 0 for speed in speeds)


def test_a_module_without_a_vocabulary_is_refused():
    trainer = SimpleNamespace(callback_metrics={"val/loss": 1.0}, loggers=[])
    with pytest.raises(MisconfigurationException, match="LightningModule has no val/loss over a vocabulary"):
        LossBeforeTraining().on_sanity_check_end(trainer, L.LightningModule())
