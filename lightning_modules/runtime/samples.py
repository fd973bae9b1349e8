"""Samples of generated text, drawn during the training."""

import itertools
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.base import ExperimentModule
from lightning_modules.common.files import write_text
from lightning_modules.common.messages import say
from lightning_modules.common.ranges import NonNegativeFloat, PositiveInt, PositiveShare
from lightning_modules.runtime.drawing import show_table
from lightning_modules.runtime.sharded import whole_model

_MOST_COLUMNS = 4  # of samples side by side
_WIDTH = 44  # characters of a column
_TOKENS_READ = 32  # of the validation text, for a prompt
_WORDS = 3  # of such a prompt, at most


class SampleText(L.Callback):
    """Callback that continues fixed prompts at each validation, writes `samples.md`, and logs a table.

    The prompts and the random numbers are the same at each validation, so that only the model changes. A run that
    validates before its first step (see `LossBeforeTraining`) has samples of the untrained model too. The data of the
    run must have `encode` and `decode`, and the module `generate`.

    Args:
        prompts: Texts to continue, none of them empty; `null` takes a few words from each of two places of the
            validation text.
        max_new_tokens: Length of a continuation in tokens.
        temperature: Divisor of the logits (0 or more); 0 takes the most probable token.
        top_k: Number of most probable tokens to sample from; `null` for all.
        top_p: Total probability of the most probable tokens to sample from (above 0, at most 1); `null` for all.
        seed: Seed of the samples.

    Raises:
        MisconfigurationException: If `prompts` is an empty list, a prompt is empty, or the temperature is infinite.
    """

    def __init__(
        self,
        prompts: list[str] | None = None,
        max_new_tokens: PositiveInt = 200,
        temperature: NonNegativeFloat = 0.8,
        top_k: PositiveInt | None = None,
        top_p: PositiveShare | None = None,
        seed: int = 0,
    ) -> None:
        if prompts is not None and not (prompts and all(prompts)):
            reason = "has an empty text" if prompts else "is empty"
            name = type(self).__name__
            raise MisconfigurationException(f"{name}: prompts {reason}; give at least one character to continue")
        self.prompts = prompts or []  # those of the validation text are read at the first validation
        self.how: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        self.how["max_new_tokens"] = max_new_tokens
        self.seed = seed
        self.heads: list[str] = []  # of the columns: the step and the validation loss
        self.continuations: list[list[str]] = []  # by column, then by prompt
        self.metrics: dict[str, float] = {}  # of the newest samples; a subclass sets them in `draw`
        self._continued: list[str] | None = None  # prompts of the continuations, where they are known
        self._has_new = False  # of the validation in progress, on this process

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Generate the samples on rank 0, and log their metrics on all ranks, each of which may need the best score."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        with whole_model(trainer, type(self).__name__) as usable:
            self._has_new = usable and trainer.is_global_zero
            if self._has_new:
                self.prompts = self.prompts or prompts_of(pl_module.data)
                self._drop_samples_of_other_prompts()
                self.heads.append(f"step {trainer.global_step}")
                self.continuations.append(self.draw(trainer, pl_module))
        if metrics := trainer.strategy.broadcast(self.metrics):
            pl_module.log_dict(metrics, sync_dist=True)

    def _drop_samples_of_other_prompts(self) -> None:
        """Drop the samples of the checkpoint if this run has other prompts; older checkpoints have no prompts."""
        others = [texts for texts in self.continuations if len(texts) != len(self.prompts)]
        if others or self._continued not in (None, self.prompts):
            say("samples.md: the prompts are not those of the checkpoint; the earlier samples are left out")
            self.heads, self.continuations = [], []
        self._continued = self.prompts

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the samples; the validation loss is known now."""
        if trainer.state.fn != TrainerFn.FITTING or not self._has_new:
            return
        if "val/loss" in trainer.callback_metrics:
            self.heads[-1] += f", val/loss {trainer.callback_metrics['val/loss']:.3f}"
        shown = _spread(len(self.heads), _MOST_COLUMNS)
        sections = [
            side_by_side(prompt, [(self.heads[i], self.continuations[i][k]) for i in shown])
            for k, prompt in enumerate(self.prompts)
        ]
        write_text(Path(trainer.default_root_dir) / "samples.md", "\n".join([*sections, self.remark()]))
        rows = [[prompt, *texts] for prompt, *texts in zip(self.prompts, *self.continuations, strict=True)]
        show_table(trainer, "samples", ["prompt", *self.heads], rows)

    def draw(self, trainer: L.Trainer, pl_module: ExperimentModule) -> list[str]:
        """Return a continuation of each prompt."""
        return [self.continue_prompt(trainer, pl_module, prompt)[0] for prompt in self.prompts]

    def remark(self) -> str:
        """Return a text that `samples.md` ends with."""
        return ""

    def continue_prompt(
        self, trainer: L.Trainer, pl_module: ExperimentModule, prompt: str, n_samples: int = 1
    ) -> list[str]:
        """Return continuations of a prompt."""
        ids = pl_module.data.encode(prompt)[None].repeat(n_samples, 1).to(pl_module.device)  # (n_samples, T)
        generator = torch.Generator(pl_module.device).manual_seed(self.seed)
        tokens = pl_module.generate(ids, generator=generator, **self.how)
        rows = torch.stack(list(tokens), dim=1).tolist()  # (n_samples, max_new_tokens)
        return [pl_module.data.decode(row, before=ids[0].tolist()) for row in rows]

    def state_dict(self) -> dict[str, Any]:
        """Return the samples so far, and their prompts."""
        return {"heads": list(self.heads), "continuations": list(self.continuations), "prompts": self._continued}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the samples so far."""
        self.heads, self.continuations = list(state_dict["heads"]), list(state_dict["continuations"])
        self._continued = state_dict.get("prompts")


def prompts_of(data: Any) -> list[str]:
    """Return the first whole words in two windows of the validation text, at its beginning and in its middle.

    Args:
        data: Datamodule whose validation batches have token ids, `input_ids`.

    Raises:
        MisconfigurationException: If they do not.
    """
    loaders = data.val_dataloader()
    loader = loaders[0] if isinstance(loaders, list) else loaders
    positions = loader.sampler.order(0)  # of all windows, whatever the share of this process
    batch = loader.dataset[positions[[0, len(positions) // 2]]]
    if "input_ids" not in batch:
        raise MisconfigurationException("SampleText: the validation batches hold no text; set prompts")
    texts = [data.decode(row) for row in batch["input_ids"][:, :_TOKENS_READ].tolist()]  # (2, T)
    return list(dict.fromkeys(_words_of(text) for text in texts))


def _words_of(text: str) -> str:
    """Return the first whole words of a text, with the space between them, or the text itself if it has none."""
    found = re.search(rf"(?<=\s)\w\S*(?:\s+\S+){{0,{_WORDS - 1}}}(?=\s)", text)
    return found[0] if found else text


def side_by_side(prompt: str, columns: Sequence[tuple[str, str]]) -> str:
    """Return a section of Markdown with the continuations of a prompt in columns; long lines are wrapped and indented.

    Args:
        prompt: Text that each column begins with.
        columns: Head and continuation of each column.
    """
    cells = [[*_wrapped(head, ""), "-" * _WIDTH, *_wrapped(prompt + text, "    ")] for head, text in columns]
    rows = itertools.zip_longest(*cells, fillvalue="")
    lines = [" | ".join(f"{cell:<{_WIDTH}}" for cell in row).rstrip() for row in rows]
    fence = "```" if not any("```" in line for line in lines) else "````````"
    return "\n".join([f"## {prompt!r}\n", f"{fence}text", *lines, fence, ""])


def _wrapped(text: str, indent: str) -> list[str]:
    wrap = textwrap.TextWrapper(_WIDTH, subsequent_indent=indent, replace_whitespace=False)
    return [part for line in text.expandtabs(4).split("\n") for part in wrap.wrap(line) or [""]]


def _spread(n: int, most: int) -> list[int]:
    """Return at most `most` indices of n items: the first, the last, and others at equal distances."""
    return [round(i * (n - 1) / (most - 1)) for i in range(most)] if n > most else list(range(n))
