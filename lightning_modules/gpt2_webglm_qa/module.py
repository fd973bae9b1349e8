"""Instruction tuning of a pretrained model to answer a question from references, and to cite them."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_modules.base import Loss
from lightning_modules.common.targets import IGNORED
from lightning_modules.finetuning.bases import as_mask, attends_within_records, in_evaluation_mode
from lightning_modules.finetuning.causal_lm import FineTunedCausalLM
from lightning_modules.metrics import CorpusLoss

Batch = dict[str, Tensor]


class GPT2WebGLMQAModule(FineTunedCausalLM):
    """Any causal language model of Transformers, tuned on answers alone (Liu et al., 2023, WebGLM).

    The loss of a batch is the weighted sum over its targets, divided by the mean weight of a batch. So a token has the
    same weight in every batch, full or not, packed or not, and for any number of processes. A mean over the targets of
    the batch would give the tokens of short answers a larger weight.
    """

    varying_sizes: ClassVar = {"places": 0}
    within_records = False  # whether the attention takes the ends of the records, `cu_seqlens`

    def setup(self, stage: str) -> None:
        """Compare the vocabularies, and refuse packing if the model does not keep the records of a row apart."""
        super().setup(stage)
        self.within_records = attends_within_records(self.trainer, self.model)
        if getattr(self.data, "packing", False) and not keeps_records_apart(self.model, self.within_records):
            raise MisconfigurationException(
                f"data.packing: a {type(self.model).__name__} does not keep the records of a row apart; set it to false"
            )

    def loss(self, batch: Batch) -> Loss:
        """Return the loss of a batch; `train/loss` is the weighted mean of the cross entropy, in nats a token."""
        total = self.output_layer.cross_entropy(
            row_weights=batch["loss_weights"], reduction="sum", **self._arguments(batch)
        )
        weight = batch["loss_weights"].sum()
        return Loss(total / batch["mean_weight"], total / weight, weight)

    def evaluation_step(self, batch: Batch, metrics: CorpusLoss) -> None:
        """Add the answers of a batch to the metrics."""
        metrics.update(self.nats(batch), batch["targets"], batch["target_bytes"])

    def nats(self, batch: Batch) -> Tensor:
        """Return the cross entropy of the targets of a batch, in the order of its `places`, (N,)."""
        return self.output_layer.nats_of_share(**self._arguments(batch))

    def _arguments(self, batch: Batch) -> dict[str, Any]:
        """Return the arguments of `OutputLayer.cross_entropy`: targets and their places, and those of the model."""
        mask = as_mask(batch["cu_seqlens"]) if self.within_records and "cu_seqlens" in batch else None
        names = ("targets", "places", "input_ids", "position_ids")
        return {name: batch[name] for name in names} | {"attention_mask": mask, "use_cache": False}

    def answer(self, prompts: Sequence[np.ndarray], max_new_tokens: int, end: int) -> list[list[int]]:
        """Return a greedy answer to each prompt, (T,), that ends with `end` or has `max_new_tokens` tokens."""
        longest = max(len(prompt) for prompt in prompts)
        # The padding precedes the prompts, so that all of them end at the same position.
        input_ids = torch.tensor([[end] * (longest - len(p)) + p.tolist() for p in prompts], device=self.device)
        lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=self.device)
        attention_mask = (torch.arange(longest, device=self.device) >= longest - lengths).long()  # (B, T)
        steps = self.generate(input_ids, max_new_tokens, temperature=0, stop_token=end, attention_mask=attention_mask)
        answers = torch.stack(list(steps), dim=1).tolist()
        return [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in answers]

    @torch.no_grad()
    def answer_nats(self, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]) -> Tensor:
        """Return the cross entropy in nats of answers, each (N,), to prompts, each (T,), summed over tokens: (B,)."""
        rows = [np.concatenate(pair).astype(np.int64) for pair in zip(prompts, answers, strict=True)]
        ids = nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True).to(self.device)
        places = torch.arange(ids.shape[1] - 1, device=self.device)  # (T,)
        begin = torch.tensor([[len(prompt) - 1] for prompt in prompts], device=self.device)
        stop = torch.tensor([[len(row) - 1] for row in rows], device=self.device)
        counted = (places >= begin) & (places < stop)  # (B, T)
        targets = ids[:, 1:].masked_fill(~counted, IGNORED)
        with in_evaluation_mode(self.model):
            nats = self.output_layer.cross_entropy(
                targets,
                counted.flatten().nonzero()[:, 0],
                reduction="none",
                input_ids=ids[:, :-1],
                position_ids=places.expand_as(targets),
                use_cache=False,
            )
        return nats.new_zeros(len(rows)).index_add(0, counted.nonzero()[:, 0], nats)

    def next_command(self, run: str) -> str:
        """Return the command that starts a chat with the model of a run."""
        return f"llm-train generate --run {run} --chat"


@torch.no_grad()
def keeps_records_apart(model: nn.Module, within_records: bool = False) -> bool:
    """Return whether a model attends only within a record, tested on two records in a row.

    Args:
        model: Causal language model of Transformers.
        within_records: Whether the model takes the ends of the records; otherwise position ids that start again at 0
            separate them.
    """
    # Two records of two tokens.
    ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    positions = torch.tensor([[0, 1, 0, 1]], device=model.device)
    ends = torch.tensor([0, 2, 4], dtype=torch.int32, device=model.device)
    mask = as_mask(ends) if within_records else None
    with in_evaluation_mode(model):
        packed = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 2:]
        alone = model(ids[:, 2:], position_ids=positions[:, 2:], use_cache=False).logits
    return torch.allclose(packed, alone, rtol=1e-3, atol=1e-4)
