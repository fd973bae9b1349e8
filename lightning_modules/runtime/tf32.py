"""Faster matrix products in float32 on GPUs with matrix units."""

import lightning as L
import torch


class TF32(L.Callback):
    """Callback that computes matrix products in float32 with the matrix units of a GPU, several times as fast.

    TF32 rounds the factors to 10 bits of mantissa, as float16 has, and sums in float32. In `bf16-mixed` and `16-mixed`
    it acts on the products that stay in float32; in `32-true`, on all. On the CPU it does nothing.
    """

    def __init__(self) -> None:
        self._before: str | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Allow TF32."""
        if trainer.strategy.root_device.type == "cuda":
            self._before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the precision of the process."""
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore the precision of the process: Lightning calls no `teardown` of a run that fails."""
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            torch.set_float32_matmul_precision(self._before)
            self._before = None
