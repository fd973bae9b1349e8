"""A baseline for text classifiers: logistic regression on word counts."""

import warnings
from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.base import ExperimentModule
from lightning_modules.classification import ClassificationMeasures
from lightning_modules.common.ranges import PositiveInt
from lightning_modules.runtime.processes import from_first


class BagOfWords(L.Callback):
    """Callback that fits a logistic regression on the words of the training reviews, and logs its results.

    The names are those of the results of the module: `val/bag_of_words/accuracy` compares with `val/accuracy`. A review
    is represented by its tf-idf: the counts of its words, where words that occur in many reviews weigh less. The order
    of the words is lost.

    The datamodule has `labelled(split)`, a list of reviews with `text` and `label`, and `classes`.

    Args:
        ngrams: Largest number of consecutive words that are counted together: 1 counts words, 2 counts pairs too.
    """

    def __init__(self, ngrams: PositiveInt = 1) -> None:
        self.ngrams = ngrams
        self._results: dict[str, dict[str, float]] = {}

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: ExperimentModule) -> None:
        """Log the results on the validation split."""
        self._log(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: ExperimentModule) -> None:
        """Log the results on the test split."""
        self._log(trainer, pl_module, "test")

    def _log(self, trainer: L.Trainer, pl_module: ExperimentModule, split: str) -> None:
        if split not in self._results:
            self._results[split] = from_first(trainer, lambda: self._evaluate(pl_module.data, split))
        results = {f"{split}/bag_of_words/{name}": value for name, value in self._results[split].items()}
        pl_module.log_dict(results, sync_dist=True)

    def _evaluate(self, data: Any, split: str) -> dict[str, float]:
        return evaluate_bag_of_words(data.labelled("train"), data.labelled(split), len(data.classes), self.ngrams)


def evaluate_bag_of_words(
    train: Sequence[Any], held_out: Sequence[Any], n_classes: int, ngrams: int
) -> dict[str, float]:
    """Return the results of a logistic regression on word counts; see `ClassificationMeasures` for their names.

    Raises:
        MisconfigurationException: If the training reviews have no words.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(TfidfVectorizer(ngram_range=(1, ngrams)), LogisticRegression(max_iter=1000))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The number of unique classes")  # few reviews of many classes
        try:
            model.fit([review.text for review in train], [review.label for review in train])
        except ValueError as error:
            if "empty vocabulary" not in str(error):
                raise
            raise MisconfigurationException(
                "BagOfWords: no training review has a word of two or more letters: leave the callback out"
            ) from error
    scores = np.full((len(held_out), n_classes), -np.inf)  # (n, K); training reviews may lack a class
    scores[:, model.classes_] = model.predict_log_proba([review.text for review in held_out])
    metrics = ClassificationMeasures(n_classes, sync_on_compute=False)  # the other processes have no data
    labels = torch.tensor([review.label for review in held_out])
    metrics.update(torch.from_numpy(scores), labels, torch.arange(len(labels)))
    return {name: float(value) for name, value in metrics.compute().items()}
