"""Fine-tuning of a pretrained language model to the style of a book."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_modules.finetuning.bases import as_mask, attends_within_records
from lightning_modules.finetuning.causal_lm import FineTunedCausalLM
from lightning_modules.metrics import CorpusLoss


class GPTNeoStyleModule(FineTunedCausalLM):
    """Any causal language model of Transformers, fine-tuned on the next token of books.

    The loss, the perplexity and the bits per byte of held-out passages of the books are logged as `val/...`, those of
    other books as `val/other/...`, which shows how specialised the model is, and those of text of the kind that the
    base was trained on as `val/base/...`, which shows how much the model forgets.
    """

    within_records = False  # whether the attention takes the ends of the rows in place of a mask

    def setup(self, stage: str) -> None:
        """Compare the vocabularies, and create the metrics of each text."""
        super().setup(stage)
        self.within_records = attends_within_records(self.trainer, self.model)
        texts = ("book", "other", "base")
        self.track(MetricCollection({text: CorpusLoss() for text in texts}, compute_groups=False))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the scores of the next token: (B, T) to (B, T, V)."""
        return self.model(input_ids, use_cache=False).logits

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the mean loss of the targets of a batch."""
        return self.output_layer.cross_entropy(batch["targets"], **self._arguments(batch["input_ids"]))

    def evaluation_step(self, batch: dict[str, Any], metrics: MetricCollection) -> None:
        """Update the metrics of the text that the batch is from."""
        targets = batch["targets"]
        nats = self.output_layer.nats_of_share(targets, **self._arguments(batch["input_ids"]))
        metrics[batch.get("text", "book")].update(nats, targets, batch["target_bytes"])

    def _arguments(self, input_ids: Tensor) -> dict[str, Any]:
        """Return the arguments of the model for rows of tokens, (B, T)."""
        mask = None
        if self.within_records:  # without a mask, Transformers looks for packed records, and the host waits for a GPU
            B, T = input_ids.shape  # noqa: N806
            mask = as_mask(torch.arange(0, B * T + 1, T, dtype=torch.int32, device=input_ids.device))
        return {"input_ids": input_ids, "attention_mask": mask, "use_cache": False}

    def evaluation_results(self, metrics: MetricCollection, split: str) -> Mapping[str, Tensor]:
        """Return the results of each text that the data has: `loss`, `other/loss`, and so on."""
        results = {text: metric.compute() for text, metric in metrics.items() if metric.update_called}
        return {
            name if text == "book" else f"{text}/{name}": value
            for text, values in results.items()
            for name, value in values.items()
        }

    def next_command(self, run: str) -> str:
        """Return the command that generates text with the model of a run."""
        return f'llm-train generate --run {run} --prompt "The"'
