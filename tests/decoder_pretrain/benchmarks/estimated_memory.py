"""The memory that `llm-train estimate` computes against measured memory: of processes on the CPU, and of recorded runs.

    python tests/decoder_pretrain/benchmarks/estimated_memory.py

Two steps of a decoder are trained in a process of its own. Its peak resident memory minus that before the model is
built is compared with the estimate. glibc keeps freed memory for later, which the step does not need, so the processes
get MALLOC_MMAP_THRESHOLD_=65536, with which large tensors are given back; the last column is without it.
"""

import argparse
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from lightning_modules.base import ExperimentModule
from lightning_modules.decoder_pretrain import PretrainModule
from lightning_modules.runtime import private_names
from lightning_modules.runtime.step_memory import step_memory

MIB = 2**20
CPU = {  # batch size, block size, layers, width, vocabulary, precision
    "25 M weights, 16 x 256 tokens, float32": (16, 256, 8, 512, 257, "32-true"),
    "25 M weights, 16 x 256 tokens, bfloat16": (16, 256, 8, 512, 257, "bf16-mixed"),
    "29 M weights, 8 x 512 tokens, float32": (8, 512, 8, 512, 8192, "32-true"),
}
# Recorded in experiments/trainer/README.md: on one H200, compiled, MiB of tensors on the GPU.
GPU = {
    "GPT-2 small, 64 x 1,024 tokens": ((64, 1024, 12, 768, 50257, "bf16-mixed"), 19.9 * 1024),
    "10.7 M weights, 64 x 256 characters": ((64, 256, 6, 384, 65, "bf16-mixed"), 1.37 * 1024),
}


def build(sizes: tuple[int, ...], compile: bool) -> ExperimentModule:
    """Return a decoder with AdamW."""
    _, block_size, n_layer, width, vocabulary = sizes
    module = PretrainModule(
        vocabulary, block_size, n_layer, width // 64, width, vocab_multiple=64 if compile else 1, compile=compile
    )
    module.optimizer_factory = torch.optim.AdamW
    return module


def estimated(case: tuple, compile: bool = False) -> float:
    """Return the estimate for a case, in MiB."""
    with private_names.without_data():
        batch = {name: torch.zeros(case[0], case[1], dtype=torch.int64) for name in ("input_ids", "targets")}
        return step_memory(build(case[:5], compile), batch, case[5]).total / MIB


def train(case: tuple) -> float:
    """Return the memory that training two steps takes in this process, in MiB."""
    torch.set_num_threads(1)
    before = 0.0
    for sizes in ((1, 8, 1, 64, 64), case[:5]):  # first a small one, which imports and starts what there is
        module, batch_size, block_size, vocabulary = build(sizes, False), sizes[0], sizes[1], sizes[4]
        optimizer = module.optimizer_factory(module.parameters())
        for _ in range(2):
            batch = {name: torch.randint(vocabulary, (batch_size, block_size)) for name in ("input_ids", "targets")}
            with torch.autocast("cpu", torch.bfloat16, enabled=case[5] == "bf16-mixed"):
                loss = module.loss(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / MIB
        before = before or resident
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


def measured(name: str, **environment: str) -> float:
    """Return the memory that a process of its own takes for a case."""
    words = [sys.executable, __file__, "--train", name]
    done = subprocess.run(words, env=os.environ | environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--train", choices=CPU)
    if name := parser.parse_args().train:
        print(train(CPU[name]))
        return
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    print(f"{'MiB':<42}{'estimated':>10}{'measured':>10}{'ratio':>7}{'with the heap of glibc':>25}")
    for name, case in CPU.items():
        found, taken = estimated(case), measured(name, MALLOC_MMAP_THRESHOLD_="65536")
        print(f"{name:<42}{found:>10,.0f}{taken:>10,.0f}{found / taken:>7.2f}{measured(name):>25,.0f}", flush=True)
    for name, (case, taken) in GPU.items():
        found = estimated(case, compile=True)
        print(f"{name:<42}{found:>10,.0f}{taken:>10,.0f}{found / taken:>7.2f}", flush=True)


if __name__ == "__main__":
    main()
