"""Export of the trained model in the format of Hugging Face."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.base import ExperimentModule
from lightning_modules.common import run_files
from lightning_modules.common.files import naming, read_json, replace_folder, write_json, write_text
from lightning_modules.common.messages import say
from lightning_modules.finetuning.adapters import merged
from lightning_modules.finetuning.bases import context_of
from lightning_modules.runtime.checkpoint import run_checkpoints
from lightning_modules.runtime.checkpoint_io import AtomicCheckpointIO
from lightning_modules.runtime.model_card import model_card
from lightning_modules.runtime.sharded import saves_shards

if TYPE_CHECKING:  # imported where used: transformers is slow to import
    from transformers import PreTrainedTokenizerFast


class ExportModel(L.Callback):
    """Callback that writes the tokenizer when the training starts, and `model/` for Transformers when it ends.

    `model/` holds the weights of `best.ckpt`, or of `last.ckpt` if no checkpoint is the best, the tokenizer, and a
    model card. The tokenizer is that of the data; without one, nothing is written. A module without `save_pretrained`
    has no `model/`, nor has one whose `save_pretrained` raises a `MisconfigurationException`: the run prints why. A
    module with `generate` makes a model that generates: other programs stop it at the end-of-text token and at the
    context.

    Args:
        licence: Licence of the model for the model card, by its name on the Hugging Face hub, such as `mit`; `null`
            means that it is not known.
    """

    def __init__(self, licence: str | None = None) -> None:
        self.licence = licence
        self._has_trained = False

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: ExperimentModule) -> None:
        """Save the tokenizer, so that text can be generated from an interrupted run too."""
        self._has_trained = True
        if _can_export(trainer, pl_module):
            folder = Path(trainer.default_root_dir) / "tokenizer"
            with naming(folder):
                pl_module.data.tokenizer.save_pretrained(folder)

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: ExperimentModule) -> None:
        """Save the model, after the last checkpoint.

        It is built again from the checkpoint, on the CPU: the trained one may be sharded over many processes.
        """
        run = Path(trainer.default_root_dir)
        if not _can_export(trainer, pl_module) or not hasattr(pl_module, "save_pretrained"):
            return
        if (run / "model").is_dir() and not self._has_trained:
            return
        if saves_shards(trainer):
            say(f"export: no model/, for the checkpoints are in shards; llm-train convert {run} makes whole files")
            return
        files = run_files.checkpoints_in(run)
        if not files:
            if self._has_trained:  # not a branch from the last step
                add = "add lightning_modules.runtime.checkpoint.RunCheckpoint"
                say(f"{run} has no checkpoint, and so no model/: {add}")
            return
        checkpoint = AtomicCheckpointIO().load_model(files[0])
        module = type(pl_module).of_checkpoint(checkpoint)
        of_best = next((checkpoint.best_metrics for checkpoint in run_checkpoints(trainer)), {})
        found = of_best or trainer.callback_metrics
        results = {name: float(value) for name, value in found.items() if name.startswith("val/")}
        base = next((base for name in ("base", "pretrained") if (base := module.hparams.get(name))), None)
        n_rows = {"train": _n_rows(trainer.train_dataloader), "val": _n_rows(trainer.val_dataloaders)}

        def write(folder: Path) -> None:
            chat_template = getattr(pl_module.data, "exported_chat_template", None)
            context = export_model(module, pl_module.data.tokenizer, folder, chat_template)
            known = {split: n for split, n in n_rows.items() if n}
            step = checkpoint["global_step"]
            card = model_card(run, folder, base, context, step, results, known, self.licence)
            write_text(folder / "README.md", card)

        try:
            replace_folder(run / "model", write)
        except MisconfigurationException as reason:
            say(f"export: no model/: {reason}; load_run of experiments loads the run with its checkpoint")


def _can_export(trainer: L.Trainer, pl_module: ExperimentModule) -> bool:
    return hasattr(getattr(pl_module.data, "tokenizer", None), "save_pretrained") and not trainer.fast_dev_run


def _n_rows(loaders: Any) -> int:
    """Return the number of rows that loaders visit in an epoch, on all processes; 0 if it is not known."""
    samplers = [getattr(loader, "sampler", None) for loader in (loaders if isinstance(loaders, list) else [loaders])]
    return sum(getattr(sampler, "n", 0) for sampler in samplers)


def export_model(
    module: ExperimentModule, tokenizer: "PreTrainedTokenizerFast", folder: Path, chat_template: str | None = None
) -> int | None:
    """Write a model and its tokenizer, with what other programs need to truncate, to pad and to stop.

    Args:
        module: Module with `save_pretrained`.
        tokenizer: Tokenizer that it was trained with.
        folder: Folder to create.
        chat_template: Chat template of the tokenizer; `None` leaves the one that it has.

    Returns:
        The context of the model, in tokens, or `None` if there is no limit.
    """
    with merged(module):
        module.save_pretrained(folder)
    config = read_json(folder / "config.json", {})
    generation = read_json(folder / "generation_config.json", {})
    context = _context(getattr(module, "model", None), config)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    if context:
        tokenizer.model_max_length = min(context, tokenizer.model_max_length)
    tokens = {"pad_token_id": tokenizer.pad_token_id}
    if hasattr(module, "generate"):
        end = tokenizer.eos_token_id
        tokens["eos_token_id"] = end
        # So that all prompts of a batch end at one position. Only what is in init_kwargs too is saved.
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
        if tokenizer.pad_token_id is None and end is not None:
            tokenizer.pad_token = tokenizer.eos_token
        generation |= _given({"eos_token_id": end, "pad_token_id": tokenizer.pad_token_id, "max_length": context})
    files = {"config.json": config | _given(tokens)} | ({"generation_config.json": generation} if generation else {})
    for name, fields in files.items():
        write_json(folder / name, fields | _known_tokens(fields, tokenizer, config.get("vocab_size")))
    tokenizer.save_pretrained(folder)
    # The class has another name in earlier versions of Transformers, and the rest is about this machine.
    settings = read_json(folder / "tokenizer_config.json", {})
    settings = {name: value for name, value in settings.items() if name not in ("is_local", "local_files_only")}
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(folder / "tokenizer_config.json", settings)
    for file in folder.iterdir():  # weights are written for the owner alone, whatever the umask
        file.chmod((folder / "config.json").stat().st_mode)
    return context


def _context(model: Any, config: Mapping[str, Any]) -> int | None:
    """Return the context of a model of Transformers, else that of its `config.json`; GPT-2 has its own name for it."""
    if hasattr(model, "get_input_embeddings") and (context := context_of(model)):
        return context
    given = config.get("max_position_embeddings") or config.get("n_positions")
    return given if given and given > 0 else None  # as `context_of`


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _known_tokens(
    fields: Mapping[str, Any], tokenizer: "PreTrainedTokenizerFast", vocab_size: int | None
) -> dict[str, Any]:
    """Return special tokens for those of the base that are not in the vocabulary, of which Transformers would warn."""
    given = {name: fields.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if vocab_size is None:
        return {}
    return {name: getattr(tokenizer, name) for name, i in given.items() if isinstance(i, int) and i >= vocab_size}
