"""The trained model as other programs take it."""

from pathlib import Path

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.base import ExperimentModule
from lightning_modules.common.files import replace_folder
from lightning_modules.finetuning.adapters import merged
from lightning_modules.runtime.checkpoint import save_last
from lightning_modules.runtime.checkpoint_io import AtomicCheckpointIO


class ExportModel(L.Callback):
    """Writes the tokenizer when the training starts, and `model/` in Hugging Face's format when it ends.

    `model/` holds the weights of `best.ckpt` where there is one, else the last ones, with the tokenizer beside them.
    """

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the tokenizer at once: an interrupted run can be generated from too."""
        if not trainer.fast_dev_run:
            pl_module.data.tokenizer.save_pretrained(Path(trainer.default_root_dir) / "tokenizer")

    def on_train_end(self, trainer: L.Trainer, pl_module: ExperimentModule) -> None:
        """Saves the model, by a new folder that takes the place of an older one.

        It is built anew from the checkpoint, on the CPU: the one that was trained may lie in parts on many processes.
        """
        if trainer.fast_dev_run:
            return
        save_last(trainer)
        if trainer.is_global_zero:
            checkpoints = Path(trainer.default_root_dir) / "checkpoints"
            best, last = checkpoints / "best.ckpt", checkpoints / "last.ckpt"
            module = type(pl_module).of_checkpoint(
                AtomicCheckpointIO().load_checkpoint(best if best.is_file() else last)
            )
            replace_folder(checkpoints.with_name("model"), lambda fresh: _save(pl_module.data, module, fresh))


def _save(datamodule: L.LightningDataModule, module: ExperimentModule, folder: Path) -> None:
    with merged(module):
        module.save_pretrained(folder)
    datamodule.tokenizer.save_pretrained(folder)
