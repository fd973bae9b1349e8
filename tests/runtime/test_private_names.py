"""Each private name of Lightning that we touch, held: a new Lightning that moves one fails here first."""

import inspect

import lightning as L
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.logger_connector import logger_connector

from lightning_modules.runtime import private_names


class Watch(L.Callback):
    """Notes what the functions say while a run goes on."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, bool]] = []
        self.loaders = 0

    def on_train_batch_end(self, trainer, *_):
        self.seen.append(
            (
                private_names.batches_done_in_epoch(trainer),
                private_names.batches_done(trainer),
                private_names.is_accumulating(trainer),
            )
        )
        self.loaders = len(private_names.train_dataloaders(trainer))


def test_progress_and_accumulation_are_what_they_say():
    watch = Watch()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        accumulate_grad_batches=2,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
    from torch.utils.data import DataLoader

    trainer.fit(BoringModel(), DataLoader(RandomDataset(32, 3)))
    assert watch.seen == [(1, 0, True), (2, 1, False), (3, 2, False), (1, 3, True), (2, 4, False), (3, 5, False)]
    assert watch.loaders == 1


def test_the_names_that_are_replaced_or_called_exist():
    assert callable(_TrainingEpochLoop._broadcast_sigterm_tensor)
    assert "_batches_that_stepped" in inspect.getsource(logger_connector)  # the step that loggers are given
