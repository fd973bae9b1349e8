"""Text for pretraining a decoder: any source, any tokenizer, windows of one length."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from datamodules.base import ExperimentDataModule
from datamodules.cache import cache_root
from datamodules.sources import Source
from datamodules.splits import require_fractions
from datamodules.tokenizers import WithTokenizer, load_tokenizer, token_byte_lengths
from datamodules.tokens import Split, TokenFile, TokenWindows, prepare_tokens, random_windows, sequential_windows
from lightning_modules.common.ranges import NonNegativeInt, PositiveInt, Probability

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class PretrainDataModule(WithTokenizer, ExperimentDataModule):
    """Windows of a tokenised text, in which the target of each token is the next one.

    The text is tokenised once; other runs, processes and workers read the same files (see `cache_dir`). A batch is
    `{"input_ids": (B, T), "targets": (B, T), "target_bytes": ()}`: `targets` is shifted by one token and is -100 after
    the end of the text; `target_bytes` is the number of UTF-8 bytes of the targets.

    Args:
        source: The text.
        block_size: Length of a window, in tokens (1 or more); the context that the model trains on.
        batch_size: Number of windows in a batch, over all processes (1 or more).
        tokenizer: `byte`; `character` (the characters of the source); a folder with a tokenizer.json, such as
            `tokenizer/` in a run of the topic bpe; such a file; or a name on the hub.
        windows: `random`: each window starts at a random token, and an epoch has as many windows as fit into the
            training text. `sequential`: an epoch is the text cut into blocks, in shuffled order; the boundaries move
            from epoch to epoch.
        split: `tail` holds out the end of the text. `documents` holds out documents, drawn by a hash of their text, so
            that copies share a split.
        val_fraction: Part of the text to hold out for validation (0 to less than 1).
        test_fraction: Part of the text to hold out for the test (0 to less than 1).
        val_source: Text for validation, in place of a part of `source`.
        test_source: Text for the test, in place of a part of `source`.
        cache_dir: Folder for the tokenised text; `null` means `$LLM_TRAIN_CACHE` or `~/.cache/llm-train`.
        num_workers: Number of processes that load batches; 0 loads them in the training process.
        seed: Seed of the windows and their order (0 or more).

    Raises:
        MisconfigurationException: If the two fractions leave nothing to train on.
    """

    def __init__(
        self,
        source: Source,
        block_size: PositiveInt,
        batch_size: PositiveInt,
        tokenizer: str = "byte",
        windows: Literal["random", "sequential"] = "random",
        split: Split = "tail",
        val_fraction: Probability = 0.1,
        test_fraction: Probability = 0.0,
        val_source: Source | None = None,
        test_source: Source | None = None,
        cache_dir: str | None = None,
        num_workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        require_fractions(val_fraction, test_fraction)
        self.source = source
        self.block_size = block_size
        self.tokenizer_name = tokenizer
        self.windows = windows
        self.split = split
        self.fractions = {
            "val_fraction": 0.0 if val_source else val_fraction,
            "test_fraction": 0.0 if test_source else test_fraction,
        }
        self.held_out = {side: text for side, text in (("val", val_source), ("test", test_source)) if text}
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else cache_root()

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer, loaded at the first access; `character` reads the source for it."""
        return load_tokenizer(self.tokenizer_name, self.source, self.cache_dir)

    def prepare_data(self) -> None:
        """Tokenise the text, in one process on each machine."""
        self._prepare()

    def setup(self, stage: str) -> None:
        """Map the token files into memory.

        Raises:
            MisconfigurationException: If a split that this stage needs has too little text.
        """
        self.files = self._prepare()
        n_train = self.files["train"].n_tokens
        if stage == "fit" and n_train <= self.block_size:
            raise MisconfigurationException(
                f"the training text has {n_train} tokens, fewer than a block and the target after it "
                f"(data.block_size {self.block_size}): give more text, or smaller blocks"
            )
        side = "test" if stage == "test" else "val"
        is_held_out = side in self.held_out or self.fractions[f"{side}_fraction"] > 0
        if self.files[side].n_tokens < 2 and (is_held_out or stage != "fit"):
            raise MisconfigurationException(
                f"there is no {side} text: set data.{side}_fraction above 0 (or, if the text is short, to a larger "
                f"fraction), or give data.{side}_source"
            )

    def train_dataloader(self) -> DataLoader:
        """Return the loader of the training windows."""
        choose = random_windows if self.windows == "random" else sequential_windows
        n, order = choose(self.files["train"].n_tokens, self.block_size, self.seed)
        return self.training_loader(self._windows("train"), n, order)

    def val_dataloader(self) -> DataLoader | list:
        """Return the loader of the validation text, each token predicted once; an empty list if none is held out."""
        return self._covering("val")

    def test_dataloader(self) -> DataLoader | list:
        """Return the loader of the test text, each token predicted once; an empty list if none is held out."""
        return self._covering("test")

    def _prepare(self) -> dict[str, TokenFile]:
        files = prepare_tokens(self.source, self.tokenizer, self.cache_dir, self.split, **self.fractions)
        for side, source in self.held_out.items():
            files[side] = prepare_tokens(source, self.tokenizer, self.cache_dir)["train"]
        return files

    def _windows(self, side: str) -> TokenWindows:
        byte_lengths = token_byte_lengths(self.tokenizer)
        return TokenWindows(self.files[side], self.block_size, byte_lengths, self.tokenizer.pad_token_id or 0)

    def _covering(self, side: str) -> DataLoader | list:
        if self.files[side].n_tokens < 2:
            return []
        windows = self._windows(side)
        return self.evaluation_loader(windows, windows.covering_starts())
