"""Features of a frozen encoder, computed once and kept in the cache."""

import hashlib
import json
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_modules.finetuning.bases import architecture_of, in_evaluation_mode
from lightning_modules.runtime.processes import gathered
from lightning_modules.runtime.sharded import require_whole_weights


class CachedFeatures(L.Callback):
    """Callback that trains the head on features, computed once before the first epoch of the first run that needs them.

    The features are a memory-mapped file in the cache. Its name depends on the weights of the encoder, the pooling, the
    precision and the token ids, and so on the texts, the tokenizer and the truncation. The predictions equal those of a
    run without the cache: a frozen encoder is in evaluation mode and draws no random numbers, so the dropout of the
    head is the same too.

    The module has `features(batch)`, and its encoder is `model.encoder`. The datamodule has `keep_features`.
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Compute the features that are not in the cache; the processes divide the batches.

        Raises:
            MisconfigurationException: If the encoder is trained, or its weights are sharded.
        """
        require_whole_weights(trainer, type(self).__name__)
        encoder = pl_module.model.encoder
        if any(parameter.requires_grad for parameter in encoder.parameters()):
            raise MisconfigurationException(
                "CachedFeatures: the encoder is trained, so its features change; freeze it with "
                'lightning_modules.finetuning.freeze.Freeze, patterns: ["model.encoder.*"], or remove this callback'
            )
        pl_module.to(trainer.strategy.root_device)
        key = [weights_digest(encoder), architecture_of(encoder), pl_module.model.config.pooling, trainer.precision]

        @torch.no_grad()
        def features_of(batch: dict[str, Tensor]) -> Tensor:
            with in_evaluation_mode(encoder), trainer.precision_plugin.forward_context():
                moved = {name: part.to(pl_module.device) for name, part in batch.items()}
                return pl_module.features(moved).float().cpu()

        for split in ("train", "val"):
            pl_module.data.keep_features(split, key, features_of, partial(gathered, trainer))


def weights_digest(model: nn.Module) -> str:
    """Return a hash of the weights of a model and their names."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
