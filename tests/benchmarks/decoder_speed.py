"""Training speed of our decoder, of Hugging Face's GPT2LMHeadModel (sdpa) and of the modern decoder, on this CPU.

Run `python tests/benchmarks/decoder_speed.py`, which prints two Markdown tables: our decoder against GPT2LMHeadModel of
the same size and weights, and the modern decoder against ours of about as many weights. Both models of a row train in
the same bare loop (forward pass, cross entropy, backward pass, clipping, fused AdamW) with the same data. Short rounds
alternate, so that other load on the machine affects both; the figures are medians over the rounds.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

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

MODERN = {
    "positions": "rotary",
    "norm": "rms_unweighted",
    "embedding_norm": True,
    "qk_norm": True,
    "feed_forward": "relu2",
    "bias": False,
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


def compare(one: Callable[[], None], other: Callable[[], None]) -> tuple[float, float, float]:
    """Return the median seconds of both steps, and the median of the ratio of the second to the first in a round."""
    steps = [one, other]
    end = time.perf_counter() + SECONDS_PER_SIZE
    for step in steps:  # warm-up
        seconds(step, 2)
    n_steps = max(1, round(SECONDS_PER_ROUND / seconds(one, 2)))
    rounds = []
    while time.perf_counter() < end or len(rounds) < 2:
        order = (0, 1) if len(rounds) % 2 == 0 else (1, 0)  # the first model of a round alternates too
        measured = {which: seconds(steps[which], n_steps) for which in order}
        rounds.append((measured[0], measured[1]))
    medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
    return medians[0], medians[1], statistics.median(second / first for first, second in rounds)


def hugging_face(ours: Decoder) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Return GPT2LMHeadModel with the weights of our decoder, and the function that computes its logits."""
    config = GPT2Config(**gpt2_config(ours.config))
    theirs = GPT2LMHeadModel._from_config(config, attn_implementation="sdpa").train()
    theirs.load_state_dict(to_gpt2_state_dict(ours))
    return theirs, lambda input_ids: theirs(input_ids, use_cache=False).logits


def modern(ours: Decoder) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Return a decoder of nanochat's parts of the same width and depth, and itself as the function of its logits."""
    decoder = Decoder(replace(ours.config, **MODERN))
    initialization.gpt2(decoder)
    return decoder, decoder


def main() -> None:
    """Measure each size, and print the tables."""
    torch.set_num_threads(N_THREADS)
    print(f"torch {torch.__version__}, {N_THREADS} threads")
    tables = (("ours", "GPT2LMHeadModel", hugging_face, False), ("GPT-2's parts", "modern", modern, True))
    for first, second, build, inverse in tables:
        ratio_of = f"{second} / {first}" if inverse else f"{first} / {second}"
        print(f"\n| size | {first}, tokens/s | {second}, tokens/s | {ratio_of} |")
        print("|---|---:|---:|---:|")
        for name, (config, batch_size) in SIZES.items():
            torch.manual_seed(0)
            ours = Decoder(config)
            initialization.gpt2(ours)
            tokens = torch.randint(config.vocab_size, (batch_size, config.block_size + 1))
            one, other, ratio = compare(make_step(ours, ours, tokens), make_step(*build(ours), tokens))
            n_tokens = batch_size * config.block_size
            ratio = 1 / ratio if inverse else ratio
            print(f"| {name} | {n_tokens / one:,.0f} | {n_tokens / other:,.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
