"""The compiled loss: one graph whatever else a run does, the weights of an eager run, and an exact resume.

The backend of most tests is `aot_eager`, which traces forward and backward pass as the others do, and compiles nothing.
"""

import signal
from types import SimpleNamespace

import forks
import lightning as L
import pytest
import torch
from helpers import LAST, RUNS, assert_close_weights, assert_same_weights
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader

from lightning_modules.base import ExperimentModule, Loss

SAMPLES = {
    "class_path": "lightning_modules.runtime.samples.SampleText",
    "init_args": {"prompts": ["a"], "max_new_tokens": 20},
}


@pytest.fixture
def counter(monkeypatch) -> CompileCounterWithBackend:
    """Use a backend that counts the graphs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(ExperimentModule, "compile_backend", counter)
    return counter


def test_samples_validations_and_a_resume_compile_nothing_again(llm_train, forked, tiny, counter):
    """Epochs of 7 batches, the last of them small; a validation every 4 steps."""
    settings = {
        "model__init_args__compile": True,
        "trainer__limit_train_batches": 7,
        "trainer__val_check_interval": 4,
        "trainer__callbacks+": [SAMPLES],
    }
    config, eager = tiny(**settings), tiny("eager", **settings | {"model__init_args__compile": False})
    assert llm_train("fit", "-c", eager).code == 0
    assert counter.frame_count == 0
    whole = llm_train("fit", "-c", config, "--run.name", "whole")
    assert whole.code == 0, whole.err
    assert counter.frame_count == 1
    assert_close_weights(RUNS / "whole" / LAST, RUNS / "eager" / LAST)
    killed = forked("fit", "-c", config, "--run.name", "killed", prepare=lambda: forks.signal_after_step(10))
    assert killed == -signal.SIGKILL
    assert llm_train("fit", "-c", config, "--run.name", "killed", "--ckpt_path", "last").code == 0
    assert counter.frame_count == 1  # this process has compiled the function before
    assert_same_weights(RUNS / "whole" / LAST, RUNS / "killed" / LAST)


class Sum(ExperimentModule):
    """The loss of a row of any length."""

    varying_sizes = {"x": 1}  # noqa: RUF012

    def __init__(self, compile: bool = True) -> None:
        super().__init__(compile)
        self.linear = nn.Linear(1, 1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def loss(self, batch: dict[str, Tensor]) -> Loss:
        total = nn.functional.dropout(self.linear(batch["x"][..., None]), 0.5, self.training).square().sum()
        return Loss(total, total / batch["x"].numel(), torch.tensor(1.0))


def rows(*lengths: int) -> DataLoader:
    return DataLoader([{"x": torch.ones(n)} for n in lengths], batch_size=1)


def fit(module: ExperimentModule, data: DataLoader, **arguments: object) -> L.Trainer:
    settings = {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(**settings | {"logger": False, "enable_checkpointing": False} | arguments)
    trainer.fit(module, data)
    return trainer


def test_sizes_that_vary_are_variables(counter):
    trainer = fit(Sum(), rows(5, 3, 9, 4), log_every_n_steps=1)
    assert counter.frame_count == 1
    assert trainer.callback_metrics["train/loss"] > 0


def test_accumulation_and_frozen_weights_compile_once(counter):
    module = Sum()
    module.linear.bias.requires_grad_(False)
    fit(module, rows(5, 3, 9), accumulate_grad_batches=2)
    assert counter.frame_count == 1


def test_the_modes_are_those_of_torch(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: calls.append(options) or function)
    for mode in (True, "reduce-overhead", "max-autotune"):
        fit(Sum(mode), rows(2))
    assert [options.get("mode") for options in calls] == [None, "reduce-overhead", "max-autotune"]
    assert {options["backend"] for options in calls} == {"inductor"}


@pytest.mark.parametrize(
    ("mode", "batches", "kept"), [("reduce-overhead", 2, True), (True, 2, False), (True, 1, False)]
)
def test_accumulated_gradients_of_cuda_graphs_have_memory_of_their_own(mode, batches, kept):
    module = Sum(mode)
    module.trainer = SimpleNamespace(accumulate_grad_batches=batches)
    optimizer = module.configure_optimizers()
    for _ in range(2):  # before the first step, and after one
        gradient = module.linear.weight.grad
        module.optimizer_zero_grad(0, 0, optimizer)
        found = module.linear.weight.grad
        assert (found is not None) == kept
        assert not kept or (found.item() == 0 and (gradient is None or found is gradient))
        module.linear.weight.grad = torch.ones(1, 1) if found is None else found.add_(1)


def test_a_cpu_without_a_compiler_is_one_line(llm_train, tiny):
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        done = llm_train("fit", "-c", tiny(model__init_args__compile=True))
    assert done.code == 1
    assert "needs a C++ compiler" in done.err.strip().splitlines()[-1]
