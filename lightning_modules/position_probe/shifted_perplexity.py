"""The perplexity of a language model on text whose first token is not at position 0."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from lightning_modules.common.files import write_csv
from lightning_modules.common.ranges import TwoOrMore
from lightning_modules.finetuning.bases import load_pretrained
from lightning_modules.metrics import next_token_loss
from lightning_modules.position_probe.figures import draw_shifted_perplexity
from lightning_modules.runtime.drawing import show_figures

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DECODERS = ("gpt2", "gpt_neo")  # types of models that predict the next token
_BATCH = 16  # windows


class ShiftedPerplexity(L.Callback):
    """Callback that evaluates the probed model on windows of text that start at positions other than 0.

    A model that uses only the distances between tokens has the same perplexity everywhere (Sinha et al., "The Curious
    Case of Absolute Position Embeddings", 2022, https://arxiv.org/abs/2210.12574). For comparison, the same model is
    evaluated with the rows of its position matrix in random order. The windows are a quarter of the positions long.

    The callback writes `shifted_perplexity.csv` and `figures/shifted_perplexity.png` when the run starts. It reads
    `matrix`, `text_windows()` and `seed` of the data, and does nothing without a text or without a model of the type
    gpt2 or gpt_neo.

    Args:
        n_starts: Starting positions, evenly spread from 0 to the last one at which a window fits.
    """

    def __init__(self, n_starts: TwoOrMore = 9) -> None:
        self.n_starts = n_starts

    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate the model at each start, and write and draw the perplexities."""
        data = pl_module.data
        if data.matrix.model_type not in _DECODERS or (windows := data.text_windows()) is None:  # (N, T)
            return
        model = load_pretrained(data.matrix.model, argument="data.source").to(pl_module.device).eval()
        last = len(data.matrix.rows) - windows.size(1)
        starts = [round(last * k / (self.n_starts - 1)) for k in range(self.n_starts)]
        windows = windows.to(pl_module.device)
        learned = [perplexity(model, windows, start) for start in starts]
        shuffle_positions(model, seed=data.seed)
        shuffled = [perplexity(model, windows, start) for start in starts]
        if not trainer.fast_dev_run:
            folder = Path(trainer.default_root_dir)
            table = folder / "shifted_perplexity.csv"
            rows = [(start, f"{p:.6g}", f"{q:.6g}") for start, p, q in zip(starts, learned, shuffled, strict=True)]
            write_csv(table, ["start", "perplexity", "perplexity_shuffled"], rows)
            show_figures(trainer, [draw_shifted_perplexity(table, folder / "figures" / "shifted_perplexity.png")])


@torch.inference_mode()
def perplexity(model: "PreTrainedModel", windows: Tensor, start: int) -> float:
    """Return the perplexity of windows of token ids (N, T) whose first token is at the position `start`."""
    nats = torch.zeros((), dtype=torch.float64, device=windows.device)
    positions = torch.arange(start, start + windows.size(1), device=windows.device)
    for batch in windows.split(_BATCH):
        logits = model(input_ids=batch, position_ids=positions.expand_as(batch)).logits
        nats += next_token_loss(logits[:, :-1], batch[:, 1:], reduction="sum")
    return math.exp(nats.item() / windows[:, 1:].numel())


@torch.no_grad()
def shuffle_positions(model: "PreTrainedModel", seed: int) -> None:
    """Put the rows of the position matrix of a model in random order."""
    rows = model.transformer.wpe.weight
    rows.copy_(rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).to(rows.device)])
