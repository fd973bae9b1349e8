"""A frozen encoder says the same of a text each time: it is asked once, and the answer is kept."""

import hashlib
import json
from collections.abc import Callable

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_modules.finetuning.bases import architecture_of
from lightning_modules.runtime.sharded import require_whole_weights


class CachedFeatures(L.Callback):
    """Trains the head on features that are computed once, before the first epoch of the first run that needs them.

    They are kept in the cache and mapped into memory, under a name that depends on the encoder's weights, the pooling,
    the precision, and the token ids of the texts: so on the texts, the tokenizer and the truncation. The predictions
    are those of a run without the cache. A frozen encoder is in evaluation mode, so it draws no random numbers, and the
    dropout of the head is the same too.

    The module has `features(batch)`, and its encoder is `model.encoder`; the datamodule has `keep_features`.
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Computes what is not there yet, on one process a machine.

        Raises:
            MisconfigurationException: If the encoder is trained, or its weights are shared out.
        """
        require_whole_weights(trainer, type(self).__name__)
        encoder = pl_module.model.encoder
        if any(parameter.requires_grad for parameter in encoder.parameters()):
            raise MisconfigurationException(
                "CachedFeatures: the encoder is trained, so its features change; freeze it with "
                'lightning_modules.finetuning.freeze.Freeze, patterns: ["model.encoder.*"], or leave this callback out'
            )
        pl_module.to(trainer.strategy.root_device)
        key = [weights_digest(encoder), architecture_of(encoder), pl_module.model.config.pooling, trainer.precision]
        for turn in (True, False):  # first one process of the machine, then the others, who find the file
            if turn == (trainer.local_rank == 0):
                for side in ("train", "val"):
                    pl_module.data.keep_features(side, key, _features_of(trainer, pl_module))
            trainer.strategy.barrier()


def _features_of(trainer: L.Trainer, pl_module: L.LightningModule) -> Callable[[dict[str, Tensor]], Tensor]:
    @torch.no_grad()
    def features_of(batch: dict[str, Tensor]) -> Tensor:
        training = pl_module.model.encoder.training
        pl_module.model.encoder.eval()
        try:
            with trainer.precision_plugin.forward_context():
                moved = {name: part.to(pl_module.device) for name, part in batch.items()}
                return pl_module.features(moved).float().cpu()
        finally:
            pl_module.model.encoder.train(training)

    return features_of


def weights_digest(model: nn.Module) -> str:
    """A hash of all weights of a model, under their names.

    Args:
        model: Any module.
    """
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()
