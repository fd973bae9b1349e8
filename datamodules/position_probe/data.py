"""Pairs of positions for probing a position matrix and its controls, with whole blocks of positions held out."""

from dataclasses import dataclass

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import ExperimentDataModule
from datamodules.position_probe.position_matrices import controls, load_positions
from datamodules.sources import AnySource, source_of
from datamodules.tokenizers import encode, load_tokenizer
from lightning_modules.common.ranges import NonNegativeInt, PositiveInt

# The side of a pair, for each fold. A pair of one held-out position and one seen position is not counted.
NOT_COUNTED, SEEN, INTERPOLATION, EXTRAPOLATION = -1, 0, 1, 2

_SPARE_PAIRS = 0.1  # share of the pairs that no probe trains on, for testing on pairs of seen positions
_MAX_VAL_PAIRS = 2**16
_N_WINDOWS = 64  # of text


class PositionProbeDataModule(ExperimentDataModule):
    """Pairs of positions, and tables with a row for each position: the position matrix of a model and its controls.

    A batch is `{"pairs": (B, 2), "side": (folds, B)}`. `pairs` are positions. `side` is 0 where the fold trains on both
    positions, 1 where both are held out and lie between training blocks (interpolation), 2 where both are held out and
    lie beyond them (extrapolation), and -1 otherwise. In the validation split, 0 marks pairs that no fold trains on, of
    two positions that this fold trains on.

    The positions are cut into blocks of equal length. The blocks between the first and the last are assigned at random
    to the interpolation folds: each is held out once, and has training blocks on both sides. One further fold holds out
    the last fifth of the blocks.

    Attributes:
        matrix: The position matrix and its model, see `PositionMatrix`.
        cases: Names of the tables: `real`, `random_labels`, and the controls (see `position_matrices.controls`).
        rows: The tables, (cases, T, d).
        labels: The position of each row, (cases, T) int64. `random_labels` has the rows of `real` with their positions
            in random order (Hewitt and Liang, 2019).
        held_out: The positions that each fold holds out, (folds, T) bool; the last fold extrapolates.

    Args:
        source: The position matrix: a run folder of decoder_pretrain; a folder in Hugging Face's format; a name on the
            hub (of the types gpt2, gpt_neo, bert and roberta); `package:NAME`, for a model that an installed package
            carries; a `.npy` of floating-point numbers (positions, components); or `sinusoids` or `gaussian`, which are
            computed.
        n_positions: Number of positions to use, from the first on; `null` for all of the matrix.
        n_embd: Number of components of `sinusoids` and `gaussian`; not used for other matrices.
        n_blocks: Blocks that the positions are cut into, at least n_folds + 2, of at least two positions each.
        n_folds: Interpolation folds.
        text: Text on which the callback `ShiftedPerplexity` evaluates the model: a source, or a file, folder, glob
            pattern, URL or `hub:OWNER/NAME`, see `source_of`; `null` for none.
        batch_size: Pairs in a batch, over all processes, at least 1.
        num_workers: Processes that load ahead; 0 loads in the training process.
        seed: Seed of the controls, the folds, the spare pairs and the order, 0 or greater.

    Raises:
        MisconfigurationException: If the matrix cannot be read, or has too few positions for the blocks.
    """

    def __init__(
        self,
        source: str,
        n_positions: PositiveInt | None = None,
        n_embd: PositiveInt = 128,
        n_blocks: PositiveInt = 10,
        n_folds: PositiveInt = 4,
        text: AnySource | None = None,
        batch_size: PositiveInt = 512,
        num_workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        if n_blocks < n_folds + 2:
            raise MisconfigurationException(
                f"data.n_blocks is {n_blocks} and data.n_folds {n_folds}: give at least {n_folds + 2} blocks, one for "
                "each fold, and the first and the last, which interpolation needs on both sides"
            )
        # The matrix is read here, so that a run whose matrix is missing or too small leaves no folder.
        self.matrix = load_positions(source, n_positions, n_embd, seed)
        n, least = len(self.matrix.rows), 2 * n_blocks
        if n < least:
            raise MisconfigurationException(
                f"data.source: {source} has {n} positions, too few for data.n_blocks {n_blocks} of two positions each: "
                f"give at least {least}, or fewer blocks"
            )
        self.source, self.n_blocks, self.n_folds = source, n_blocks, n_folds
        self.text = source_of(text, "data.text") if text else None

    def setup(self, stage: str) -> None:
        """Build the tables, the folds and the pairs."""
        n = len(self.matrix.rows)
        rng = np.random.default_rng([self.seed, 2])
        tables = controls(self.matrix, self.seed)
        tables.pop(self.source, None)  # a matrix is not a control of itself
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
        """Return the training pairs: all but the spare ones, each once an epoch."""
        return self.training_loader(self.train_pairs, len(self.train_pairs))

    def val_dataloader(self) -> DataLoader:
        """Return the validation pairs, each once; a random sample of them if there are very many."""
        return self.evaluation_loader(self.val_pairs, torch.arange(len(self.val_pairs)))

    def text_windows(self) -> Tensor | None:
        """Return windows of text in tokens of the model, (N, T // 4) int64; `None` without a text or a model."""
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
    """Return which positions each fold holds out, (n_folds + 1, n_positions) bool; see `PositionProbeDataModule`."""
    block = np.arange(n_positions) * n_blocks // n_positions  # (T,)
    interior = rng.permutation(np.arange(1, n_blocks - 1))
    interpolation = [np.isin(block, interior[fold::n_folds]) for fold in range(n_folds)]
    return np.stack([*interpolation, block >= n_blocks - max(1, n_blocks // 5)])


@dataclass(eq=False)
class PositionPairs(Dataset):
    """Pairs of positions, and the side of each for each fold."""

    codes: Tensor  # i T + j for each pair (i, j), (n,) int64
    counts_as_seen: Tensor  # the pairs that have the side `SEEN` where a fold trains on both positions, (T, T) bool
    held_out: Tensor  # the positions that each fold holds out, (folds, T) bool

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the pairs with these indices (B,): positions (B, 2), sides (folds, B) int64."""
        codes, n = self.codes[indices], self.held_out.size(1)
        first, second = codes // n, codes % n
        held_first, held_second = self.held_out[:, first], self.held_out[:, second]  # (folds, B)
        is_seen = ~held_first & ~held_second & self.counts_as_seen[first, second]
        side = torch.where(is_seen, SEEN, NOT_COUNTED)
        unseen = torch.tensor([*[INTERPOLATION] * (len(self.held_out) - 1), EXTRAPOLATION])[:, None]
        side = torch.where(held_first & held_second, unseen, side)
        return {"pairs": torch.stack([first, second], dim=1), "side": side}
