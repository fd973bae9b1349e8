"""Export of the trained model in the format of Hugging Face."""

from pathlib import Path

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.base import ExperimentModule
from lightning_modules.common.files import replace_folder
from lightning_modules.finetuning.adapters import merged
from lightning_modules.runtime.checkpoint import save_last
from lightning_modules.runtime.checkpoint_io import AtomicCheckpointIO


class ExportModel(L.Callback):
    """Callback that writes the tokenizer when the training starts, and `model/` for Transformers when it ends.

    `model/` holds the weights of `best.ckpt`, or of `last.ckpt` if no checkpoint is the best, and the tokenizer. The
    data of the run must have a `tokenizer`, and the module `save_pretrained`.
    """

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: ExperimentModule) -> None:
        """Save the tokenizer, so that text can be generated from an interrupted run too."""
        if not trainer.fast_dev_run:
            pl_module.data.tokenizer.save_pretrained(Path(trainer.default_root_dir) / "tokenizer")

    def on_train_end(self, trainer: L.Trainer, pl_module: ExperimentModule) -> None:
        """Save the model.

        It is built again from the checkpoint, on the CPU: the trained one may be sharded over many processes.
        """
        if trainer.fast_dev_run:
            return
        save_last(trainer)
        if trainer.is_global_zero:
            run = Path(trainer.default_root_dir)
            best, last = run / "checkpoints/best.ckpt", run / "checkpoints/last.ckpt"
            checkpoint = AtomicCheckpointIO().load_checkpoint(best if best.is_file() else last)
            module = type(pl_module).of_checkpoint(checkpoint)

            def save(folder: Path) -> None:
                with merged(module):
                    module.save_pretrained(folder)
                pl_module.data.tokenizer.save_pretrained(folder)

            replace_folder(run / "model", save)
