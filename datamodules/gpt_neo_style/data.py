"""Books whose style is learned, in passages of which some are held out, and other texts to evaluate on."""

from functools import cached_property
from itertools import chain
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from datamodules.files import TEXT, find_files
from datamodules.gpt_neo_style.books import cut_into_passages, read_book
from datamodules.sources import AnySource, ListText, source_of
from datamodules.splits import SIDES, DocumentSplit
from datamodules.token_files import Tokens, describe_sizes
from datamodules.tokens import TokenDataModule
from datamodules.windows import sequential_windows
from lightning_modules.common.messages import say
from lightning_modules.common.ranges import NonNegativeInt, PositiveInt, PositiveShare, TwoOrMore

Books = int | str | list[int | str]


class GPTNeoStyleDataModule(TokenDataModule):
    """Blocks of one or several books, and three texts to evaluate on: the books, other books, and the base's own text.

    A book is cut into contiguous passages that do not overlap, and some of them, spread over the whole book, are held
    out. A batch is `{"input_ids": (B, T), "targets": (B, T), "target_bytes": ()}`; a batch of a held-out text also has
    `text`, its name: `book`, `other` or `base`.

    Args:
        books: Books whose style is learned, one or a list. Each is a number of Project Gutenberg (1513 is Romeo and
            Juliet, 11 Alice's Adventures in Wonderland), a URL, the path of a UTF-8 text file, a folder with such
            files, or the name of a book that is shipped with the package: `bell_of_orrow` or `mislaid_wednesday`.
        block_size: Length of a block, in tokens, at least 1 and at most the context of the base.
        batch_size: Blocks in a batch, over all processes, at least 1.
        tokenizer: Tokenizer of the base, mostly under its name: see `datamodules.tokenizers.load_tokenizer`.
        other_books: Books of another style, to evaluate on and not to train on; `null` for none.
        base_source: Text of the kind that the base was trained on, to evaluate what the model forgets: a source, or a
            file, folder, glob pattern, URL or `hub:OWNER/NAME`, see `source_of`; `null` for none.
        base_val_fraction: Part of `base_source` to evaluate on, more than 0, at most 1. With the fraction and the split
            of a `decoder_pretrain` run it is what the run held out.
        base_windows: Blocks of that part to evaluate on, spread evenly over it, at least 1; all blocks if there are
            fewer.
        passages: Passages that a book is cut into, at least 2.
        val_fraction: Part of the passages that is held out for validation, 0 or more and less than 1.
        test_fraction: Part of the passages that is held out for the test, 0 or more and less than 1.
        cache_dir: Folder of the tokenised text; `null` means `$LLM_TRAIN_CACHE` or `~/.cache/llm-train`.
        num_workers: Processes that load ahead; 0 loads in the training process.
        seed: Seed of the order of the blocks, 0 or more.
        base_split: How the part of `base_source` is chosen: `documents` are drawn by a hash of their beginning; `auto`
            does the same if there are more than 20, and one of them is drawn, and takes the end of each if not;
            `groups` is `auto`, but documents with many lines in common go together.

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
        base_source: AnySource | None = None,
        base_val_fraction: PositiveShare = 1.0,
        base_windows: PositiveInt = 64,
        passages: TwoOrMore = 20,
        val_fraction: float = 0.15,
        test_fraction: float = 0.0,
        cache_dir: str | None = None,
        num_workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
        base_split: DocumentSplit = "documents",
    ) -> None:
        fractions = val_fraction, test_fraction
        super().__init__(block_size, batch_size, tokenizer, *fractions, cache_dir, num_workers, seed)
        if books == []:
            raise MisconfigurationException("data.books is empty: give at least one book")
        self.books, self.other_books = books, other_books
        self.base_source = source_of(base_source, "data.base_source") if base_source else None
        self.base_split = base_split
        self.base_val_fraction = base_val_fraction
        self.base_windows = base_windows
        self.passages = passages

    @cached_property
    def book_passages(self) -> dict[str, list[str]]:
        """The passages of the books by split: train, val, test."""
        return self._passages(self.books)

    def setup(self, stage: str) -> None:
        """Check that the splits of a stage have enough text.

        Raises:
            MisconfigurationException: If a split that this stage needs has too little text.
        """
        self.require_text(self.files["book"], stage)
        if stage == "fit":
            sizes = {text: describe_sizes(files) for text, files in self.files.items() if text != "base"}
            say(f"data    tokens: {'; '.join(f'{text} {size}' for text, size in sizes.items())}")

    def train_dataloader(self) -> DataLoader:
        """Return the loader of the blocks of the books; the cuts between the blocks move from epoch to epoch."""
        file = self.files["book"]["train"]
        n, order = sequential_windows(file.n_tokens, self.block_size, self.seed)
        return self.training_loader(self.windows_of(file), n, order)

    def val_dataloader(self) -> list[DataLoader]:
        """Return the loaders of the held-out passages of the books, of the other books, and of the base's own text."""
        return self._held_out("val")

    def test_dataloader(self) -> list[DataLoader]:
        """Return the same loaders for the test; that of the base's own text has the blocks of the validation."""
        return self._held_out("test")

    def _passages(self, books: Books) -> dict[str, list[str]]:
        passages: dict[str, list[str]] = {side: [] for side in SIDES}
        for book in chain.from_iterable(map(_books_at, books if isinstance(books, list) else [books])):
            cut = cut_into_passages(read_book(book), self.passages, self.val_fraction, self.test_fraction, str(book))
            for side, text in cut:
                passages[side].append(text)
        return passages

    @cached_property
    def files(self) -> dict[str, dict[str, Tokens]]:
        """The token file of each text and split; the texts are read, and tokenised if need be, at the first access."""
        texts = {"book": self.book_passages}
        if self.other_books:
            texts["other"] = self._passages(self.other_books)
        files = {
            text: {side: self.tokenize(ListText(passages), announce=False)["train"] for side, passages in sides.items()}
            for text, sides in texts.items()
        }
        if self.base_source is not None:
            base = self.tokenize(self.base_source, self.base_split, self.base_val_fraction)["val"]
            files["base"] = {"val": base, "test": base}
        return files

    def _held_out(self, side: str) -> list[DataLoader]:
        loaders = (
            self.covering_loader(files[side], self.base_windows if text == "base" else None, text=text)
            for text, files in self.files.items()
        )
        return [loader for loader in loaders if loader is not None]


def _books_at(name: int | str) -> list[int | str]:
    """Return the text files of a folder, each of which is a book; any other name is one book."""
    if isinstance(name, str) and Path(name).expanduser().is_dir():
        return [*find_files(name, TEXT)]
    return [name]
