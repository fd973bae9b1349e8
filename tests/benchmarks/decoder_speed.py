"""Training speed of our decoder and of Hugging Face's GPT2LMHeadModel (sdpa) of the same size, on this CPU.

Run `python tests/benchmarks/decoder_speed.py`, which prints a Markdown table. Both models train in the same bare loop
(forward pass, cross entropy, backward pass, clipping, fused AdamW) with the same weights and data. Short rounds
alternate, so that other load on the machine affects both; the figures are medians over the rounds.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_modules.models import initialization
from lightning_modules.models.decoder import Decoder, DecoderConfig
from lightning_modules.models.gpt2_format import gpt2_config, to_gpt2_state_dict

N_THREADS = 2
SECONDS_PER_ROUND = 0.5  # of one model; at least one step
SECONDS_PER_SIZE = 40.0

SIZES = {  # name: configuration, batch size
    "nanoGPT's CPU size": (DecoderConfig(vocab_size=65, block_size=64, n_layer=4, n_head=4, n_embd=128), 12),
    "6 layers, 192 wide": (DecoderConfig(vocab_size=1024, block_size=128, n_layer=6, n_head=6, n_embd=192), 16),
}


def make_step(model: nn.Module, logits: Callable[[Tensor], Tensor], tokens: Tensor) -> Callable[[], None]:
    """Return a function that makes one optimiser step of `model`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()

    def step() -> None:
        loss = F.cross_entropy(logits(inputs).flatten(0, 1), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds(step: Callable[[], None], n_steps: int) -> float:
    """Return the mean seconds of `n_steps` steps."""
    start = time.perf_counter()
    for _ in range(n_steps):
        step()
    return (time.perf_counter() - start) / n_steps


def compare(config: DecoderConfig, batch_size: int) -> tuple[float, float, float]:
    """Return our tokens per second, those of Hugging Face, and the median ratio over the rounds."""
    torch.manual_seed(0)
    ours = Decoder(config)
    initialization.gpt2(ours)
    theirs = GPT2LMHeadModel._from_config(GPT2Config(**gpt2_config(config)), attn_implementation="sdpa").train()
    theirs.load_state_dict(to_gpt2_state_dict(ours))
    tokens = torch.randint(config.vocab_size, (batch_size, config.block_size + 1))
    steps = [
        make_step(ours, ours, tokens),
        make_step(theirs, lambda input_ids: theirs(input_ids, use_cache=False).logits, tokens),
    ]
    end = time.perf_counter() + SECONDS_PER_SIZE
    for step in steps:  # warm-up
        seconds(step, 2)
    n_steps = max(1, round(SECONDS_PER_ROUND / seconds(steps[0], 2)))
    rounds = []
    while time.perf_counter() < end or len(rounds) < 2:
        order = (0, 1) if len(rounds) % 2 == 0 else (1, 0)  # the first model of a round alternates too
        measured = {which: seconds(steps[which], n_steps) for which in order}
        rounds.append((measured[0], measured[1]))
    n_tokens = batch_size * config.block_size
    speeds = [n_tokens / statistics.median(column) for column in zip(*rounds, strict=True)]
    return speeds[0], speeds[1], statistics.median(theirs / ours for ours, theirs in rounds)


def main() -> None:
    """Measure each size, and print the table."""
    torch.set_num_threads(N_THREADS)
    print(f"torch {torch.__version__}, {N_THREADS} threads\n")
    print("| size | ours, tokens/s | GPT2LMHeadModel, tokens/s | ratio |")
    print("|---|---:|---:|---:|")
    for name, (config, batch_size) in SIZES.items():
        ours, theirs, ratio = compare(config, batch_size)
        print(f"| {name} | {ours:,.0f} | {theirs:,.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
