"""Speed of a run: tokens per second, tokens seen, and model FLOP utilisation."""

import time
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch import Tensor

from lightning_modules.runtime import private_names


class Throughput(L.Callback):
    """Callback that logs `perf/tokens_per_second`, `train/tokens_seen` and, if the peak FLOPS are known, `perf/mfu`.

    Tokens are counted over all processes. The time from the start of a validation to the next training batch is not
    counted. Model FLOP utilisation (Chowdhery et al., 2022, appendix B) is the number of FLOPs of the model (see its
    `flops_per_token`), divided by the number that the devices can do in the same time.
    """

    def __init__(self) -> None:
        self.tokens_seen = 0
        self.tokens_per_second = float("nan")
        self._tokens_since = 0
        self._clock = 0.0
        self._stopped_at: float | None = None
        self._peak_flops: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look up the peak of the device and start the clock."""
        if pl_module.device.type == "cuda":
            dtype = {"16": torch.float16, "bf": torch.bfloat16}.get(str(trainer.precision)[:2], torch.float32)
            self._peak_flops = get_available_flops(pl_module.device, dtype)
        self._stopped_at = None  # by a validation before the first step
        self._tokens_since, self._clock = 0, time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the tokens of the batch, and log if logging is due."""
        tokens = _tokens_in(batch) * trainer.world_size
        self.tokens_seen += tokens
        self._tokens_since += tokens
        if trainer.global_step % trainer.log_every_n_steps or private_names.is_accumulating(trainer):
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.tokens_per_second = self._tokens_since / (time.perf_counter() - self._clock)
        metrics = {"perf/tokens_per_second": self.tokens_per_second, "train/tokens_seen": float(self.tokens_seen)}
        flops_per_token = getattr(pl_module, "flops_per_token", None)
        if self._peak_flops and flops_per_token:
            metrics["perf/mfu"] = self.tokens_per_second * flops_per_token / (self._peak_flops * trainer.world_size)
        pl_module.log_dict(metrics)
        self._tokens_since, self._clock = 0, time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._stopped_at = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        """Restart the clock after a validation, its samples and its checkpoint."""
        if self._stopped_at is not None:
            self._clock += time.perf_counter() - self._stopped_at
            self._stopped_at = None

    def state_dict(self) -> dict[str, int]:
        """Return the tokens seen so far."""
        return {"tokens_seen": self.tokens_seen}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore the tokens seen so far."""
        self.tokens_seen = state_dict["tokens_seen"]


def _tokens_in(batch: Any) -> int:
    tokens = batch.get("input_ids", batch.get("targets")) if isinstance(batch, dict) else None
    return tokens.numel() if isinstance(tokens, Tensor) else 0
