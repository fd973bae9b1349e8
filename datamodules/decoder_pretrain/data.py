"""Text for pretraining a decoder: any source, any tokenizer, windows of one length."""

from functools import cached_property
from typing import Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from datamodules.sources import AnySource, Mixture, Source, source_of
from datamodules.splits import Side
from datamodules.token_cache import Split
from datamodules.token_files import Tokens, joined
from datamodules.tokens import TokenDataModule
from datamodules.windows import mixed_windows, random_windows, sequential_windows
from lightning_modules.common.messages import say
from lightning_modules.common.ranges import NonNegativeInt, PositiveInt, Probability


class PretrainDataModule(TokenDataModule):
    """Windows of a tokenised text, in which the target of each token is the next one.

    The text is tokenised once; other runs, processes and workers read the same files (see `cache_dir`). A batch is
    `{"input_ids": (B, T), "targets": (B, T), "target_bytes": ()}`: `targets` is shifted by one token and is -100 after
    the end of the text; `target_bytes` is the number of UTF-8 bytes of the targets.

    Args:
        source: The text: a source, or a file, folder, glob pattern, URL or `hub:OWNER/NAME`, see `source_of`. A
            `datamodules.sources.Mixture` takes shares of several by weight.
        block_size: Length of a window, in tokens (1 or more); the context that the model trains on.
        batch_size: Number of windows in a batch, over all processes (1 or more).
        tokenizer: `byte`, `character` (the characters of the source), or the name of another one: see
            `datamodules.tokenizers.load_tokenizer`.
        windows: `random`: each window starts at a random token, and an epoch has as many windows as fit into the
            training text. `sequential`: an epoch is the text cut into blocks, in shuffled order; the boundaries move
            from epoch to epoch. A mixture needs `sequential`; its boundaries do not move.
        split: `tail` holds out the end of the text. `documents` holds out documents, drawn by a hash of their
            beginning, so that copies share a split. `auto` does the same if there are more than 20, and some for each
            split, and holds out the end of each if not. `groups` is `auto`, but documents with many lines in common
            share a split.
        val_fraction: Part of the text to hold out for validation (0 to less than 1).
        test_fraction: Part of the text to hold out for the test (0 to less than 1).
        val_source: Text for validation, in place of a part of `source`.
        test_source: Text for the test, in place of a part of `source`.
        cache_dir: Folder for the tokenised text; `null` means `$LLM_TRAIN_CACHE` or `~/.cache/llm-train`.
        num_workers: Number of processes that load batches; 0 loads them in the training process.
        seed: Seed of the windows and their order (0 or more).
        val_windows: Number of windows of the validation text to evaluate on, spread evenly over it (1 or more); `null`
            for all. The test has all windows of its text.

    Raises:
        MisconfigurationException: If the two fractions leave nothing to train on, or a mixture has random windows.
    """

    def __init__(
        self,
        source: AnySource,
        block_size: PositiveInt,
        batch_size: PositiveInt,
        tokenizer: str = "byte",
        windows: Literal["random", "sequential"] = "random",
        split: Split = "tail",
        val_fraction: Probability = 0.1,
        test_fraction: Probability = 0.0,
        val_source: AnySource | None = None,
        test_source: AnySource | None = None,
        cache_dir: str | None = None,
        num_workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
        val_windows: PositiveInt | None = None,
    ) -> None:
        fractions = 0.0 if val_source else val_fraction, 0.0 if test_source else test_fraction
        super().__init__(block_size, batch_size, tokenizer, *fractions, cache_dir, num_workers, seed)
        self.source: Source = source_of(source)
        if isinstance(self.source, Mixture) and windows != "sequential":
            raise MisconfigurationException(f"data.windows is {windows}: a mixture needs data.windows sequential")
        self.windows = windows
        self.split = split
        self.val_windows = val_windows
        own: dict[Side, AnySource | None] = {"val": val_source, "test": test_source}
        self.held_out = {side: source_of(text, f"data.{side}_source") for side, text in own.items() if text}

    def setup(self, stage: str) -> None:
        """Check that the splits of a stage have enough text.

        Raises:
            MisconfigurationException: If a split that this stage needs has too little text.
        """
        self.require_text(self.files, stage, self.held_out)
        say(f"data    {self.files['train'].split}")

    def train_dataloader(self) -> DataLoader:
        """Return the loader of the training windows."""
        if isinstance(self.source, Mixture):
            sizes = [files["train"].n_tokens for files in self._texts]
            n, order = mixed_windows(sizes, self.source.weights, self.block_size, self.seed)
        else:
            choose = random_windows if self.windows == "random" else sequential_windows
            n, order = choose(self.files["train"].n_tokens, self.block_size, self.seed)
        return self.training_loader(self.windows_of(self.files["train"]), n, order)

    def val_dataloader(self) -> DataLoader | list:
        """Return the loader of the windows of the validation text; an empty list if none is held out."""
        return self._held_out("val", self.val_windows)

    def test_dataloader(self) -> DataLoader | list:
        """Return the loader of the test text, each token predicted once; an empty list if none is held out."""
        return self._held_out("test")

    @cached_property
    def files(self) -> dict[str, Tokens]:
        """The token file of each split; the text is read, and tokenised if need be, at the first access."""
        files = self._texts[0]
        if isinstance(self.source, Mixture):
            files = {side: joined([text[side] for text in self._texts]) for side in files}
        return files | {side: self.tokenize(source, whole=side)["train"] for side, source in self.held_out.items()}

    @cached_property
    def _texts(self) -> list[dict[str, Tokens]]:
        """The token files of the text, or of each text of a mixture."""
        sources = self.source.texts if isinstance(self.source, Mixture) else [self.source]
        return [self.tokenize(source, self.split, self.val_fraction, self.test_fraction) for source in sources]

    def _held_out(self, side: str, most: int | None = None) -> DataLoader | list:
        loader = self.covering_loader(self.files[side], most)
        return [] if loader is None else loader
