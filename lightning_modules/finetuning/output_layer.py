"""The loss of a language model of Transformers without the scores of a whole batch.

Such a model ends with a linear layer, from the last hidden states to the scores of the tokens. `OutputLayer` reads the
inputs of that layer and leaves the scores to `models.linear_cross_entropy`. Some models scale the scores or bound them
afterwards, or their layer has been replaced, for example by an adapter: those give their own scores.
"""

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_modules.common.targets import IGNORED
from lightning_modules.finetuning.bases import in_evaluation_mode
from lightning_modules.models.decoder import soft_capped
from lightning_modules.models.linear_cross_entropy import linear_cross_entropy
from lightning_modules.runtime.private_names import has_data

if TYPE_CHECKING:  # imported where used: transformers is slow to import
    from transformers import PreTrainedModel


class OutputLayer:
    """The output layer of a model of Transformers.

    Args:
        model: Model with an output layer, such as a causal or a masked language model.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model = model
        self._layer: Any = None  # the module that has the hook
        self._hook: RemovableHandle | None = None
        self.reads_inputs = False  # in place of the scores
        self._places: Tensor | None = None
        self._reading = False
        self._inputs: Tensor | None = None

    def cross_entropy(
        self,
        targets: Tensor,
        places: Tensor | None = None,
        row_weights: Tensor | None = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
        **arguments: Any,
    ) -> Tensor:
        """Return the cross entropy of the scores of the model in nats, at least in float32.

        Args:
            targets: Token ids, (B, T); `IGNORED` where a position carries no loss.
            places: Positions to score, (N,) int64, in the B T positions of the batch, one row after another. All
                others must be without a target. `None` scores all.
            row_weights: Weight of the loss at each position, (B, T).
            reduction: `mean`, weighted, over the targets; `sum`, weighted; `none`, the loss of each place, (N,), or of
                each position, (B, T).
            **arguments: Arguments of the model.
        """
        if not torch.compiler.is_compiling():
            self.prepare()
        if places is not None:
            targets = targets.flatten()[places]
            row_weights = None if row_weights is None else row_weights.flatten()[places]
        if self.reads_inputs:
            inputs = self._inputs_of_layer(places, arguments)
            return linear_cross_entropy(
                inputs,
                self._layer.weight,
                targets,
                self._layer.bias,
                row_weights=row_weights,
                soft_cap=self._soft_cap,
                reduction=reduction,
            )
        self._places = places
        scores = self.model(**arguments).logits.float()
        self._places = None
        nats = F.cross_entropy(scores.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none")
        if reduction == "none":
            return nats.view(targets.shape)
        weights = (targets != IGNORED).flatten().to(nats.dtype)
        if row_weights is not None:
            weights = weights * row_weights.flatten()
        total = (nats * weights).sum()
        return total if reduction == "sum" else total / weights.sum()

    def nats_of_share(self, targets: Tensor, places: Tensor | None = None, **arguments: Any) -> Tensor:
        """Return the cross entropy of each place or position, or none if this process has no share of the batch.

        On several processes, some have no share of the last batch of an evaluation, and most models of Transformers
        fail on a batch without rows.
        """
        if len(targets) == 0:
            return torch.zeros(0, device=targets.device)
        return self.cross_entropy(targets, places, reduction="none", **arguments)

    @torch.no_grad()
    def prepare(self) -> None:
        """Find the output layer, and test whether the scores are a linear function of its inputs.

        Call it before `cross_entropy` is compiled, and after adapters are added; otherwise it runs by itself.
        """
        layer = self.model.get_output_embeddings()
        if layer is self._layer:
            return
        if self._hook is not None:
            self._hook.remove()
        self._layer, self._hook = layer, layer.register_forward_pre_hook(self._before_layer)
        self.reads_inputs = type(layer) is nn.Linear
        if not self.reads_inputs or not has_data(layer.weight):  # without scores to test, they are taken for linear
            return
        ids = torch.arange(2, device=self.model.device)[None] % self.model.config.get_text_config().vocab_size
        with in_evaluation_mode(self.model):
            scores = self.model(input_ids=ids).logits.float()
            found = F.linear(self._inputs_of_layer(None, {"input_ids": ids}), layer.weight, layer.bias)
        # The model caps its scores in the number format of `found`, with three roundings by at most eps / 2.
        rtol = max(1e-3, 2 * torch.finfo(found.dtype).eps)
        self.reads_inputs = torch.allclose(scores, soft_capped(found.float(), self._soft_cap), rtol=rtol, atol=1e-4)

    @property
    def _soft_cap(self) -> float | None:
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    def _inputs_of_layer(self, places: Tensor | None, arguments: dict[str, Any]) -> Tensor:
        """Return the inputs of the output layer, (B, T, C), or (N, C) at `places`."""
        self._places, self._reading = places, True
        self.model(**arguments)
        inputs, self._inputs = self._inputs, None
        self._places, self._reading = None, False
        return inputs

    def _before_layer(self, layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        """Choose the places to score, or read the inputs and score none; a hook of the layer."""
        x = inputs[0]
        if self._places is not None:
            x = x.flatten(0, 1).index_select(0, self._places)
        if self._reading:
            self._inputs = x
            return (x[:0],)
        return (x,)
