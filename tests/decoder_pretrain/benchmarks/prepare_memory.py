"""Time and peak memory of tokenising a large text into the cache.

Run `python tests/decoder_pretrain/benchmarks/prepare_memory.py [--gigabytes 1] [--processes 2]`: it prints a Markdown
table. The text is one file of lines of the Python source of this machine, in random order. The benchmark needs three
times its size on the disk, and deletes all files at the end.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any


class Memory(threading.Thread):
    """The memory of this process and its copies, in MiB, measured twice a second (Linux only)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0.0

    def run(self) -> None:
        """Measure until the process ends."""
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.5)

    def now(self) -> float:
        """Return the memory in use, in which pages that several processes share count once."""
        pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
        total = 0
        for pid in pids:
            with contextlib.suppress(OSError):  # the process has ended
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return total / 1024


def write_text(path: Path, size: int) -> None:
    """Write about `size` bytes of shuffled source lines."""
    from datamodules.sources import PythonText

    lines = [line for text in PythonText(["topics", "modules"]).documents() for line in text.splitlines(keepends=True)]
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < size:
            file.writelines(rng.sample(lines, 10_000))


def write_tokenizer(path: Path) -> None:
    """Train a small byte-level BPE tokenizer on text of the same kind."""
    from tokenizers import ByteLevelBPETokenizer

    from datamodules.sources import PythonText

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(PythonText().documents(), vocab_size=8192, show_progress=False)
    tokenizer.save(str(path))


def prepare(text: Path, tokenizer: str, cache: str, n_processes: int) -> dict[str, float]:
    """Tokenise the text as `llm-train prepare` does, and return the figures."""
    from datamodules.decoder_pretrain.data import PretrainDataModule
    from datamodules.sources import TextFiles

    data = PretrainDataModule(TextFiles(str(text)), 1024, 8, tokenizer, cache_dir=cache)
    data.n_processes = n_processes
    assert data.vocab_size > 1
    memory = Memory()
    before = memory.now()
    memory.start()
    start = time.perf_counter()
    data.prepare_data()
    seconds = time.perf_counter() - start
    data.setup("fit")
    tokens = sum(file.n_tokens for file in data.files.values())
    return {"seconds": seconds, "tokens": tokens, "before": before, "peak": memory.peak}


def run_alone(function: Callable[..., Any], *args: object) -> Any:
    """Call a function in a new process, so that each has its own peak of memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def main() -> None:
    """Measure each tokenizer in its own process, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text, bpe = Path(folder, "text.txt"), Path(folder, "tokenizer.json")
        run_alone(write_text, text, int(options.gigabytes * 1e9))
        run_alone(write_tokenizer, bpe)
        size = text.stat().st_size / 1e6
        print("| tokenizer | text (MB) | tokens (million) | seconds | MB/s | memory before (MiB) | peak memory (MiB) |")
        print("|---|---|---|---|---|---|---|")
        for name, tokenizer in (("byte", "byte"), ("character", "character"), ("BPE, 8,192", str(bpe))):
            with tempfile.TemporaryDirectory(dir=folder) as cache:
                result = run_alone(prepare, text, tokenizer, cache, options.processes)
            print(
                f"| {name} | {size:.0f} | {result['tokens'] / 1e6:.0f} | {result['seconds']:.0f} "
                f"| {size / result['seconds']:.1f} | {result['before']:.0f} | {result['peak']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
