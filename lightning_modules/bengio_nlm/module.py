"""Bengio's network compared with, and mixed with, an interpolated trigram."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from lightning_modules.base import CompileMode, ExperimentModule
from lightning_modules.bengio_nlm.network import BengioNLM
from lightning_modules.bengio_nlm.trigram import N_GROUPS, InterpolatedTrigram, fit_mixture
from lightning_modules.common.ranges import NonNegativeInt, PositiveInt, Probability
from lightning_modules.metrics import SplitMetric
from lightning_modules.runtime.private_names import KeepsBufferDtypes

Batch = dict[str, Tensor]


class BengioNLMModule(KeepsBufferDtypes, ExperimentModule):
    """The network `BengioNLM`, trained to predict the next word (Bengio et al., 2003).

    An interpolated trigram is fitted when a run starts: its frequencies to the training text, its weights by EM to the
    validation text. A validation or a test evaluates on the same words the network (`perplexity`), the trigram
    (`perplexity_trigram`), the unigram with one added to each count (`perplexity_unigram`), and the mixture of network
    and trigram (`perplexity_mixed`).

    The module reads `text.ids`, `sides` and `vocab_size` of the data; see `BengioNLMDataModule`.

    Args:
        vocab_size: Number of words; linked from the data.
        block_size: Words of context, n - 1; linked from the data (`data.n`).
        h: Hidden units; with 0, only the direct connections remain.
        m: Features of a word.
        direct: Whether the features are also connected directly to the output.
        mix: Weights of network and trigram: `equal`, as in the table of the paper; `learned`, by EM on the validation
            text, separately for histories of different frequency; `none` for no mixture.
        dropout: Probability of dropping a feature in training.
        hidden_dropout: Probability of dropping a hidden unit in training.
        word_dropout: Probability of dropping all features of a word of the context in training. The kept words are not
            scaled.

    Raises:
        MisconfigurationException: If `h` is 0 and `direct` is false.
    """

    def __init__(
        self,
        vocab_size: int | None = None,
        block_size: int | None = None,
        h: NonNegativeInt = 50,
        m: PositiveInt = 60,
        direct: bool = True,
        mix: Literal["none", "equal", "learned"] = "learned",
        dropout: Probability = 0.0,
        hidden_dropout: Probability = 0.0,
        word_dropout: Probability = 0.0,
        compile: CompileMode = False,
    ) -> None:
        super().__init__(compile)
        self.save_hyperparameters()
        vocab_size, block_size = self.linked(vocab_size=vocab_size, block_size=block_size)
        if h == 0 and not direct:
            raise MisconfigurationException(
                "model: h is 0 and direct is false: nothing connects the words to the output; set one of them"
            )
        dropouts = {"dropout": dropout, "hidden_dropout": hidden_dropout, "word_dropout": word_dropout}
        self.network = BengioNLM(vocab_size, block_size + 1, h, m, direct, **dropouts)
        self.mix = mix
        self.register_buffer("mixture", torch.full((N_GROUPS, 2), 0.5, dtype=torch.float64))  # network, trigram
        self.track(Likelihoods())

    def setup(self, stage: str) -> None:
        """Fit the trigram, and initialise the bias of a new network with the frequencies of the words."""
        data = self.data
        ids, sides = data.text.ids, data.sides
        try:
            self.trigram = InterpolatedTrigram(ids[sides["train"]], data.vocab_size)
        except ValueError as error:
            raise MisconfigurationException(f"the trigram: {error}") from error
        places = np.arange(sides["val"].start, sides["val"].stop)
        self.trigram.fit(np.stack([ids[places - 1], ids[places - 2]], axis=1), ids[places])
        self._unigram = (self.trigram.unigrams + 1) / (self.trigram.n_tokens + data.vocab_size)
        if stage == "fit" and not self.network.b.any():  # a trained bias is not zero
            with torch.no_grad():
                self.network.b.copy_(torch.from_numpy(np.log(self._unigram)))

    def on_test_start(self) -> None:
        """Refuse to test a learned mixture that no validation has learned.

        Raises:
            MisconfigurationException: If `mix` is `learned` and the weights are those of a new module.
        """
        if self.mix == "learned" and (self.mixture == 0.5).all():
            raise MisconfigurationException(
                "model.mix is learned, but the checkpoint has no learned weights of network and trigram: test it with "
                "--model.mix equal, or train with a validation"
            )

    def forward(self, context: Tensor) -> Tensor:
        """Return the scores of the next word, (B, V), for a context (B, n - 1), the nearest word first."""
        return self.network(context)

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of the words of the batch."""
        return self.network.loss(batch["context"], batch["targets"])

    def evaluation_step(self, batch: Batch, metrics: "Likelihoods") -> None:
        """Record the log-probability of each target by each model, and the group of its history."""
        network = -F.cross_entropy(self(batch["context"]).float(), batch["targets"], reduction="none")
        histories, targets = batch["context"][:, :2].cpu().numpy(), batch["targets"].cpu().numpy()
        trigram = np.log(self.trigram.probabilities(histories, targets))
        unigram = np.log(self._unigram[targets])
        group = self.trigram.groups(histories)
        metrics.update(network, *(torch.from_numpy(column).to(network.device) for column in (trigram, unigram, group)))

    def evaluation_results(self, metrics: "Likelihoods", split: str) -> Mapping[str, Tensor]:
        """Return the loss and the perplexities; a validation first learns the mixture if `mix` is `learned`."""
        # A column of one element comes as a scalar.
        measured = {name: column.flatten() for name, column in metrics.compute().items()}
        models = torch.stack([measured["network"], measured["trigram"]], dim=1)  # (N, 2)
        if split == "val" and self.mix == "learned":
            weights = fit_mixture(models.exp().cpu().numpy(), measured["group"].cpu().numpy(), N_GROUPS)
            self.mixture.copy_(torch.from_numpy(weights))
        logs = {"": measured["network"], "_trigram": measured["trigram"], "_unigram": measured["unigram"]}
        if self.mix != "none":
            mixture = self.mixture if self.mix == "learned" else torch.full_like(self.mixture, 0.5)
            logs["_mixed"] = (models + mixture[measured["group"]].log()).logsumexp(dim=1)
        results = {f"perplexity{name}": (-log.mean()).exp().float() for name, log in logs.items()}
        return results | {"loss": -measured["network"].mean().float()}

    @property
    def word_vectors(self) -> Tensor:
        """C, the features of each word, (V, m)."""
        return self.network.C

    def next_command(self, run: str) -> str:
        """Return the command that evaluates the test text."""
        return f"llm-train test -c {run}/config.yaml --ckpt_path best"


class Likelihoods(SplitMetric):
    """The log-probabilities of all words by each model, over all processes, and the groups of their histories."""

    columns = ("network", "trigram", "unigram", "group")

    def __init__(self) -> None:
        super().__init__()
        for name in self.columns:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, network: Tensor, trigram: Tensor, unigram: Tensor, group: Tensor) -> None:
        """Add a batch: log-probabilities by each model, and groups as int64, (B,) each."""
        for name, column in zip(self.columns, (network.double(), trigram, unigram, group), strict=True):
            getattr(self, name).append(column)

    def compute(self) -> dict[str, Tensor]:
        """Return the columns by name, (N,) each."""
        return {name: dim_zero_cat(getattr(self, name)) for name in self.columns}
