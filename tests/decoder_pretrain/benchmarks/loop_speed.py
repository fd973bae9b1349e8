"""The cost of the framework: steps per second of `llm-train fit` and of a bare PyTorch loop, in turn in one process.

Run `python tests/decoder_pretrain/benchmarks/loop_speed.py`, which prints a Markdown table. Both train the decoder of
`char_shakespeare_cpu.yaml` on random windows of the same generated text, with the same fused AdamW, schedule and
gradient clipping. `fit` has the default callbacks and loggers (W&B offline).
"""

import contextlib
import io
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F

from experiments.__main__ import main
from lightning_modules.models import initialization
from lightning_modules.models.decoder import Decoder, DecoderConfig
from lightning_modules.optim import weight_decay_groups
from lightning_modules.optim.schedules import Cosine

CONFIG = Path(__file__).parents[3] / "experiments/decoder_pretrain/char_shakespeare_cpu.yaml"
ROUNDS, STEPS, WARMUP = 7, 250, 50
BATCH, BLOCK = 12, 64


def write_text(path: Path) -> None:
    """Write a million random characters of 65 kinds."""
    draw = random.Random(0)
    letters = "".join(map(chr, range(32, 32 + 65)))
    path.write_text("".join(draw.choices(letters, k=1_000_000)))


def bare_steps_per_second(path: Path) -> float:
    """Return the steps per second of a training loop without a framework."""
    text = path.read_text()
    ids = {character: i for i, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([ids[character] for character in text])
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(len(ids), BLOCK, n_layer=4, n_head=4, n_embd=128, bias=False))
    initialization.gpt2(decoder)
    optimizer = torch.optim.AdamW(
        weight_decay_groups(decoder), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True
    )
    schedule = Cosine(optimizer, STEPS, warmup=100, final=0.1)
    parameters = list(decoder.parameters())
    for step in range(STEPS):
        if step == WARMUP:
            began = time.perf_counter()
        starts = torch.randint(len(tokens) - BLOCK - 1, (BATCH,)).tolist()
        inputs = torch.stack([tokens[s : s + BLOCK] for s in starts])
        targets = torch.stack([tokens[s + 1 : s + BLOCK + 1] for s in starts])
        loss = F.cross_entropy(decoder(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    return (STEPS - WARMUP) / (time.perf_counter() - began)


class Stopwatch(L.Callback):
    """Callback that times the steps after the warm-up, as the bare loop does."""

    seconds = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Start the clock after the warm-up, and stop it after the last step."""
        if trainer.global_step == WARMUP:
            Stopwatch.began = time.perf_counter()
        elif trainer.global_step == STEPS:
            Stopwatch.seconds = time.perf_counter() - Stopwatch.began


def fit_steps_per_second(path: Path) -> float:
    """Return the steps per second of the command."""
    flags = ["--data.source.paths", str(path), "--trainer.max_steps", str(STEPS), "--trainer.limit_val_batches", "0"]
    flags += ["--trainer.callbacks+", f"{__name__}.Stopwatch"]
    with contextlib.redirect_stderr(io.StringIO()):
        main(["fit", "-c", str(CONFIG), *flags])
    return (STEPS - WARMUP) / Stopwatch.seconds


if __name__ == "__main__":
    os.environ["WANDB_MODE"] = "offline"
    sys.argv = ["llm-train"]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["LLM_TRAIN_CACHE"] = folder
        write_text(Path("text.txt"))
        rows = []
        for _ in range(ROUNDS):
            rows.append((bare_steps_per_second(Path("text.txt")), fit_steps_per_second(Path("text.txt"))))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {STEPS - WARMUP} steps a round\n")
    print("| round | bare loop, steps/s | llm-train fit, steps/s | ratio |\n|---|---|---|---|")
    for number, (bare, fit) in enumerate(rows, start=1):
        print(f"| {number} | {bare:.1f} | {fit:.1f} | {fit / bare:.3f} |")
    print(f"\nMedian ratio: {statistics.median(fit / bare for bare, fit in rows):.3f}")
