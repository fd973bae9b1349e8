"""Speed and memory of a run: tokens per second, tokens seen, model FLOP utilisation, and peak GPU memory."""

import time
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_modules.runtime import private_names
from lightning_modules.runtime.peak_flops import format_of, peak_flops
from lightning_modules.runtime.stages import step_is_logged


class Throughput(L.Callback):
    """Callback that logs the speed of the training, and on a GPU its use of the device, over all processes.

    - `perf/tokens_per_second`: the time from the start of a validation to the next training batch is not counted.
    - `train/tokens_seen`: tokens of all training batches so far. Padding is no token: a batch with padding has the
      number of its tokens as `n_tokens`, a scalar; otherwise every entry of its `input_ids`, or `targets`, is one.
    - `perf/mfu`: model FLOP utilisation (Chowdhery et al., 2022, appendix B, https://arxiv.org/abs/2204.02311), the
      FLOPs of the model (see its `flops_per_token`) divided by those that the devices can do in the same time; only if
      the peak of the device is known, see `peak_flops`.
    - `perf/gpu_memory_mib`: largest memory of tensors on the first device so far.
    """

    def __init__(self) -> None:
        self.tokens_seen = 0
        self.tokens_per_second = float("nan")
        self._of_step: list[Tensor | int] = []  # of the batches of the optimiser step in progress, on this process
        self._uncounted: list[Tensor | int] = []  # of the steps since the last count
        self._seen_at_clock, self._clock = 0, 0.0  # tokens and time at the last logging
        self._stopped_at: float | None = None
        self._peak_flops: float | None = None
        self._trainer: L.Trainer | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look up the peak of the device and start the clock."""
        self._trainer = trainer
        if pl_module.device.type == "cuda" and (number_format := format_of(str(trainer.precision))):
            self._peak_flops = peak_flops(torch.cuda.get_device_name(pl_module.device), number_format)
        self._stopped_at = None  # by a validation before the first step
        self._of_step, self._uncounted = [], []
        self._seen_at_clock, self._clock = self.tokens_seen, time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember the tokens of the batch, and log if logging is due."""
        self._of_step.append(_tokens_in(batch))
        if private_names.is_accumulating(trainer):  # a resumed run repeats the batches of an unfinished step
            return
        self._uncounted += self._of_step
        self._of_step = []
        if not step_is_logged(trainer):
            return
        seconds, before = _time_after_work(pl_module.device) - self._clock, self._seen_at_clock
        self._count()
        metrics: dict[str, float] = {}
        if self.tokens_seen > before:  # batches of cached features have no tokens
            self.tokens_per_second = (self.tokens_seen - before) / seconds
            metrics = {"perf/tokens_per_second": self.tokens_per_second, "train/tokens_seen": float(self.tokens_seen)}
            flops_per_token = getattr(pl_module, "flops_per_token", None)
            if self._peak_flops and flops_per_token:
                metrics["perf/mfu"] = self.tokens_per_second * flops_per_token / (self._peak_flops * trainer.world_size)
        if pl_module.device.type == "cuda":
            metrics["perf/gpu_memory_mib"] = torch.cuda.max_memory_allocated(pl_module.device) / 2**20
        pl_module.log_dict(metrics)
        self._seen_at_clock, self._clock = self.tokens_seen, time.perf_counter()

    def _count(self) -> None:
        """Add the tokens of the batches since the last count, of all processes."""
        if not self._uncounted or self._trainer is None:
            return
        device = self._trainer.strategy.root_device
        known = sum(n for n in self._uncounted if isinstance(n, int))
        counted = [n.to(device) for n in self._uncounted if isinstance(n, Tensor)]
        own = torch.stack([torch.tensor(known, device=device), *counted]).sum()
        self.tokens_seen += int(self._trainer.strategy.reduce(own, reduce_op="sum"))
        self._uncounted = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._stopped_at = _time_after_work(pl_module.device)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Restart the clock after a validation, its samples and its checkpoint."""
        if self._stopped_at is not None:
            self._clock += _time_after_work(pl_module.device) - self._stopped_at
            self._stopped_at = None

    def state_dict(self) -> dict[str, int]:
        """Return the tokens seen so far; Lightning calls this on every process."""
        self._count()
        return {"tokens_seen": self.tokens_seen}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore the tokens seen so far."""
        self.tokens_seen = state_dict["tokens_seen"]


def _time_after_work(device: torch.device) -> float:
    """Return the time, in seconds, when the device has done all that is queued on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _tokens_in(batch: Any) -> Tensor | int:
    if not isinstance(batch, dict):
        return 0
    if "n_tokens" in batch:
        return batch["n_tokens"]
    tokens = batch.get("input_ids", batch.get("targets"))
    return tokens.numel() if isinstance(tokens, Tensor) else 0
