"""Compare batched answers with Transformers' own `generate`: tokens per second, alternating.

A model of the size of GPT-2 small with random weights answers eight prompts with 128 tokens each.

    python tests/gpt2_webglm_qa/benchmarks/answer_speed.py
"""

import statistics
import time

import numpy as np
import torch

from lightning_modules.gpt2_webglm_qa.module import GPT2WebGLMQAModule

VOCAB_SIZE, BATCH_SIZE, LONGEST_PROMPT, NEW_TOKENS, ROUNDS = 50257, 8, 64, 128, 2


def main() -> None:
    """Print a table."""
    torch.manual_seed(0)
    module = GPT2WebGLMQAModule("none", VOCAB_SIZE, 1024, {"model_type": "gpt2", "vocab_size": VOCAB_SIZE})
    lengths = torch.linspace(LONGEST_PROMPT // 2, LONGEST_PROMPT, BATCH_SIZE).int().tolist()
    prompts = [torch.randint(VOCAB_SIZE - 1, (length,)).numpy() for length in lengths]
    module.answer(prompts, 2, end=VOCAB_SIZE - 1)  # warm-up

    def by_transformers(prompts: list[np.ndarray], max_new_tokens: int, end: int) -> list[list[int]]:
        """Return what `module.answer` returns."""
        longest = max(map(len, prompts))
        input_ids = torch.tensor([[end] * (longest - len(prompt)) + prompt.tolist() for prompt in prompts])
        output = module.model.eval().generate(
            input_ids,
            attention_mask=(input_ids != end).long(),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )
        answers = output[:, longest:].tolist()
        return [answer[: answer.index(end) + 1] if end in answer else answer for answer in answers]

    answers: dict[str, list[list[int]]] = {}
    speeds: dict[str, list[float]] = {"this project": [], "Transformers": []}
    for _ in range(ROUNDS):
        for name in speeds:
            started = time.perf_counter()
            answer = module.answer if name == "this project" else by_transformers
            answers[name] = answer(prompts, NEW_TOKENS, end=VOCAB_SIZE - 1)
            speeds[name].append(sum(map(len, answers[name])) / (time.perf_counter() - started))
    ratios = [own / other for own, other in zip(*speeds.values(), strict=True)]
    print("| | tokens per second | |\n|---|---|---|")
    for name, measured in speeds.items():
        print(f"| {name} | {statistics.median(measured):.1f} | {', '.join(f'{speed:.1f}' for speed in measured)} |")
    print(f"\nMedian ratio: {statistics.median(ratios):.1f}")
    print(f"The same tokens: {answers['this project'] == answers['Transformers']}")


if __name__ == "__main__":
    main()
