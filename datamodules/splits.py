"""The three splits of a data set, and the assignment of documents, or of their parts, to them."""

import hashlib
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.sources import Piece, Source
from lightning_modules.common.messages import say

Side = Literal["train", "val", "test"]
Kind = Literal["documents", "parts", "tail"]  # how a text was split
DocumentSplit = Literal["auto", "groups", "documents"]  # how documents are split, see `SplitDocuments`
SIDES: tuple[Side, ...] = ("train", "val", "test")

CUT_FEW = ", or set data.split auto, which cuts few documents"  # the end of an advice where documents stay whole

FEW = 20  # documents, of which whole ones would be too coarse a split; or examples, of which a score would vary much

_LONG = 40  # characters of a line that counts in a comparison of documents
_MANY = 10  # a line of more documents than this, and of more than the tenth of all, counts only between copies
_COPY = 0.9  # share of the long lines of copies that is equal

_MOVE = 0.5  # share of a held-out part by which a cut may move to the beginning of a line or word


def require_fractions(val_fraction: float, test_fraction: float, where: str = "data") -> tuple[float, float]:
    """Return the two fractions, checked; `where` is their path in the configuration, for the message."""
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise MisconfigurationException(
            f"{where}.val_fraction {val_fraction} and {where}.test_fraction {test_fraction} must be 0 or more, and "
            "leave something to train on"
        )
    return val_fraction, test_fraction


def side_of(text: str, val_fraction: float, test_fraction: float) -> Side:
    """Return the split of a document, drawn by a hash of its text, so that equal texts share a split in every run."""
    draw = _draw(text)
    if draw < test_fraction:
        return "test"
    return "val" if draw < test_fraction + val_fraction else "train"


def sides_of(texts: Iterable[str], val_fraction: float, test_fraction: float) -> dict[str, Side]:
    """Return the split of each text, by the order of the hashes of all, so that few texts have these fractions too.

    Each fraction above 0 has a text at least, if one is left to train on: of two texts, one is for the validation.
    """
    ordered = sorted(set(texts), key=_draw)
    n_test, n_val = (max(1, round(len(ordered) * share)) if share else 0 for share in (test_fraction, val_fraction))
    n_val = min(n_val, max(len(ordered) - 1, 0))
    n_test = min(n_test, max(len(ordered) - 1 - n_val, 0))
    sides = dict.fromkeys(ordered[:n_test], SIDES[2]) | dict.fromkeys(ordered[n_test : n_test + n_val], SIDES[1])
    return dict.fromkeys(ordered, SIDES[0]) | sides


def _draw(text: str) -> float:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=b"split").digest()) / 2**64


def groups_of(documents: Iterable[str]) -> list[int]:
    """Return for each document the number of the first document of its group.

    Two documents are in a group if they are equal, or share at least half of the long lines of the one that has fewer,
    and so are the documents that share as much with either. Lines of more than 10 documents and of more than a tenth of
    all, such as those of a licence, count only between copies: documents whose long lines are at least half of their
    text, and which share such lines, at least nine tenths of the long lines of the one that has more. Each is compared
    with the 10 before it. So more than 10 drafts of a text, of which each differs more from the others, are no group.
    """
    lines: list[frozenset[bytes]] = []
    mostly_long: list[bool] = []
    group: list[int] = []  # an earlier document of the group, or the document itself
    distinct: dict[bytes, int] = {}  # the first document of each text
    places: defaultdict[bytes, list[int]] = defaultdict(list)  # the distinct documents of each line

    def first(number: int) -> int:
        while group[number] != number:
            number = group[number]
        return number

    def join(number: int, other: int) -> None:
        one, two = sorted((first(number), first(other)))
        group[two] = one

    for number, text in enumerate(map(str.strip, documents)):
        group.append(distinct.setdefault(_hash(text), number))
        long_lines = _long_lines(text) if group[number] == number else set()
        lines.append(frozenset(map(_hash, long_lines)))
        mostly_long.append(2 * sum(map(len, long_lines)) >= len(text))
        for line in lines[number]:
            places[line].append(number)
    most = max(_MANY, len(distinct) // _MANY)
    own = {number: [line for line in lines[number] if len(places[line]) <= most] for number in distinct.values()}
    latest: defaultdict[bytes, deque[int]] = defaultdict(lambda: deque(maxlen=_MANY))  # possible copies with a line
    for number, counted in own.items():
        shared = Counter(other for line in counted for other in places[line] if other < number)
        for other, n in shared.items():
            if 2 * n >= min(len(counted), len(own[other])):
                join(number, other)
        if mostly_long[number] and len(lines[number]) - len(counted) >= _COPY * len(lines[number]):
            common = lines[number].difference(counted)
            for other in {other for line in common for other in latest[line]}:
                if len(common & lines[other]) >= _COPY * max(len(lines[number]), len(lines[other])):
                    join(number, other)
            for line in common:
                latest[line].append(number)
    return [first(number) for number in range(len(group))]


def _long_lines(text: str) -> set[str]:
    """Return the long lines of a text, or the whole text if it has none."""
    return {line for line in map(str.strip, text.splitlines()) if len(line) >= _LONG} or {text}


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


class Length(NamedTuple):
    """The length of a document in characters, and in bytes of UTF-8."""

    characters: int
    bytes: int


@dataclass
class SplitDocuments:
    """The pieces of the documents of a source, each with its split.

    Args:
        source: The source.
        split: `documents`: each document is in one split, drawn by a hash of its beginning. `auto`: the same if the
            source has more than `FEW` documents, and some for each split; if not, each is cut, and its beginning
            trains, the part after that validates, and its end is for the test. `groups`: as `auto`, but documents that
            are nearly copies of each other (see `groups_of`) share a split, that of the first; the whole source is read
            for it, and a number for each of its long lines is kept in memory.
        val_fraction: Part of the documents, or of the characters of each, for validation.
        test_fraction: Part of the documents, or of the characters of each, for the test.
        lengths: For a part of a text of few documents, the lengths of its documents, the first of which may have begun
            in an earlier part.
        begin: Number of characters of the first document in earlier parts.
    """

    source: Source
    split: DocumentSplit = "documents"
    val_fraction: float = 0.0
    test_fraction: float = 0.0
    lengths: list[Length] | None = None
    begin: int = 0

    @cached_property
    def few(self) -> list[Length] | None:
        """The length of each document if each is cut; `None` if they stay whole. No more is read than decides it."""
        if self.lengths is not None:
            return self.lengths
        if self.split == "documents" or not self.val_fraction + self.test_fraction:
            return None
        lengths: list[Length] = []
        without = {side for side, fraction in (("val", self.val_fraction), ("test", self.test_fraction)) if fraction}
        characters = n_bytes = 0
        for text, ends_document in self.source.pieces():
            if not characters:
                without.discard(side_of(text, self.val_fraction, self.test_fraction))
            characters, n_bytes = characters + len(text), n_bytes + len(text.encode())
            if ends_document:
                lengths.append(Length(characters, n_bytes))
                characters = n_bytes = 0
                if len(lengths) > FEW and not without:
                    return None
        return lengths

    @cached_property
    def groups(self) -> list[int] | None:
        """The first document of the group of each, if they are grouped."""
        if self.split != "groups" or not self.val_fraction + self.test_fraction:
            return None
        return groups_of(self.source.documents())

    def parts(self) -> Sequence["SplitDocuments"]:
        """Return the parts of the source, each of which can be split alone, or only this one."""
        parts = [] if self.split == "groups" and self.few is None else self.source.parts()
        if len(parts) < 2:
            return [self]
        fractions = self.val_fraction, self.test_fraction
        if self.few is None:
            return [SplitDocuments(part, "documents", *fractions) for part in parts]
        found: list[SplitDocuments] = []
        number = begin = 0
        for part in parts:
            found.append(SplitDocuments(part, self.split, *fractions, self.few[number:], begin))
            for text, ends_document in part.pieces():
                begin = 0 if ends_document else begin + len(text)
                number += ends_document
        return found

    @cached_property
    def opening_side(self) -> Side | None:
        """The split of the document in which a part of a text begins, `None` if it begins with a document."""
        if self.lengths is not None:
            return self._side_before(self.begin, self.lengths[0].characters) if self.begin else None
        opening = self.source.opening()
        return side_of(opening, self.val_fraction, self.test_fraction) if opening else None

    def _side_before(self, place: int, n: int) -> Side:
        """Return the split of the character before a place in a document of `n` characters that is cut."""
        if place > round(n * (1 - self.test_fraction)):
            return "test"
        return "val" if place > round(n * (1 - self.val_fraction - self.test_fraction)) else "train"

    def __iter__(self) -> Iterator[tuple[Side, Piece]]:
        if self.few is not None:
            yield from self._parts(self.few)
            return
        starts_document, side, number = self.opening_side is None, self.opening_side or SIDES[0], 0
        sides: list[Side] = []
        for piece in self.source.pieces():
            if starts_document:
                side = side_of(piece.text, self.val_fraction, self.test_fraction)
                if self.groups is not None:
                    sides.append(side)
                    side = sides[self.groups[number]]
                number += 1
            yield side, piece
            starts_document = piece.ends_document

    def _parts(self, lengths: list[Length]) -> Iterator[tuple[Side, Piece]]:
        pieces = self.source.pieces()
        held_out: dict[Side, float] = {"val": self.val_fraction, "test": self.test_fraction}
        held_out = {side: fraction for side, fraction in held_out.items() if fraction}
        smallest = min(held_out.values())
        begin = self.begin  # of the piece in the document
        for n, _ in lengths:
            side, left = SIDES[0], dict(held_out)
            while left and begin >= round(n * (1 - sum(left.values()))):  # an earlier part had the cut
                side = next(iter(left))
                del left[side]
            for text, ends_document in pieces:
                while left and begin + len(text) > (end := round(n * (1 - sum(left.values())))):
                    place = _good_cut(text, end - begin, int(_MOVE * smallest * n))
                    if place:
                        yield side, Piece(text[:place], True)
                    text, begin = text[place:], begin + place
                    side = next(iter(left))
                    del left[side]
                yield side, Piece(text, ends_document)
                begin += len(text)
                if ends_document:
                    break
            begin = 0


def _good_cut(text: str, place: int, most: int) -> int:
    """Return the last beginning of a line, or else of a word with its space, at most `most` characters before."""
    first = max(0, place - most)
    line = text.rfind("\n", first, place) + 1
    return line or max(text.rfind(" ", first, place), 0) or place


def describe(
    split: Kind,
    documents: Mapping[Side, int],
    sizes: Mapping[Side, int],
    val_fraction: float,
    test_fraction: float,
) -> str:
    """Return a line that says what the splits are.

    Args:
        split: `documents`; `parts`, where each document is cut; or `tail`, where the whole text is.
        documents: Number of documents in each split; in all for `parts` and `tail`, under `train`.
        sizes: Number of bytes of UTF-8 in each split.
        val_fraction: Part for validation.
        test_fraction: Part for the test.
    """
    size = sum(sizes.values())
    n = sum(documents.values()) if split == "documents" else documents["train"]
    line = f"{n:,} document{'s' * (n != 1)}, {_bytes(size)}"
    if not val_fraction + test_fraction:
        return f"{line}: all of it trains"
    if split == "documents":
        counts = [f"{documents['train']:,} train"]
        held_out: tuple[tuple[Side, str, float], ...]
        held_out = (("val", "validate", val_fraction), ("test", "test", test_fraction))
        for side, verb, fraction in held_out:
            if fraction:
                counts.append(f"{documents[side]:,} {verb} ({sizes[side] / max(1, size):.1%} of the text)")
        return f"{line}: {', '.join(counts)}"
    of = " of each" if n > 1 and split == "parts" else ""
    parts = [f"the first {_percent(1 - val_fraction - test_fraction)}{of} trains"]
    if val_fraction:
        parts.append(f"the {'next' if test_fraction else 'last'} {_percent(val_fraction)}{of} validates")
    if test_fraction:
        parts.append(f"the last {_percent(test_fraction)}{of} is for the test")
    return f"{line}: {', '.join(parts)}"


def say_if_few(side: Side, n: int, what: str) -> None:
    """Print a line if a held-out split has so few examples that chance decides its scores.

    Args:
        side: The split; nothing is said of the training split.
        n: Number of examples in it.
        what: What the examples are, such as `rows`.
    """
    if side != "train" and 0 < n < FEW:
        say(f"{side}: only {n} {what if n > 1 else what.removesuffix('s')}; scores of so few vary much by chance")


def _percent(share: float) -> str:
    return f"{round(100 * share, 4):g} %"


def _bytes(n: int) -> str:
    units = [(unit, 1000**power) for power, unit in ((3, "GB"), (2, "MB"), (1, "kB"))]
    return next((f"{n / size:.1f} {unit}" for unit, size in units if n >= size), f"{n} bytes")
