"""Training speed of Bengio's network compared with plain PyTorch modules: MLP1, a vocabulary of Brown's size, this CPU.

Run `python tests/bengio_nlm/benchmarks/bengio_speed.py`: about two minutes; it prints a Markdown table. Both networks
have the same weights, the same words and fused AdamW. The plain one is `nn.Embedding`, `nn.Linear` and
`F.cross_entropy`; ours is `BengioNLM.loss`, as `BengioNLMModule` calls it. Both run in float32 and under bfloat16
autocast. They take turns after each step, so that other work on the machine slows down all alike; the figures are
medians.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.bengio_nlm.network import BengioNLM

N_THREADS = 2
VOCAB_SIZE, N, H, M, BATCH_SIZE = 16_487, 5, 50, 60, 1024
EPOCH = 800_000  # words
ROUNDS = 40


class Plain(nn.Module):
    """The same network of standard PyTorch modules."""

    def __init__(self, ours: BengioNLM) -> None:
        super().__init__()
        width = (N - 1) * M
        self.embedding = nn.Embedding(VOCAB_SIZE, M)
        self.hidden = nn.Linear(width, H)
        self.output = nn.Linear(H, VOCAB_SIZE)
        self.direct = nn.Linear(width, VOCAB_SIZE, bias=False)
        with torch.no_grad():
            for mine, theirs in (
                (self.embedding.weight, ours.C), (self.hidden.weight, ours.H), (self.hidden.bias, ours.d),
                (self.output.weight, ours.U), (self.output.bias, ours.b), (self.direct.weight, ours.W),
            ):  # fmt: skip
                mine.copy_(theirs)

    def loss(self, context: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy of targets (B,) for contexts (B, n - 1)."""
        x = torch.cat([self.embedding(context[:, k]) for k in range(N - 1)], dim=1)
        return F.cross_entropy(self.output(torch.tanh(self.hidden(x))) + self.direct(x), targets)


def make_step(model: nn.Module, context: Tensor, targets: Tensor, low: bool) -> Callable[[], float]:
    """Return a function that makes an optimiser step and returns its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = model.loss(context, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def main() -> None:
    """Measure the networks and print the table."""
    torch.set_num_threads(N_THREADS)
    torch.manual_seed(0)
    context = torch.randint(VOCAB_SIZE, (BATCH_SIZE, N - 1))
    targets = torch.randint(VOCAB_SIZE, (BATCH_SIZE,))
    steps = {}
    for precision, low in (("float32", False), ("bfloat16", True)):
        torch.manual_seed(0)
        ours = BengioNLM(VOCAB_SIZE, N, H, M)
        steps[f"plain PyTorch, {precision}"] = make_step(Plain(ours), context, targets, low)
        steps[f"ours, {precision}"] = make_step(ours, context, targets, low)
    losses = {name: [step(), step()][1] for name, step in steps.items()}  # a warm-up too
    assert max(losses.values()) - min(losses.values()) < 0.02, losses
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(ROUNDS):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:  # the first one changes too
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
    print("| network | words per second | an epoch of 800,000 words | speed, plain float32 = 1 |\n|---|---|---|---|")
    for name, measured in seconds.items():
        ratio = statistics.median(p / m for p, m in zip(seconds[names[0]], measured, strict=True))
        speed = BATCH_SIZE / statistics.median(measured)
        print(f"| {name} | {speed:,.0f} | {EPOCH / speed:.0f} s | {ratio:.2f} |")


if __name__ == "__main__":
    main()
