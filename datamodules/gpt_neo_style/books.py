"""Books: reading them by number, URL, path or name, removing licences, and cutting into passages."""

import re
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.sources import TextFiles
from lightning_modules.common.messages import say

GUTENBERG = "https://www.gutenberg.org/cache/epub/{number}/pg{number}.txt"
SHIPPED = Path(__file__).parent / "books"  # original texts that are part of the package

# "*** START OF THE PROJECT GUTENBERG EBOOK EMMA ***" or "***START OF THIS PROJECT GUTENBERG EBOOK EMMA***", on two
# lines where the title is long; before 2004 "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*".
_MARKER = r"^[ \t]*\*\*\* ?{side} OF (?:THE |THIS )?(?:PROJECT GUTENBERG )?(?:E-?BOOK|E-?TEXT|BOOK)\b[^*]*\*\*\*"
_START = re.compile(_MARKER.format(side="START") + r"|^\*END ?\*? ?THE SMALL PRINT!.*$", re.MULTILINE | re.IGNORECASE)
_END = re.compile(_MARKER.format(side="END"), re.MULTILINE | re.IGNORECASE)
# Credits of the transcribers between the markers and the book.
_CREDITS = re.compile(r"\s*(?:Produced by|E-?text prepared by|Transcribed (?:from|by))\b.*?\n\s*\n", re.DOTALL)
_LAST_LINE = re.compile(r"\n[ \t]*End of (?:the |this )?Project Gutenberg.*\Z", re.DOTALL | re.IGNORECASE)


class Passage(NamedTuple):
    """A contiguous part of a book, and its split."""

    side: str
    text: str


def read_book(name: int | str) -> str:
    """Return the text of a book, without the header and the licence of Project Gutenberg.

    Args:
        name: A number of Project Gutenberg, a URL, a path, or the name of a book that is shipped with the package.

    Raises:
        MisconfigurationException: If there is no such book, or it is not UTF-8 text, or its text is empty.
    """
    path = str(name)
    shipped = {file.stem: str(file) for file in sorted(SHIPPED.glob("*.txt"))}
    if path.isdecimal():
        path = GUTENBERG.format(number=path)
    elif path in shipped:
        path = shipped[path]
    elif re.fullmatch(r"\w+", path) and not Path(path).is_file():
        raise MisconfigurationException(
            f"there is no book {name}: give a number of Project Gutenberg, a URL, the path of a text file, or one of "
            f"{', '.join(shipped)}"
        )
    text = without_licence("".join(TextFiles(path).documents()), path)
    if not text:
        raise MisconfigurationException(f"book {name} is empty: there is no text between its header and its end")
    return text


def without_licence(text: str, name: str = "") -> str:
    """Return the text between the markers of Project Gutenberg, or the whole text, with a warning, if it has none."""
    start = _START.search(text)
    if start is None:
        say(
            f"book {name} has no line '*** START OF THE PROJECT GUTENBERG EBOOK': it is used whole, including any "
            "header and licence"
        )
        return text.strip()
    end = _END.search(text, start.end())
    body = text[start.end() : end.start() if end else None]
    if credits := _CREDITS.match(body):
        body = body[credits.end() :]
    return _LAST_LINE.sub("", body).strip()


def cut_into_passages(text: str, n: int, val_fraction: float, test_fraction: float, name: str = "") -> list[Passage]:
    """Cut a book into contiguous passages of about equal length, of which some, spread evenly, are held out.

    The cuts are at blank lines if there are enough of them, otherwise at line ends. The passages together are the
    text, each character once. Neighbours in the same split are joined.

    Args:
        text: Text of the book.
        n: Number of passages before neighbours are joined.
        val_fraction: Part of the passages for validation; at least one passage unless it is 0.
        test_fraction: Part of the passages for the test; at least one passage unless it is 0.
        name: Name of the book, for error messages.

    Raises:
        MisconfigurationException: If the book has too few lines, or there are fewer passages than are held out.
    """
    paragraphs, lines = ([match.end() for match in re.finditer(at, text)] for at in (r"\n\s*\n", r"\n"))
    ends = paragraphs if len(paragraphs) >= 4 * n else lines
    if len(ends) < n:
        raise MisconfigurationException(
            f"book {name} is too short: its {len(lines) + 1} lines ({len(text)} characters) cannot be cut into {n} "
            "passages; give a longer one, or fewer data.passages"
        )
    cuts = sorted({min(ends, key=lambda end: abs(end - len(text) * k // n)) for k in range(1, n)})
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    sides = _sides(len(pieces), {"val": val_fraction, "test": test_fraction})
    joined = groupby(zip(sides, pieces, strict=True), key=lambda pair: pair[0])
    return [Passage(side, "".join(piece for _, piece in group)) for side, group in joined]


def _sides(n: int, fractions: dict[str, float]) -> list[str]:
    """Return the split of each of `n` passages: `fractions` of them at equal distances, the rest for training."""
    sides = ["train"] * n
    counts = {side: max(1, round(n * fraction)) if fraction else 0 for side, fraction in fractions.items()}
    if (held_out := sum(counts.values())) > n:
        given = " and ".join(f"data.{side}_fraction {fraction}" for side, fraction in fractions.items())
        raise MisconfigurationException(
            f"{given} hold out {held_out} of {n} passages; set data.passages to more, or smaller fractions"
        )
    for side, count in counts.items():
        for k in range(count):
            free = [i for i in range(n) if sides[i] == "train"]
            sides[min(free, key=lambda i: abs(i + 0.5 - (k + 0.5) * n / count))] = side
    return sides
