"""What counting words would have found out: the yardstick beside every result of a text classifier."""

from typing import Any

import lightning as L
import numpy as np
import torch

from lightning_modules.classification import ClassificationMeasures


class BagOfWords(L.Callback):
    """Fits a logistic regression on the words of the same training texts, and logs its measures beside the module's.

    They are called as those of the module: `val/bag_of_words/accuracy` stands beside `val/accuracy`. Each text is its
    words' counts, those of words that many texts have weighing less (tf-idf); the order of the words is lost.

    The datamodule has the texts: `labelled(side)` gives reviews with `text` and `label`.

    Args:
        ngrams: Words in a row that count as one, at most: 1 loses the order altogether, 2 sees pairs.
    """

    def __init__(self, ngrams: int = 1) -> None:
        self.ngrams = ngrams
        self._measures: dict[str, dict[str, float]] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures it on the validation texts."""
        self._measure(trainer, pl_module, "val")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs."""
        self._log(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs."""
        self._log(trainer, pl_module, "test")

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule, side: str) -> None:
        if side not in self._measures:
            self._measure(trainer, pl_module, side)
        found = self._measures[side].items()
        pl_module.log_dict({f"{side}/bag_of_words/{name}": value for name, value in found}, sync_dist=True)

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule, side: str) -> None:
        found = None
        if trainer.is_global_zero:
            train, held_out = pl_module.data.labelled("train"), pl_module.data.labelled(side)
            found = measures_of_word_counts(train, held_out, len(pl_module.data.classes), self.ngrams)
        self._measures[side] = trainer.strategy.broadcast(found)


def measures_of_word_counts(train: list[Any], held_out: list[Any], n_classes: int, ngrams: int) -> dict[str, float]:
    """How well a logistic regression on counts of words does; see `ClassificationMeasures` for the names.

    Args:
        train: Reviews to fit it on.
        held_out: Reviews to measure it on.
        n_classes: Number of classes.
        ngrams: Words in a row that count as one, at most.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    counts = TfidfVectorizer(ngram_range=(1, ngrams))
    model = LogisticRegression(max_iter=1000).fit(
        counts.fit_transform([review.text for review in train]), [review.label for review in train]
    )
    found = model.predict_log_proba(counts.transform([review.text for review in held_out]))  # (n, classes seen)
    scores = np.full((len(held_out), n_classes), -np.inf)
    scores[:, model.classes_] = found
    measures = ClassificationMeasures(n_classes, sync_on_compute=False)  # one process alone has come here
    labels = torch.tensor([review.label for review in held_out])
    measures.update(torch.from_numpy(scores), labels, torch.arange(len(labels)))
    return {name: float(value) for name, value in measures.compute().items()}
