"""The shared base of classifiers: its metric, and its training, evaluation and prediction steps."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_modules.bert_imdb.classification_report import most_confidently_wrong, reliability
from lightning_modules.classification import ClassificationMeasures, ClassifierModule


def test_calibration_by_hand():
    """Ten confident predictions, eight of them right, and ten unsure ones, six of them right."""
    probabilities = torch.tensor([[0.05, 0.95]] * 10 + [[0.4, 0.6]] * 10)
    labels = torch.tensor([1] * 8 + [0] * 2 + [1] * 6 + [0] * 4)
    metrics = ClassificationMeasures(2)
    metrics.update(probabilities.log(), labels, torch.arange(20))
    metrics.update(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    results = metrics.compute()
    assert results["calibration_error"].item() == pytest.approx((0.15 + 0.0) / 2, abs=1e-6)
    assert results["accuracy"].item() == pytest.approx(0.7)
    counts, confidence, accuracy = reliability(labels.numpy(), probabilities.numpy())
    assert counts[[8, 14]].tolist() == [10, 10]
    assert confidence[[8, 14]] == pytest.approx([0.6, 0.95])
    assert accuracy[[8, 14]] == pytest.approx([0.6, 0.8])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n_present", [1, 3, 4])
def test_the_auroc_is_the_mean_over_the_classes_that_a_split_has(n_present):
    from sklearn.metrics import roc_auc_score

    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(60, 4, generator=draw), torch.arange(60) % n_present
    metrics = ClassificationMeasures(4)
    metrics.update(logits, labels, torch.arange(60))
    probabilities = logits.softmax(-1)
    present = range(n_present if n_present > 1 else 0)  # of one class alone, it is not defined
    of_classes = [roc_auc_score(labels == label, probabilities[:, label]) for label in present]
    expected = np.mean(of_classes) if of_classes else 0.0
    assert metrics.compute()["auroc"].item() == pytest.approx(expected, abs=1e-6)


def test_predictions_are_ordered_by_position():
    metrics = ClassificationMeasures(2)
    metrics.update(torch.tensor([[0.0, 9.0], [9.0, 0.0]]), torch.tensor([1, 0]), torch.tensor([2, 0]))
    metrics.update(torch.tensor([[0.0, 1.0]]), torch.tensor([0]), torch.tensor([1]))
    probabilities, labels, positions = metrics.predictions()
    assert positions.tolist() == [0, 1, 2]
    assert labels.tolist() == [0, 0, 1]
    nats = torch.tensor([0.0, 1.0, 0.0]) + torch.tensor([9.0, 1.0, 9.0]).neg().exp().log1p()
    torch.testing.assert_close(metrics.compute()["loss"], nats.mean())
    assert probabilities.argmax(1).tolist() == [0, 1, 1]
    surest = most_confidently_wrong(np.array([[0.4, 0.6], [0.9, 0.1], [0.2, 0.8]]), np.array([0, 1, 1]))
    assert surest.tolist() == [1, 0]


class LinearClassifier(ClassifierModule):
    """The least that a topic writes: a network of three classes, and `forward`."""

    def __init__(self) -> None:
        super().__init__(n_classes=3)
        self.linear = nn.Linear(4, 3)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        assert len(batch["x"])  # like most models of Transformers
        return self.linear(batch["x"])


def test_a_subclass_writes_its_network_and_forward_only():
    torch.manual_seed(0)
    module = LinearClassifier()
    module.log_train_loss = lambda *_: None
    x, labels, positions = torch.randn(7, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0]), torch.tensor([6, 0, 5, 1, 4, 2, 3])
    batch = {"x": x, "labels": labels, "positions": positions}
    logits = module.linear(x)
    loss = F.cross_entropy(logits, labels)
    torch.testing.assert_close(module.training_step(batch, 0), loss)
    predicted = module.predict_step(batch, 0)
    torch.testing.assert_close(predicted["probabilities"], logits.softmax(-1))
    assert torch.equal(predicted["positions"], positions)

    with torch.no_grad():
        for rows in (slice(0, 4), slice(4, 7), slice(7, 7)):  # a process may have no share of the last batch
            module.validation_step({name: part[rows] for name, part in batch.items()}, 0)
        results = module.evaluation_results(module.val_metrics, "val")
    assert results.keys() == {"loss", "accuracy", "f1", "auroc", "calibration_error"}
    torch.testing.assert_close(results["loss"], loss.detach())
    order = positions.argsort()
    probabilities, labels_in_order, positions_in_order = module.predictions
    torch.testing.assert_close(probabilities, logits.softmax(-1).detach()[order])
    assert torch.equal(labels_in_order, labels[order])
    assert positions_in_order.tolist() == list(range(7))
    assert module.val_metrics is not module.test_metrics


def test_an_entry_that_the_batch_does_not_have_is_named():
    module, batch = LinearClassifier(), {"x": torch.randn(2, 4), "label": torch.tensor([0, 1])}
    for step in (module.training_step, module.validation_step):
        with pytest.raises(
            MisconfigurationException, match=r"LinearClassifier: the batch has no '.*', only 'x', 'label'"
        ):
            step(batch, 0)
    module.forward = lambda batch: {"a": 1}["y"]  # a mistake in other code
    with pytest.raises(KeyError, match="y"):
        module.training_step(batch, 0)


def test_the_closing_lines_compare_the_accuracy_with_a_constant_answer():
    module = LinearClassifier()
    assert module.closing_lines({"val/loss": 1.0}) == []
    module.predictions = (torch.ones(8, 3) / 3, torch.tensor([0, 1, 1, 1, 2, 2, 0, 1]), torch.arange(8))
    best = {"val/loss": 1.0, "val/accuracy": 0.625, "val/words/accuracy": 0.6}
    shown = "val/accuracy 0.6250, val/words/accuracy 0.6000, always the most frequent class 0.5000"
    assert module.closing_lines(best) == [shown]
    _, remark = module.closing_lines(best | {"val/words/accuracy": 1.0})
    assert remark == "a baseline is better: pretrained models need an --optimizer.lr of 1e-5 to 1e-4, others more"
    _, advice = module.closing_lines(best | {"val/accuracy": 0.5})
    assert "--trainer.max_epochs 40" in advice


def test_the_scores_stay_in_single_precision():
    metrics = ClassificationMeasures(2).to(torch.bfloat16)
    metrics.update(torch.randn(3, 2, dtype=torch.bfloat16), torch.tensor([0, 1, 1]), torch.arange(3))
    assert metrics.to(torch.bfloat16).predictions()[0].dtype == torch.float32
