"""Number ranges as types. The parser checks them and shows them in `--help`."""

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    register_type,
    restricted_number_type,
)

Probability = restricted_number_type("Probability", float, [(">=", 0), ("<", 1)])  # of dropping, masking, holding out
PositiveShare = restricted_number_type("PositiveShare", float, [(">", 0), ("<=", 1)])  # of a rate, or of documents
TwoOrMore = restricted_number_type("TwoOrMore", int, (">=", 2))
ThreeOrMore = restricted_number_type("ThreeOrMore", int, (">=", 3))

# By default a parsed value is an instance of such a type. A checkpoint keeps the arguments of its module and is loaded
# with `weights_only=True`, which accepts plain numbers alone.
for _type in (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
    Probability,
    ThreeOrMore,
    TwoOrMore,
):
    _plain = int if issubclass(_type, int) else float
    register_type(_type, _plain, lambda value, kind=_type, plain=_plain: plain(kind(value)))
