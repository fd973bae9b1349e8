"""Bengio's network beside, and mixed with, the trigram that it was to replace."""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_modules.base import ExperimentModule
from lightning_modules.bengio_nlm.network import BengioNLM
from lightning_modules.bengio_nlm.trigram import N_GROUPS, InterpolatedTrigram, fit_mixture

Batch = dict[str, Tensor]


class BengioNLMModule(ExperimentModule):
    """The network of `models/bengio.py`, trained on the next word (Bengio et al., 2003).

    The interpolated trigram of `models/ngram.py` is fitted to the same text when the run starts: its frequencies are
    those of the training text, its weights what EM finds on the validation text. Every validation and test measures on
    the same words the network (`perplexity`), the trigram (`perplexity_trigram`), the unigram with one added to each
    count (`perplexity_unigram`), and the mixture of network and trigram (`perplexity_mixed`).

    Args:
        vocab_size: Number of words; linked from the data.
        block_size: Words that the network looks back at, n - 1; linked from the data (`data.n`).
        h: Hidden units; 0 for none, which leaves the direct connections alone.
        m: Features of a word.
        direct: Whether the features are connected to the output directly too.
        mix: The weights of network and trigram: `equal`, as in the paper's table; `learned`, by EM on the validation
            text, for each order of magnitude of the history's frequency; `none` measures no mixture.
        dropout: Share of the features that is dropped in training (0 to 1).
        hidden_dropout: Share of the hidden units that is dropped in training (0 to 1).
        word_dropout: Share of the context's words that is dropped in training, all features at once (0 to 1).

    Raises:
        MisconfigurationException: If the sizes make no network.
    """

    def __init__(
        self,
        vocab_size: int | None = None,
        block_size: int | None = None,
        h: int = 50,
        m: int = 60,
        direct: bool = True,
        mix: Literal["none", "equal", "learned"] = "learned",
        dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        word_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if vocab_size is None or block_size is None:
            raise MisconfigurationException(
                "model: vocab_size and block_size are needed; the data gives them, or you do"
            )
        try:
            self.network = BengioNLM(vocab_size, block_size + 1, h, m, direct, dropout, hidden_dropout, word_dropout)
        except ValueError as error:
            raise MisconfigurationException(f"model: {error}") from error
        self.mix = mix
        self.register_buffer("mixture", torch.full((N_GROUPS, 2), 0.5, dtype=torch.float64))  # network, trigram
        self.val_likelihoods = Likelihoods()
        self.test_likelihoods = Likelihoods()

    def setup(self, stage: str) -> None:
        """Fits the trigram, and lets a new network start from the frequencies of the words.

        Raises:
            MisconfigurationException: If the text is too short for a trigram, or the vocabulary too large.
        """
        data = self.data
        ids, sides = data.text.ids, data.sides
        try:
            self.trigram = InterpolatedTrigram(ids[sides["train"]], data.vocab_size)
        except ValueError as error:
            raise MisconfigurationException(f"the trigram: {error}") from error
        places = np.arange(sides["val"].start, sides["val"].stop)
        self.trigram.fit(np.stack([ids[places - 1], ids[places - 2]], axis=1), ids[places])
        self._unigram = (self.trigram.unigrams + 1) / (self.trigram.n_tokens + data.vocab_size)
        if stage == "fit":  # a checkpoint's weights are loaded after this
            with torch.no_grad():
                self.network.b.copy_(torch.from_numpy(np.log(self._unigram)))

    def forward(self, context: Tensor) -> Tensor:
        """Scores of the next word: (B, n - 1), the nearest word first, to (B, V)."""
        return self.network(context)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of the batch's words."""
        loss = self.network.loss(batch["context"], batch["targets"])
        self.log_train_loss(loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Notes how likely each model finds each word."""
        self.val_likelihoods.update(*self._likelihoods(batch))

    def on_validation_epoch_end(self) -> None:
        """Logs the perplexities of the validation text, after it has learned the mixture."""
        if self.mix == "learned":
            measured = self.val_likelihoods.compute()
            both = torch.stack([measured["network"].exp(), measured["trigram"].exp()], dim=1).cpu().numpy()
            weights = fit_mixture(both, measured["group"].cpu().numpy(), N_GROUPS)
            self.mixture.copy_(torch.from_numpy(weights))
        self._log_measures("val", self.val_likelihoods)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Notes how likely each model finds each word."""
        self.test_likelihoods.update(*self._likelihoods(batch))

    def on_test_epoch_end(self) -> None:
        """Logs the perplexities of the test text, with the mixture that the checkpoint has."""
        self._log_measures("test", self.test_likelihoods)

    def _likelihoods(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each target: log-probability by network, trigram and unigram, and the group of its history; all (B,)."""
        network = -F.cross_entropy(self(batch["context"]).float(), batch["targets"], reduction="none")
        histories, targets = batch["context"][:, :2].cpu().numpy(), batch["targets"].cpu().numpy()
        trigram = np.log(self.trigram.probabilities(histories, targets))
        unigram = np.log(self._unigram[targets])
        group = self.trigram.groups(histories)
        return network, *(torch.from_numpy(column).to(network.device) for column in (trigram, unigram, group))

    def _log_measures(self, split: str, likelihoods: "Likelihoods") -> None:
        measured = likelihoods.compute()
        likelihoods.reset()
        logs = {"": measured["network"], "_trigram": measured["trigram"], "_unigram": measured["unigram"]}
        if self.mix != "none":
            weights = self.mixture[measured["group"]]  # (N, 2)
            both = torch.stack([measured["network"], measured["trigram"]], dim=1)
            logs["_mixed"] = (both + weights.log()).logsumexp(dim=1)
        measures = {f"{split}/perplexity{name}": (-log.mean()).exp().float() for name, log in logs.items()}
        measures[f"{split}/loss"] = -measured["network"].mean().float()
        # These are of all ranks already; sync_dist only tells Lightning that they are the same everywhere.
        self.log_dict(measures, sync_dist=True)

    @property
    def word_vectors(self) -> Tensor:
        """C, the features of each word: (V, m)."""
        return self.network.C

    def next_command(self, run: str) -> str:
        """Measure on the test text, once all is decided."""
        return f"llm-train test -c {run}/config.yaml --ckpt_path best"


class Likelihoods(Metric):
    """The log-probabilities that the models give each word seen, on all processes, and the group of its history."""

    full_state_update = False
    columns = ("network", "trigram", "unigram", "group")

    def __init__(self) -> None:
        super().__init__()
        for name in self.columns:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, network: Tensor, trigram: Tensor, unigram: Tensor, group: Tensor) -> None:
        """Adds a batch.

        Args:
            network: Log-probabilities, (B,).
            trigram: The same.
            unigram: The same.
            group: Integers, (B,).
        """
        for name, column in zip(self.columns, (network.double(), trigram, unigram, group), strict=True):
            getattr(self, name).append(column)

    def compute(self) -> dict[str, Tensor]:
        """The columns by name, (N,)."""
        return {name: dim_zero_cat(getattr(self, name)) for name in self.columns}
