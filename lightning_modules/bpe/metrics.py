"""Metrics of the tokens into which tokenizers split a text."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_modules.bpe.textbook import count_words
from lightning_modules.common.byte_level import is_byte_level
from lightning_modules.metrics import SplitMetric

if TYPE_CHECKING:  # imported where it is used: it is slow to import
    from tokenizers import Tokenizer


class TokenizerMetrics(SplitMetric):
    """Metrics of several tokenizers on the same text, over all processes.

    - `bytes_per_token`: the compression; that of bytes alone is 1.
    - `tokens_per_word`: mean number of tokens that a word is split into (the fertility).
    - `vocabulary_use`: share of the vocabulary that occurs in the text.
    - `single_byte_tokens`: share of the tokens that are single bytes, which no merge covers; only of a tokenizer whose
      tokens are bytes.

    Args:
        tokenizers: Tokenizers by name.
        pattern: Pattern of words, as in `count_words`; the same for all tokenizers.
    """

    def __init__(self, tokenizers: "Mapping[str, Tokenizer]", pattern: str) -> None:
        super().__init__()
        self.tokenizers, self.pattern = tokenizers, pattern
        for number, tokenizer in enumerate(tokenizers.values()):
            n_ids = max(tokenizer.get_vocab().values()) + 1
            self.add_state(f"occurrences_{number}", torch.zeros(n_ids, dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("bytes", "words"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, texts: list[str]) -> None:
        """Add some documents, or parts of documents."""
        self.bytes += sum(len(text.encode()) for text in texts)
        self.words += count_words(texts, self.pattern).total()
        for number, tokenizer in enumerate(self.tokenizers.values()):
            occurrences = getattr(self, f"occurrences_{number}")
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            ids = torch.tensor([i for encoding in encodings for i in encoding.ids], dtype=torch.int64)
            occurrences += ids.to(occurrences.device).bincount(minlength=len(occurrences))

    def compute(self) -> dict[str, dict[str, Tensor]]:
        """Return the metrics by name, for each tokenizer by its name."""
        results = {}
        for number, (name, tokenizer) in enumerate(self.tokenizers.items()):
            occurrences = getattr(self, f"occurrences_{number}")
            tokens = occurrences.sum()
            results[name] = {
                "bytes_per_token": self.bytes / tokens,
                "tokens_per_word": tokens / self.words,
                "vocabulary_use": (occurrences > 0).float().mean(),
            }
            if is_byte_level(tokenizer):  # one character a byte
                single = [i for token, i in tokenizer.get_vocab().items() if len(token) == 1]
                results[name]["single_byte_tokens"] = occurrences[single].sum() / tokens
        return results
