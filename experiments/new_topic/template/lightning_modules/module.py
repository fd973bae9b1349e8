"""The training and evaluation of the network."""

from torch import Tensor

from lightning_modules.classification import Batch, ClassifierModule
from lightning_modules.common.ranges import PositiveInt
from lightning_modules.majority.network import MajorityNetwork


class MajorityModule(ClassifierModule):
    """The network of `network.py`, trained to name the most frequent token of a sequence.

    Args:
        width: Length of an embedding and of the hidden layer.
        vocab_size: Number of tokens; linked from the data.
        classes: Names of the classes; linked from the data.

    Raises:
        MisconfigurationException: If the data did not link its values.
    """

    def __init__(
        self, width: PositiveInt = 32, vocab_size: int | None = None, classes: list[str] | None = None
    ) -> None:
        vocab_size, classes = self.linked(vocab_size=vocab_size, classes=classes)
        super().__init__(n_classes=len(classes))
        self.save_hyperparameters()
        self.network = MajorityNetwork(vocab_size, len(classes), width)

    def forward(self, batch: Batch) -> Tensor:
        """Return scores of the classes, (B, K), for `batch["input_ids"]`, (B, T)."""
        return self.network(batch["input_ids"])
