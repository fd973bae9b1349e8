"""Instruction tuning: a pretrained model learns to answer a question from references, and to cite them."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_modules.common.targets import IGNORED
from lightning_modules.finetuning.bases import evaluating, scored_at
from lightning_modules.finetuning.causal_lm import FineTunedCausalLM
from lightning_modules.metrics import CorpusLoss

Batch = dict[str, Tensor]


class GPT2WebGLMQAModule(FineTunedCausalLM):
    """Any causal language model of Transformers, tuned on answers alone (Liu et al., 2023, WebGLM).

    The loss of a batch is the sum of what its targets weigh, divided by what a batch weighs on average. So a token has
    the same weight wherever it stands: in a full batch or a half empty one, on one process or one of eight, packed or
    not. A mean over the batch's own tokens would make those of short answers weigh more.
    """

    def setup(self, stage: str) -> None:
        """Refuses packed rows where the model would let their records see each other.

        Raises:
            MisconfigurationException: If it does.
        """
        if getattr(self.data, "packing", False) and not keeps_records_apart(self.model):
            raise MisconfigurationException(
                f"data.packing: a {type(self.model).__name__} does not keep the records of a row apart; set it to false"
            )

    def forward(self, batch: Batch) -> Tensor:
        """Scores of the next token at those N places of a batch that have a target: (N, V)."""
        with scored_at(self.model, batch["targets"] != IGNORED):
            return self.model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The weighted loss of the batch's targets. What is logged is their weighted mean, in nats a token."""
        counted = batch["targets"] != IGNORED
        nats = F.cross_entropy(self(batch).float(), batch["targets"][counted], reduction="none")  # (N,)
        total = nats @ batch["loss_weights"][counted]
        weight = batch["loss_weights"].sum()
        self.log_train_loss(total / weight, weight)
        return total / batch["mean_weight"]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds the answers of a batch to the measures of the validation records."""
        self._measure(self.val_metrics, batch)

    def on_validation_epoch_end(self) -> None:
        """Logs `val/loss`, `val/perplexity` and `val/bits_per_byte`, all of the answers alone."""
        self._log_measures("val", self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds the answers of a batch to the measures of the test records."""
        self._measure(self.test_metrics, batch)

    def on_test_epoch_end(self) -> None:
        """Logs `test/loss`, `test/perplexity` and `test/bits_per_byte`, all of the answers alone."""
        self._log_measures("test", self.test_metrics)

    def _measure(self, measures: CorpusLoss, batch: Batch) -> None:
        counted = batch["targets"] != IGNORED
        # A process may have no share of the last batch, and Transformers would trip over it.
        scores = self(batch) if len(counted) else torch.zeros(0, 1, device=self.device)
        measures.update(scores[None], batch["targets"][counted][None], batch["target_bytes"])

    def _log_measures(self, split: str, measures: CorpusLoss) -> None:
        # The measures are already those of all ranks; sync_dist only tells Lightning that they are the same everywhere.
        self.log_dict({f"{split}/{name}": value for name, value in measures.compute().items()}, sync_dist=True)
        measures.reset()

    @torch.no_grad()
    def answer(
        self, prompts: Sequence[np.ndarray], max_new_tokens: int, end: int, use_cache: bool = True
    ) -> list[list[int]]:
        """Answers several prompts at once, taking the likeliest token each time.

        Args:
            prompts: Token ids, each (T,).
            max_new_tokens: Length of an answer, at most.
            end: The end-of-text token, which ends an answer.
            use_cache: Whether keys and values are kept from token to token, rather than computed anew.

        Returns:
            The tokens of each answer; the last one is `end` unless it was too long.
        """
        longest = max(len(prompt) for prompt in prompts)
        # Padding goes before a prompt, so that all of them end, and are continued, at the same place.
        input_ids = torch.tensor([[end] * (longest - len(p)) + p.tolist() for p in prompts], device=self.device)
        lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=self.device)
        attention_mask = (torch.arange(longest, device=self.device) >= longest - lengths).long()  # (B, T)
        with evaluating(self.model):
            output = self.model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=use_cache,
                eos_token_id=end,
                pad_token_id=end,
            )
        return [_until(end, row) for row in output[:, longest:].tolist()]

    @torch.no_grad()
    def answer_nats(self, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]) -> Tensor:
        """What given answers cost, in nats, each summed over its tokens: (B,).

        Args:
            prompts: Token ids, each (T,).
            answers: Token ids, each (N,).
        """
        rows = [np.concatenate(pair).astype(np.int64) for pair in zip(prompts, answers, strict=True)]
        ids = nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True).to(self.device)
        places = torch.arange(ids.shape[1] - 1, device=self.device)  # (T,)
        begin = torch.tensor([[len(prompt) - 1] for prompt in prompts], device=self.device)
        stop = torch.tensor([[len(row) - 1] for row in rows], device=self.device)
        counted = (places >= begin) & (places < stop)  # (B, T)
        targets = ids[:, 1:].masked_fill(~counted, IGNORED)
        with evaluating(self.model):
            scores = self({"input_ids": ids[:, :-1], "position_ids": places.expand_as(targets), "targets": targets})
        nats = F.cross_entropy(scores.float(), targets[counted], reduction="none")
        return torch.zeros(len(rows), device=self.device).index_add(0, counted.nonzero()[:, 0], nats)

    def next_command(self, run: str) -> str:
        """Ask it something."""
        return f"llm-train generate --run {run} --chat"


@torch.no_grad()
def keeps_records_apart(model: nn.Module) -> bool:
    """Whether a model attends within a stretch of growing positions alone, as most of Transformers do: it is tried.

    Args:
        model: A causal language model of Transformers.
    """
    ids = torch.arange(4, device=model.device)[None] % model.config.vocab_size  # two records of two tokens
    positions = torch.tensor([[0, 1, 0, 1]], device=model.device)
    with evaluating(model):
        packed = model(ids, position_ids=positions, use_cache=False).logits[:, 2:]
        alone = model(ids[:, 2:], position_ids=positions[:, 2:], use_cache=False).logits
    return torch.allclose(packed, alone, rtol=1e-3, atol=1e-4)


def _until(end: int, tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens
