"""Fine-tuning a pretrained language model to the style of a book."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_modules.base import ExperimentModule
from lightning_modules.metrics import CorpusLoss, next_token_loss
from lightning_modules.models.generation import generate
from lightning_modules.pretrained import CachedHubModel, architecture_of, check_fit, load_pretrained, save_pretrained

Batch = dict[str, Any]


class GPTNeoStyleModule(ExperimentModule):
    """Any causal language model of Transformers, trained further on the next token of books.

    What it measures on the held-out passages of the books is called `val/loss`, `val/perplexity` and
    `val/bits_per_byte`; on other books `val/other/...`, which says how far it has specialised; on text of the kind that
    its base was trained on `val/base/...`, which says how much it forgets.

    Args:
        base: Model to start from: a folder with `config.json` and weights, the folder of a run that has such a folder
            `model/` (`runs/decoder_pretrain/offline`), or a name on the hub (`EleutherAI/gpt-neo-125m`).
        vocab_size: Number of tokens of the tokenizer; linked from the data.
        block_size: Length of a block, in tokens; linked from the data.
        architecture: Configuration of the model, which a checkpoint keeps, so that it can be loaded where its base is
            not; leave it out.

    Raises:
        MisconfigurationException: If the base cannot be loaded, or cannot read the data.
    """

    def __init__(
        self,
        base: str,
        vocab_size: int | None = None,
        block_size: int | None = None,
        architecture: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if vocab_size is None or block_size is None:
            raise MisconfigurationException(
                "model: vocab_size and block_size are needed; the data gives them, or you do"
            )
        self.model = load_pretrained(base, architecture=architecture)
        check_fit(self.model, base, vocab_size, block_size)
        self.save_hyperparameters()
        self.hparams["architecture"] = architecture_of(self.model)
        self.val_measures, self.test_measures = CorpusLoss(), CorpusLoss()
        self.side_measures = nn.ModuleDict({text: CorpusLoss() for text in ("other", "base")})

    def forward(self, input_ids: Tensor) -> Tensor:
        """Scores of the next token: (B, T) to (B, T, V)."""
        return self.model(input_ids, use_cache=False).logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of the batch's targets."""
        loss = next_token_loss(self(batch["input_ids"]), batch["targets"])
        self.log_train_loss(loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds the batch to the measures of the text that it is of."""
        self._measure(batch, self.val_measures)

    def on_validation_epoch_end(self) -> None:
        """Logs the measures of each text."""
        self._log_measures("val", self.val_measures)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds the batch to the measures of the text that it is of."""
        self._measure(batch, self.test_measures)

    def on_test_epoch_end(self) -> None:
        """Logs the measures of each text."""
        self._log_measures("test", self.test_measures)

    def _measure(self, batch: Batch, of_the_book: CorpusLoss) -> None:
        measures = of_the_book if batch["text"] == "book" else self.side_measures[batch["text"]]
        ids = batch["input_ids"]
        # A process may have no share of the last batch, and Transformers would trip over it.
        logits = self(ids) if len(ids) else torch.zeros(0, 1, 1, device=self.device)
        measures.update(logits, batch["targets"], batch["target_bytes"])

    def _log_measures(self, split: str, of_the_book: CorpusLoss) -> None:
        sides = {f"{split}/{text}": measures for text, measures in self.side_measures.items()}
        for prefix, measures in ({split: of_the_book} | sides).items():
            if measures.update_called:
                # Already those of all ranks; sync_dist only tells Lightning that they are the same everywhere.
                self.log_dict({f"{prefix}/{name}": value for name, value in measures.compute().items()}, sync_dist=True)
                measures.reset()

    def generate(self, input_ids: Tensor, max_new_tokens: int, **sampling: Any) -> Iterator[Tensor]:
        """Continues token ids of shape (B, T), one step of shape (B,) at a time; see `models.generation.generate`."""
        training = self.model.training
        self.model.eval()
        try:
            yield from generate(CachedHubModel(self.model), input_ids, max_new_tokens, **sampling)
        finally:
            self.model.train(training)

    def next_command(self, run: str) -> str:
        """Read what the model writes."""
        return f'llm-train generate --run {run} --prompt "The"'

    def save_pretrained(self, folder: Path) -> None:
        """Writes the model in Transformers' format, as its base was: `config.json` and `model.safetensors`.

        Args:
            folder: Folder to make.
        """
        save_pretrained(self.model, folder)
