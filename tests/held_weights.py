"""What a process holds for weights between the forward and the backward pass of a sharded step."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_modules.runtime.sharded import FullyShardedStrategy


def measure(file: Path) -> None:
    """For `prepare`: write what each training step holds for weights, one JSON object a line.

    - `units`: bytes of the gathered weights.
    - `copies`: bytes of their copies in bfloat16 that the backward pass needs.
    - `n_copies`: number of these copies.

    The activations must have other shapes than the matrices.
    """
    step = FullyShardedStrategy.training_step

    def measured(self: FullyShardedStrategy, *args: Any, **kwargs: Any) -> Any:
        shapes = {tuple(p.shape) for p in self.model.parameters() if p.ndim == 2}
        shapes |= {shape[::-1] for shape in shapes}
        saved: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            if tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in shapes:
                saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = step(self, *args, **kwargs)
        gathered = [p for p in self.model.parameters() if not isinstance(p, DTensor)]
        units = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in gathered}
        copies = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
        copies = {pointer: size for pointer, size in copies.items() if size and pointer not in units}
        line = {"units": sum(units.values()), "copies": sum(copies.values()), "n_copies": len(copies)}
        with file.open("a") as lines:
            lines.write(json.dumps(line) + "\n")
        return loss

    FullyShardedStrategy.training_step = measured  # type: ignore[method-assign]
