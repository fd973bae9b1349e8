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
from lightning.pytorch.utilities.exceptions import MisconfigurationException
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


@pytest.mark.slow
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


class SumOfOneLength(Sum):
    """The loss of a row of one length."""

    varying_sizes = {}  # noqa: RUF012


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
        fit(SumOfOneLength(mode), rows(2))
    assert [options.get("mode") for options in calls] == [None, "reduce-overhead", "max-autotune"]
    assert {options["backend"] for options in calls} == {"inductor"}


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_are_refused_for_entries_whose_sizes_vary(counter, mode):
    with pytest.raises(MisconfigurationException, match=f"model.compile: {mode} .* sizes of x vary; set it to true"):
        fit(Sum(mode), rows(2))
    assert counter.frame_count == 0


@pytest.mark.parametrize(("mode", "kept"), [("reduce-overhead", True), ("max-autotune", True), (True, False)])
def test_accumulated_gradients_of_cuda_graphs_have_memory_of_their_own(mode, kept):
    module = SumOfOneLength(mode)
    weight, optimizer = module.linear.weight, module.configure_optimizers()
    module.linear.bias.requires_grad = False  # until a later epoch
    for batches in (1, 2, 2, 1, 2):
        module.trainer = SimpleNamespace(accumulate_grad_batches=batches)
        module.optimizer_zero_grad(0, 0, optimizer)
        assert (weight.grad is not None) == (kept and batches > 1)
        assert weight.grad is None or weight.grad.item() == 0
        assert module.linear.bias.grad is None
        # The next forward pass frees the gradient of a graph, which cannot be read any more.
        weight.grad = FreedMemory(torch.ones(1, 1)) if weight.grad is None else weight.grad.add_(1)


class FreedMemory(Tensor):
    """A tensor with which every operation fails."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} reads memory that a CUDA graph has freed")


def test_a_cpu_without_a_compiler_is_one_line(llm_train, tiny):
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        done = llm_train("fit", "-c", tiny(model__init_args__compile=True))
    assert done.code == 1
    assert "needs a C++ compiler" in done.err.strip().splitlines()[-1]
