"""Time and memory of learning byte-pair merges, compared with Hugging Face's `tokenizers`; prints Markdown tables.

Run `python tests/bpe/benchmarks/bpe_speed.py [--gigabyte]` on an idle machine. It takes a few minutes, and
some more with a gigabyte of generated text.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from lightning_modules.bpe.learner import _Corpus, learn_merges
from lightning_modules.bpe.textbook import GPT2_PATTERN, spell, vocabulary
from lightning_modules.bpe.word_counter import WordCounter

VOCAB_SIZE = 32_768
CORES = 2
DOCUMENT_WORDS = 1_000
BATCH_CHARACTERS = 1 << 22  # text that a process gets at a time


def library_texts() -> list[str]:
    """Return the source of the standard library's modules, tests included."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:  # test data in other encodings
            continue
    return texts


def count_words(texts: Iterable[str]) -> Counter[bytes]:
    """Return how often each word occurs, counted by as many processes as there are cores."""
    counter = WordCounter(GPT2_PATTERN, workers=CORES)
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            counter.add(batch)
            batch, size = [], 0
    counter.add(batch)
    counter.wait()
    counter.close()
    return counter.words


def time_ours(texts: list[str]) -> tuple[dict[str, float], list[list[str]]]:
    """Return the wall time of each stage, in seconds, and the merges, spelled."""
    start = time.perf_counter()
    word_counts = count_words(texts)
    counted = time.perf_counter()
    merges = learn_merges(word_counts, VOCAB_SIZE)
    learned = time.perf_counter()
    _Corpus(word_counts, vocabulary())  # a second time, to measure it without the merging
    preparing = time.perf_counter() - learned
    stages = {
        "counting": counted - start,
        "preparing": preparing,
        "merging": learned - counted - preparing,
        "total": learned - start,
    }
    return stages, [[spell(left), spell(right)] for left, right in merges]


def time_tokenizers(texts: list[str]) -> tuple[float, list[list[str]]]:
    """Return the wall time of the library's trainer, in seconds, and its merges, spelled."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    start = time.perf_counter()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=0,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    seconds = time.perf_counter() - start
    return seconds, json.loads(tokenizer.to_str())["model"]["merges"]


def compare_on_library(rounds: int) -> None:
    """Time both in turn on the source of the standard library, and print the table."""
    texts = library_texts()
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"## Python library text, {size:.1f} MB, {VOCAB_SIZE:,} tokens, {CORES} cores, {rounds} rounds in turn\n")
    ours, theirs = [], []
    for _ in range(rounds):
        seconds, their_merges = time_tokenizers(texts)
        stages, our_merges = time_ours(texts)
        assert our_merges == their_merges, "the merges differ"
        theirs.append(seconds)
        ours.append(stages)
    print("| stage | median s | smallest | largest |\n|---|---|---|---|")
    for stage in ours[0]:
        print_row(stage, [stages[stage] for stages in ours])
    print_row("tokenizers' BpeTrainer", theirs)
    print_row("ratio", [stages["total"] / seconds for stages, seconds in zip(ours, theirs, strict=True)])
    print("\nMerges identical in every round.\n", flush=True)


def print_row(name: str, values: list[float]) -> None:
    """Print a table row: the median and the range of some values."""
    print(f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} | {max(values):.2f} |")


def write_generated_text(path: Path, megabytes: int) -> None:
    """Write documents, one a line, of random words whose frequencies are proportional to one over their rank."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 12, size=500_000)
    letters = generator.choice(list("etaoinshrdlucmfwypvbgk"), size=lengths.sum())
    ends = np.cumsum(lengths)
    lexicon = ["".join(letters[end - length : end]) for end, length in zip(ends, lengths, strict=True)]
    cumulative = np.cumsum(1 / np.arange(1, len(lexicon) + 1))
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1_000_000:
            ranks = np.searchsorted(cumulative, generator.random(100 * DOCUMENT_WORDS) * cumulative[-1])
            words = [lexicon[rank] for rank in ranks.tolist()]
            for start in range(0, len(words), DOCUMENT_WORDS):
                file.write(" ".join(words[start : start + DOCUMENT_WORDS]) + "\n")


def read_lines(path: Path) -> Iterator[str]:
    """Yield the documents of a file."""
    with path.open(encoding="utf-8") as file:
        yield from file


def measure_file(path: Path) -> None:
    """Learn from one file in this new process, and print its row, with the sum of the peaks of all processes."""
    start = time.perf_counter()
    word_counts = count_words(read_lines(path))
    counted = time.perf_counter()
    learn_merges(word_counts, VOCAB_SIZE)
    learned = time.perf_counter()
    words = sum(word_counts.values())
    peak = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        + CORES * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # the largest of them, in KiB on Linux
    )
    print(
        f"| {path.stat().st_size / 1e6:,.0f} | {words / 1e6:.1f} | {len(word_counts):,} | {counted - start:.1f} "
        f"| {learned - counted:.1f} | {(learned - start) / words * 1e6:.2f} | {peak / 1024:,.0f} |",
        flush=True,
    )


def scale_on_generated_text(sizes: list[int]) -> None:
    """Print time and peak memory for texts of growing size, each in a new process."""
    print(f"## Generated text, {VOCAB_SIZE:,} tokens, {CORES} cores\n")
    print("| MB | million words | distinct | counting s | learning s | s per million words | peak MiB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in sizes:
            path = Path(folder) / f"{megabytes}.txt"
            write_generated_text(path, megabytes)
            subprocess.run([sys.executable, __file__, "--file", path], check=True)
            path.unlink()
    print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabyte", action="store_true", help="generated text up to 1 GB")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each on the library text")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)  # one measurement in a fresh process
    arguments = parser.parse_args()
    if arguments.file:
        measure_file(arguments.file)
    else:
        os.environ["RAYON_NUM_THREADS"] = str(CORES)
        compare_on_library(arguments.rounds)
        scale_on_generated_text([10, 100, 1000] if arguments.gigabyte else [10, 100])
