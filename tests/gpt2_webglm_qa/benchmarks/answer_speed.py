"""Measure the cache of keys and values: tokens per second of batched answers with and without it, alternating.

A model of the size of GPT-2 small with random weights answers eight prompts with 128 tokens each.

    python tests/gpt2_webglm_qa/benchmarks/answer_speed.py
"""

import statistics
import time

import torch

from lightning_modules.gpt2_webglm_qa.module import GPT2WebGLMQAModule

VOCAB_SIZE, BATCH_SIZE, LONGEST_PROMPT, NEW_TOKENS, ROUNDS = 50257, 8, 64, 128, 2


def main() -> None:
    """Print a table."""
    torch.manual_seed(0)
    module = GPT2WebGLMQAModule("none", VOCAB_SIZE, 1024, {"model_type": "gpt2", "vocab_size": VOCAB_SIZE})
    lengths = torch.linspace(LONGEST_PROMPT // 2, LONGEST_PROMPT, BATCH_SIZE).int().tolist()
    prompts = [torch.randint(VOCAB_SIZE, (length,)).numpy() for length in lengths]
    module.answer(prompts, 2, end=VOCAB_SIZE - 1)  # warm-up

    answers, speeds = {}, {"cached": [], "uncached": []}
    for _ in range(ROUNDS):
        for name in speeds:
            started = time.perf_counter()
            answers[name] = module.answer(prompts, NEW_TOKENS, end=VOCAB_SIZE - 1, use_cache=name == "cached")
            speeds[name].append(sum(map(len, answers[name])) / (time.perf_counter() - started))
    ratios = [cached / uncached for cached, uncached in zip(*speeds.values(), strict=True)]
    print("| | tokens per second | |\n|---|---|---|")
    for name, measured in speeds.items():
        print(f"| {name} | {statistics.median(measured):.1f} | {', '.join(f'{speed:.1f}' for speed in measured)} |")
    print(f"\nMedian ratio: {statistics.median(ratios):.1f}")
    print(f"The same tokens: {answers['cached'] == answers['uncached']}")


if __name__ == "__main__":
    main()
