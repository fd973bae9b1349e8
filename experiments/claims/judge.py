"""The verdict on a claim, from the records of its study alone."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from experiments.claims.claims_file import Bounds, Claim, Comparison, EveryRun, Mean, Order, Settings, Verdict
from experiments.comparison.measures import Measure, mode_of
from experiments.comparison.runs import FINISHED, RunResult
from experiments.comparison.statistics import BySeed, difference, differences, estimate
from experiments.comparison.tables import with_interval
from experiments.errors import UserError

_FAILED = "failed"  # status of a run


class Effect(NamedTuple):
    """One number that a claim is judged by, its interval if it has one, and what it says about the claim."""

    what: str
    value: float
    low: float | None
    high: float | None
    verdict: Verdict
    how: str
    shown: str  # value and interval
    margin: float = 0.0  # how far the value is within the bounds


class Judgement(NamedTuple):
    """The verdict on a claim, with its numbers."""

    topic: str
    claim: Claim
    verdict: Verdict | Literal["no records"]
    effects: list[Effect]

    @property
    def is_as_expected(self) -> bool:
        """Whether the verdict is the expected one, or there are no records of a claim whose records are pending."""
        if self.verdict == "no records":
            return self.claim.records == "pending"
        return self.verdict == self.claim.expected

    @property
    def shown(self) -> str:
        """The number that decides: of those with the verdict of the claim, the least within the bounds."""
        deciding = [effect for effect in self.effects if effect.verdict == self.verdict]
        if not deciding:
            return ""
        found = min(deciding, key=lambda effect: effect.margin)
        values = [effect.value for effect in self.effects]
        if len(values) == 1:
            return found.shown
        which = {max(values): "highest", min(values): "lowest"}.get(found.value, "1")
        return f"{found.shown} ({which} of {len(values)})"


def judge(topic: str, claim: Claim, runs: Sequence[RunResult] | None, is_deterministic: bool = False) -> Judgement:
    """Return the verdict on a claim.

    A number decides with its whole interval: the claim holds if the interval is in the bounds, it does not hold if the
    interval is outside of them, and is not clear otherwise. A claim about several numbers holds if it holds for each,
    and does not if it does not for one.

    Args:
        topic: Topic of the claim.
        claim: The claim.
        runs: Runs of its study, as the records have them, or `None` without records.
        is_deterministic: Whether the seed has no effect on these runs.

    Raises:
        UserError: If the records have no run, or several arms, with the settings of the claim.
    """
    if runs is None:
        return Judgement(topic, claim, "no records", [])
    effects = _Judge(topic, claim, runs, is_deterministic).effects()
    verdicts = {effect.verdict for effect in effects}
    verdict: Verdict = "holds"
    for other in ("not clear", "does not hold here"):
        verdict = other if other in verdicts else verdict
    return Judgement(topic, claim, verdict, effects)


class _Judge:
    def __init__(self, topic: str, claim: Claim, runs: Sequence[RunResult], is_deterministic: bool) -> None:
        self.topic, self.claim, self.runs, self.is_deterministic = topic, claim, runs, is_deterministic

    def effects(self) -> list[Effect]:
        condition = self.claim.holds_if
        if condition.every_run is not None:
            return self._every_run(condition.every_run)
        if condition.mean is not None:
            return [self._mean(condition.mean)]
        if condition.difference is not None:
            return self._differences(condition.difference)
        return self._order(condition.order)

    def _every_run(self, condition: EveryRun) -> list[Effect]:
        values = [value for _, value in self._values({})]
        n_failed = sum(run.status == _FAILED for run in self._all_runs({}))
        low = -math.inf if condition.at_least is None else condition.at_least
        high = math.inf if condition.at_most is None else condition.at_most
        verdict: Verdict = "holds"
        if n_failed or not all(low <= value <= high for value in values):
            verdict = "does not hold here"
        elif len(values) < 2 and not self.is_deterministic:
            verdict = "not clear"
        ends = list(dict.fromkeys(f"{value:.4g}" for value in (min(values), max(values))))
        how = f"{len(values)} finished" + (f", {n_failed} failed" if n_failed else "")
        return [Effect(self._label({}), min(values), min(values), max(values), verdict, how, " to ".join(ends))]

    def _mean(self, condition: Mean) -> Effect:
        values = [value for _, value in self._values({})]
        mean, half_width, n = estimate(values)
        half_width = 0.0 if self.is_deterministic else half_width
        margin = condition.within
        of = self.claim.source.number if condition.of is None and self.claim.source is not None else condition.of
        if condition.within_percent is not None:
            margin = abs(of) * condition.within_percent / 100
        region = _region(condition, of or 0.0, margin)
        verdict = _verdict(mean, half_width, region)
        shown = with_interval(mean, half_width or None)
        return Effect(self._label({}), mean, *_ends(mean, half_width), verdict, f"mean of {n}", shown)

    def _differences(self, condition: Comparison) -> list[Effect]:
        arms = [(arm, condition.against) for arm in condition.arms]
        neutral = 1.0 if condition.ratio else 0.0
        region = _region(condition, neutral, condition.within)
        if condition.ratio:
            low, high = (math.log(end) if end > 0 else -math.inf for end in region)
            region = low, high
        # Holm's procedure tests against a difference of zero, so the bound is taken off.
        shift = 0.0 if condition.within is not None else next(filter(math.isfinite, region))
        return self._compared(arms, region, shift, is_family=condition.within is None, is_ratio=condition.ratio)

    def _order(self, condition: Order) -> list[Effect]:
        pairs = [(higher, lower) for lower, higher in zip(condition.ascending, condition.ascending[1:], strict=False)]
        return self._compared(pairs, (0.0, math.inf), 0.0)

    def _compared(
        self,
        pairs: Sequence[tuple[Settings, Settings]],
        region: Sequence[float],
        shift: float,
        is_family: bool = True,
        is_ratio: bool = False,
    ) -> list[Effect]:
        """Return the effect of each pair: the difference of the first from the second, or its ratio to the second."""

        def transformed(arm: Settings, by: float = 0.0) -> BySeed:
            values = self._values(arm)
            for seed, value in values if is_ratio else ():
                if value <= 0:
                    raise self._error(
                        f"{self._label(arm)} is {value:g} with seed {seed}; a ratio needs positive values"
                    )
            of = math.log if is_ratio else float
            return [(seed, of(value) + by) for seed, value in values]

        self._check_validations([arm for pair in pairs for arm in pair])
        compared = [(transformed(arm), transformed(against, shift)) for arm, against in pairs]
        found = differences(compared) if is_family else [difference(*pair) for pair in compared]
        effects = []
        for (arm, against), each in zip(pairs, found, strict=True):
            half_width = 0.0 if self.is_deterministic else each.half_width
            mean = each.mean + shift
            verdict = _verdict(mean, half_width, region)
            back: Callable[[float], float] = math.exp if is_ratio else float
            low, high = (None if end is None else back(end) for end in _ends(mean, half_width))
            shown = with_interval(mean, half_width or None, sign="+")
            if is_ratio:
                shown = f"× {back(mean):.4g}" + (f" ({low:.3g} to {high:.3g})" if half_width else "")
            what = f"{self._label(arm)} against {self._label(against)}"
            margin = min(mean - region[0], region[1] - mean)
            effects.append(Effect(what, back(mean), low, high, verdict, each.how, shown, margin))
        return effects

    def _values(self, arm: Settings) -> BySeed:
        """Return seed and value of each finished run of an arm."""
        return self._measure(arm).by_seed(self._runs(arm))

    def _metric(self, arm: Settings) -> str:
        return arm.get("metric", self.claim.metric)

    def _measure(self, arm: Settings) -> Measure:
        metric = self._metric(arm)
        return Measure(metric, self.claim.value, mode_of(metric) if self.claim.value == "best" else None)

    def _runs(self, arm: Settings) -> list[RunResult]:
        """Return the finished runs of an arm, of which at least one has the metric."""
        finished = [run for run in self._all_runs(arm) if run.status == FINISHED]
        metric = self._metric(arm)
        if not any(metric in run.metrics for run in finished):
            raise self._error(f"no finished run has recorded {self._label(arm)}")
        return finished

    def _all_runs(self, arm: Settings) -> list[RunResult]:
        wanted = self.claim.where | {key: value for key, value in arm.items() if key != "metric"}
        known = self.runs[0].settings if self.runs else {}
        keys = {}
        for name in wanted:
            fitting = [key for key in known if f".{key}".endswith(f".{name}")]
            if len(fitting) != 1:
                raise self._error(f"the setting {name!r} is none of {', '.join(known) or 'the records'}")
            keys[name] = fitting[0]
        runs = [run for run in self.runs if all(run.settings[keys[name]] == value for name, value in wanted.items())]
        arms = {tuple(map(str, run.settings.values())) for run in runs}
        if len(arms) != 1:
            raise self._error(f"{len(arms)} arms of the records have {wanted}; give the settings of one")
        return runs

    def _check_validations(self, arms: Sequence[Settings]) -> None:
        for metric in {self._metric(arm) for arm in arms}:
            runs = [run for arm in arms if self._metric(arm) == metric for run in self._runs(arm)]
            if not self._measure({"metric": metric}).is_fair(runs):
                raise self._error("best values of runs with unequal numbers of validations cannot be compared")

    def _label(self, arm: Settings) -> str:
        settings = self.claim.where | arm
        metric = settings.pop("metric", self.claim.metric)
        named = ", ".join(f"{key}={value}" for key, value in settings.items())
        return f"{metric} of {named}" if named else metric

    def _error(self, message: str) -> UserError:
        return UserError(f"{self.topic}, claim {self.claim.name}: {message}")


def _region(bounds: Bounds, of: float, margin: float | None) -> tuple[float, float]:
    if margin is not None:
        return of - margin, of + margin
    return (
        -math.inf if bounds.above is None else bounds.above,
        math.inf if bounds.below is None else bounds.below,
    )


def _ends(mean: float, half_width: float | None) -> tuple[float | None, float | None]:
    return (None, None) if half_width is None else (mean - half_width, mean + half_width)


def _verdict(mean: float, half_width: float | None, region: Sequence[float]) -> Verdict:
    if half_width is None or not math.isfinite(mean):
        return "not clear"
    low, high = mean - half_width, mean + half_width
    if region[0] < low and high < region[1]:
        return "holds"
    return "does not hold here" if high <= region[0] or low >= region[1] else "not clear"
