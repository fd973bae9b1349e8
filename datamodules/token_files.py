"""Token files: the ids of a tokenised text, mapped into memory. Those of its parts are read as one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

_MOST_OPEN = 256  # files of a text that are mapped at once; a process may often open 1,024


@dataclass(frozen=True)
class TokenFile:
    """A file of token ids, with the NumPy type of an id, their number, and how the text was split."""

    path: Path
    dtype: str
    n_tokens: int
    split: str = ""  # of the whole text, in words
    begin: int = 0  # number of the first token in the file

    def open(self) -> np.ndarray:
        """Return the tokens, (n_tokens,), mapped into memory that processes share."""
        offset = self.begin * np.dtype(self.dtype).itemsize
        return np.memmap(self.path, dtype=self.dtype, mode="r", offset=offset, shape=(self.n_tokens,))


@dataclass(frozen=True)
class TokenFiles:
    """The token files of the parts of a text, which are read as one file."""

    files: tuple[TokenFile, ...]
    split: str = ""

    @cached_property
    def n_tokens(self) -> int:
        """Number of tokens in all files."""
        return sum(file.n_tokens for file in self.files)

    def between(self, begin: int, end: int) -> "TokenFiles":
        """Return the tokens from one place to another."""
        found, start = [], 0
        for file in self.files:
            first, last = max(begin, start) - start, min(end, start + file.n_tokens) - start
            if first < last:
                found.append(replace(file, begin=file.begin + first, n_tokens=last - first))
            start += file.n_tokens
        return TokenFiles(tuple(found), self.split)

    def open(self) -> "JoinedTokens":
        """Return the tokens; each file is mapped into memory when it is needed."""
        return JoinedTokens(self.files)


Tokens = TokenFile | TokenFiles


def joined(texts: Sequence[Tokens]) -> TokenFiles:
    """Return several texts one after the other."""
    files = [file for text in texts for file in (text.files if isinstance(text, TokenFiles) else [text])]
    split = "; ".join(dict.fromkeys(text.split for text in texts))
    return TokenFiles(tuple(file for file in files if file.n_tokens), split)


class JoinedTokens:
    """The tokens of several files one after the other, indexed as an array.

    Args:
        files: Token files, each of which has some tokens.
    """

    def __init__(self, files: Sequence[TokenFile]) -> None:
        self._files = files
        self._ends = np.cumsum([file.n_tokens for file in files])
        self._open: dict[int, np.ndarray] = {}

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """Return the tokens at these places, (B, T) int64, which do not decrease in a row."""
        found = np.empty(places.shape, dtype=self._files[0].dtype)
        for row, tokens in zip(places, found, strict=True):
            for number in range(self._file_with(row[0]), self._file_with(row[-1]) + 1):
                end = self._ends[number]
                start = end - self._files[number].n_tokens
                inside = (start <= row) & (row < end)
                tokens[inside] = self._tokens(number)[row[inside] - start]
        return found

    def _file_with(self, place: int) -> int:
        return int(np.searchsorted(self._ends, place, side="right"))

    def _tokens(self, number: int) -> np.ndarray:
        if number not in self._open:
            if len(self._open) == _MOST_OPEN:
                self._open.pop(next(iter(self._open)))
            self._open[number] = self._files[number].open()
        return self._open[number]


def describe_sizes(files: Mapping[str, Tokens]) -> str:
    """Return the number of tokens of each split that has some, for a message."""
    return ", ".join(f"{side} {file.n_tokens:,}" for side, file in files.items() if file.n_tokens)
