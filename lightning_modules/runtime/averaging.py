r"""Averages of the weights over the last steps, which are often better than the weights of any one of these steps.

With a constant learning rate, the weights move around a minimum at a distance that depends on the rate. Their mean over
some steps is nearer to it, as if the rate had been lowered. The mean is a running one, with weights that fall
geometrically into the past (an exponential moving average), and follows the weights closely at first:

    a_t = d_t a_{t-1} + (1 - d_t) w_t,    d_t = min(decay, (1 + t) / (10 + t))

Papers: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging" (1992); Tarvainen and Valpola,
"Mean teachers are better role models" (2017), https://arxiv.org/abs/1703.01780; Busbridge et al., "How to Scale
Your EMA" (2023), https://arxiv.org/abs/2307.13813.
"""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_modules.common.ranges import Probability
from lightning_modules.runtime.private_names import foreach_lerp_
from lightning_modules.runtime.sharded import require_whole_weights
from lightning_modules.runtime.stages import validates_a_fit

TRAINED = "trained_weights"  # in a checkpoint whose `state_dict` has averages: the weights that training goes on with
_WEIGHTS = "weights"  # in a checkpoint: what its `state_dict` holds, in words


class AveragedWeights(L.Callback):
    """Callback that averages the weights over the steps; the averages are validated, saved and exported.

    Metrics of validations, samples, `best.ckpt`, `last.ckpt` and `model/` are those of the averages. A checkpoint also
    has the trained weights (`trained_weights`), from which a resumed run continues. The averages are float32 whatever
    the precision of the weights. (Lightning's `EMAWeightAveraging` averages bfloat16 weights in bfloat16, has no
    warm-up, and ends a run with the averages in place of the trained weights, from which it cannot be resumed.)

    Args:
        decay: Share of the average that a step keeps, once about `9 / (1 - decay)` steps are done (0 to less than 1);
            the average is over about the last `1 / (1 - decay)` steps.

    Raises:
        MisconfigurationException: If the weights are sharded.
    """

    # After the callbacks that read the averages at the end of a validation; see `ExperimentModule.configure_callbacks`.
    setup_order = 1

    def __init__(self, decay: Probability = 0.99) -> None:
        self.decay = decay
        self.updates = 0
        self._averages: dict[str, Tensor] = {}  # float32
        self._parameters: dict[str, nn.Parameter] = {}
        self._trained: dict[str, Tensor] = {}  # during a validation
        self._step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse sharded weights."""
        require_whole_weights(trainer, "AveragedWeights")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin with the weights as they are, or with the averages of the checkpoint."""
        optimised = {p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        self._parameters = {name: p for name, p in pl_module.named_parameters() if p in optimised}
        self._averages = {
            name: self._averages.get(name, p.detach()).to(p.device, torch.float32, copy=True)
            for name, p in self._parameters.items()
        }
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Add the weights of the step to the averages."""
        if trainer.global_step == self._step:  # gradients are being accumulated
            return
        self._step = trainer.global_step
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        weights = [p.detach().float() for p in self._parameters.values()]  # no copy of float32 weights
        foreach_lerp_(list(self._averages.values()), weights, 1 - decay)

    @torch.no_grad()
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the averages in the place of the weights."""
        if validates_a_fit(trainer):
            for name, p in self._parameters.items():
                self._trained[name] = p.detach().clone()
                p.copy_(self._averages[name])

    @torch.no_grad()
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the trained weights back, before a checkpoint is written."""
        for name, weight in self._trained.items():
            self._parameters[name].copy_(weight)
        self._trained = {}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the averages as the weights of the model, and the trained weights beside them."""
        state = dict(checkpoint["state_dict"])
        checkpoint[TRAINED] = {name: state[name] for name in self._averages}
        averages = {name: average.to(state[name].dtype) for name, average in self._averages.items()}
        first_names = {p: name for name, p in pl_module.named_parameters()}
        all_names = pl_module.named_parameters(remove_duplicate=False)  # a tied weight is saved under each of its names
        averages = {name: averages[first_names[p]] for name, p in all_names if first_names[p] in averages}
        checkpoint["state_dict"] = state | averages
        checkpoint[_WEIGHTS] = f"averages with decay {self.decay} after {self.updates} steps"

    @torch.no_grad()
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on with the trained weights of the checkpoint; its averages are in the model now."""
        if trainer.state.fn == TrainerFn.FITTING:
            for name, weight in checkpoint.get(TRAINED, {}).items():
                pl_module.get_parameter(name).copy_(weight)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages; in float32, a checkpoint stores them once, with the weights of the model."""
        return {"updates": self.updates, "averages": dict(self._averages)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the averages."""
        self.updates, self._averages = state_dict["updates"], state_dict["averages"]
