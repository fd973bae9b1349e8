"""Time of a step and peak memory with the first half of a model frozen, compared with training all of it.

Run `python tests/benchmarks/freeze_speed.py`: it takes about two minutes and prints a Markdown table. The first half is
the embeddings and half of the layers. Both arms train on the same batches with the same clipping and fused AdamW, in
short alternating rounds, so that other load on the machine affects both. Times are medians over the rounds. Peak memory
is measured in a process of its own, as the increase over the memory before the model is built.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import GPT2Config

from lightning_modules.finetuning.causal_lm import FineTunedCausalLM
from lightning_modules.finetuning.freeze import Freeze
from lightning_modules.metrics import next_token_loss

N_THREADS = 2
SECONDS_PER_ROUND = 1.0  # of one arm; a round has at least one step
SECONDS_PER_SIZE = 60.0

SIZES = {  # name: vocabulary, layers, heads, width, block, batch
    "the base of `offline.yaml`": (8192, 4, 4, 128, 128, 4),
    "12 layers, 384 wide": (8192, 12, 6, 384, 128, 4),
}


def make_step(size: tuple[int, ...], frozen: bool) -> Callable[[], None]:
    """Return a function without arguments that makes one optimiser step."""
    vocabulary, n_layer, n_head, width, block, batch = size
    shape = {"vocab_size": vocabulary, "n_positions": block, "n_embd": width, "n_layer": n_layer, "n_head": n_head}
    config = GPT2Config(**shape, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    module = FineTunedCausalLM("", vocabulary, block, architecture=config.to_dict())
    if frozen:
        Freeze(embeddings=True, layers=":50%").setup(None, module, "fit")
    module.optimizer_factory = partial(torch.optim.AdamW, lr=1e-4, fused=True)
    optimizer = module.configure_optimizers()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    tokens = torch.randint(vocabulary, (batch, block + 1))

    def step() -> None:
        logits = module.model(tokens[:, :-1], use_cache=False).logits
        next_token_loss(logits, tokens[:, 1:]).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds(step: Callable[[], None], n_steps: int) -> float:
    """Return the mean time of a step in seconds, over `n_steps` steps."""
    start = time.perf_counter()
    for _ in range(n_steps):
        step()
    return (time.perf_counter() - start) / n_steps


def rounds_in_turn(size: tuple[int, ...]) -> list[tuple[float, float]]:
    """Return for each round the seconds a step with nothing frozen, and with the first half frozen."""
    steps = [make_step(size, frozen) for frozen in (False, True)]
    end = time.perf_counter() + SECONDS_PER_SIZE
    for step in steps:  # warm-up
        seconds(step, 2)
    n_steps = max(1, round(SECONDS_PER_ROUND / seconds(steps[0], 2)))
    rounds = []
    while time.perf_counter() < end or len(rounds) < 3:
        order = (0, 1) if len(rounds) % 2 == 0 else (1, 0)  # the order alternates too
        measured = {which: seconds(steps[which], n_steps) for which in order}
        rounds.append((measured[0], measured[1]))
    return rounds


def memory_mib(field: str) -> float:
    """Return the resident memory of this process in MiB, now (`VmRSS`) or at its peak (`VmHWM`). Linux only."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) / 1024


def peak_memory(size: tuple[int, ...], frozen: bool) -> float:
    """Return the increase of the memory of this process during three steps, at its peak, in MiB."""
    torch.set_num_threads(N_THREADS)
    before = memory_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which is that of the imports
    step = make_step(size, frozen)
    for _ in range(3):
        step()
    return memory_mib("VmHWM") - before


def main() -> None:
    """Run the benchmark and print the table."""
    torch.set_num_threads(N_THREADS)
    print(f"torch {torch.__version__}, {N_THREADS} threads\n")
    print(
        "| model | frozen | ms a step | ratio | range of the ratios | peak memory, MiB |\n|---|---|---:|---:|---:|---:|"
    )
    for name, size in SIZES.items():
        peaks = []
        for frozen in (False, True):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peaks.append(pool.apply(peak_memory, (size, frozen)))
        rounds = rounds_in_turn(size)
        everything, half = (1000 * statistics.median(column) for column in zip(*rounds, strict=True))
        ratios = sorted(frozen / trained for trained, frozen in rounds)
        print(f"| {name} | nothing | {everything:.0f} | | | {peaks[0]:.0f} |")
        print(
            f"| | first half | {half:.0f} | {statistics.median(ratios):.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f} "
            f"| {peaks[1]:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
