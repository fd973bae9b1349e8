"""The scale of the residual stream and of the gradient at each depth of a decoder, at chosen steps of the training."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_modules.common.files import atomic_file
from lightning_modules.common.ranges import NonNegativeInt
from lightning_modules.decoder_pretrain.signal_figures import draw_by_depth, draw_histograms
from lightning_modules.models.decoder import Decoder
from lightning_modules.runtime.drawing import DrawsAtTheEnd
from lightning_modules.runtime.loggers import WandbRecorder
from lightning_modules.runtime.processes import gathered
from lightning_modules.runtime.sharded import require_whole_weights

if TYPE_CHECKING:
    from lightning_modules.decoder_pretrain.module import PretrainModule

EDGES = np.linspace(-12, 6, 181)  # of the histograms of log10 |value|; the same in every run, so that runs compare


class SignalPropagation(DrawsAtTheEnd):
    """Callback that measures the residual stream and the gradients of a decoder by depth, at given steps.

    Depth 0 is the embedding, depth l is block l. The callback logs

    - `signal/residual_std/<depth>`: standard deviation of the residual stream after that depth, over all positions and
      features of the batch on all processes;
    - `signal/gradient_rms/<depth>`: root mean square of the gradient of the matrices at that depth, before clipping;
    - at step 0 also `init/residual_growth`, the standard deviation after the last block divided by that after the
      embedding, and `init/gradient_growth`, the gradient of the first block divided by that of the last.

    `signal/step_*.npz` holds these numbers and histograms of the logarithms of the absolute values; in these, a
    wider distribution is shifted to the right. Zeros count in the first bin. The figures `signal_by_depth.png` and
    `signal_histograms.png` are drawn from these files; W&B receives the histograms of each matrix.

    The callback reads the forward and backward passes of the training. It adds no pass and changes no result.

    Args:
        steps: Numbers of completed optimiser steps after which to measure (each 0 or more); steps that the run does
            not reach are ignored.

    Raises:
        MisconfigurationException: If `steps` is empty, or the module has no decoder or a compiled one.
    """

    def __init__(self, steps: list[NonNegativeInt]) -> None:
        if not steps:
            raise MisconfigurationException("SignalPropagation: steps is empty; give numbers of optimiser steps")
        self.steps = frozenset(steps)
        self._stream: dict[int, np.ndarray] = {}  # by depth, the `_totals` of the micro-batches of this process
        self._hooks: list[RemovableHandle] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the module has a decoder that accepts hooks."""
        require_whole_weights(trainer, type(self).__name__)
        require_decoder(pl_module, type(self).__name__)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: "PretrainModule", batch: Any, batch_idx: int) -> None:
        """Hook the residual stream if this step is to be measured."""
        if trainer.global_step in self.steps and not self._hooks:
            decoder = pl_module.decoder
            for depth, module in enumerate([decoder.embedding_dropout, *decoder.blocks]):
                self._hooks.append(module.register_forward_hook(partial(self._keep, depth)))

    def _keep(self, depth: int, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if torch.is_grad_enabled():  # a validation may come between the micro-batches
            self._stream[depth] = self._stream.get(depth, 0) + _totals(output)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: "PretrainModule", optimizer: torch.optim.Optimizer
    ) -> None:
        """Measure and log, once all micro-batches have added their gradients."""
        if self._hooks:
            for hook in self._hooks:
                hook.remove()
            stream = np.stack(list(self._stream.values()))  # (1 + n_layer, 3 + bins)
            self._measure(trainer, pl_module.decoder, sum(gathered(trainer, stream)))
            self._hooks, self._stream = [], {}

    @rank_zero_only
    def _measure(self, trainer: L.Trainer, decoder: Decoder, stream: np.ndarray) -> None:
        step, n_layer = trainer.global_step, decoder.config.n_layer
        gradients = {
            name.removesuffix(".weight"): parameter.grad
            for name, parameter in decoder.named_parameters()
            if parameter.dim() == 2 and parameter.grad is not None
        }
        depths = np.array([_depth(name) for name in gradients])
        squares = np.array([gradient.float().square().sum().item() for gradient in gradients.values()])
        sizes = np.array([gradient.numel() for gradient in gradients.values()])
        n, total, total_of_squares = stream[:, :3].T
        arrays = {
            "edges": EDGES,
            "residual_std": np.sqrt((total_of_squares - total**2 / n) / (n - 1)),  # (1 + n_layer,)
            "residual_histograms": stream[:, 3:].astype(np.int64),  # (1 + n_layer, bins)
            "gradient_rms": np.array(
                [np.sqrt(squares[depths == depth].sum() / sizes[depths == depth].sum()) for depth in range(1 + n_layer)]
            ),
            "matrices": np.array(list(gradients)),
            "depths": depths,  # of the matrices; -1 is none
            "gradient_histograms": np.stack([_histogram(gradient) for gradient in gradients.values()]),
        }
        with atomic_file(Path(trainer.default_root_dir) / "signal" / f"step_{step:06d}.npz") as file:
            np.savez_compressed(file, **arrays)
        self._log(trainer, step, arrays)

    def _log(self, trainer: L.Trainer, step: int, arrays: dict[str, np.ndarray]) -> None:
        metrics = {
            f"signal/{name}/{depth:02d}": value
            for name in ("residual_std", "gradient_rms")
            for depth, value in enumerate(arrays[name])
        }
        if step == 0:
            metrics["init/residual_growth"] = arrays["residual_std"][-1] / arrays["residual_std"][0]
            metrics["init/gradient_growth"] = arrays["gradient_rms"][1] / arrays["gradient_rms"][-1]
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step - 1)  # loggers count as Lightning does: see `loggers.steps_done`
            if isinstance(logger, WandbRecorder):
                from wandb import Histogram

                names = [f"residual/{depth:02d}" for depth in range(len(arrays["residual_std"]))]
                names += [f"gradient/{name}" for name in arrays["matrices"]]
                counts = [*arrays["residual_histograms"], *arrays["gradient_histograms"]]
                histograms = {
                    f"log10/{name}": Histogram(np_histogram=(count, EDGES))
                    for name, count in zip(names, counts, strict=True)
                }
                logger.log_metrics(histograms, step=step - 1)

    def draw(self, run: Path) -> list[Path]:
        """Draw both figures from the files of the measured steps."""
        files = sorted((run / "signal").glob("step_*.npz"))
        if not files:
            return []
        by_step = {int(file.stem.removeprefix("step_")): np.load(file) for file in files}
        return [
            draw_by_depth(by_step, run / "figures" / "signal_by_depth.png"),
            draw_histograms(by_step, run / "figures" / "signal_histograms.png"),
        ]


def require_decoder(pl_module: L.LightningModule, callback: str) -> None:
    """Refuse a module that has no decoder, or one whose layers cannot be hooked.

    Raises:
        MisconfigurationException: If the module has no decoder, or a compiled one.
    """
    if not isinstance(getattr(pl_module, "decoder", None), Decoder):
        raise MisconfigurationException(f"{callback}: {type(pl_module).__name__} has no decoder; remove the callback")
    if pl_module.hparams.get("compile"):
        raise MisconfigurationException(
            f"{callback}: the layers of a compiled decoder cannot be hooked; set model.compile to false"
        )


def _depth(name: str) -> int:
    """Return 4 for `blocks.3.attention.qkv`, 0 for the embeddings, and -1 for an output matrix of its own."""
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else -1 if name == "output" else 0


def _totals(values: Tensor) -> np.ndarray:
    """Return the number of values, their sum, that of their squares, and their histogram, as one array of float64."""
    values = values.detach().float().cpu()
    x = values.numpy().astype(np.float64)
    return np.array([x.size, x.sum(), (x**2).sum(), *_histogram(values)])


def _histogram(values: Tensor) -> np.ndarray:
    magnitudes = values.detach().float().abs().cpu().numpy()
    return np.histogram(np.log10(magnitudes.clip(10.0 ** EDGES[0], 10.0 ** EDGES[-1])), EDGES)[0]
