"""The claims of a topic: `claims.yaml`, checked when it is read. README.md of this folder explains its keys."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from experiments.comparison.measures import mode_of
from experiments.study.distributions import NOT_GIVEN, Number, PositiveNumber, Section, SectionError
from experiments.study.sweep_file import mistake
from experiments.yaml_files import read_yaml

FILE = "claims.yaml"

Verdict = Literal["holds", "does not hold here", "not clear"]
Settings = dict[str, Any]  # a whole key of a setting, or the end of it, and its value; `metric` names another metric
Name = Annotated[str, Field(pattern=r"^[a-z0-9_]+$", max_length=32)]


class Source(Section):
    """Where a claim comes from: the paper, the place in it, what it says, and its number."""

    paper: str
    where: str = ""
    says: str = ""
    number: Number = NOT_GIVEN


class RecordsSpec(Section):
    """The study that makes the runs, and what is recorded of them.

    Args:
        file: Name of the sweep file, if it is another than that of the records.
        first: Experiments that the runs start from, such as `TOPIC/offline`; they run first if they are missing.
        flags: Further flags of all runs, such as `--trainer.max_steps=1200`; the study is then named as
            the records are.
        metrics: Metrics whose last value is recorded; the first is that of the figure and of the differences.
        best: Those among them whose best value is recorded too; the name says which is best: `val/loss`.
        baseline: Settings of the arm with which the table in the README compares the others: `initialization=gpt2`.
        test: Whether the best checkpoint of each run is tested, for metrics of the test split.
        deterministic: Whether the seed has no effect, so that one run of an arm is all there is to know.
        needs: What a run needs besides two CPU cores, such as `the hub`; it runs only if its own name is given.
    """

    file: str = ""
    first: list[str] = Field(default_factory=list)
    flags: list[str] = Field(default_factory=list)
    metrics: Annotated[list[str], Field(min_length=1)]
    best: list[str] = Field(default_factory=list)
    baseline: list[str] = Field(default_factory=list)
    test: bool = False
    deterministic: bool = False
    needs: str = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for metric in self.best:
            if metric not in self.metrics:
                raise SectionError(f"{metric} is not in metrics:", "best")
            if mode_of(metric) is None:
                raise SectionError(f"the name of {metric} does not say whether small or large values are good", "best")
        return self


class Bounds(Section):
    """Where a value must be: above or below a bound, between two, or near a value."""

    above: Number = NOT_GIVEN
    below: Number = NOT_GIVEN
    within: PositiveNumber = NOT_GIVEN

    @model_validator(mode="after")
    def _check(self) -> Self:
        kinds = {"above", "below"}, {"within"}, {"within_percent"}
        if sum(not kind.isdisjoint(self.model_fields_set) for kind in kinds) != 1:
            raise SectionError("needs above: or below: or both, or within: alone, or within_percent: alone (a mean)")
        return self


class Mean(Bounds):
    """The mean over seeds is in the bounds: its whole 95 % interval is."""

    within_percent: PositiveNumber = NOT_GIVEN
    of: Number = NOT_GIVEN  # the value to be near; that of the paper if it is left out

    @model_validator(mode="after")
    def _check_of(self) -> Self:
        if self.of is not None and self.within is None and self.within_percent is None:
            raise SectionError("is the value for within: or within_percent:, and neither is there", "of")
        return self


class EveryRun(Section):
    """Each run has at least, or at most, a value."""

    at_least: Number = NOT_GIVEN
    at_most: Number = NOT_GIVEN

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.model_fields_set:
            raise SectionError("needs at_least: or at_most:")
        return self


class Comparison(Bounds):
    """The difference of some arms from another is in the bounds, or their ratio is: the whole interval of each."""

    arms: Annotated[list[Settings], Field(min_length=1)]
    against: Settings
    ratio: bool = False

    @model_validator(mode="after")
    def _check_ratio(self) -> Self:
        for key, bound in (("above", self.above), ("below", self.below)):
            if self.ratio and bound is not None and bound <= 0:
                raise SectionError("must be positive, as a ratio is", key)
        return self


class Order(Section):
    """Each of these arms is clearly below the next."""

    ascending: Annotated[list[Settings], Field(min_length=2)]


class HoldsIf(Section):
    """The one condition of a claim."""

    every_run: EveryRun = NOT_GIVEN
    mean: Mean = NOT_GIVEN
    difference: Comparison = NOT_GIVEN
    order: Order = NOT_GIVEN

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise SectionError(f"needs one of {', '.join(type(self).model_fields)}")
        return self


class Claim(Section):
    """A claim, and the verdict that is expected of it in this setting.

    Args:
        name: Short name.
        sentence: The claim in words.
        source: Its paper.
        study: Name of the records that decide it.
        metric: Metric that decides it.
        value: Whether the last or the best validation counts. The best counts only at equal numbers of validations.
        where: Settings that all arms of the claim have.
        holds_if: Condition under which it holds.
        expected: Expected verdict.
        because: Why it is expected not to hold here.
        records: `pending` for a claim whose runs are not recorded yet.
    """

    name: Name
    sentence: str
    source: Source = NOT_GIVEN
    study: str
    metric: str
    value: Literal["last", "best"] = "last"
    where: Settings = Field(default_factory=dict)
    holds_if: HoldsIf
    expected: Verdict
    because: str = ""
    records: Literal["required", "pending"] = "required"

    @model_validator(mode="after")
    def _check(self) -> Self:
        mean = self.holds_if.mean
        is_near = mean is not None and mean.of is None and mean.model_fields_set & {"within", "within_percent"}
        if is_near and (self.source is None or self.source.number is None):
            raise SectionError("needs of:, or a number of the source", "holds_if", "mean")
        return self


class Topic(Section):
    """The claims of a topic and the studies that decide them."""

    studies: dict[Name, RecordsSpec]
    claims: list[Claim]

    @model_validator(mode="after")
    def _check(self) -> Self:
        seen: set[str] = set()
        for i, claim in enumerate(self.claims):
            if claim.study not in self.studies:
                raise SectionError(f"there is no study {claim.study!r} in studies:", "claims", i, "study")
            if claim.value == "best" and claim.metric not in self.studies[claim.study].best:
                raise SectionError(f"{claim.study} does not record the best {claim.metric}", "claims", i, "value")
            if claim.name in seen:
                raise SectionError(f"there are two claims of the name {claim.name!r}", "claims", i, "name")
            seen.add(claim.name)
        return self


def read_claims(file: Path) -> Topic:
    """Read a file of claims; raise a `UserError` with the line of the first mistake."""
    try:
        return Topic.model_validate(read_yaml(file))
    except ValidationError as found:
        raise mistake(file, file.read_text(encoding="utf-8"), found) from found


def claims_files(folder: Path) -> dict[str, Path]:
    """Return the files of claims of all topics in a folder, by topic."""
    return {file.parent.name: file for file in sorted(folder.glob(f"*/{FILE}"))}
