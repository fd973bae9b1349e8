"""Token files in the cache: a text is tokenised once, and a large one in parts, by several processes."""

import contextlib
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tqdm import tqdm

from datamodules.cache import digest
from datamodules.fast_encoding import TextEncoder, fast_encoder
from datamodules.sources import Piece, Source
from datamodules.splits import SIDES, Kind, Side, SplitDocuments, describe
from datamodules.token_files import TokenFile, TokenFiles, Tokens, describe_sizes
from datamodules.tokenizers import tokenizer_fingerprint, vocab_size
from lightning_modules.common.files import process_name, try_lock, write_json
from lightning_modules.common.messages import say
from lightning_modules.common.signals import leave_to_the_parent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Split = Literal["auto", "groups", "tail", "documents"]
_FORMAT = 2  # increase it when the content of the files changes, so that older files are not read
_BATCH_CHARACTERS = 2**20  # encoded at once on all cores; memory use grows with it
_BATCH_PIECES = 2**10
_WAIT = 0.2  # seconds between two looks at what other processes have written
_JOIN_LOCK = "join.lock"
_SILENT_WAIT = 30.0  # seconds before the processes that are waited for are named


def prepare_tokens(
    source: Source,
    tokenizer: "PreTrainedTokenizerFast",
    cache_dir: Path,
    split: Split = "tail",
    val_fraction: float = 0.0,
    test_fraction: float = 0.0,
    announce: bool = True,
    n_processes: int = 1,
    whole: Side = "train",
) -> dict[str, Tokens]:
    """Return the token files of the splits train, val and test; write them the first time.

    A folder of files appears only when all of them are complete. A large text is written in parts, each to a folder of
    its own. Several processes, also of several machines, share the parts: each part is locked by the process that
    writes it. If the preparation stops, the parts that are complete are used by the next one, unless it divides the
    text otherwise. If two processes prepare the same small text, or divide a large one differently, the files of the
    first are kept. If the tokenizer has an end-of-text token, that token separates documents.

    Args:
        source: Text to tokenise.
        tokenizer: Tokenizer of the text.
        cache_dir: Folder for the files. Their subfolder depends on the source, the tokenizer and the split.
        split: `tail` holds out the last tokens, those of the test after those of the validation; `documents`, `auto`
            and `groups` hold out documents or the ends of few, see `SplitDocuments`.
        val_fraction: Part of the tokens (`tail`), or of the documents, that is held out for validation.
        test_fraction: Part that is held out for the test.
        announce: Whether to say where new files are.
        n_processes: Processes that write the parts of a large text; 1 is this one.
        whole: What a text is for of which nothing is held out, to say so; its tokens are those of `train` all the same.

    Raises:
        MisconfigurationException: If the text cannot be read or tokenised, or the files cannot be written.
    """
    parts = [_FORMAT, source.fingerprint(), tokenizer_fingerprint(tokenizer), split, val_fraction, test_fraction]
    folder = cache_dir / "tokens" / digest(parts)
    if (files := prepared(folder)) is not None:
        with contextlib.suppress(OSError):  # of a process that was killed; a text that is there needs no lock
            (folder / _JOIN_LOCK).unlink()
        return files
    fractions = val_fraction, test_fraction
    text = SplitDocuments(source) if split == "tail" else SplitDocuments(source, split, *fractions)
    texts = text.parts()
    try:
        if len(texts) == 1:
            if folder.exists():
                say(f"the prepared text in {folder} is damaged or incomplete: preparing it again")
            _write_folder(folder, partial(_write_text, text, tokenizer, split, fractions))
        else:
            text_parts = _Parts(folder, texts, tokenizer)
            try:
                _write_parts(text_parts, n_processes)
                text_parts.join(split, fractions)
            finally:
                text_parts.remove_unused()
    except OSError as error:
        # Another process that has completed the text in another division has removed the parts of this one.
        if (files := prepared(folder)) is not None:
            return files
        raise MisconfigurationException(
            f"the prepared text cannot be written to {folder.parent} ({error}): make room there, or choose another "
            "folder with data.cache_dir or $LLM_TRAIN_CACHE"
        ) from error
    files = prepared(folder)
    assert files is not None
    if announce:
        sizes = {whole if side == "train" else side: file for side, file in files.items() if file.n_tokens}
        say(f"prepared text in {folder} (tokens: {describe_sizes(sizes)})")
    return files


def prepared(folder: Path) -> dict[str, Tokens] | None:
    """Return the token files in a folder, or `None` if one is missing or has another size than it should."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if "parts" in meta:
            return _read_parts(folder, meta)
        files = _files_of(folder, meta["dtype"], meta["tokens"], meta["split"])
        return {**files} if _are_whole(files.values()) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_parts(folder: Path, meta: dict[str, Any]) -> dict[str, Tokens] | None:
    division = folder / meta.get("division", "")  # older versions had the parts in the folder itself
    parts = [
        _files_of(division / _name(number), meta["dtype"], tokens, meta["split"])
        for number, tokens in enumerate(meta["parts"])
    ]
    if not all(_are_whole(files.values()) for files in parts):
        return None
    found: dict[str, Tokens] = {}
    for side, (written_as, begin) in meta["places"].items():
        files = TokenFiles(tuple(files[written_as] for files in parts), meta["split"])
        found[side] = files.between(begin, begin + meta["tokens"][side])
    return found


def _files_of(folder: Path, dtype: str, tokens: dict[str, int], split: str) -> dict[str, TokenFile]:
    return {str(side): TokenFile(folder / f"{side}.bin", dtype, tokens[side], split) for side in SIDES}


def _are_whole(files: Iterable[TokenFile]) -> bool:
    return all(file.path.stat().st_size == file.n_tokens * np.dtype(file.dtype).itemsize for file in files)


def _name(part: int) -> str:
    return f"{part:05d}"


def _write_folder(folder: Path, write: Callable[[Path], None], prefix: str = "unfinished-") -> None:
    """Call a function that fills a folder, which appears under its name when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix, ignore_cleanup_errors=True) as parent:
        fresh = Path(parent, "fresh")
        fresh.mkdir()
        write(fresh)
        _publish(fresh, folder, scrap=Path(parent, "damaged"))


def _publish(fresh: Path, folder: Path, scrap: Path) -> None:
    if prepared(folder) is not None:
        return  # another process has written the same files
    try:
        if folder.exists():
            os.rename(folder, scrap)
        os.rename(fresh, folder)
    except OSError:
        if prepared(folder) is None:
            raise


# --- the parts of a large text ----------------------------------------------------------------------------------------


@dataclass
class _Parts:
    """The parts of a text, and the folder of the text.

    The same text can be divided otherwise, such as a dataset of the hub that is downloaded in place of streamed. So the
    folders of the parts are in one that is named by this division.
    """

    text_folder: Path
    texts: Sequence[SplitDocuments]
    tokenizer: "PreTrainedTokenizerFast"

    def __post_init__(self) -> None:
        self._missing = list(range(len(self.texts)))
        self.folder = self.text_folder / digest([text.source.fingerprint() for text in self.texts])
        self._awaited: list[int] = []  # the parts that were missing at the last look
        self._waits_since = 0.0  # for other processes alone, which have completed none since
        self._has_said_so = False

    def missing(self) -> list[int]:
        """Return the numbers of the parts that no process has completed; none once the text is there."""
        if prepared(self.text_folder) is not None:  # perhaps in another division
            return []
        self._missing = [number for number in self._missing if prepared(self.folder / _name(number)) is None]
        return self._missing

    def write_missing(self) -> Iterator[Collection[int]]:
        """Write the missing parts that no other process writes, and wait for the others.

        Yields:
            The number of this process, after each part and while it waits.
        """
        own = [os.getpid()]
        while numbers := self.missing():
            written = False
            for number in numbers:
                if self._write(number):
                    written = True
                    yield own
            if not written:
                time.sleep(_WAIT)
                yield own

    def name_others(self, own: Collection[int], missing: list[int]) -> None:
        """Say once which other processes write the missing parts, if they have had all of them for some time.

        The names are those in the lock files, which processes that were killed leave behind. The part of such a process
        is free, so that this command completes it: the time begins again with each part that is completed.

        Args:
            own: Numbers of the processes of this command.
            missing: Numbers of the missing parts.
        """
        holders = set() if self._has_said_so else self._others(own, missing)
        now = time.monotonic()
        if not holders or missing != self._awaited:
            self._awaited, self._waits_since = missing, now
        elif now - self._waits_since >= _SILENT_WAIT:
            self._has_said_so = True
            say(
                f"the missing parts are being prepared by {' and '.join(sorted(holders))}: wait, or end it, and this "
                "command prepares them"
            )

    def _others(self, own: Collection[int], missing: Iterable[int]) -> set[str]:
        """Return the names of the processes that write the missing parts; none if there is a part for this command.

        This process must hold no lock of a part: reading the file would end it.
        """
        holders = set()
        for number in missing:
            try:
                holder = self._lock_file(number).read_text(encoding="utf-8").strip()
            except FileNotFoundError:
                return set()
            if not holder or holder in map(process_name, own):
                return set()
            holders.add(holder)
        return holders

    def _lock_file(self, number: int) -> Path:
        return self.folder / f"{_name(number)}.lock"

    def _write(self, number: int) -> bool:
        """Write a part unless it, or the text, is complete; return `False` if another process writes it."""
        folder, prefix = self.folder / _name(number), f"{_name(number)}-"
        if prepared(folder) is not None or prepared(self.text_folder) is not None:
            return True
        lock_file = self._lock_file(number)
        lock = try_lock(lock_file)
        if lock is None:
            return False
        with lock:
            if lock.is_exclusive:
                for unfinished in self.folder.glob(f"{prefix}*"):  # of a process that was killed
                    shutil.rmtree(unfinished, ignore_errors=True)
            if prepared(folder) is None:
                _write_folder(folder, partial(_write_part, self.texts[number], self.tokenizer, number > 0), prefix)
            lock_file.unlink(missing_ok=True)
        return True

    def join(self, split: Split, fractions: tuple[float, float]) -> None:
        """Write `meta.json`, which says where the tokens of each split are in the parts; remove other divisions.

        If the text is there, it stays as it is: its files may be in use, also those of another division. Of processes
        that join several divisions at once, each waits for the one before.
        """
        lock_file = self.text_folder / _JOIN_LOCK
        while (lock := try_lock(lock_file)) is None:
            time.sleep(_WAIT)
        with lock:
            try:
                if prepared(self.text_folder) is None:
                    self._join(split, fractions)
            finally:
                lock_file.unlink(missing_ok=True)

    def _join(self, split: Split, fractions: tuple[float, float]) -> None:
        parts = [json.loads((self.folder / _name(i) / "meta.json").read_text()) for i in range(len(self.texts))]
        tokens, documents, sizes = (
            {side: sum(part[name][side] for part in parts) for side in SIDES}
            for name in ("tokens", "documents", "sizes")
        )
        places: dict[Side, tuple[Side, int]] = {side: (side, 0) for side in SIDES}
        if split == "tail":
            tokens, begins = _tail(tokens["train"], *fractions)
            places = {side: ("train", begins[side]) for side in SIDES}
        else:
            for side in SIDES:
                # A separator is before the first document of each part but the first of the text.
                first = next((part for part in parts if part["tokens"][side]), parts[0])
                if first["begins_with_separator"][side]:
                    places[side], tokens[side] = (side, 1), tokens[side] - 1
        meta = {
            "dtype": parts[0]["dtype"],
            "tokens": tokens,
            "split": describe(_kind(split, self.texts[0]), documents, sizes, *fractions),
            "division": self.folder.name,
            "parts": [part["tokens"] for part in parts],
            "places": places,
        }
        write_json(self.text_folder / "meta.json", meta, indent=None)
        for lock_file in self.folder.glob("*.lock"):  # of processes that were killed
            lock_file.unlink(missing_ok=True)
        for other in self.text_folder.iterdir():
            if other.is_dir() and other != self.folder:
                shutil.rmtree(other, ignore_errors=True)

    def remove_unused(self) -> None:
        """Remove the parts of this division if the text is complete in another.

        The process that has completed the text has removed them too, but this one may have written some since.
        """
        if prepared(self.text_folder) is None:
            return
        meta = json.loads((self.text_folder / "meta.json").read_text())
        if meta.get("division") != self.folder.name:
            shutil.rmtree(self.folder, ignore_errors=True)


def _write_parts(parts: _Parts, n_processes: int) -> None:
    """Write the missing parts of a text in one or several processes."""
    parts.folder.mkdir(parents=True, exist_ok=True)
    n, n_missing = len(parts.texts), len(parts.missing())
    say(f"preparing text in {n} parts in {parts.text_folder}" + f" ({n - n_missing} are there)" * (n_missing < n))
    with tqdm(total=n, initial=n - n_missing, desc="preparing", unit="part", disable=None) as bar:
        if n_processes == 1:
            working = parts.write_missing()
        else:
            fast_encoder(parts.tokenizer)  # once, for the copies of this process
            working = _in_processes(min(n_processes, n_missing), parts.write_missing)
        for own in working:
            missing = parts.missing()
            bar.update(n - len(missing) - bar.n)
            parts.name_others(own, missing)


def _in_processes(n: int, work: Callable[[], Iterable[object]]) -> Iterator[Collection[int]]:
    """Do some work in copies of this process, which share it.

    Yields:
        The numbers of the copies, from time to time until all have ended.

    Raises:
        MisconfigurationException: If one of them failed, or was killed.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    parent = os.getpid()

    def child() -> None:
        # tqdm's lock is one semaphore for a process and its copies: a copy killed while it draws would keep it.
        tqdm.set_lock(threading.RLock())
        leave_to_the_parent()
        try:
            for _ in work():
                if os.getppid() != parent:  # which was killed
                    return
        except (MisconfigurationException, OSError) as error:
            sender.send(error)
            raise SystemExit(1) from error

    copies = [context.Process(target=child, daemon=True) for _ in range(n)]
    try:
        for copy in copies:
            copy.start()
        while any(copy.is_alive() for copy in copies) and not any(copy.exitcode for copy in copies):
            yield [copy.pid for copy in copies if copy.pid is not None]
            wait([copy.sentinel for copy in copies if copy.is_alive()], timeout=_WAIT)
        if failed := next((copy for copy in copies if copy.exitcode), None):
            if receiver.poll():
                raise receiver.recv()
            raise MisconfigurationException(
                f"a process that prepared text ended with exit code {failed.exitcode} (out of memory?): run the "
                "command again, which writes only the parts that are missing"
            )
    finally:
        for copy in copies:
            copy.terminate()
            copy.join()


# --- writing ----------------------------------------------------------------------------------------------------------


def _write_text(
    text: SplitDocuments,
    tokenizer: "PreTrainedTokenizerFast",
    split: Split,
    fractions: tuple[float, float],
    folder: Path,
) -> None:
    """Write the token files of a text that has no parts, and what they hold."""
    written = _write_documents(folder, text, tokenizer)
    if split == "tail":
        written["tokens"], begins = _tail(written["tokens"]["train"], *fractions)
        for side in ("test", "val"):
            begin = begins[side] * np.dtype(written["dtype"]).itemsize
            with open(folder / "train.bin", "r+b") as train, open(folder / f"{side}.bin", "wb") as held_out:
                train.seek(begin)
                shutil.copyfileobj(train, held_out)
                train.truncate(begin)
    said = describe(_kind(split, text), written["documents"], written["sizes"], *fractions)
    meta = {"dtype": written["dtype"], "tokens": written["tokens"], "split": said}
    (folder / "meta.json").write_text(json.dumps(meta))


def _kind(split: Split, text: SplitDocuments) -> Kind:
    return "tail" if split == "tail" else "parts" if text.few is not None else "documents"


def _tail(n: int, val_fraction: float, test_fraction: float) -> tuple[dict[Side, int], dict[Side, int]]:
    """Return the number of tokens in each split of `n` tokens whose ends are held out, and the first token of each."""
    val, test = int(n * (1 - val_fraction - test_fraction)), int(n * (1 - test_fraction))
    return {"train": val, "val": test - val, "test": n - test}, {"train": 0, "val": val, "test": test}


def _write_part(text: SplitDocuments, tokenizer: "PreTrainedTokenizerFast", follows: bool, folder: Path) -> None:
    """Write the token files of a part of a text, and what they hold."""
    written = _write_documents(folder, text, tokenizer, is_part=True, follows=follows)
    (folder / "meta.json").write_text(json.dumps(written | {"split": ""}))


def _write_documents(
    folder: Path,
    text: SplitDocuments,
    tokenizer: "PreTrainedTokenizerFast",
    is_part: bool = False,
    follows: bool = False,
) -> dict[str, Any]:
    """Write the tokens of documents to the file of the split of each.

    Args:
        folder: Folder of the files.
        text: The documents.
        tokenizer: Their tokenizer.
        is_part: Whether they are a part of a text, so that the progress is not that of the text.
        follows: Whether other documents are before these, so that a separator is before the first one too.

    Returns:
        The NumPy type of an id, and for each split the number of tokens, of documents, and of bytes of text, and
        whether the file begins with a separator.
    """
    dtype = np.dtype(np.uint16 if vocab_size(tokenizer) <= 2**16 else np.uint32)
    separator = tokenizer.eos_token_id
    tokens: dict[Side, int] = dict.fromkeys(SIDES, 0)
    documents: dict[Side, int] = dict.fromkeys(SIDES, 0)
    sizes: dict[Side, int] = dict.fromkeys(SIDES, 0)
    begins_with_separator: dict[Side, bool] = dict.fromkeys(SIDES, False)
    with ExitStack() as stack:
        files: dict[Side, BinaryIO] = {side: stack.enter_context(open(folder / f"{side}.bin", "wb")) for side in SIDES}

        def append(side: Side, ids: np.ndarray) -> None:
            files[side].write(ids.astype(dtype).data)
            tokens[side] += len(ids)

        disable = True if is_part else None
        bar = stack.enter_context(tqdm(desc="tokenizing", unit="char", unit_scale=True, delay=1, disable=disable))
        encode = TextEncoder(tokenizer)
        before = text.opening_side  # the split of the last piece, if its document goes on
        for batch in _batches(text):
            encoded = encode([piece.text for _, piece in batch])
            for (side, piece), ids in zip(batch, encoded, strict=True):
                if side != before:
                    documents[side] += 1
                    if separator is not None and (tokens[side] or follows):
                        begins_with_separator[side] |= not tokens[side]
                        append(side, np.array([separator]))
                append(side, ids)
                sizes[side] += len(piece.text.encode())
                before = None if piece.ends_document else side
                bar.update(len(piece.text))
    return {
        "dtype": dtype.name,
        "tokens": tokens,
        "documents": documents,
        "sizes": sizes,
        "begins_with_separator": begins_with_separator,
    }


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
