"""Text for pretraining a decoder: any source, any tokenizer, windows of one block length."""

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

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class PretrainDataModule(WithTokenizer, ExperimentDataModule):
    """Windows of a tokenised text, with the next token as each token's target.

    The text is tokenised once, into files that later runs, other processes and workers share (see `cache_dir`). A batch
    is `{"input_ids": (B, T), "targets": (B, T), "target_bytes": ()}`: targets are shifted by one, -100 where there is
    none; `target_bytes` counts the UTF-8 bytes that the targets stand for.
    """

    def __init__(
        self,
        source: Source,
        block_size: int,
        batch_size: int,
        tokenizer: str = "byte",
        windows: Literal["random", "sequential"] = "random",
        split: Split = "tail",
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        val_source: Source | None = None,
        test_source: Source | None = None,
        cache_dir: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Choose the text and how it is cut.

        Args:
            source: where the text comes from.
            block_size: tokens in a window, at least 1: the context that the model trains on.
            batch_size: windows in a batch, over all processes, at least 1.
            tokenizer: `byte`; `character` (those of the source); a folder with a tokenizer.json, such as `tokenizer/`
                in a run of the topic bpe; such a file; or a name on the hub.
            windows: `random`: an epoch is as many windows as the training text has blocks, each starting anywhere;
                some text comes twice and some not at all. `sequential`: an epoch is the text cut into blocks, each
                seen once, in shuffled order; the cuts move from epoch to epoch.
            split: `tail`: validation is the last part of the text. `documents`: each document goes to one side, by a
                hash of its text, so that copies stay together.
            val_fraction: part of the text that is kept for validation, 0 to less than 1.
            test_fraction: part of the text that is kept for the test, after validation, 0 to less than 1.
            val_source: text for validation, all of it, in place of a part of `source`.
            test_source: text for the test, all of it, in place of a part of `source`.
            cache_dir: folder for the tokenised text; by default `$LLM_TRAIN_CACHE` or `~/.cache/llm-train`.
            num_workers: processes that load ahead; 0 loads in the training process.
            seed: of the windows and their order, 0 or greater.
        """
        super().__init__(batch_size, num_workers, seed)
        if block_size < 1:
            raise MisconfigurationException(f"data.block_size is {block_size}: it must be at least 1")
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
        """The tokenizer. `character` reads the source when it is first asked for."""
        return load_tokenizer(self.tokenizer_name, self.source, self.cache_dir)

    def prepare_data(self) -> None:
        """Tokenise the text, on one process a machine."""
        self._prepare()

    def setup(self, stage: str) -> None:
        """Map the token files into memory.

        Raises:
            MisconfigurationException: a side that this stage needs has too little text.
        """
        self.files = self._prepare()
        n_train = self.files["train"].n_tokens
        if stage == "fit" and n_train <= self.block_size:
            raise MisconfigurationException(
                f"the training text has {n_train} tokens, fewer than a block and the target after it: "
                f"give more text, or less than data.block_size {self.block_size}"
            )
        side = "test" if stage == "test" else "val"
        asked_for = side in self.held_out or self.fractions[f"{side}_fraction"] > 0
        if self.files[side].n_tokens < 2 and (asked_for or stage != "fit"):
            raise MisconfigurationException(
                f"there is no {side} text: set data.{side}_fraction above 0 (more than it is, where the text is short) "
                f"or give data.{side}_source"
            )

    def train_dataloader(self) -> DataLoader:
        """Return the windows to train on."""
        choose = random_windows if self.windows == "random" else sequential_windows
        n, order = choose(self.files["train"].n_tokens, self.block_size, self.seed)
        return self.training_loader(self._windows("train"), n, order)

    def val_dataloader(self) -> DataLoader | list:
        """Return the validation text, every token predicted once; nothing where no text was set aside."""
        return self._covering("val")

    def test_dataloader(self) -> DataLoader | list:
        """Return the test text, every token predicted once."""
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
