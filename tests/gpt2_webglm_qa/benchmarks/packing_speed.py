"""Compare packing with padding: records per second of alternating training steps, and the loss of each record.

A model of the size of GPT-2 small with random weights trains on rows of 1,024 positions.

    python tests/gpt2_webglm_qa/benchmarks/packing_speed.py
    python tests/gpt2_webglm_qa/benchmarks/packing_speed.py RECORDS.jsonl --tokenizer FOLDER

Without a file, the records are random words, and the tokens are their bytes.
"""

import argparse
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from datamodules.gpt2_webglm_qa.cited_answers import JSONLines, Record, RecordSource
from datamodules.gpt2_webglm_qa.data import GPT2WebGLMQADataModule, Rows
from lightning_modules.common.targets import places_of_targets
from lightning_modules.gpt2_webglm_qa.module import GPT2WebGLMQAModule

BLOCK_SIZE, BATCH_SIZE, ROUNDS, COMPARED_ROWS = 1024, 2, 4, 8


class Generated(RecordSource):
    """Records of random words with lengths that vary as those of real records."""

    def records(self, side: str) -> Iterator[Record]:
        """Yield 200 training records.

        Args:
            side: The split.
        """
        draw = random.Random(0)

        def text(n_words: float) -> str:
            return " ".join(
                "".join(draw.choices("aeioumnrst", k=draw.randint(2, 6))) for _ in range(max(1, int(n_words)))
            )

        for _ in range(200 if side == "train" else 0):
            references = tuple(text(draw.lognormvariate(3.2, 0.6)) for _ in range(draw.randint(1, 5)))
            yield Record(f"{text(6)}?", f"{text(draw.lognormvariate(2.8, 0.5))} [1].", references)


def rows_of(source: RecordSource, tokenizer: str, max_record_tokens: int, packing: bool) -> tuple[Rows, dict]:
    """Return the training rows, and the counts with the size of the vocabulary."""
    data = GPT2WebGLMQADataModule(
        source, BLOCK_SIZE, BATCH_SIZE, tokenizer, max_record_tokens=max_record_tokens, packing=packing
    )
    data.setup("fit")
    return data.rows["train"], data.counts["train"] | {"vocab_size": data.vocab_size}


def losses(module: GPT2WebGLMQAModule, rows: Rows, numbers: list[int]) -> dict[int, float]:
    """Return the loss of each record in some rows, in nats a token."""
    found = {}
    with torch.no_grad():
        for number in numbers:
            batch = rows[torch.tensor([number])]
            nats = module.nats(batch)[: int((batch["targets"] >= 0).sum())]
            lengths = [len(rows.examples[i].answer_ids) for i in rows.rows[number]]
            found |= {
                i: part.double().mean().item() for i, part in zip(rows.rows[number], nats.split(lengths), strict=True)
            }
    return found


def step(
    module: GPT2WebGLMQAModule, optimizer: torch.optim.Optimizer, rows: Rows, numbers: torch.Tensor, way: str
) -> float:
    """Train on some rows, and return the seconds for each record."""
    started = time.perf_counter()
    batch = rows[numbers]
    members = [rows.examples[i] for number in numbers.tolist() for i in rows.rows[number]]
    if way == "trimmed":
        longest = max(example.n_places for example in members)
        batch = {name: values[:, :longest] if values.dim() == 2 else values for name, values in batch.items()}
        batch["places"] = torch.from_numpy(places_of_targets(batch["targets"].numpy()))
    module.training_step(batch, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    return (time.perf_counter() - started) / len(members)


def measure(source: RecordSource, tokenizer: str, max_record_tokens: int) -> str:
    """Return a row of the table."""
    packed, packed_counts = rows_of(source, tokenizer, max_record_tokens, packing=True)
    padded, padded_counts = rows_of(source, tokenizer, max_record_tokens, packing=False)
    torch.manual_seed(0)
    vocab_size = packed_counts["vocab_size"]
    architecture = {"model_type": "gpt2", "vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0}
    architecture |= dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0)
    module = GPT2WebGLMQAModule("none", vocab_size, BLOCK_SIZE, architecture)
    module.log_train_loss = lambda *_: None  # there is no trainer
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    draw = torch.Generator().manual_seed(1)
    ways = {"packed": packed, "padded": padded, "trimmed": padded}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way, rows in ways.items():
            numbers = torch.randperm(len(rows), generator=draw)[:BATCH_SIZE]
            seconds[way].append(step(module, optimizer, rows, numbers, way))
    speed = {way: 1 / statistics.mean(measured[1:]) for way, measured in seconds.items()}  # the first is a warm-up
    together = losses(module, packed, list(range(min(COMPARED_ROWS, len(packed)))))
    alone = losses(module, padded, sorted(together))  # without packing, the row of a record has its number
    worst = max(abs(together[i] - alone[i]) / alone[i] for i in together)
    cells = [
        str(max_record_tokens),
        f"{packed_counts['records']} in {len(packed)} rows",
        f"{packed_counts['fill']:.1%}",
        f"{padded_counts['fill']:.1%}",
        f"{speed['packed']:.2f}",
        f"{speed['padded']:.2f}, {speed['packed'] / speed['padded']:.2f} times",
        f"{speed['trimmed']:.2f}, {speed['packed'] / speed['trimmed']:.2f} times",
        f"{worst:.1e}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print a table for records of up to half a row, and of up to a whole row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="?", type=Path, help="JSON lines (default: generated)")
    parser.add_argument("--tokenizer", default="byte", help="folder or name of a tokenizer (default: byte)")
    options = parser.parse_args()
    source = JSONLines(str(options.records), val_fraction=0.0) if options.records else Generated()
    heads = [
        "records of up to",
        "records",
        "packed rows full",
        "padded rows full",
        "packed, records/s",
        "padded to the row, records/s",
        "padded to the longest of the batch, records/s",
        "largest difference of a record's loss, relative",
    ]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for max_record_tokens in (BLOCK_SIZE // 2, BLOCK_SIZE):
        print(measure(source, options.tokenizer, max_record_tokens), flush=True)


if __name__ == "__main__":
    main()
