"""Running text as word ids, and the windows of n words that Bengio's network is trained on."""

import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import ExperimentDataModule, shuffled
from datamodules.cache import digest
from datamodules.files import download, identity_of, is_url
from datamodules.sources import AnySource, Piece, Source, cut, source_of
from lightning_modules.common.messages import say
from lightning_modules.common.ranges import NonNegativeInt, PositiveFloat, PositiveInt, ThreeOrMore

RARE = "<rare>"  # replaces all rare words, and is the first word then
PARAGRAPH = "<p>"  # the word at the end of a paragraph

_NLTK_BROWN = "https://raw.githubusercontent.com/nltk/nltk_data/gh-pages/packages/corpora/brown.zip"
_NLTK_FILE = re.compile(r"c[a-r]\d\d")
_WORD = re.compile(r"\w+|[^\w\s]")
_CLITIC = re.compile(r"(.+?)(n't|'(?:s|d|m|re|ve|ll))", re.IGNORECASE)


class BrownCorpus(Source):
    """The Brown corpus (Francis and Kucera, 1964): 500 texts of American English, about 1.16 million words.

    Tokens are separated by spaces, a sentence is a line, an empty line ends a paragraph. Part-of-speech tags, which the
    copy of NLTK has (`The/at jury/nn`), are dropped.

    Args:
        path: A folder or zip file with the texts, or the URL of such a zip file, which is downloaded once. The texts
            are the files with names as in the copy of NLTK (`ca01` to `cr09`), or else all `*.txt`, in the order of
            their names.
    """

    def __init__(self, path: str = _NLTK_BROWN) -> None:
        self.path = path

    def pieces(self) -> Iterator[Piece]:
        """Yield the texts in pieces."""
        local, name = self._local(), ""
        try:
            readers = _readers(local)
            names = list(filter(_NLTK_FILE.fullmatch, readers)) or [name for name in readers if name.endswith(".txt")]
            for name in sorted(names):
                yield from cut([_without_tags(readers[name]().decode())])
        except zipfile.BadZipFile as error:
            raise MisconfigurationException(f"data.source: {local} is no zip file ({error})") from error
        except UnicodeDecodeError as error:
            raise MisconfigurationException(f"data.source: {name} in {self.path} is not UTF-8 ({error})") from error
        if not names:
            raise MisconfigurationException(
                f"data.source: {self.path} holds no text of the Brown corpus (files ca01 to cr09, or *.txt)"
            )

    def fingerprint(self) -> str:
        """Return a hash of the URL, or of the paths and contents of the files."""
        if is_url(self.path):
            return digest(["BrownCorpus", self.path])
        local = self._local()
        files = sorted(filter(Path.is_file, local.iterdir())) if local.is_dir() else [local]
        return digest(["BrownCorpus", [identity_of(file) for file in files]])

    def _local(self) -> Path:
        if not is_url(self.path):
            local = Path(self.path).expanduser()
            if not local.exists():
                raise MisconfigurationException(
                    f"data.source: {local} does not exist: give the folder or the zip file of the Brown corpus"
                )
            return local
        try:
            return download(self.path)
        except MisconfigurationException as error:
            advice = "(--data.source.path FOLDER_OR_ZIP); experiments/bengio_nlm/offline.yaml needs no network"
            raise MisconfigurationException(f"data.source: {error} {advice}") from error


def _readers(path: Path) -> dict[str, Callable[[], bytes]]:
    """Return a function that reads each file of a folder or of a zip file, by the name of the file."""
    if path.is_dir():
        return {file.name: file.read_bytes for file in path.iterdir() if file.is_file()}
    archive = zipfile.ZipFile(path)
    return {Path(name).name: partial(archive.read, name) for name in archive.namelist()}


def _without_tags(text: str) -> str:
    lines = [line.split() for line in text.split("\n")]
    if not all("/" in token for line in lines for token in line):
        return text
    return "\n".join(" ".join(token.rpartition("/")[0] for token in line) for line in lines)


@dataclass(frozen=True)
class NumberedText:
    """A text as ids, and its vocabulary by frequency."""

    ids: np.ndarray  # (N,) int32
    words: list[str]  # the V words, the most frequent first; if words were replaced, `RARE` precedes them
    counts: np.ndarray  # occurrences of each word in the whole text, (V,)


def words_of(
    documents: Iterable[str], tokens: Literal["spaces", "words"], lowercase: bool, split_clitics: bool, marks: bool
) -> Iterator[str]:
    """Yield the words of documents one after the other; see `BengioNLMDataModule` for the arguments."""
    for document in documents:
        in_paragraph = False
        for line in (document.lower() if lowercase else document).split("\n"):
            words = line.split() if tokens == "spaces" else _WORD.findall(line)
            if marks and in_paragraph and not words:
                yield PARAGRAPH
            in_paragraph = bool(words)
            for word in words:
                if split_clitics and (parts := _CLITIC.fullmatch(word)):
                    yield from parts.groups()
                else:
                    yield word
        if marks and in_paragraph:
            yield PARAGRAPH


def number(words: Iterable[str], rare: int) -> NumberedText:
    """Return a text with ids for its words; words that occur at most `rare` times are replaced by `RARE`.

    If the text has the word `RARE` itself, as a text in which rare words were replaced before, it counts as one.
    """
    first_seen: dict[str, int] = {}
    ids = np.fromiter((first_seen.setdefault(word, len(first_seen)) for word in words), np.int32)
    names = list(first_seen)
    counts = np.bincount(ids, minlength=len(names))
    kept = [i for i in np.flatnonzero(counts > rare) if names[i] != RARE]
    kept.sort(key=lambda i: (-counts[i], names[i]))
    merged = [RARE] if len(kept) < len(names) else []
    renumbered = np.zeros(len(names), np.int32)
    renumbered[kept] = np.arange(len(merged), len(merged) + len(kept))
    ids = renumbered[ids]
    return NumberedText(ids, merged + [names[i] for i in kept], np.bincount(ids))


class BengioNLMDataModule(ExperimentDataModule):
    """Words of a text, each with the n - 1 words before it; the text is cut into train, validation and test, in order.

    A batch is `{"context": (B, n - 1), "targets": (B,)}` of int64 ids; the nearest word of a context comes first. The
    context of the first words of the validation and test splits is in the previous split, so that every word of these
    splits is predicted. The first n - 1 words of the training split are not predicted.

    Args:
        source: The text: a source, or a file, folder, glob pattern, URL or `hub:OWNER/NAME`, see `source_of`.
        batch_size: Words to predict in a batch, over all processes, at least 1.
        n: Words in a window, including the predicted one; the trigram needs 3.
        tokens: `spaces`: words are separated by spaces. `words`: a word is a run of letters and digits, or any other
            single character.
        lowercase: Whether to convert the text to lower case.
        split_clitics: Whether n't, 's, 'd, 'm, 're, 've and 'll at the end of a word become words.
        paragraph_marks: Whether to add a word `<p>` at the end of each paragraph; empty lines separate paragraphs.
        rare: Words that occur at most this often, in the whole text as in the paper, become one word; 0 keeps all.
        train: Part of the text to train on: a share below 1, or a number of words.
        val: Part of the text for validation, after it: a share below 1, or a number of words. The rest is the test
            split.
        num_workers: Processes that load ahead; 0 loads in the training process.
        seed: Seed of the order of the training words, 0 or greater.

    Raises:
        MisconfigurationException: If the shares add up to more than 1.
    """

    def __init__(
        self,
        source: AnySource,
        batch_size: PositiveInt,
        n: ThreeOrMore = 5,
        tokens: Literal["spaces", "words"] = "spaces",
        lowercase: bool = False,
        split_clitics: bool = False,
        paragraph_marks: bool = False,
        rare: NonNegativeInt = 3,
        train: PositiveFloat = 0.8,
        val: PositiveFloat = 0.1,
        num_workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        if train < 1 and val < 1 and train + val > 1:
            raise MisconfigurationException(
                f"data.train is {train} and data.val {val}: as shares they must add up to 1 at most"
            )
        self.source, self.n, self.train, self.val = source_of(source), n, train, val
        self.block_size = n - 1  # words of context
        self.tokens, self.rare = tokens, rare
        self.variant = {"lowercase": lowercase, "split_clitics": split_clitics, "marks": paragraph_marks}

    @cached_property
    def text(self) -> NumberedText:
        """The whole text, read at the first access; it must have two different words."""
        text = number(words_of(self.source.documents(), self.tokens, **self.variant), self.rare)
        if len(text.words) < 2:
            raise MisconfigurationException(
                f"the text has {len(text.ids)} words and a vocabulary of {len(text.words)}, and needs at least 2: give "
                f"more text, or less than data.rare {self.rare}"
            )
        return text

    @property
    def vocab_size(self) -> int:
        """The number of words in the vocabulary."""
        return len(self.text.words)

    @property
    def sides(self) -> dict[str, range]:
        """The positions of train, val and test in the text."""
        n_words = len(self.text.ids)
        n_train, n_val = (int(part * n_words) if part < 1 else int(part) for part in (self.train, self.val))
        return {
            "train": range(min(n_train, n_words)),
            "val": range(n_train, min(n_train + n_val, n_words)),
            "test": range(n_train + n_val, n_words),
        }

    def setup(self, stage: str) -> None:
        """Check that the splits that this stage needs have enough words."""
        sides = self.sides
        if len(sides["train"]) < self.n:
            raise MisconfigurationException(
                f"the training text has {len(sides['train'])} words, fewer than one window of data.n {self.n}: give "
                "more text, or a larger data.train"
            )
        for side in ("val", "test") if stage == "test" else ("val",):  # the trigram is fitted to val, also for a test
            if not sides[side]:
                raise MisconfigurationException(
                    f"data.train {self.train:g} and data.val {self.val:g} leave nothing of {len(self.text.ids):,} words"
                    f" for the split {side}: make them smaller, or give more text"
                )
        if stage == "fit":
            counts = f"{len(sides['train']):,} train, {len(sides['val']):,} validate"
            say(f"data    {len(self.text.ids):,} words, vocabulary of {self.vocab_size:,}: {counts}")

    def train_dataloader(self) -> DataLoader:
        """Return the loader of the training words, shuffled."""
        first = self.n - 1  # position of the first word with a whole context
        n = len(self.sides["train"]) - first
        order = shuffled(n, self.seed)
        return self.training_loader(NGramWindows(self.text.ids, self.n), n, lambda epoch: order(epoch) + first)

    def val_dataloader(self) -> DataLoader:
        """Return the loader of the validation words."""
        return self._split("val")

    def test_dataloader(self) -> DataLoader:
        """Return the loader of the test words."""
        return self._split("test")

    def _split(self, side: str) -> DataLoader:
        return self.evaluation_loader(NGramWindows(self.text.ids, self.n), torch.tensor(self.sides[side]))


class NGramWindows(Dataset):
    """The windows of n words in a text of word ids (N,), by the positions of their last words."""

    def __init__(self, ids: np.ndarray, n: int) -> None:
        self.ids = torch.from_numpy(ids)
        self.offsets = torch.arange(n)  # from the predicted word back to the farthest of its context

    def __getitem__(self, positions: Tensor) -> dict[str, Tensor]:
        """Return the words at positions (B,), each at least n - 1, and the words before them, the nearest first."""
        windows = self.ids[positions[:, None] - self.offsets].long()  # (B, n)
        return {"context": windows[:, 1:], "targets": windows[:, 0]}
