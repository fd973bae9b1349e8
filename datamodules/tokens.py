"""Token files: a text is tokenised once, written to the cache, mapped into memory, and read in windows."""

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from datamodules.base import ExperimentDataModule, Order
from datamodules.cache import cache_root, digest
from datamodules.sources import Piece, Source
from datamodules.splits import CUT_FEW, SIDES, Kind, Side, SplitDocuments, describe, require_fractions
from datamodules.tokenizers import (
    WithTokenizer,
    encode,
    load_tokenizer,
    token_byte_lengths,
    tokenizer_fingerprint,
    vocab_size,
)
from lightning_modules.common.messages import say
from lightning_modules.common.targets import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Split = Literal["auto", "groups", "tail", "documents"]

_FORMAT = 2  # increase it when the content of the files changes, so that older files are not read
_BATCH_CHARACTERS = 2**20  # encoded at once on all cores; memory use grows with it
_BATCH_PIECES = 2**10


@dataclass(frozen=True)
class TokenFile:
    """A file of token ids, with the NumPy type of an id, their number, and how the text was split."""

    path: Path
    dtype: str
    n_tokens: int
    split: str = ""  # of the whole text, in words

    def open(self) -> np.ndarray:
        """Return the tokens, (n_tokens,), mapped into memory that processes share."""
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.n_tokens,))


def prepare_tokens(
    source: Source,
    tokenizer: "PreTrainedTokenizerFast",
    cache_dir: Path,
    split: Split = "tail",
    val_fraction: float = 0.0,
    test_fraction: float = 0.0,
    announce: bool = True,
) -> dict[str, TokenFile]:
    """Return the token files of the splits train, val and test; write them the first time.

    The folder of the files appears only when all of them are complete. If two processes prepare the same text, the
    files of the first are kept. If the tokenizer has an end-of-text token, that token separates documents.

    Args:
        source: Text to tokenise.
        tokenizer: Tokenizer of the text.
        cache_dir: Folder for the files. Their subfolder depends on the source, the tokenizer and the split.
        split: `tail` holds out the last tokens, those of the test after those of the validation; `documents`, `auto`
            and `groups` hold out documents or the ends of few, see `SplitDocuments`.
        val_fraction: Part of the tokens (`tail`), or of the documents, that is held out for validation.
        test_fraction: Part that is held out for the test.
        announce: Whether to say where new files are.

    Raises:
        MisconfigurationException: If the text cannot be read or tokenised, or the files cannot be written.
    """
    parts = [_FORMAT, source.fingerprint(), tokenizer_fingerprint(tokenizer), split, val_fraction, test_fraction]
    folder = cache_dir / "tokens" / digest(parts)
    if (files := _read(folder)) is not None:
        return files
    if folder.exists():
        say(f"the prepared text in {folder} is damaged: preparing it again")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unfinished-", ignore_cleanup_errors=True) as parent:
            fresh = Path(parent, "fresh")
            fresh.mkdir()
            _write(fresh, source, tokenizer, split, (val_fraction, test_fraction))
            _publish(fresh, folder, scrap=Path(parent, "damaged"))
    except OSError as error:
        raise MisconfigurationException(
            f"the prepared text cannot be written to {folder.parent} ({error}): make room there, or choose another "
            "folder with data.cache_dir or $LLM_TRAIN_CACHE"
        ) from error
    files = _read(folder)
    assert files is not None
    if announce:
        say(f"prepared text in {folder} (tokens: {describe_sizes(files)})")
    return files


def describe_sizes(files: dict[str, TokenFile]) -> str:
    """Return the number of tokens of each split that has some, for a message."""
    return ", ".join(f"{side} {file.n_tokens:,}" for side, file in files.items() if file.n_tokens)


def _read(folder: Path) -> dict[str, TokenFile] | None:
    """Return the token files in a folder, or `None` if one is missing or damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        files = {
            str(side): TokenFile(folder / f"{side}.bin", meta["dtype"], meta["tokens"][side], meta["split"])
            for side in SIDES
        }
        size = np.dtype(meta["dtype"]).itemsize
        whole = all(file.path.stat().st_size == file.n_tokens * size for file in files.values())
        return files if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _publish(fresh: Path, folder: Path, scrap: Path) -> None:
    if _read(folder) is not None:
        return  # another process has written the same files
    try:
        if folder.exists():
            os.rename(folder, scrap)
        os.rename(fresh, folder)
    except OSError:
        if _read(folder) is None:
            raise


def _write(
    folder: Path, source: Source, tokenizer: "PreTrainedTokenizerFast", split: Split, fractions: tuple[float, float]
) -> None:
    dtype = np.dtype(np.uint16 if vocab_size(tokenizer) <= 2**16 else np.uint32)
    separator = tokenizer.eos_token_id
    tokens: dict[str, int] = dict.fromkeys(SIDES, 0)
    documents: dict[Side, int] = dict.fromkeys(SIDES, 0)
    sizes: dict[Side, int] = dict.fromkeys(SIDES, 0)
    text = SplitDocuments(source) if split == "tail" else SplitDocuments(source, split, *fractions)
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {side: stack.enter_context(open(folder / f"{side}.bin", "w+b")) for side in SIDES}

        def append(side: str, ids: np.ndarray) -> None:
            ids.astype(dtype).tofile(files[side])
            tokens[side] += len(ids)

        def move_tail(side: str, begin: int) -> None:
            tokens[side], tokens["train"] = tokens["train"] - begin, begin
            files["train"].seek(begin * dtype.itemsize)
            shutil.copyfileobj(files["train"], files[side])
            files["train"].truncate(begin * dtype.itemsize)

        bar = stack.enter_context(tqdm(desc="tokenizing", unit="char", unit_scale=True, delay=1, disable=None))
        before: Side | None = None  # the split of the last piece, if its document goes on
        for batch in _batches(text):
            encoded = encode(tokenizer, [piece.text for _, piece in batch])
            for (side, piece), ids in zip(batch, encoded, strict=True):
                if side != before:
                    documents[side] += 1
                    if separator is not None and tokens[side]:
                        append(side, np.array([separator]))
                append(side, ids)
                sizes[side] += len(piece.text.encode())
                before = None if piece.ends_document else side
                bar.update(len(piece.text))
        if split == "tail":
            n, (val_fraction, test_fraction) = tokens["train"], fractions
            move_tail("test", int(n * (1 - test_fraction)))
            move_tail("val", int(n * (1 - val_fraction - test_fraction)))
    kind: Kind = "tail" if split == "tail" else "parts" if text.few is not None else "documents"
    said = describe(kind, documents, sizes, *fractions)
    (folder / "meta.json").write_text(json.dumps({"dtype": dtype.name, "tokens": tokens, "split": said}))


def _batches(pieces: Iterable[tuple[Side, Piece]]) -> Iterator[list[tuple[Side, Piece]]]:
    batch: list[tuple[Side, Piece]] = []
    characters = 0
    for side, piece in pieces:
        batch.append((side, piece))
        characters += len(piece.text)
        if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_PIECES:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def random_windows(n_tokens: int, block_size: int, seed: int) -> tuple[int, Order]:
    """Return the number of windows in an epoch, and their order: starts are drawn with replacement in each epoch."""
    n = n_tokens // block_size
    # After the last start there is room for a window and the target of its last token.
    last = n_tokens - block_size
    return n, lambda epoch: torch.from_numpy(np.random.default_rng([seed, epoch]).integers(last, size=n))


def sequential_windows(n_tokens: int, block_size: int, seed: int) -> tuple[int, Order]:
    """Return the number of windows in an epoch, and their order: windows do not overlap and are shuffled.

    The first window starts at an offset that is drawn for each epoch, so that the boundaries move. An epoch skips less
    than two windows of text, at the beginning and the end.
    """
    n = max(1, n_tokens // block_size - 1)  # one less than would fit, to leave room for the offset
    spare = n_tokens - 1 - n * block_size

    def order(epoch: int) -> Tensor:
        rng = np.random.default_rng([seed, epoch])
        offset = rng.integers(min(spare + 1, block_size))
        return torch.from_numpy(offset + block_size * rng.permutation(n))

    return n, order


class TokenWindows(Dataset):
    """Windows of a token file, indexed by the positions of their first tokens. After the end of the file is padding.

    Args:
        file: Token file.
        block_size: Number of tokens in a window.
        byte_lengths: Number of UTF-8 bytes of each token, (vocab,).
        pad_token_id: Input after the end of the file; its target is ignored.
        **labels: Entries that each batch has too, such as the name of the text.
    """

    def __init__(
        self, file: TokenFile, block_size: int, byte_lengths: np.ndarray, pad_token_id: int = 0, **labels: str
    ) -> None:
        self.file, self.block_size, self.byte_lengths, self.pad_token_id = file, block_size, byte_lengths, pad_token_id
        self.labels = labels

    @cached_property
    def tokens(self) -> np.ndarray:
        """The tokens of the file, (n_tokens,), mapped into memory."""
        return self.file.open()

    def __getstate__(self) -> dict[str, Any]:
        # Pickling a mapped file would copy its content; a worker maps the file itself.
        return {name: value for name, value in self.__dict__.items() if name != "tokens"}

    def covering_starts(self, most: int | None = None) -> Tensor:
        """Return the starts of windows that predict each token except the first exactly once, (n,) int64.

        Args:
            most: Number of windows, if there are more: those are returned that are spread evenly over the file.
        """
        starts = torch.arange(0, self.file.n_tokens - 1, self.block_size)
        if most is None or most >= len(starts):
            return starts
        return starts[torch.linspace(0, len(starts) - 1, most).long()]

    def __getitem__(self, starts: Tensor) -> dict[str, Any]:
        """Return the windows that start at these positions, (B,) int64.

        Returns:
            `input_ids` and `targets`, (B, T) int64, and `target_bytes`, the number of UTF-8 bytes of the targets, ().
        """
        places = starts.numpy()[:, None] + np.arange(self.block_size + 1)  # (B, T + 1)
        tokens = self.tokens[np.minimum(places, self.file.n_tokens - 1)].astype(np.int64)
        beyond = places >= self.file.n_tokens
        inputs = np.where(beyond, self.pad_token_id, tokens)[:, :-1]
        targets = np.where(beyond, IGNORED, tokens)[:, 1:]
        return {
            "input_ids": torch.from_numpy(np.ascontiguousarray(inputs)),
            "targets": torch.from_numpy(np.ascontiguousarray(targets)),
            "target_bytes": torch.tensor(int((self.byte_lengths[tokens] * ~beyond)[:, 1:].sum())),
            **self.labels,
        }


class TokenDataModule(WithTokenizer, ExperimentDataModule):
    """Base of the datamodules whose batches are windows of token files; the subclasses document the arguments."""

    source: Source | None = None  # the text whose characters the tokenizer `character` has
    split: Split = "tail"  # how the text is split

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

    def tokenize(
        self,
        source: Source,
        split: Split = "tail",
        val_fraction: float = 0.0,
        test_fraction: float = 0.0,
        announce: bool = True,
    ) -> dict[str, TokenFile]:
        """Return the token files of a text; see `prepare_tokens`."""
        return prepare_tokens(source, self.tokenizer, self.cache_dir, split, val_fraction, test_fraction, announce)

    def windows_of(self, file: TokenFile, **labels: str) -> TokenWindows:
        """Return the windows of a token file; each batch has the labels too."""
        byte_lengths = token_byte_lengths(self.tokenizer)
        return TokenWindows(file, self.block_size, byte_lengths, self.tokenizer.pad_token_id or 0, **labels)

    def require_text(self, files: dict[str, TokenFile], stage: str, own_source: Collection[str] | None = None) -> None:
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
