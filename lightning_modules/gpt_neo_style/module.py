"""Fine-tuning a pretrained language model to the style of a book."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.finetuning.causal_lm import FineTunedCausalLM
from lightning_modules.metrics import CorpusLoss, next_token_loss

Batch = dict[str, Any]


class GPTNeoStyleModule(FineTunedCausalLM):
    """Any causal language model of Transformers, trained further on the next token of books.

    What it measures on the held-out passages of the books is called `val/loss`, `val/perplexity` and
    `val/bits_per_byte`; on other books `val/other/...`, which says how far it has specialised; on text of the kind that
    its base was trained on `val/base/...`, which says how much it forgets.
    """

    def setup(self, stage: str) -> None:
        """Makes the measures of the texts that stand beside the book."""
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
        self._measure(batch, self.val_metrics)

    def on_validation_epoch_end(self) -> None:
        """Logs the measures of each text."""
        self._log_measures("val", self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds the batch to the measures of the text that it is of."""
        self._measure(batch, self.test_metrics)

    def on_test_epoch_end(self) -> None:
        """Logs the measures of each text."""
        self._log_measures("test", self.test_metrics)

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

    def next_command(self, run: str) -> str:
        """Read what the model writes."""
        return f'llm-train generate --run {run} --prompt "The"'
