"""Number ranges as types. The parser checks them and shows them in `--help`."""

import math
from typing import Any

from jsonargparse.typing import register_type, restricted_number_type


def _numbers(name: str, base: type, *restrictions: tuple[str, float]) -> Any:
    """Return the type of the numbers that meet all restrictions; a parsed value is a plain `int` or `float`.

    By default, a parsed value is an instance of the restricted type. A checkpoint keeps the arguments of its module and
    is loaded with `weights_only=True`, which accepts plain numbers only.
    """
    restricted = restricted_number_type(name, base, list(restrictions))
    register_type(restricted, base, lambda value: base(restricted(value)))
    return restricted


PositiveInt = _numbers("PositiveInt", int, (">", 0))
NonNegativeInt = _numbers("NonNegativeInt", int, (">=", 0))
TwoOrMore = _numbers("TwoOrMore", int, (">=", 2))
ThreeOrMore = _numbers("ThreeOrMore", int, (">=", 3))
# jsonargparse has types with the names of these two, which include infinity.
PositiveFloat = _numbers("FinitePositiveFloat", float, (">", 0), ("<", math.inf))
NonNegativeFloat = _numbers("FiniteNonNegativeFloat", float, (">=", 0), ("<", math.inf))
ClosedUnitInterval = _numbers("ClosedUnitInterval", float, (">=", 0), ("<=", 1))
OpenUnitInterval = _numbers("OpenUnitInterval", float, (">", 0), ("<", 1))
Probability = _numbers("Probability", float, (">=", 0), ("<", 1))  # of dropping, masking, holding out
PositiveShare = _numbers("PositiveShare", float, (">", 0), ("<=", 1))  # of a rate, or of documents
