"""Training speed with batches of similar lengths against random batches, and with cached features against tokens.

    python tests/bert_imdb/benchmarks/length_grouping.py

Random and grouped batches train the same small BERT on the same reviews, in turn. Then its head alone is trained on
tokens and on features. The lengths are log-normal with the median of IMDB's reviews, truncated to the length of BERT.
"""

import copy
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from datamodules.base import GlobalBatches, shuffled
from datamodules.bert_imdb.data import TokenizedReviews, grouped_by_length
from lightning_modules.bert_imdb.module import BertImdbModule

BATCHES = 20  # in a turn
TURNS = 3  # of each way
BATCH_SIZE = 16


def main() -> None:
    """Print the speed of each way, and their ratio."""
    from transformers import BertConfig, BertModel

    draw = np.random.default_rng(0)
    lengths = np.clip(np.exp(draw.normal(np.log(234), 0.6, 2000)).astype(int), 20, 512)
    rows = [draw.integers(5, 1000, n).astype(np.int32) for n in lengths]
    reviews = TokenizedReviews(rows, draw.integers(0, 2, len(rows)), pad_token_id=0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    with tempfile.TemporaryDirectory() as folder:
        BertModel(BertConfig(vocab_size=1000, max_position_embeddings=512, **sizes)).save_pretrained(Path(folder))
        module = BertImdbModule(folder, vocab_size=1000, block_size=512, classes=["negative", "positive"])
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)

    def seconds(order: object, epoch: int, dataset: TokenizedReviews) -> float:
        sampler = GlobalBatches(len(rows), order, BATCH_SIZE)
        sampler.set_epoch(epoch)
        began = time.perf_counter()
        for positions, _ in zip(sampler, range(BATCHES), strict=False):
            batch = dataset[positions]
            optimizer.zero_grad()
            F.cross_entropy(module(batch), batch["labels"]).backward()
            optimizer.step()
        return time.perf_counter() - began

    def compare(ways: dict[str, tuple[object, TokenizedReviews]], what: str) -> None:
        turns = [[seconds(order, turn, dataset) for order, dataset in ways.values()] for turn in range(TURNS)]
        for name, times in zip(ways, zip(*turns, strict=True), strict=True):
            speed = BATCHES * BATCH_SIZE / statistics.median(times)
            print(f"{name:8} {speed:9.1f} reviews/s   {min(times):.3f} to {max(times):.3f} s")
        ratios = [slow / fast for slow, fast in turns]
        print(f"{what} {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})")

    random, grouped = shuffled(len(rows), 0), grouped_by_length(lengths, BATCH_SIZE, 0)
    for order in (random, grouped):
        seconds(order, 0, reviews)  # warm-up
    compare({"random": (random, reviews), "grouped": (grouped, reviews)}, "grouped batches are")

    module.model.encoder.requires_grad_(False).eval()
    cached = copy.copy(reviews)
    cached.features = draw.normal(size=(len(rows), sizes["hidden_size"])).astype(np.float32)
    compare({"tokens": (grouped, reviews), "features": (grouped, cached)}, "training the head on cached features is")


if __name__ == "__main__":
    main()
