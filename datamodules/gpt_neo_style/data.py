"""Books whose style is learned, in passages of which some are held out, and other texts to evaluate on."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.base import ExperimentDataModule
from datamodules.cache import cache_root
from datamodules.gpt_neo_style.books import cut_into_passages, read_book
from datamodules.sources import ListText, Source
from datamodules.splits import SIDES, require_fractions
from datamodules.tokenizers import WithTokenizer, load_tokenizer, token_byte_lengths
from datamodules.tokens import TokenFile, TokenWindows, prepare_tokens, sequential_windows
from lightning_modules.common.ranges import NonNegativeInt, PositiveInt, PositiveShare, TwoOrMore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Books = int | str | list[int | str]


class GPTNeoStyleDataModule(WithTokenizer, ExperimentDataModule):
    """Blocks of one or several books, and three texts to evaluate on: the books, other books, and the base's own text.

    A book is cut into contiguous passages that do not overlap, and some of them, spread over the whole book, are held
    out. A batch is `{"input_ids": (B, T), "targets": (B, T), "target_bytes": ()}`; a batch of a held-out text also has
    `text`, its name: `book`, `other` or `base`.

    Args:
        books: Books whose style is learned, one or a list. Each is a number of Project Gutenberg (1513 is Romeo and
            Juliet, 11 Alice's Adventures in Wonderland), a URL, the path of a UTF-8 text file, or the name of a book
            that is shipped with the package: `bell_of_orrow` or `mislaid_wednesday`.
        block_size: Length of a block, in tokens, at least 1 and at most the context of the base.
        batch_size: Blocks in a batch, over all processes, at least 1.
        tokenizer: Tokenizer of the base: a folder with a tokenizer.json, such a file, or a name on the hub.
        other_books: Books of another style, to evaluate on and not to train on; `null` for none.
        base_source: Text of the kind that the base was trained on, to evaluate what the model forgets; `null` for none.
        base_val_fraction: Part of the documents of `base_source` to evaluate on, more than 0, at most 1. A hash of its
            text chooses a document: the value that `decoder_pretrain` had chooses what it held out.
        base_windows: Blocks of that part to evaluate on, spread evenly over it, at least 1; all blocks if there are
            fewer.
        passages: Passages that a book is cut into, at least 2.
        val_fraction: Part of the passages that is held out for validation, 0 or more and less than 1.
        test_fraction: Part of the passages that is held out for the test, 0 or more and less than 1.
        cache_dir: Folder of the tokenised text; by default `$LLM_TRAIN_CACHE` or `~/.cache/llm-train`.
        num_workers: Processes that load in advance; 0 loads in the training process.
        seed: Seed of the order of the blocks, 0 or more.

    Raises:
        MisconfigurationException: If there is no book, or nothing is left to train on.
    """

    def __init__(
        self,
        books: Books,
        block_size: PositiveInt,
        batch_size: PositiveInt,
        tokenizer: str = "byte",
        other_books: Books | None = None,
        base_source: Source | None = None,
        base_val_fraction: PositiveShare = 1.0,
        base_windows: PositiveInt = 64,
        passages: TwoOrMore = 20,
        val_fraction: float = 0.15,
        test_fraction: float = 0.0,
        cache_dir: str | None = None,
        num_workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.val_fraction, self.test_fraction = require_fractions(val_fraction, test_fraction)
        self.books, self.other_books = _as_list(books), _as_list(other_books)
        if not self.books:
            raise MisconfigurationException("data.books is empty: give at least one book")
        self.block_size = block_size
        self.tokenizer_name = tokenizer
        self.base_source = base_source
        self.base_val_fraction = base_val_fraction
        self.base_windows = base_windows
        self.passages = passages
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else cache_root()

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer of the base."""
        return load_tokenizer(self.tokenizer_name)

    @cached_property
    def book_passages(self) -> dict[str, list[str]]:
        """The passages of the books by split: train, val, test."""
        return self._passages(self.books)

    def prepare_data(self) -> None:
        """Fetch the books and tokenise all text, on one process a machine."""
        self._prepare()

    def setup(self, stage: str) -> None:
        """Map the token files into memory.

        Raises:
            MisconfigurationException: If a split that this stage needs has too little text.
        """
        self.files = self._prepare()
        n_train = self.files["book"]["train"].n_tokens
        if stage == "fit" and n_train <= self.block_size:
            raise MisconfigurationException(
                f"data.books: there are {n_train} tokens to train on, fewer than a block and the target after it: give "
                f"longer books, or less than data.block_size {self.block_size}"
            )
        side = "test" if stage == "test" else "val"
        asked_for = {"val": self.val_fraction, "test": self.test_fraction}[side] > 0
        if self.files["book"][side].n_tokens < 2 and (asked_for or stage != "fit"):
            raise MisconfigurationException(
                f"data.books: there is no {side} text: set data.{side}_fraction above 0, or give longer books"
            )

    def train_dataloader(self) -> DataLoader:
        """Return the loader of the blocks of the books; the cuts between the blocks move from epoch to epoch."""
        file = self.files["book"]["train"]
        return self.training_loader(self._windows(file), *sequential_windows(file.n_tokens, self.block_size, self.seed))

    def val_dataloader(self) -> list[DataLoader]:
        """Return the loaders of the held-out passages of the books, of the other books, and of the base's own text."""
        return self._held_out("val")

    def test_dataloader(self) -> list[DataLoader]:
        """Return the same loaders for the test; that of the base's own text has the blocks of the validation."""
        return self._held_out("test")

    def _passages(self, books: Sequence[int | str]) -> dict[str, list[str]]:
        sides: dict[str, list[str]] = {side: [] for side in SIDES}
        for book in books:
            cut = cut_into_passages(read_book(book), self.passages, self.val_fraction, self.test_fraction, str(book))
            for side, text in cut:
                sides[side].append(text)
        return sides

    def _prepare(self) -> dict[str, dict[str, TokenFile]]:
        """Return the token file of each text and split."""
        files = {"book": self._tokenized(self.book_passages)}
        if self.other_books:
            files["other"] = self._tokenized(self._passages(self.other_books))
        if self.base_source is not None:
            base = prepare_tokens(
                self.base_source, self.tokenizer, self.cache_dir, "documents", val_fraction=self.base_val_fraction
            )["val"]
            files["base"] = {"val": base, "test": base}
        return files

    def _tokenized(self, passages: dict[str, list[str]]) -> dict[str, TokenFile]:
        return {
            side: prepare_tokens(ListText(texts), self.tokenizer, self.cache_dir)["train"]
            for side, texts in passages.items()
        }

    def _windows(self, file: TokenFile, text: str | None = None) -> TokenWindows:
        byte_lengths = token_byte_lengths(self.tokenizer)
        return NamedWindows(text, file, self.block_size, byte_lengths, self.tokenizer.pad_token_id or 0)

    def _held_out(self, side: str) -> list[DataLoader]:
        loaders = []
        for text, files in self.files.items():
            if files[side].n_tokens >= 2:
                windows = self._windows(files[side], text)
                starts = windows.covering_starts()
                if text == "base":
                    starts = starts[torch.linspace(0, len(starts) - 1, min(self.base_windows, len(starts))).long()]
                loaders.append(self.evaluation_loader(windows, starts))
        return loaders


class NamedWindows(TokenWindows):
    """Windows of a text whose batches hold the name of the text.

    Args:
        text: Name of the text; `None` for the training text, whose batches hold no name.
        *args: Arguments of `TokenWindows`.
    """

    def __init__(self, text: str | None, *args: Any) -> None:
        super().__init__(*args)
        self.text = text

    def __getitem__(self, starts: Tensor) -> dict[str, Any]:
        """Return the windows that begin at these tokens, (B,), and the name of the text."""
        batch = super().__getitem__(starts)
        return batch if self.text is None else batch | {"text": self.text}


def _as_list(books: Books | None) -> list[int | str]:
    return [] if books is None else list(books) if isinstance(books, list) else [books]
