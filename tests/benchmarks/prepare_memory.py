"""Time and peak memory of tokenising a large text into the cache.

Run `python tests/benchmarks/prepare_memory.py [--gigabytes 1]`, which prints a Markdown table. The text is one file of
lines of the Python source of this machine, in random order. The benchmark needs three times its size on the disk, and
deletes all files at the end.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def peak_mib() -> float:
    """Return the peak resident memory of this process in MiB (Linux only)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("no VmHWM in /proc/self/status")


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


def prepare(text: Path, tokenizer: str, cache: Path) -> None:
    """Tokenise the text as a training run does, and print the figures as JSON."""
    from datamodules.decoder_pretrain.data import PretrainDataModule
    from datamodules.sources import TextFiles

    data = PretrainDataModule(TextFiles(str(text)), 1024, 8, tokenizer, cache_dir=str(cache))
    assert data.vocab_size > 1
    imports = peak_mib()
    start = time.perf_counter()
    data.prepare_data()
    seconds = time.perf_counter() - start
    data.setup("fit")
    tokens = sum(file.n_tokens for file in data.files.values())
    print(json.dumps({"seconds": seconds, "tokens": tokens, "imports": imports, "peak": peak_mib()}))


def main() -> None:
    """Measure each tokenizer in its own process, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        name, *rest = options.step
        steps = {
            "text": lambda path, size: write_text(Path(path), int(size)),
            "tokenizer": lambda path: write_tokenizer(Path(path)),
            "prepare": lambda text, tokenizer, cache: prepare(Path(text), tokenizer, Path(cache)),
        }
        return steps[name](*rest)

    def run(*step: str) -> str:
        return subprocess.run(
            [sys.executable, __file__, "--step", *step], check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    with tempfile.TemporaryDirectory() as folder:
        text, bpe = Path(folder, "text.txt"), Path(folder, "tokenizer.json")
        run("text", str(text), str(int(options.gigabytes * 1e9)))
        run("tokenizer", str(bpe))
        size = text.stat().st_size / 1e6
        print("| tokenizer | text (MB) | tokens (million) | seconds | MB/s | memory before (MiB) | peak memory (MiB) |")
        print("|---|---|---|---|---|---|---|")
        for name, tokenizer in (("byte", "byte"), ("character", "character"), ("BPE, 8,192", str(bpe))):
            with tempfile.TemporaryDirectory(dir=folder) as cache:
                result = json.loads(run("prepare", str(text), tokenizer, cache))
            print(
                f"| {name} | {size:.0f} | {result['tokens'] / 1e6:.0f} | {result['seconds']:.0f} "
                f"| {size / result['seconds']:.1f} | {result['imports']:.0f} | {result['peak']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
