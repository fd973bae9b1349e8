"""The base of the datamodules whose batches are windows of token files."""

from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from datamodules.base import ExperimentDataModule
from datamodules.sources import Source
from datamodules.splits import CUT_FEW, Side, require_fractions
from datamodules.token_cache import Split, prepare_tokens
from datamodules.token_files import Tokens
from datamodules.tokenizers import WithTokenizer, load_tokenizer, token_byte_lengths
from datamodules.windows import TokenWindows
from lightning_modules.common.cache import cache_root

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class TokenDataModule(WithTokenizer, ExperimentDataModule):
    """Base of the datamodules whose batches are windows of token files; the subclasses document the arguments."""

    files: Any  # the token files; a cached property, which reads and tokenises all text at the first access
    source: Source | None = None  # the text whose characters the tokenizer `character` has
    split: Split = "tail"  # how the text is split
    n_processes = 1  # that tokenise a large text
    against_few_examples = "give more text, a smaller data.block_size or a smaller batch"

    def __init__(
        self,
        block_size: int,
        batch_size: int,
        tokenizer: str,
        val_fraction: float,
        test_fraction: float,
        cache_dir: str | None,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.val_fraction, self.test_fraction = require_fractions(val_fraction, test_fraction)
        self.block_size = block_size
        self.tokenizer_name = tokenizer
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else cache_root()

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer, loaded at the first access; `character` reads the source for it."""
        return load_tokenizer(self.tokenizer_name, self.source, self.cache_dir)

    def prepare_data(self) -> None:
        """Read and tokenise all text, on one process of each machine."""
        _ = self.files

    def tokenize(
        self,
        source: Source,
        split: Split = "tail",
        val_fraction: float = 0.0,
        test_fraction: float = 0.0,
        announce: bool = True,
        whole: Side = "train",
    ) -> dict[str, Tokens]:
        """Return the token files of a text; see `prepare_tokens`."""
        fractions = val_fraction, test_fraction
        return prepare_tokens(
            source, self.tokenizer, self.cache_dir, split, *fractions, announce, self.n_processes, whole
        )

    def windows_of(self, file: Tokens, **labels: str) -> TokenWindows:
        """Return the windows of a token file; each batch has the labels too."""
        byte_lengths = token_byte_lengths(self.tokenizer)
        return TokenWindows(file, self.block_size, byte_lengths, self.tokenizer.pad_token_id or 0, **labels)

    def covering_loader(self, file: Tokens, most: int | None = None, **labels: str) -> DataLoader | None:
        """Return the loader that evaluates a text; `None` if it has less than two tokens.

        Args:
            file: The tokens of the text.
            most: Largest number of its windows, spread evenly over it; `None` predicts each token once.
            **labels: What each batch has too.
        """
        if file.n_tokens < 2:
            return None
        windows = self.windows_of(file, **labels)
        return self.evaluation_loader(windows, windows.covering_starts(most))

    def require_text(self, files: Mapping[str, Tokens], stage: str, own_source: Collection[str] | None = None) -> None:
        """Check that the splits that a stage needs have enough text.

        Args:
            files: Token file of each split.
            stage: `fit`, `validate` or `test`.
            own_source: Splits that have a separate source; `None` if no split can have one.

        Raises:
            MisconfigurationException: If a split has too little text.
        """
        n_train = files["train"].n_tokens
        if stage == "fit" and n_train <= self.block_size:
            raise MisconfigurationException(
                f"the training text has {n_train} tokens, fewer than a block and the target after it "
                f"(data.block_size {self.block_size}): give more text, or smaller blocks"
            )
        side = "test" if stage == "test" else "val"
        is_held_out = getattr(self, f"{side}_fraction") > 0 or side in (own_source or ())
        if files[side].n_tokens < 2 and (is_held_out or stage != "fit"):
            other, text = "", ""
            if own_source is not None:
                other, text = f", or give data.{side}_source", f" ({files['train'].split})"
            if self.split == "documents":
                other += CUT_FEW
            raise MisconfigurationException(
                f"there is no {side} text{text}: set data.{side}_fraction above 0 (or, if the text is short, to a "
                f"larger fraction){other}"
            )
