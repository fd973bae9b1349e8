"""The order and the reading of 10 billion and of 1 trillion tokens, which need no tokens: the files are empty pages.

Run `python tests/decoder_pretrain/benchmarks/large_corpora.py`: it prints a Markdown table, in a few seconds of
processor time. Times are of one process, the best of 20.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from datamodules.sources import MOST_PARTS
from datamodules.token_cache import prepared
from datamodules.token_files import TokenFile, TokenFiles
from datamodules.windows import TokenWindows, mixed_windows, sequential_windows

BLOCK, BATCH = 1024, 64
A_PART = 20_000_000  # tokens of a part of 10 billion


def milliseconds(function: Callable[[], object], tries: int = 20) -> float:
    """Return the processor time of the fastest of several calls."""
    times = []
    for _ in range(tries):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return 1e3 * min(times)


def write_parts(folder: Path) -> None:
    """Write prepared parts of 10 billion tokens, all zero, which take no room."""
    tokens = {"train": A_PART, "val": 0, "test": 0}
    for number in range(MOST_PARTS):
        part = folder / f"{number:05d}"
        part.mkdir()
        for side, n in tokens.items():
            with open(part / f"{side}.bin", "wb") as file:
                file.truncate(2 * n)
    total = tokens | {"train": A_PART * MOST_PARTS}
    places = {side: (side, 0) for side in tokens}
    meta = {"dtype": "uint16", "tokens": total, "split": "", "parts": [tokens] * MOST_PARTS, "places": places}
    (folder / "meta.json").write_text(json.dumps(meta))


def main() -> None:
    """Measure, and print the table."""
    print(f"| windows of {BLOCK:,} tokens, batches of {BATCH} | 10 billion tokens | 1 trillion tokens |\n|---|---|---|")
    sizes = (10**10, 10**12)
    whole = [sequential_windows(n, BLOCK, seed=0) for n in sizes]
    mixed = [mixed_windows([n * 8 // 10, n * 2 // 10], [8, 2], BLOCK, seed=0) for n in sizes]
    print(f"| windows in an epoch | {' | '.join(f'{n:,}' for n, _ in whole)} |")
    (n, small), (_, large) = whole
    in_memory, lazy = small(0), large(0)
    assert isinstance(in_memory, torch.Tensor)
    assert not isinstance(lazy, torch.Tensor)
    once = milliseconds(lambda: small(0), 3) / 1e3
    a_batch = milliseconds(lambda: lazy[10**8 : 10**8 + BATCH])
    print(f"| order of an epoch | {once:.1f} s once, {8 * n / 1e6:.0f} MB | {a_batch:.2f} ms a batch, no memory |")
    of_mixtures = [order(0) for _, order in mixed]
    times = [milliseconds(lambda order=order: order[10**6 : 10**6 + BATCH]) for order in of_mixtures]
    print(f"| order of a mixture of two texts, a batch | {times[0]:.2f} ms | {times[1]:.2f} ms |")
    with tempfile.TemporaryDirectory() as folder:
        write_parts(Path(folder))
        found = milliseconds(lambda: prepared(Path(folder)))
        files = prepared(Path(folder))["train"]
        assert isinstance(files, TokenFiles)
        starts = torch.from_numpy(np.random.default_rng(0).integers(files.n_tokens - BLOCK - 1, size=BATCH))
        lengths = np.ones(2**16, dtype=np.int64)
        every, one = (TokenWindows(file, BLOCK, lengths) for file in (files, files.files[0]))
        assert isinstance(one.file, TokenFile)
        times = [milliseconds(lambda: every[starts]), milliseconds(lambda: one[starts % (A_PART - BLOCK)])]
    print(f"| {MOST_PARTS} prepared parts found at the start of a run | {found:.0f} ms | as many parts |")
    print(f"| a batch from {MOST_PARTS} files, pages in memory (of one file) | {times[0]:.1f} ms ({times[1]:.1f}) | |")


if __name__ == "__main__":
    main()
