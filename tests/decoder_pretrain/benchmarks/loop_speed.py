"""The cost of the framework: steps per second of a bare PyTorch loop, of Lightning, and of `llm-train fit`.

Run `python tests/decoder_pretrain/benchmarks/loop_speed.py`, which prints a Markdown table. All three train the decoder
of `char_shakespeare_cpu.yaml` on random windows of the same generated text, with the same fused AdamW, schedule and
gradient clipping, in turn in one process. Lightning has no loggers and one callback, that of the clock; `fit` has the
default callbacks and loggers (W&B offline).

Of the 1.5 to 2 ms that a step of 29 ms takes longer in `fit` than in a bare loop (two idle cores, 2026-11-27), 0.7 ms
are ours, by the clock around each part: 0.2 ms to read and count the windows, 0.5 ms for hooks of callbacks and for
logging. With a decoder of 1,400 weights, `fit` takes 0.9 ms longer (1.9 against 1.05 ms a step), because Python's data
then stay in the cache of the processor. Four changes made our part faster: seeding the generator of the device in place
of `torch.manual_seed`, which records a stack trace for absent devices (1 ms a step); reading the metrics only when the
progress bar is drawn (0.2 ms, under the profiler); a shortcut for the attribute that Lightning sets forty times a step
(0.2 ms); and logging every 20 steps in place of 10. A profiler without a context of its own at each hook, tried through
`trainer.profiler`, saves another 0.1 ms and was left out.
"""

import contextlib
import io
import logging
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from experiments.__main__ import main
from lightning_modules.models import initialization
from lightning_modules.models.decoder import Decoder, DecoderConfig
from lightning_modules.optim import weight_decay_groups
from lightning_modules.optim.schedules import Cosine

CONFIG = Path(__file__).parents[3] / "experiments/decoder_pretrain/char_shakespeare_cpu.yaml"
ROUNDS, STEPS, WARMUP = 9, 350, 50
BATCH, BLOCK = 12, 64


def write_text(path: Path) -> None:
    """Write a million random characters of 65 kinds."""
    draw = random.Random(0)
    letters = "".join(map(chr, range(32, 32 + 65)))
    path.write_text("".join(draw.choices(letters, k=1_000_000)))


class Windows(IterableDataset):
    """Batches of random windows of a text: inputs and targets, each (B, T) int64."""

    def __init__(self, path: Path) -> None:
        text = path.read_text()
        ids = {character: i for i, character in enumerate(sorted(set(text)))}
        self.tokens, self.vocab_size = torch.tensor([ids[character] for character in text]), len(ids)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches without end."""
        while True:
            starts = torch.randint(len(self.tokens) - BLOCK - 1, (BATCH,)).tolist()
            yield tuple(torch.stack([self.tokens[s + k : s + k + BLOCK] for s in starts]) for k in (0, 1))


class Plain(L.LightningModule):
    """The same training step as that of `fit`, with nothing of ours but the decoder, its groups and the schedule."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.decoder = Decoder(DecoderConfig(vocab_size, BLOCK, n_layer=4, n_head=4, n_embd=128, bias=False))
        initialization.gpt2(self.decoder)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss of a batch."""
        inputs, targets = batch
        return F.cross_entropy(self.decoder(inputs).flatten(0, 1), targets.flatten())

    def configure_optimizers(self) -> dict:
        """Return the optimiser and the schedule of `char_shakespeare_cpu.yaml`."""
        optimizer = torch.optim.AdamW(
            weight_decay_groups(self.decoder), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True
        )
        schedule = Cosine(optimizer, STEPS, warmup=100, final=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def bare_steps_per_second(path: Path) -> float:
    """Return the steps per second of a training loop without a framework."""
    torch.manual_seed(0)
    windows = Windows(path)
    module = Plain(windows.vocab_size)
    made = module.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    parameters = list(module.parameters())
    for step, batch in zip(range(STEPS), windows, strict=False):
        if step == WARMUP:
            began = time.perf_counter()
        loss = module.training_step(batch)
        optimizer.zero_grad()
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


def lightning_steps_per_second(path: Path) -> float:
    """Return the steps per second of Lightning's trainer alone."""
    torch.manual_seed(0)
    windows = Windows(path)
    off = {"logger": False} | {f"enable_{part}": False for part in ("checkpointing", "progress_bar", "model_summary")}
    trainer = L.Trainer(accelerator="cpu", max_steps=STEPS, gradient_clip_val=1.0, callbacks=[Stopwatch()], **off)
    trainer.fit(Plain(windows.vocab_size), DataLoader(windows, batch_size=None))
    return (STEPS - WARMUP) / Stopwatch.seconds


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
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["LLM_TRAIN_CACHE"] = folder
        write_text(Path("text.txt"))
        bare_steps_per_second(Path("text.txt"))  # the first loop of a process is slower
        rows = [
            [
                measure(Path("text.txt"))
                for measure in (bare_steps_per_second, lightning_steps_per_second, fit_steps_per_second)
            ]
            for _ in range(ROUNDS)
        ]
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {STEPS - WARMUP} steps a round\n")
    print("| round | bare loop, steps/s | Lightning alone | llm-train fit | Lightning / bare | fit / bare |")
    print("|---|---|---|---|---|---|")
    for number, (bare, alone, fit) in enumerate(rows, start=1):
        print(f"| {number} | {bare:.1f} | {alone:.1f} | {fit:.1f} | {alone / bare:.3f} | {fit / bare:.3f} |")
    medians = [statistics.median(row[k] / row[0] for row in rows) for k in (1, 2)]
    print("\nMedian ratios: Lightning alone {:.3f}, llm-train fit {:.3f}".format(*medians))
