"""The journal of a study: which run comes next and how each has ended. Optuna draws, and writes the file."""

import contextlib
import fcntl
import itertools
import json
import os
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from experiments.errors import UserError
from experiments.study.names import arm_name
from experiments.study.runs import LOGS, Attempt, Plan
from experiments.study.sweep_file import Sweep
from lightning_modules.common import run_files
from lightning_modules.common.files import complete_lines, process_name, read_json, write_text

JOB = "job"  # attribute of the trial of a run that was submitted to a cluster

_FILE = "journal.log"
# Links of submitit to batch scripts, by their absolute paths: a study that has been moved has links to its earlier
# place. Their names are random, and nothing is written to them again.
_OF_SUBMITIT = ".submission_file_"
_STUDY = "study"  # the name in the journal
_DELETED = 1  # the operation in Optuna's journal by which a study that has changed begins anew


class Journal:
    """The trials of a study, one for each start of a run; the latest trial of an arm says how the arm has ended.

    The points of a grid are told apart by their settings, and Optuna draws nothing: so values can be added to a grid.

    Args:
        plan: The study.
        in_memory: Whether nothing is written.
        find: Function that returns whether a run that an earlier command has submitted waits or is alive.
    """

    def __init__(
        self, plan: Plan, in_memory: bool = False, find: Callable[[Attempt], bool] = lambda run: False
    ) -> None:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalStorage
        from optuna.trial import TrialState

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._plan, self._sweep = plan, plan.sweep
        self._direction = "maximize" if plan.sweep.maximize else "minimize"
        self._judges = plan.sweep.uses_results or plan.sweep.early_terminate is not None  # runs by values of the metric
        self._points = _points_of(plan.sweep)
        swept = {".".join(key): spec for key, spec in plan.sweep.distributions.items() if spec.is_swept}
        self._distributions = {} if self._is_grid else {name: spec.for_optuna() for name, spec in swept.items()}
        self._storage = (
            optuna.storages.InMemoryStorage()
            if in_memory
            else JournalStorage(JournalFileBackend(str(plan.folder / _FILE)))
        )
        self._optuna = self._open()
        self.found = self._find_runs(find)  # those that go on since an earlier command
        self.changed_files: list[str] = []  # since the study began, if it has runs
        self._dropped: set[str] = set()  # arms of a study that begins anew; each has a failed record or no folder
        arms = self._begin()
        self._named = arms if in_memory else {}  # in memory there are no arms yet, but the study in the folder has some
        for run in self.found:
            self._checked_attributes(run.trial)
        while self._optuna.get_trials(states=(TrialState.WAITING,)):
            self._optuna.tell(self._optuna.ask(self._distributions), state=TrialState.FAIL)
        by_arm = {
            arm: trial
            for arm, trial in latest(self._optuna.trials).items()
            if not self._is_grid or _text(trial.user_attrs["settings"]) in self._points  # a value without runs may go
        }
        # Runs that were interrupted or failed, or whose folder was removed, are the first that `next` returns.
        self._again = [
            trial
            for arm, trial in by_arm.items()
            if trial.state == TrialState.FAIL or (trial.state.is_finished() and not (plan.folder / arm).is_dir())
        ]
        # By arm: name of a TrialState, or AGAIN before another attempt.
        self.outcomes = {arm: "AGAIN" if trial in self._again else trial.state.name for arm, trial in by_arm.items()}
        there = {_text(trial.user_attrs["settings"]) for trial in by_arm.values()}
        self._left = iter([values for point, values in self._points.items() if point not in there])

    @property
    def _is_grid(self) -> bool:
        return self._sweep.method == "grid"

    def _open(self) -> Any:
        """Return the study in the journal; it begins if it is not there."""
        import optuna

        from experiments.study.pruning import Halving

        rule = self._sweep.early_terminate
        return optuna.create_study(
            storage=self._storage,
            study_name=_STUDY,
            direction=self._direction,
            pruner=Halving(rule.first, int(rule.eta)) if rule else optuna.pruners.NopPruner(),
            load_if_exists=True,
        )

    def _find_runs(self, find: Callable[[Attempt], bool]) -> list[Attempt]:
        """Return the runs that go on since an earlier command; others that the journal has as running have ended."""
        from optuna.trial import TrialState

        found = []
        for trial in self._optuna.get_trials(states=(TrialState.RUNNING,)):
            if JOB in trial.user_attrs and find(run := self._run_of(trial)):
                found.append(run)
            else:
                self._optuna.tell(trial.number, state=TrialState.FAIL)
        return found

    def _begin(self) -> dict[str, dict[str, Any]]:
        """Record what the study asks, and return the settings of its earlier arms by their names.

        What no run depends on may change. As long as no arm has a folder, everything may: the study begins anew.

        Raises:
            UserError: If something else has changed.
        """
        import optuna

        folder = self._plan.folder
        asked = _asked_by(self._sweep) | {"flags": self._plan.flags, "seed": None if self._is_grid else self._plan.seed}
        asked |= {"files": (files := self._plan.files()), "n_runs": self._plan.n_runs}
        begun, arms = _read(folder) if (folder / _FILE).is_file() else ({}, {})
        settings = {arm: attributes["settings"] for arm, attributes in arms.items()}
        going_on = {run.arm for run in self.found}
        kept = [settings[arm] for arm in settings if arm in going_on or _has_begun(folder / arm)]
        other = [key for key in asked if asked[key] != begun.get(key, asked[key]) and not self._may_change(key, kept)]
        if self._judges and self._optuna.direction.name.lower() != self._direction and "metric" not in other:
            other.append("metric")  # changed while it judged no run
        if kept and other:
            raise UserError(
                f"{folder} was begun with other {' and '.join(other)}: give this study another --name; "
                f"`llm-train compare {folder} {folder.parent}/NAME` compares the two"
            )
        if other:
            optuna.delete_study(study_name=_STUDY, storage=self._storage)
            self._optuna = self._open()
            self._dropped = {*settings}
        if kept:
            asked["files"] = files | begun.get("files", {})  # those of the first runs
            self.changed_files = [file for file, digest in files.items() if asked["files"][file] != digest]
        if self._optuna.user_attrs.get("asked") != asked:
            self._optuna.set_user_attr("asked", asked)
        return settings

    def _may_change(self, key: str, kept: Collection[Mapping[str, Any]]) -> bool:
        """Return whether a part of what the study asks may change: arms with the settings `kept` have runs."""
        match key:
            case "parameters":
                return self._is_grid and all(_text(settings) in self._points for settings in kept)
            case "metric":
                return not self._judges
        return key in ("files", "n_runs")

    def next(self) -> Attempt | None:
        """Return the next run to start or to resume, or `None` if there is none."""
        if self._again:
            earlier = self._again.pop(0)
            attributes = self._checked_attributes(earlier)
            self._optuna.enqueue_trial(earlier.params, attributes)
            run = Attempt(self._plan, **attributes, trial=self._optuna.ask(self._distributions))
            for key, value in attributes.items():  # Optuna writes those of a queued trial in another form
                run.trial.set_user_attr(key, value)
        elif len(self.outcomes) < self._plan.n_runs and not self.reached_target:
            run = self._draw(len(self.outcomes))
        else:
            return None
        self.outcomes[run.arm] = "RUNNING"
        return run

    def _run_of(self, trial: Any) -> Attempt:
        """Return the run of a trial that the journal has as running."""
        from optuna.trial import Trial

        study_id = self._storage.get_study_id_from_name(_STUDY)
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)
        arm, settings = self._arm_of(trial), trial.user_attrs["settings"]
        n_reported = len(trial.intermediate_values)
        return Attempt(self._plan, arm, settings, Trial(self._optuna, trial_id), n_reported=n_reported)

    def _arm_of(self, trial: Any) -> str:
        """Return the arm of a trial, which names a folder."""
        arm = trial.user_attrs["arm"]
        if Path(arm).name != arm or arm == "..":  # it may be removed
            raise UserError(f"{self._plan.folder / _FILE}: {arm!r} is not a name of a run")
        return arm

    def _checked_attributes(self, trial: Any) -> dict[str, Any]:
        """Return the arm and the settings of a trial; the settings become flags."""
        arm, settings = self._arm_of(trial), trial.user_attrs["settings"]
        known = self._points if self._is_grid else [_text(self._sweep.settings(self._values(trial)))]
        if _text(settings) not in known:
            raise UserError(f"{self._plan.folder / _FILE}: the settings of {arm} are not the sweep's")
        return {"arm": arm, "settings": settings}

    def _draw(self, i: int) -> Attempt:
        """Draw the settings of run i; those of a grid are the next ones in the order of the file."""
        from optuna.samplers import RandomSampler, TPESampler

        # From (seed, i) alone: an interrupted study draws what it would have drawn.
        seed = random.Random(f"{self._plan.seed} {i}").getrandbits(32)
        if self._sweep.method == "random":
            self._optuna.sampler = RandomSampler(seed)
        elif self._sweep.method == "bayes":
            self._optuna.sampler = TPESampler(seed=seed, constant_liar=self._plan.jobs > 1)
        trial = self._optuna.ask(self._distributions)
        values = next(self._left) if self._is_grid else self._values(trial)
        settings = self._sweep.settings(values)
        arm = self._name(settings, values)
        trial.set_user_attr("settings", settings)
        trial.set_user_attr("arm", arm)
        return Attempt(self._plan, arm, settings, trial)

    def _name(self, settings: Mapping[str, Any], values: Sequence[Any]) -> str:
        """Return the name of a new arm with these settings, and these values of all parameters."""
        for arm, known in self._named.items():
            if known == settings and arm not in self.outcomes:
                return arm
        specs = self._sweep.distributions.items()
        swept = {".".join(key): value for (key, spec), value in zip(specs, values, strict=True) if spec.is_swept}
        arm = name = arm_name(swept)
        numbers = itertools.count(len(self.outcomes) + 1)
        while not arm or arm in self.outcomes or (arm not in self._dropped and (self._plan.folder / arm).exists()):
            arm = f"{name}{',' if name else ''}run={next(numbers)}"
        return arm

    def _values(self, trial: Any) -> list[Any]:
        """Return the values of all parameters that a draw of Optuna stands for."""
        specs = self._sweep.distributions.items()
        return [spec.setting(trial.params.get(".".join(key))) for key, spec in specs]

    def record(self, run: Attempt, value: float | None, error: str | None) -> None:
        """Record how a run has ended: its best value of the metric, and the reason if it failed."""
        from optuna.trial import TrialState

        if error:
            run.trial.set_user_attr("error", error)
        state = TrialState.FAIL if error else TrialState.PRUNED if run.stopped_early else TrialState.COMPLETE
        # Optuna wants a number of every complete trial; a sweep without a metric has none.
        self._optuna.tell(run.trial, (value or 0.0) if state == TrialState.COMPLETE else None, state)
        self.outcomes[run.arm] = state.name

    @property
    def reached_target(self) -> bool:
        """Whether a run, also one of an earlier command, has reached the target of the metric."""
        target = self._sweep.metric.target if self._sweep.metric else None
        if target is None:
            return False
        trials = latest(self._optuna.get_trials(deepcopy=False))
        ended = (arm for arm, outcome in self.outcomes.items() if outcome == "COMPLETE")  # not one that starts again
        values = (trials[arm].value for arm in ended)
        return any(value >= target if self._sweep.maximize else value <= target for value in values)

    def count(self, *outcomes: str) -> int:
        """Return how many arms have one of these outcomes."""
        return sum(outcome in outcomes for outcome in self.outcomes.values())


def latest(trials: Iterable[Any]) -> dict[str, Any]:
    """Return the latest trial of each arm; it says how the arm has ended."""
    return {trial.user_attrs["arm"]: trial for trial in trials if "arm" in trial.user_attrs}


def _asked_by(sweep: Sweep) -> dict[str, Any]:
    """Return the parts of a sweep file that say what its runs are."""
    content = sweep.model_dump(exclude_unset=True, warnings=False)  # they cannot tell Nested from Distribution
    return {key: content.get(key) for key in ("method", "parameters", "metric", "command")}


def _points_of(sweep: Sweep) -> dict[str, list[Any]]:
    """Return the values of all parameters at each point of a grid, by the settings of its run as text."""
    if sweep.method != "grid":
        return {}
    points = itertools.product(*(spec.grid() or [] for spec in sweep.distributions.values()))
    return {_text(sweep.settings(values)): list(values) for values in points}


def _has_begun(folder: Path) -> bool:
    """Return whether an arm has a run, and not just the record that it failed before it wrote a checkpoint."""
    failed = read_json(folder / run_files.SUMMARY, {}).get("status") == "failed"
    return folder.is_dir() and not (failed and not any(folder.glob(run_files.checkpoint("*"))))


def _text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return what the study in a folder asks, empty if its journal does not say it, and what is recorded of each arm.

    Raises:
        UserError: If there is no journal, or it is damaged.
    """
    asked: dict[str, Any] = {}
    trials: dict[int, dict[str, Any]] = {}
    try:
        for line in complete_lines(folder / _FILE):
            record = json.loads(line)
            attributes = record.get("user_attr", {})
            if record.get("op_code") == _DELETED:
                asked, trials = {}, {}
            elif "trial_id" in record:
                trials.setdefault(record["trial_id"], {}).update(attributes)
            else:
                asked = attributes.get("asked", asked)
        return asked, {trial["arm"]: trial for trial in trials.values() if {"arm", "settings"} <= trial.keys()}
    except FileNotFoundError as error:
        raise UserError(f"{folder}: holds no runs of a study (no {_FILE}); llm-train study makes them") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / _FILE}: is not the journal of a study ({type(error).__name__})") from error


def goal_of(folder: Path) -> tuple[str, str] | None:
    """Return the metric of the study in a folder and its goal, or `None` if there is no study, or it has no goal."""
    with contextlib.suppress(UserError, KeyError, TypeError):
        metric = _read(folder)[0]["metric"]
        return metric["name"], metric["goal"]
    return None


def not_run(folder: Path) -> str | None:
    """Return how many arms of the study in a folder have no run, `None` if there is no study, or each arm has one."""
    with contextlib.suppress(UserError, ValueError, KeyError, TypeError):
        asked, recorded = _read(folder)
        arms = {_text(of_arm["settings"]): of_arm for of_arm in recorded.values()}
        if asked["method"] == "grid":
            sweep = {"method": "grid", "parameters": asked["parameters"], "command": ["${args}"]}
            arms = {point: arms.get(point, {}) for point in _points_of(Sweep.model_validate(sweep))}
        absent = [of_arm for of_arm in arms.values() if not of_arm or not (folder / of_arm["arm"]).is_dir()]
        n_failed, n_begun = sum("error" in of_arm for of_arm in absent), len(arms) - len(absent)
        n_all = min(len(arms), asked.get("n_runs", len(arms)))
        # A study ends when a run has reached the target.
        n_left = 0 if (asked.get("metric") or {}).get("target") is not None else max(0, n_all - n_begun - n_failed)
        if n_failed or n_left:
            return (
                f"Not compared, of the {n_begun + n_failed + n_left} runs of {folder}: {n_failed} failed before the "
                f"start, {n_left} not run."
            )
    return None


def settings_of(folder: Path, sweep: Sweep) -> dict[str, dict[str, Any]]:
    """Return the settings of each arm of the study in a folder, nested as in its sweep file, by the name of its folder.

    Raises:
        UserError: If there is no journal, it is damaged, or the sweep file has been changed since the study began.
    """
    (begun, arms), now = _read(folder), _asked_by(sweep)
    if other := " and ".join(key for key in ("parameters", "command") if begun.get(key, now[key]) != now[key]):
        raise UserError(
            f"{folder} was begun with other {other} than {sweep.path} has now: undo that, or "
            f"`llm-train study {sweep.path}` again"
        )
    return {arm: recorded["settings"] for arm, recorded in arms.items()}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[BinaryIO]:
    """Lock a study's folder and yield the lock; repair the journal if the last line is incomplete after a kill.

    A file in the folder says which process has it. A file system without locks gives one to every process.

    Raises:
        UserError: If another process has it, or a link leads out of the folder, to what the study would write.
    """
    journal, holder = folder / _FILE, folder / ".lock"
    for path in (journal, folder / LOGS, *(folder / LOGS).rglob("*")):
        if path.name.startswith(_OF_SUBMITIT):
            continue
        if path.is_symlink() and not (target := path.resolve()).is_relative_to(folder.resolve()):
            raise UserError(f"{path} is a link to {target}, outside of the study; replace it by what it links to")
    with journal.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            by = f" of {holder.read_text(encoding='utf-8').strip()}" if holder.is_file() else ""
            message = f"{folder}: the study{by} is running, or a run that has outlived it; wait for it or end it"
            raise UserError(message) from None
        except OSError:  # a file system without locks
            pass
        file.truncate(journal.read_bytes().rfind(b"\n") + 1)
        journal.with_name(f"{_FILE}.lock").unlink(missing_ok=True)  # Optuna's
        write_text(holder, f"{process_name(os.getpid())}\n")
        try:
            yield file
        finally:
            holder.unlink(missing_ok=True)
