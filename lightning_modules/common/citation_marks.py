"""Citation marks in a text whose references are numbered from 1: `[1]` cites the first, `[2][3]` cites two.

Brackets in code (between backticks) are no marks, nor are `[0]`, `[01]`, `[1, 2]` and `[[1]]`. A mark may follow a word
directly, as in `so[1]`, so an index that is not written as code cannot be told from a mark.
"""

import re
from collections.abc import Callable

MARK = r"\[([1-9][0-9]{0,5})\]"  # the digits of ASCII; \d would match others too

_NUMBER = re.compile(MARK)
# Code ends with as many backticks as it begins with; a block of code that is not closed ends with the text.
_CODE = r"(?<!`)(?P<ticks>`+)(?!`)(?:.*?[^`])??(?P=ticks)(?!`)|(?:^|(?<=\n))```.*"
# The first look-behind keeps a long white space from being searched from each of its characters.
_MARKS = r"(?P<space>(?<!\s)\s*)(?<!\[)(?P<marks>(?:\[[1-9][0-9]{0,5}\])+)"
_CODE_OR_MARKS = re.compile(rf"(?P<code>{_CODE})|{_MARKS}", re.DOTALL)


def cited(text: str) -> list[int]:
    """Return the numbers of the citation marks of a text, in order and with repetitions."""
    groups = (found["marks"] or "" for found in _CODE_OR_MARKS.finditer(text))
    return [int(number) for marks in groups for number in _NUMBER.findall(marks)]


def renumber(text: str, new_number: Callable[[int], int | None]) -> str:
    """Return a text with new numbers in its citation marks; a mark whose new number is `None` is removed.

    The space before adjacent marks is removed if all of them are removed.
    """

    def change(found: re.Match[str]) -> str:
        if found["code"] is not None:
            return found["code"]
        numbers = (new_number(int(number)) for number in _NUMBER.findall(found["marks"]))
        left = "".join(f"[{number}]" for number in numbers if number is not None)
        return left and found["space"] + left

    return _CODE_OR_MARKS.sub(change, text)


def without_marks(text: str) -> str:
    """Return a text without its citation marks and the space before them."""
    return renumber(text, lambda number: None)
