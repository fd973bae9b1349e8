"""Accumulated gradients: short last steps, float16, and checkpoints between the batches of an optimiser step."""

import os
import signal

import lightning as L
import pytest
import torch
from helpers import LAST, RUNS, assert_same_weights, metrics_that_repeat
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_modules.base import ExperimentModule, Loss
from lightning_modules.runtime.reproducible import ReproducibleSteps

VALUES = torch.arange(1.0, 6.0)  # five batches of one number each


class Product(ExperimentModule):
    """The loss w x of a number x, whose gradient by w is x."""

    def __init__(self, **optimizer: object) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))
        self.settings = {"lr": 1.0} | optimizer
        self.seen: list[float] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.w], **self.settings)

    def loss(self, batch: Tensor) -> Tensor:
        return (self.w * batch).sum()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.seen.append(self.w.grad.tolist())


class Weighted(Product):
    """A loss whose mean in the log is weighted by x."""

    def loss(self, batch: Tensor) -> Loss:
        return Loss(super().loss(batch), mean=batch.sum(), weight=batch.sum())


class Pair(Product):
    """The loss 3 w_1 x + w_2 x."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))

    def loss(self, batch: Tensor) -> Tensor:
        return self.w @ torch.tensor([3.0, 1.0]) * batch.sum()


class Stream(IterableDataset):
    """Batches whose number is not known beforehand."""

    def __iter__(self):
        return iter(VALUES)


def fit(module: Product, data: object = VALUES, **arguments: object) -> L.Trainer:
    settings = {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    settings |= {"logger": False, "enable_checkpointing": False, "log_every_n_steps": 1}
    trainer = L.Trainer(**settings | arguments)
    trainer.fit(module, DataLoader(data))
    return trainer


def test_the_last_step_of_an_epoch_uses_the_mean_of_its_batches():
    module = Product()
    trainer = fit(module, accumulate_grad_batches=4)
    assert module.seen == [2.5, 5.0, 2.5, 5.0]  # the means of 1, 2, 3, 4 and of 5
    assert module.w.item() == -15.0
    assert trainer.callback_metrics["train/grad_norm"].item() == 5.0
    unsized = Product()
    fit(unsized, Stream(), accumulate_grad_batches=2, max_epochs=1)
    assert unsized.seen == [1.5, 3.5, 5.0]


def test_the_logged_loss_is_the_weighted_mean_of_the_batches():
    trainer = fit(Weighted(), accumulate_grad_batches=2, max_steps=1)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx((1 * 1 + 2 * 2) / (1 + 2))


def test_each_entry_of_the_gradient_is_clipped_by_value():
    module = Pair()
    trainer = fit(module, max_steps=1, gradient_clip_val=2.0, gradient_clip_algorithm="value")
    assert module.seen == [[3.0, 1.0]]
    assert module.w.tolist() == [-2.0, -1.0]
    norms = [trainer.callback_metrics[f"train/{name}"].item() ** 2 for name in ("grad_norm", "grad_norm_clipped")]
    assert norms == pytest.approx([3**2 + 1, 2**2 + 1])


@pytest.mark.parametrize("fused", [False, True])
def test_in_float16_the_gradient_is_unscaled_before_it_is_read_and_clipped(fused):
    module = Product(fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    trainer = fit(module, accumulate_grad_batches=4, plugins=[plugin], gradient_clip_val=2.0)
    assert module.seen == [2.5, 5.0, 2.5, 5.0]
    assert module.w.item() == pytest.approx(-8.0, abs=1e-4)  # four steps, each clipped to 2
    assert trainer.callback_metrics["train/grad_norm"].item() == pytest.approx(5.0)
    assert trainer.callback_metrics["train/grad_norm_clipped"].item() == pytest.approx(2.0, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("every", [6, 2])  # the last checkpoint is at the end of a step, and within one
def test_a_checkpoint_between_the_batches_of_a_step_resumes_from_the_step_before(llm_train, forked, tiny, every):
    settings = {
        "trainer__accumulate_grad_batches": 4,
        "trainer__val_check_interval": every,
        "trainer__max_steps": 8,
        "trainer__log_every_n_steps": 1,
        "data__init_args__batch_size": 4,
    }
    config = tiny(**settings)
    assert llm_train("fit", "-c", config, "--run.name", "whole").code == 0
    assert forked("fit", "-c", config, "--run.name", "killed", prepare=lambda: kill_at_batch(15)) == -signal.SIGKILL
    resumed = llm_train("fit", "-c", config, "--run.name", "killed", "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert_same_weights(RUNS / "whole" / LAST, RUNS / "killed" / LAST)
    header, *rows = metrics_that_repeat(RUNS / "whole")
    assert metrics_that_repeat(RUNS / "killed") == [header, *rows]
    validated = [int(row[0]) for row in rows if row[header.index("val/loss")]]
    assert validated == sorted({8} | {max(1, batch // 4) if batch >= 4 else 0 for batch in range(every, 33, every)})
    seen = torch.load(RUNS / "killed" / LAST, weights_only=True)["callbacks"]["Throughput"]["tokens_seen"]
    assert seen == 8 * 4 * 4 * 16  # steps, batches, rows, positions


@pytest.mark.slow
def test_a_scheduled_accumulation_goes_on_in_an_epoch_that_is_resumed(llm_train, forked, tiny):
    scheduler = {
        "class_path": "lightning.pytorch.callbacks.GradientAccumulationScheduler",
        "init_args": {"scheduling": {0: 4}},
    }
    settings = {"trainer__val_check_interval": 10, "trainer__max_steps": 8}
    config = tiny(**settings, **{"trainer__callbacks+": [scheduler]})
    assert llm_train("fit", "-c", config, "--run.name", "whole").code == 0
    assert forked("fit", "-c", config, "--run.name", "killed", prepare=lambda: kill_at_batch(15)) == -signal.SIGKILL
    resumed = llm_train("fit", "-c", config, "--run.name", "killed", "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert_same_weights(RUNS / "whole" / LAST, RUNS / "killed" / LAST)


def kill_at_batch(number: int) -> None:
    """For `prepare`: the process kills itself at the start of a batch, from 0."""
    start = ReproducibleSteps.on_train_batch_start

    def start_or_die(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx == number:
            os.kill(os.getpid(), signal.SIGKILL)
        start(self, trainer, pl_module, batch, batch_idx)

    ReproducibleSteps.on_train_batch_start = start_or_die
