"""A text as token files on disk, made once and mapped into memory, and the windows that are cut from them."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from datamodules.base import Order
from datamodules.cache import digest
from datamodules.sources import Piece, Source
from datamodules.splits import SIDES, Side, side_of
from datamodules.tokenizers import encode, tokenizer_fingerprint, vocab_size
from lightning_modules.common.messages import say
from lightning_modules.common.targets import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Split = Literal["tail", "documents"]

_FORMAT = 1  # raise it when the files change their meaning: caches of other formats are then left alone
_BATCH_CHARACTERS = 2**20  # encoded at once, by all cores; memory grows with it
_BATCH_PIECES = 2**10


@dataclass(frozen=True)
class TokenFile:
    """A file of token ids, one after the other."""

    path: Path
    dtype: str
    n_tokens: int

    def open(self) -> np.ndarray:
        """Map the file into memory: (n_tokens,). Processes share the pages that they read."""
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.n_tokens,))


def prepare_tokens(
    source: Source,
    tokenizer: "PreTrainedTokenizerFast",
    cache_dir: Path,
    split: Split = "tail",
    val_fraction: float = 0.0,
    test_fraction: float = 0.0,
) -> dict[str, TokenFile]:
    """Return the token files of the sides train, val and test, tokenising the source unless that was done before.

    The files appear all at once: a process that is killed leaves nothing that is taken for them, and of two that
    prepare the same text the first to finish wins.

    Args:
        source: the text.
        tokenizer: its end-of-text token, where it has one, stands between documents.
        cache_dir: where the files are kept, in a folder named for the source, the tokenizer and the split.
        split: see `PretrainDataModule`.
        val_fraction: part of the tokens (`tail`) or of the documents (`documents`) that goes to the side val.
        test_fraction: the same for test.

    Raises:
        MisconfigurationException: the text or the tokenizer is at fault, or the files cannot be written.
    """
    parts = [_FORMAT, source.fingerprint(), tokenizer_fingerprint(tokenizer), split, val_fraction, test_fraction]
    folder = cache_dir / "tokens" / digest(parts)
    files = _read(folder)
    if files is not None:
        return files
    if folder.exists():
        say(f"the prepared text in {folder} is damaged: preparing it again")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unfinished-", ignore_cleanup_errors=True) as parent:
            fresh = Path(parent, "fresh")
            fresh.mkdir()
            _write(fresh, source, tokenizer, split, val_fraction, test_fraction)
            _publish(fresh, folder, scrap=Path(parent, "damaged"))
    except OSError as error:
        raise MisconfigurationException(
            f"the prepared text cannot be written to {folder.parent} ({error}): make room there, or choose another "
            "folder with data.cache_dir or $LLM_TRAIN_CACHE"
        ) from error
    files = _read(folder)
    assert files is not None
    counts = ", ".join(f"{side} {file.n_tokens:,}" for side, file in files.items())
    say(f"prepared text in {folder} (tokens: {counts})")
    return files


def _read(folder: Path) -> dict[str, TokenFile] | None:
    """Return the token files in a folder, or None where they are missing or not as long as they were written."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        files = {side: TokenFile(folder / f"{side}.bin", meta["dtype"], meta["tokens"][side]) for side in SIDES}
        whole = all(
            file.path.stat().st_size == file.n_tokens * np.dtype(file.dtype).itemsize for file in files.values()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return files if whole else None


def _publish(fresh: Path, folder: Path, scrap: Path) -> None:
    if _read(folder) is not None:
        return  # another process was first
    try:
        if folder.exists():
            os.rename(folder, scrap)
        os.rename(fresh, folder)
    except OSError:
        if _read(folder) is None:
            raise


def _write(
    folder: Path,
    source: Source,
    tokenizer: "PreTrainedTokenizerFast",
    split: Split,
    val_fraction: float,
    test_fraction: float,
) -> None:
    size = vocab_size(tokenizer)
    dtype = np.dtype(np.uint16 if size <= 2**16 else np.uint32)
    separator = tokenizer.eos_token_id
    tokens = dict.fromkeys(SIDES, 0)
    with ExitStack() as stack:
        files = {side: stack.enter_context(open(folder / f"{side}.bin", "w+b")) for side in SIDES}

        def append(side: str, ids: np.ndarray) -> None:
            ids.astype(dtype).tofile(files[side])
            tokens[side] += len(ids)

        def move_tail(side: str, begin: int) -> None:
            tokens[side], tokens["train"] = tokens["train"] - begin, begin
            files["train"].seek(begin * dtype.itemsize)
            shutil.copyfileobj(files["train"], files[side])
            files["train"].truncate(begin * dtype.itemsize)

        bar = stack.enter_context(tqdm(desc="tokenizing", unit="char", unit_scale=True, delay=1, disable=None))
        side: Side = "train"
        starts_document = True
        for batch in _batches(source.pieces()):
            encoded = encode(tokenizer, [piece.text for piece in batch])
            for (text, ends_document), ids in zip(batch, encoded, strict=True):
                if starts_document:
                    if split == "documents":
                        side = side_of(text, val_fraction, test_fraction)
                    if separator is not None and tokens[side]:
                        append(side, np.array([separator]))
                append(side, ids)
                starts_document = ends_document
                bar.update(len(text))
        if split == "tail":
            n = tokens["train"]
            move_tail("test", int(n * (1 - test_fraction)))
            move_tail("val", int(n * (1 - val_fraction - test_fraction)))
    (folder / "meta.json").write_text(json.dumps({"dtype": dtype.name, "tokens": tokens}))


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_PIECES:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def random_windows(n_tokens: int, block_size: int, seed: int) -> tuple[int, Order]:
    """Return the number of windows in an epoch and their order: starts drawn anew, with replacement, in each epoch."""
    n = n_tokens // block_size

    def order(epoch: int) -> Tensor:
        # The last start leaves room for a window and the target of its last token.
        return torch.from_numpy(np.random.default_rng([seed, epoch]).integers(n_tokens - block_size, size=n))

    return n, order


def sequential_windows(n_tokens: int, block_size: int, seed: int) -> tuple[int, Order]:
    """Return the number of windows in an epoch and their order: each stretch of text at most once, shuffled.

    The grid of windows starts at an offset drawn for each epoch, so that the boundaries move. An epoch leaves out less
    than two windows' worth of text at the ends.
    """
    n = max(1, n_tokens // block_size - 1)  # one less than fit: room for the grid to move in
    spare = n_tokens - 1 - n * block_size

    def order(epoch: int) -> Tensor:
        rng = np.random.default_rng([seed, epoch])
        offset = rng.integers(min(spare + 1, block_size))
        return torch.from_numpy(offset + block_size * rng.permutation(n))

    return n, order


class TokenWindows(Dataset):
    """Windows of a token file, by the positions of their first tokens; what lies beyond the file's end is padding."""

    def __init__(self, file: TokenFile, block_size: int, byte_lengths: np.ndarray, pad_token_id: int = 0) -> None:
        """Look at a file through windows.

        Args:
            file: the tokens.
            block_size: tokens in a window.
            byte_lengths: (vocab,), UTF-8 bytes that each token stands for.
            pad_token_id: the input where the file has ended; its target is ignored.
        """
        self.file, self.block_size, self.byte_lengths, self.pad_token_id = file, block_size, byte_lengths, pad_token_id

    @cached_property
    def tokens(self) -> np.ndarray:
        """The tokens of the file, mapped into memory: (n_tokens,)."""
        return self.file.open()

    def __getstate__(self) -> dict[str, Any]:
        # Pickled, a mapped file is a copy of all that it holds: a worker maps it for itself.
        return {name: value for name, value in self.__dict__.items() if name != "tokens"}

    def covering_starts(self) -> Tensor:
        """Return the starts of the windows that predict each token but the first exactly once: (n,) int64."""
        return torch.arange(0, self.file.n_tokens - 1, self.block_size)

    def __getitem__(self, starts: Tensor) -> dict[str, Tensor]:
        """Return the windows that begin at these tokens (B,): inputs and targets (B, T), bytes of the targets ()."""
        places = starts.numpy()[:, None] + np.arange(self.block_size + 1)  # (B, T + 1)
        tokens = self.tokens[np.minimum(places, self.file.n_tokens - 1)].astype(np.int64)
        beyond = places >= self.file.n_tokens
        inputs = np.where(beyond, self.pad_token_id, tokens)[:, :-1]
        targets = np.where(beyond, IGNORED, tokens)[:, 1:]
        return {
            "input_ids": torch.from_numpy(np.ascontiguousarray(inputs)),
            "targets": torch.from_numpy(np.ascontiguousarray(targets)),
            "target_bytes": torch.tensor(int((self.byte_lengths[tokens] * ~beyond)[:, 1:].sum())),
        }
