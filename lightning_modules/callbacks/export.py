"""The trained model as other programs take it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.adapters import merged


class ExportModel(L.Callback):
    """Writes the tokenizer when the training starts, and `model/` in Hugging Face's format when it ends.

    `model/` holds the weights of `best.ckpt` where there is one, else the last ones, with the tokenizer beside them.
    """

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the tokenizer at once: an interrupted run can be generated from too."""
        if not trainer.fast_dev_run:
            trainer.datamodule.tokenizer.save_pretrained(Path(trainer.default_root_dir) / "tokenizer")

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the model, by a new folder that takes the place of an older one."""
        if trainer.fast_dev_run:
            return
        folder = Path(trainer.default_root_dir)
        best = folder / "checkpoints" / "best.ckpt"
        last_weights = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}
        if best.is_file():
            pl_module.load_state_dict(torch.load(best, map_location=pl_module.device, weights_only=True)["state_dict"])
        replace_folder(folder / "model", lambda fresh: _save(trainer, pl_module, fresh))
        pl_module.load_state_dict(last_weights)


def _save(trainer: L.Trainer, pl_module: L.LightningModule, folder: Path) -> None:
    with merged(pl_module):
        pl_module.save_pretrained(folder)
    trainer.datamodule.tokenizer.save_pretrained(folder)


def replace_folder(target: Path, save: Callable[[Path], None]) -> None:
    """Saves into a new folder, which then takes the place of an older one.

    Args:
        target: Folder to make or replace.
        save: Makes and fills the folder that it is given.
    """
    fresh = target.with_name(f".{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    save(fresh)
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)


def replace_text(target: Path, text: str) -> None:
    """Writes a text file under a temporary name, which then takes the place of an older one.

    Args:
        target: File to make or replace.
        text: Its content.
    """
    fresh = target.with_name(f".{target.name}.tmp")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(target)
