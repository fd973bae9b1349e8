"""How much worse a language model gets when its text does not start at position 0."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from lightning_modules.common.files import write_text
from lightning_modules.metrics import next_token_loss
from lightning_modules.position_probe.figures import draw_shifted_perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WITH_NEXT_TOKENS = ("gpt2", "gpt_neo")
_BATCH = 16  # windows at once


class ShiftedPerplexity(L.Callback):
    """Measures the perplexity of the probed model on windows of text that start at other positions than 0.

    A model that used nothing but the distances between tokens would not notice (Sinha et al., "The Curious Case of
    Absolute Position Embeddings", 2022, https://arxiv.org/abs/2210.12574). Beside it stands the same model with the
    rows of its position matrix in random order: what it would lose if the rows' order meant nothing. The windows are
    those of the data's `text`, a quarter of the positions long; without a text, or a model of the type gpt2 or gpt_neo,
    nothing is done. Writes `shifted_perplexity.csv` and
    `figures/shifted_perplexity.png` when the run starts.

    Args:
        n_starts: Starting positions, evenly spread from 0 to the last at which a window fits; at least 2.

    Raises:
        MisconfigurationException: If there are fewer than 2.
    """

    def __init__(self, n_starts: int = 9) -> None:
        if n_starts < 2:
            raise MisconfigurationException(f"ShiftedPerplexity: n_starts is {n_starts}; give at least 2")
        self.n_starts = n_starts

    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures and draws, where the data has text, and a model that predicts the next token."""
        data = pl_module.data
        if data.matrix.model_type not in _WITH_NEXT_TOKENS or (windows := data.text_windows()) is None:  # (N, T)
            return
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(data.matrix.model, dtype=torch.float32).to(pl_module.device).eval()
        last = len(data.matrix.rows) - windows.size(1)
        starts = [round(last * k / (self.n_starts - 1)) for k in range(self.n_starts)]
        windows = windows.to(pl_module.device)
        perplexities = [perplexity(model, windows, start) for start in starts]
        shuffle_positions(model, seed=data.seed)
        shuffled = [perplexity(model, windows, start) for start in starts]
        if trainer.fast_dev_run:
            return
        folder = Path(trainer.default_root_dir)
        lines = [f"{s},{p:.6g},{q:.6g}" for s, p, q in zip(starts, perplexities, shuffled, strict=True)]
        table = folder / "shifted_perplexity.csv"
        write_text(table, "\n".join(["start,perplexity,perplexity_shuffled", *lines, ""]))
        figure = draw_shifted_perplexity(table, folder / "figures" / "shifted_perplexity.png")
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("figures/shifted_perplexity", [str(figure)])


@torch.inference_mode()
def perplexity(model: "PreTrainedModel", windows: Tensor, start: int) -> float:
    """Perplexity of windows whose first token is put at a position.

    Args:
        model: Transformers' GPT-2 or GPT-Neo.
        windows: Token ids, (N, T).
        start: Position of the first token.
    """
    nats = torch.zeros((), dtype=torch.float64, device=windows.device)
    positions = torch.arange(start, start + windows.size(1), device=windows.device)
    for batch in windows.split(_BATCH):
        logits = model(input_ids=batch, position_ids=positions.expand_as(batch)).logits
        nats += next_token_loss(logits[:, :-1], batch[:, 1:], reduction="sum")
    return math.exp(nats.item() / windows[:, 1:].numel())


@torch.no_grad()
def shuffle_positions(model: "PreTrainedModel", seed: int) -> None:
    """Puts the rows of a model's position matrix in random order.

    Args:
        model: Transformers' GPT-2 or GPT-Neo.
        seed: Of the order.
    """
    rows = model.transformer.wpe.weight
    rows.copy_(rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).to(rows.device)])
