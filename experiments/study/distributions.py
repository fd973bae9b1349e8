"""The distributions of a W&B sweep: their keys, their grids, and how draws of Optuna become values.

https://docs.wandb.ai/models/sweeps/sweep-config-keys#distribution-options-for-random-and-bayesian-search
"""

import bisect
import itertools
import json
import math
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, WrapValidator, model_validator

from experiments.errors import did_you_mean

if TYPE_CHECKING:  # optuna is slow to import
    from optuna.distributions import BaseDistribution

NOT_GIVEN: Any = None  # of a key that may be left out, but not set to null


def _as_written(number: Any, validate: Callable[[Any], float]) -> Any:
    validate(number)
    return number  # 1 stays a whole number


Number = Annotated[float, WrapValidator(_as_written)]
PositiveNumber = Annotated[Number, Field(gt=0)]

_KEYS: dict[str, tuple[str, ...]] = {
    "constant": ("value",),
    "categorical": ("values",),
    "categorical_w_probabilities": ("values", "probabilities"),
    **dict.fromkeys(("int_uniform", "uniform", "log_uniform_values", "inv_log_uniform_values"), ("min", "max")),
    **dict.fromkeys(("normal", "log_normal"), ("mu", "sigma")),
    "beta": ("a", "b"),
}
for _name in ("uniform", "log_uniform_values", "normal", "log_normal", "beta"):  # rounded to multiples of q
    _KEYS[f"q_{_name}"] = (*_KEYS[_name], "q")


class Section(BaseModel):
    """A section of a sweep file: it has no keys but its fields, and values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class SectionError(ValueError):
    """An error at a key of a section, or in the section as a whole."""

    def __init__(self, message: str, *key: str | int) -> None:
        super().__init__(message)
        self.key = key


class Distribution(Section):
    """The distribution of one parameter, with the keys of a W&B sweep file."""

    distribution: str = NOT_GIVEN
    value: Any = None
    values: Annotated[list[Any], Field(min_length=1)] = NOT_GIVEN
    probabilities: list[Annotated[Number, Field(ge=0)]] = NOT_GIVEN
    min: Number = NOT_GIVEN
    max: Number = NOT_GIVEN
    mu: Number = 0.0
    sigma: Annotated[Number, Field(ge=0)] = 1.0
    a: PositiveNumber = 1.0
    b: PositiveNumber = 1.0
    q: PositiveNumber = 1

    @property
    def name(self) -> str:
        """The name of the distribution, given or implied."""
        given = self.model_fields_set
        if "distribution" in given:
            return self.distribution
        if "value" in given:
            return "constant"
        if "values" in given:
            return "categorical_w_probabilities" if "probabilities" in given else "categorical"
        return "int_uniform" if {type(self.min), type(self.max)} == {int} else "uniform"

    @property
    def is_swept(self) -> bool:
        """Whether the parameter can differ between runs."""
        return len(self.values or (0, 1)) > 1 and self.name != "constant"

    @model_validator(mode="after")
    def _check(self) -> Self:
        name, given = self.name, self.model_fields_set
        if name not in _KEYS:
            renamed = _KEYS.keys() & {f"{name}_values"}  # W&B has withdrawn distributions whose ends were exponents
            raise SectionError(f"there is no {name!r}{did_you_mean(name, renamed or _KEYS)}", "distribution")
        for key in given - {"distribution", *_KEYS[name]}:
            raise SectionError(f"there is no such key for {name}", key)
        if not given:
            raise SectionError("must have `value:`, `values:`, or `min:` and `max:`")
        for key in _KEYS[name]:
            if key not in given and type(self).model_fields[key].default is None:
                raise SectionError(f"{name} needs {key}:")
        if self.min is not None and self.min >= self.max:
            raise SectionError(f"min {self.min} must be less than max {self.max}")
        if name == "int_uniform" and not {type(self.min), type(self.max)} == {int}:
            raise SectionError(f"min and max of int_uniform must be whole numbers, got {self.min} and {self.max}")
        if "log_uniform" in name and self.min <= 0:
            raise SectionError(f"must be greater than 0 for {name}, got {self.min}", "min")
        if self.probabilities is not None:
            if len(self.values) != len(self.probabilities):
                raise SectionError(f"there are {len(self.values)} values and {len(self.probabilities)} probabilities")
            if not math.isclose(sum(self.probabilities), 1, rel_tol=1e-5):
                raise SectionError(f"must add up to 1, got {sum(self.probabilities):g}", "probabilities")
        return self

    def grid(self) -> list[Any] | None:
        """Return the values of W&B's grid, each once; `None` if a grid cannot enumerate the distribution."""
        match self.name:
            case "constant":
                return [self.value]
            case "categorical":
                return [json.loads(text) for text in dict.fromkeys(map(json.dumps, self.values))]
            case "int_uniform":
                return list(range(int(self.min), int(self.max) + 1))
            case "q_uniform":  # without `max`
                return [_rounded(self.min + i * self.q) for i in range(math.ceil((self.max - self.min) / self.q))]
        return None

    def for_optuna(self) -> "BaseDistribution":
        """Return what Optuna draws from: choices as JSON, ranges, and quantiles of what Optuna does not have."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.name == "categorical":
            return CategoricalDistribution([json.dumps(value) for value in self.values])
        if self.name == "int_uniform":
            return IntDistribution(int(self.min), int(self.max))
        if self.min is not None:
            return FloatDistribution(self.min, self.max, log="log_uniform" in self.name)
        return FloatDistribution(1e-9, 1 - 1e-9)

    def setting(self, drawn: Any) -> Any:
        """Return the value that a draw of Optuna stands for."""
        if not self.is_swept:
            return self.value if self.name == "constant" else self.values[0]
        if isinstance(drawn, str):
            return json.loads(drawn)
        match self.name.removeprefix("q_"):
            case "categorical_w_probabilities":
                ends = list(itertools.accumulate(self.probabilities))
                return self.values[min(bisect.bisect(ends, drawn), len(ends) - 1)]
            case "normal" | "log_normal" as name:
                drawn = self.mu + self.sigma * statistics.NormalDist().inv_cdf(drawn)
                drawn = math.exp(drawn) if name == "log_normal" else drawn
            case "beta":
                from scipy.special import betaincinv

                drawn = float(betaincinv(self.a, self.b, drawn))
        return _rounded(round(drawn / self.q) * self.q) if self.name.startswith("q_") else drawn


def _rounded(number: float) -> float:
    """Return the number without the error of binary fractions: 0.3 for 0.30000000000000004."""
    return number if isinstance(number, int) else float(f"{number:.12g}")
