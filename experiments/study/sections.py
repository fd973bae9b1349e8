"""What the sections of a sweep file have in common: how they are checked, and how an error is explained."""

import difflib
import json
import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, WrapValidator, model_validator

ABSENT: Any = None  # of a key that may be left out, but not set to null


def _as_written(number: Any, validate: Callable[[Any], float]) -> Any:
    validate(number)
    return number  # 1 stays a whole number


Number = Annotated[float, WrapValidator(_as_written)]


class SectionError(ValueError):
    """An error in a section.

    Args:
        message: What is wrong.
        key: Key in the section; nothing if the error is not that of one key.
    """

    def __init__(self, message: str, *key: str | int) -> None:
        super().__init__(message)
        self.key = key


class Section(BaseModel):
    """A section of a sweep file: it has no keys but its fields, and values are not converted."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            raise SectionError(f"must be a section with {', '.join(cls.model_fields)}, got {_shown(content)}")
        for key in content:
            if key not in cls.model_fields:
                raise SectionError(f"there is no such key{did_you_mean(key, cls.model_fields)}", key)
        return content


def explain(error: Any) -> tuple[tuple[str | int, ...], str]:
    """Return the key of an error that Pydantic has found, and what is wrong.

    Args:
        error: Item of `ValidationError.errors()`.
    """
    key = tuple(
        part for part in error["loc"] if not re.fullmatch(r"\[key\]|<.*>", str(part))
    )  # parts that Pydantic adds
    kind, value, hint = error["type"], error["input"], ""
    match kind:
        case "missing":
            return key, "is missing"
        case "value_error":
            return (*key, *error["ctx"]["error"].key), str(error["ctx"]["error"])
        case "too_short":
            return key, "is empty: there is nothing to sweep"
        case "string_pattern_mismatch":
            return key, "is not a name of a parameter: use letters, digits and _ . - only"
        case "literal_error":
            hint = did_you_mean(value, re.findall(r"'([^']+)'", error["ctx"]["expected"]))
        case "float_type" | "int_type":  # YAML 1.1 reads 1e-3 as text
            if found := re.fullmatch(r"([+-]?\d+)e([+-]?)(\d+)", str(value).lower()):
                hint = f" (YAML wants {found[1]}.0e{found[2] or '+'}{found[3]})"
    return key, f"{error['msg'].replace('Input should be', 'must be')}, got {_shown(value)}{hint}"


def did_you_mean(word: Any, candidates: Iterable[str]) -> str:
    """Return a hint at the candidate that is most like the word, or nothing if none is."""
    close = difflib.get_close_matches(str(word), candidates, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
