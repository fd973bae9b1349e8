"""How the signal goes up through the blocks of a decoder, and the gradient down, at chosen steps of the training."""

import io
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_modules.decoder_pretrain.signal_figures import draw_by_depth, draw_histograms
from lightning_modules.models.decoder import Decoder
from lightning_modules.runtime.drawing import DrawsAtTheEnd
from lightning_modules.runtime.loggers import WandbRecorder
from lightning_modules.runtime.sharded import require_whole_weights

EDGES = np.linspace(-12, 6, 181)  # of the histograms: ten bins a decade of the absolute value, the same in every run


class SignalPropagation(DrawsAtTheEnd):
    """Measures the residual stream and the gradients of a decoder's training, by depth, as they are at given steps.

    Depth 0 is the embedding, depth l the l-th block. Logged are `signal/residual_std/<depth>`, the standard deviation
    of the residual stream after it, over all positions and features; and `signal/gradient_rms/<depth>`, the root mean
    square of the gradient of its matrices, before clipping. At step 0 also what two layers make of it in all:
    `init/residual_growth`, the last deviation over the first, and `init/gradient_growth`, the gradient of the first
    block over that of the last.

    `signal/step_*.npz` keeps the histograms too, of the logarithm of absolute values, where the width of a bell is the
    place of a hump; zeros count in the first bin. From these files come `figures/signal_by_depth.png` and
    `figures/signal_histograms.png`; W&B gets the histograms of each matrix.

    It looks at the training's own forward and backward pass, so it adds no pass, and changes nothing.

    Args:
        steps: Numbers of optimiser steps done when it measures (0 or more); those the run does not reach are not
            measured.

    Raises:
        MisconfigurationException: If there are no steps, or a negative one.
    """

    def __init__(self, steps: list[int]) -> None:
        if not steps or min(steps) < 0:
            raise MisconfigurationException(f"SignalPropagation: steps must be numbers of 0 or more, got {steps}")
        self.steps = frozenset(steps)
        self._stream: dict[int, Tensor] = {}  # depth -> (B, T, C)
        self._hooks: list[RemovableHandle] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Looks whether there is a decoder to look into."""
        require_whole_weights(trainer, type(self).__name__)
        check_decoder(pl_module, type(self).__name__)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Listens to the residual stream if this step is one to measure."""
        if trainer.global_step in self.steps and not self._hooks:
            decoder = pl_module.decoder
            for depth, module in enumerate([decoder.embedding_dropout, *decoder.blocks]):
                self._hooks.append(module.register_forward_hook(partial(self._keep, depth)))

    def _keep(self, depth: int, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._stream[depth] = output.detach()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Measures, when the gradients of the step are complete."""
        if self._hooks:
            for hook in self._hooks:
                hook.remove()
            self._measure(trainer, pl_module.decoder)
            self._hooks, self._stream = [], {}

    @rank_zero_only
    def _measure(self, trainer: L.Trainer, decoder: Decoder) -> None:
        step, n_layer = trainer.global_step, decoder.config.n_layer
        gradients = {
            name.removesuffix(".weight"): parameter.grad
            for name, parameter in decoder.named_parameters()
            if parameter.dim() == 2 and parameter.grad is not None
        }
        depths = np.array([_depth(name) for name in gradients])
        squares = np.array([gradient.float().square().sum().item() for gradient in gradients.values()])
        sizes = np.array([gradient.numel() for gradient in gradients.values()])
        found = {
            "edges": EDGES,
            "residual_std": np.array([x.float().std().item() for x in self._stream.values()]),  # (1 + n_layer,)
            "residual_histograms": np.stack([_histogram(x) for x in self._stream.values()]),  # (1 + n_layer, bins)
            "gradient_rms": np.array(
                [np.sqrt(squares[depths == depth].sum() / sizes[depths == depth].sum()) for depth in range(1 + n_layer)]
            ),
            "matrices": np.array(list(gradients)),
            "depths": depths,  # of the matrices
            "gradient_histograms": np.stack([_histogram(gradient) for gradient in gradients.values()]),
        }
        _save(Path(trainer.default_root_dir) / "signal" / f"step_{step:06d}.npz", found)
        self._log(trainer, step, found)

    def _log(self, trainer: L.Trainer, step: int, found: dict[str, np.ndarray]) -> None:
        metrics = {
            f"signal/{what}/{depth:02d}": value
            for what in ("residual_std", "gradient_rms")
            for depth, value in enumerate(found[what])
        }
        if step == 0:
            metrics["init/residual_growth"] = found["residual_std"][-1] / found["residual_std"][0]
            metrics["init/gradient_growth"] = found["gradient_rms"][1] / found["gradient_rms"][-1]
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step - 1)  # loggers count as Lightning does: see `loggers.steps_done`
            if isinstance(logger, WandbRecorder):
                from wandb import Histogram

                names = [f"residual/{depth:02d}" for depth in range(len(found["residual_std"]))]
                names += [f"gradient/{name}" for name in found["matrices"]]
                counts = [*found["residual_histograms"], *found["gradient_histograms"]]
                histograms = {
                    f"log10/{name}": Histogram(np_histogram=(count, EDGES))
                    for name, count in zip(names, counts, strict=True)
                }
                logger.log_metrics(histograms, step=step - 1)

    def draw(self, run: Path) -> list[Path]:
        """Draws both figures from the files of the steps.

        Args:
            run: The run's folder.
        """
        files = sorted((run / "signal").glob("step_*.npz"))
        if not files:
            return []
        by_step = {int(file.stem.removeprefix("step_")): np.load(file) for file in files}
        return [
            draw_by_depth(by_step, run / "figures" / "signal_by_depth.png"),
            draw_histograms(by_step, run / "figures" / "signal_histograms.png"),
        ]


def check_decoder(pl_module: L.LightningModule, callback: str) -> None:
    """Refuses a module that hooks cannot look into.

    Args:
        pl_module: The module.
        callback: Name of the callback that wants to.

    Raises:
        MisconfigurationException: If the module has no decoder, or has it compiled.
    """
    if not isinstance(getattr(pl_module, "decoder", None), Decoder):
        raise MisconfigurationException(
            f"{callback}: {type(pl_module).__name__} has no decoder; leave the callback out"
        )
    if pl_module.hparams.get("compile"):
        raise MisconfigurationException(
            f"{callback}: a compiled decoder cannot be looked into; set model.compile to false"
        )


def _depth(name: str) -> int:
    """blocks.3.attention.qkv -> 4; the embeddings -> 0."""
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 0


def _histogram(values: Tensor) -> np.ndarray:
    magnitudes = values.detach().float().abs().cpu().numpy()
    return np.histogram(np.log10(magnitudes.clip(10.0 ** EDGES[0], 10.0 ** EDGES[-1])), EDGES)[0]


def _save(file: Path, arrays: dict[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    file.parent.mkdir(exist_ok=True)
    fresh = file.with_name(f".{file.name}")
    fresh.write_bytes(buffer.getvalue())
    fresh.replace(file)
