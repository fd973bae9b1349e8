"""Pairs of positions for probing a position matrix and its controls, with whole blocks of positions held out."""

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import ExperimentDataModule
from datamodules.position_probe.position_matrices import controls, load_positions
from datamodules.sources import Source
from datamodules.tokenizers import encode, load_tokenizer

# What a pair is to a fold. A pair of which one position alone is held out tells nothing clear, and does not count.
IGNORED, SEEN, INTERPOLATION, EXTRAPOLATION = -1, 0, 1, 2

_SPARE_PAIRS = 0.1  # share of the pairs that no probe trains on, so that pairs of seen positions can be tested too
_MAX_VAL_PAIRS = 2**16
_N_WINDOWS = 64  # of text


class PositionProbeDataModule(ExperimentDataModule):
    """Pairs of positions, and the tables whose rows stand for them: a model's position matrix and its controls.

    A batch is `{"pairs": (B, 2), "side": (folds, B)}`. `pairs` are positions; `side` says what the pair is to each
    fold: 0 both positions are in its training blocks, 1 both lie in held-out blocks between them (interpolation), 2
    both lie beyond them (extrapolation), -1 it does not count. In the training data 0 is what to train on; in the
    validation data it is a new pair of positions that were seen.

    The positions are cut into blocks of equal length. The blocks between the first and the last are dealt at random
    to the interpolation folds, so that each is held out once and has training blocks around it. One more fold holds
    out the last fifth.

    Attributes:
        cases: names of the tables: `real`, `random_labels`, and the controls (see `position_matrices.controls`).
        rows: the tables, (cases, T, d).
        labels: the position that each row is said to have, (cases, T) int64: its own, but under `random_labels`,
            where the rows are those of `real` and their positions are dealt at random (Hewitt and Liang, 2019).
        held_out: which positions each fold keeps from its probes, (folds, T) bool; the last fold extrapolates.
    """

    def __init__(
        self,
        source: str,
        n_positions: int | None = None,
        n_embd: int = 128,
        n_blocks: int = 10,
        n_folds: int = 4,
        text: Source | None = None,
        batch_size: int = 512,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Choose the matrix and how it is split.

        Args:
            source: where the position matrix comes from: a run folder of decoder_pretrain; a folder in Hugging Face's
                format; a name on the hub (of the types gpt2, gpt_neo, bert and roberta); a `.npy` of floating-point
                numbers (positions, components); `sinusoids` or `gaussian`, which are made.
            n_positions: positions to look at, from the first on; null for all that the matrix has.
            n_embd: components of `sinusoids` and `gaussian`; matrices that are read have their own.
            n_blocks: blocks that the positions are cut into, at least n_folds + 2; each needs two positions.
            n_folds: interpolation folds, at least 1.
            text: text on which the callback ShiftedPerplexity runs the model, where there is one; null for none.
            batch_size: pairs in a batch, over all processes, at least 1.
            num_workers: processes that load ahead; 0 loads in the training process.
            seed: of the controls, the folds, the spare pairs and the order, 0 or greater.

        Raises:
            MisconfigurationException: the matrix cannot be had, or has too few positions for its blocks.
        """
        super().__init__(batch_size, num_workers, seed)
        if n_positions is not None and n_positions < 1:
            raise MisconfigurationException(f"data.n_positions is {n_positions}: give at least 1, or null for all")
        if n_folds < 1 or n_blocks < n_folds + 2:
            raise MisconfigurationException(
                f"data.n_blocks is {n_blocks} and data.n_folds {n_folds}: there must be a fold, and a block for each "
                "fold beside the first and the last, which interpolation needs on both sides"
            )
        # Read at once, so that a run whose matrix is missing or too small leaves no folder.
        self.matrix = load_positions(source, n_positions, n_embd, seed)
        n, least = len(self.matrix.rows), 2 * n_blocks
        if n < least:
            raise MisconfigurationException(
                f"data.source: {source} has {n} positions, too few for data.n_blocks {n_blocks} of two positions each: "
                f"give at least {least}, or fewer blocks"
            )
        self.source, self.n_blocks, self.n_folds, self.text = source, n_blocks, n_folds, text

    def setup(self, stage: str) -> None:
        """Make the tables, the folds and the pairs."""
        n = len(self.matrix.rows)
        rng = np.random.default_rng([self.seed, 2])
        tables = controls(self.matrix, self.seed)
        tables.pop(self.source, None)  # no control is needed that is the thing itself
        self.cases = ["real", "random_labels", *tables]
        self.rows = torch.from_numpy(np.stack([self.matrix.rows, self.matrix.rows, *tables.values()])).float()
        self.labels = torch.arange(n).repeat(len(self.cases), 1)
        self.labels[1] = torch.from_numpy(rng.permutation(n))
        self.held_out = torch.from_numpy(hold_out_blocks(n, self.n_blocks, self.n_folds, rng))
        upper = np.triu(rng.random((n, n)) < _SPARE_PAIRS, k=1)  # one draw for (i, j) and (j, i)
        spare = torch.from_numpy(upper | upper.T)
        different = ~torch.eye(n, dtype=torch.bool)
        unseen = (self.held_out[:, :, None] & self.held_out[:, None, :]).any(dim=0)  # (T, T), by some fold
        val_codes = ((spare | unseen) & different).flatten().nonzero()[:, 0]
        val_codes = val_codes[torch.from_numpy(rng.permutation(len(val_codes))[:_MAX_VAL_PAIRS])]
        self.train_pairs = PositionPairs((different & ~spare).flatten().nonzero()[:, 0], ~spare, self.held_out)
        self.val_pairs = PositionPairs(val_codes, spare, self.held_out)

    def train_dataloader(self) -> DataLoader:
        """Return the pairs to train on: all but the spare ones, each once an epoch."""
        return self.training_loader(self.train_pairs, len(self.train_pairs))

    def val_dataloader(self) -> DataLoader:
        """Return the pairs to test on, each once; of very many a random sample."""
        return self.evaluation_loader(self.val_pairs, torch.arange(len(self.val_pairs)))

    def text_windows(self) -> Tensor | None:
        """Return text in the model's tokens, in windows of a quarter of its positions: (N, T // 4) int64.

        None where there is no text, or no model to read it.

        Raises:
            MisconfigurationException: the text is shorter than a window.
        """
        if self.text is None or self.matrix.model is None:
            return None
        tokenizer, length = load_tokenizer(self.matrix.model), len(self.matrix.rows) // 4
        ids: list[np.ndarray] = []
        for document in self.text.documents():
            ids.append(encode(tokenizer, [document])[0])
            if sum(map(len, ids)) >= _N_WINDOWS * length:
                break
        tokens = np.concatenate(ids).astype(np.int64)[: _N_WINDOWS * length]
        if len(tokens) < length:
            raise MisconfigurationException(
                f"data.text has {len(tokens)} tokens, fewer than the {length} of one window: give more text"
            )
        return torch.from_numpy(tokens[: len(tokens) // length * length]).view(-1, length)


def hold_out_blocks(n_positions: int, n_blocks: int, n_folds: int, rng: np.random.Generator) -> np.ndarray:
    """Return which positions each fold holds out: (n_folds + 1, n_positions) bool.

    Args:
        n_positions: positions.
        n_blocks: blocks that they are cut into.
        n_folds: folds that hold out blocks from between the first and the last; one more holds out the last fifth.
        rng: deals the blocks.
    """
    block = np.arange(n_positions) * n_blocks // n_positions  # (T,)
    interior = rng.permutation(np.arange(1, n_blocks - 1))
    interpolation = [np.isin(block, interior[fold::n_folds]) for fold in range(n_folds)]
    return np.stack([*interpolation, block >= n_blocks - max(1, n_blocks // 5)])


class PositionPairs(Dataset):
    """Pairs of positions, and what each is to each fold."""

    def __init__(self, codes: Tensor, counts_as_seen: Tensor, held_out: Tensor) -> None:
        """Choose the pairs.

        Args:
            codes: (n,) int64, i T + j for the pair (i, j).
            counts_as_seen: (T, T) bool, the pairs that are of the side `SEEN` where both positions are trained on.
            held_out: (folds, T) bool.
        """
        self.codes, self.counts_as_seen, self.held_out = codes, counts_as_seen, held_out
        self.unseen = torch.full((len(held_out), 1), INTERPOLATION)
        self.unseen[-1] = EXTRAPOLATION

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, numbers: Tensor) -> dict[str, Tensor]:
        """Return the pairs of these numbers (B,): positions (B, 2), sides (folds, B) int64."""
        codes, n = self.codes[numbers], self.held_out.size(1)
        first, second = codes // n, codes % n
        held_first, held_second = self.held_out[:, first], self.held_out[:, second]  # (folds, B)
        is_seen = ~held_first & ~held_second & self.counts_as_seen[first, second]
        side = torch.where(is_seen, SEEN, IGNORED)
        side = torch.where(held_first & held_second, self.unseen, side)
        return {"pairs": torch.stack([first, second], dim=1), "side": side}
