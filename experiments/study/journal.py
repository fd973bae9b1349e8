"""The journal of a study: which run comes next and how each has ended. Optuna draws, and writes the file."""

import contextlib
import fcntl
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from experiments.errors import UserError
from experiments.study.names import arm_name
from experiments.study.runs import LOGS, Plan, Run
from experiments.study.sweep_file import Sweep
from lightning_modules.common.files import complete_lines

JOB = "job"  # attribute of the trial of a run that was submitted to a cluster

_FILE = "journal.log"
# Links of submitit to batch scripts, by their absolute paths: a study that has been moved has links to its earlier
# place. Their names are random, and nothing is written to them again.
_OF_SUBMITIT = ".submission_file_"
_STUDY = "study"  # the name in the journal


class Journal:
    """The trials of a study, one for each start of a run; the latest trial of an arm says how the arm has ended.

    Args:
        plan: The study.
        in_memory: Whether nothing is written.
        find: Function that returns whether a run that an earlier command has submitted waits or is alive.
    """

    def __init__(self, plan: Plan, in_memory: bool = False, find: Callable[[Run], bool] = lambda run: False) -> None:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalStorage
        from optuna.trial import TrialState

        from experiments.study.pruning import Halving

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sweep = plan.sweep
        self._plan, self._sweep = plan, sweep
        self._distributions = {
            ".".join(key): spec.for_optuna(sweep.method == "grid")
            for key, spec in sweep.distributions.items()
            if spec.is_swept
        }
        rule = sweep.early_terminate
        self._storage = (
            optuna.storages.InMemoryStorage()
            if in_memory
            else JournalStorage(JournalFileBackend(str(plan.folder / _FILE)))
        )
        self._optuna = optuna.create_study(
            storage=self._storage,
            study_name=_STUDY,
            direction="maximize" if sweep.maximize else "minimize",
            pruner=Halving(rule.first, int(rule.eta)) if rule else optuna.pruners.NopPruner(),
            load_if_exists=True,
        )
        # In memory there are no arms yet, but the study in the folder has some: their folders are not those of others.
        self._named = settings_of(plan.folder, sweep) if in_memory and (plan.folder / _FILE).is_file() else {}
        asked = _asked_by(sweep) | {"flags": plan.flags, "seed": None if sweep.method == "grid" else plan.seed}
        if "asked" not in self._optuna.user_attrs:
            self._optuna.set_user_attr("asked", asked)
        begun = self._optuna.user_attrs["asked"]
        if other := " and ".join(key for key in asked if asked[key] != begun[key]):
            raise UserError(f"{plan.folder} was begun with other {other}: remove it, or give this study another --name")
        while self._optuna.get_trials(states=(TrialState.WAITING,)):
            self._optuna.ask(self._distributions)
        self.found: list[Run] = []  # runs that go on since an earlier command
        for trial in self._optuna.get_trials(states=(TrialState.RUNNING,)):
            if JOB in trial.user_attrs and find(run := self._run_of(trial)):
                self.found.append(run)
            else:
                self._optuna.tell(trial.number, state=TrialState.FAIL)
        by_arm = latest(self._optuna.trials)
        # Runs that were interrupted or failed, or whose folder was removed, are the first that `next` returns.
        self._again = [
            trial
            for arm, trial in by_arm.items()
            if trial.state == TrialState.FAIL or (trial.state.is_finished() and not (plan.folder / arm).is_dir())
        ]
        # By arm: name of a TrialState, or AGAIN before another attempt.
        self.outcomes = {arm: "AGAIN" if trial in self._again else trial.state.name for arm, trial in by_arm.items()}

    def next(self) -> Run | None:
        """Return the next run to start or to resume, or `None` if there is none."""
        if self._again:
            earlier = self._again.pop(0)
            attributes = self._checked_attributes(earlier)
            self._optuna.enqueue_trial(earlier.params, attributes)
            run = Run(self._plan, **attributes, trial=self._optuna.ask(self._distributions))
        elif len(self.outcomes) < self._plan.n_runs and not self.reached_target:
            run = self._draw(len(self.outcomes))
        else:
            return None
        self.outcomes[run.arm] = "RUNNING"
        return run

    def _run_of(self, trial: Any) -> Run:
        """Return the run of a trial that the journal has as running."""
        from optuna.trial import Trial

        study_id = self._storage.get_study_id_from_name(_STUDY)
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)
        attributes = self._checked_attributes(trial) | {"n_reported": len(trial.intermediate_values)}
        return Run(self._plan, **attributes, trial=Trial(self._optuna, trial_id))

    def _checked_attributes(self, trial: Any) -> dict[str, Any]:
        """Return the arm and the settings of a trial; the arm names a folder, and the settings become flags."""
        attributes = {key: trial.user_attrs[key] for key in ("arm", "settings")}
        if Path(attributes["arm"]).name != attributes["arm"] or attributes["arm"] == "..":  # it may be removed
            raise UserError(f"{self._plan.folder / _FILE}: {attributes['arm']!r} is not a name of a run")
        if json.dumps(self._settings(trial)) != json.dumps(attributes["settings"]):
            raise UserError(f"{self._plan.folder / _FILE}: the settings of {attributes['arm']} are not the sweep's")
        return attributes

    def _draw(self, i: int) -> Run:
        """Draw the settings of run i."""
        from optuna.samplers import RandomSampler, TPESampler

        # From (seed, i) alone: an interrupted study draws what it would have drawn.
        seed = random.Random(f"{self._plan.seed} {i}").getrandbits(32)
        distributions = self._sweep.distributions
        if self._sweep.method == "grid":
            grid = itertools.product(*(spec.grid() or [] for spec in distributions.values() if spec.is_swept))
            point = next(itertools.islice(grid, i, None))
            self._optuna.enqueue_trial(dict(zip(self._distributions, map(json.dumps, point), strict=True)))
        elif self._sweep.method == "random":
            self._optuna.sampler = RandomSampler(seed)
        else:
            self._optuna.sampler = TPESampler(seed=seed, constant_liar=self._plan.jobs > 1)
        trial = self._optuna.ask(self._distributions)
        values = self._values(trial)
        arm = arm_name({name: values[name] for name in self._distributions})
        if not arm or arm in self.outcomes or ((self._plan.folder / arm).exists() and arm not in self._named):
            arm = f"{arm}{',' if arm else ''}run={i + 1}"
        settings = self._settings(trial)
        trial.set_user_attr("settings", settings)
        trial.set_user_attr("arm", arm)
        return Run(self._plan, arm, settings, trial)

    def _values(self, trial: Any) -> dict[str, Any]:
        """Return the values of all parameters of a trial, by name."""
        specs = self._sweep.distributions.items()
        return {".".join(key): spec.setting(trial.params.get(".".join(key))) for key, spec in specs}

    def _settings(self, trial: Any) -> dict[str, Any]:
        """Return the settings of the run of a trial, nested as in the sweep file."""
        return self._sweep.settings(list(self._values(trial).values()))

    def record(self, run: Run, value: float | None, error: str | None) -> None:
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
        trials = latest(self._optuna.get_trials(deepcopy=False)).items()
        values = (trial.value for arm, trial in trials if self.outcomes[arm] == "COMPLETE")  # not one that starts again
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


def _asked_in(folder: Path) -> dict[str, Any]:
    """Return what the study in a folder was begun with; empty if its journal does not say it."""
    for line in complete_lines(folder / _FILE):
        record = json.loads(line)
        if "asked" in record.get("user_attr", {}):
            return record["user_attr"]["asked"]
    return {}


def goal_of(folder: Path) -> tuple[str, str] | None:
    """Return the metric of the study in a folder and its goal, or `None` if there is no study, or it has no goal."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        metric = _asked_in(folder)["metric"]
        return metric["name"], metric["goal"]
    return None


def settings_of(folder: Path, sweep: Sweep) -> dict[str, dict[str, Any]]:
    """Return the settings of each arm of the study in a folder, nested as in its sweep file, by the name of its folder.

    Raises:
        UserError: If there is no journal, it is damaged, or the sweep file has been changed since the study began.
    """
    trials: dict[int, dict[str, Any]] = {}
    try:
        begun, now = _asked_in(folder), _asked_by(sweep)
        if other := " and ".join(key for key in ("parameters", "command") if begun.get(key, now[key]) != now[key]):
            raise UserError(f"{folder} was begun with other {other} than {sweep.path} has now: undo that, or remove it")
        for line in complete_lines(folder / _FILE):
            record = json.loads(line)
            if "trial_id" in record:
                trials.setdefault(record["trial_id"], {}).update(record.get("user_attr", {}))
        return {trial["arm"]: trial["settings"] for trial in trials.values() if "arm" in trial}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / _FILE}: is not the journal of a study ({type(error).__name__})") from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[BinaryIO]:
    """Lock a study's folder and yield the lock; repair the journal if the last line is incomplete after a kill.

    A file system without locks gives one to every process.

    Raises:
        UserError: If another process has it, or a link leads out of the folder, to what the study would write.
    """
    journal = folder / _FILE
    for path in (journal, folder / LOGS, *(folder / LOGS).rglob("*")):
        if path.name.startswith(_OF_SUBMITIT):
            continue
        if path.is_symlink() and not (target := path.resolve()).is_relative_to(folder.resolve()):
            raise UserError(f"{path} is a link to {target}, outside of the study; replace it by what it links to")
    with journal.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            message = f"{folder}: the study is running, or a run that has outlived it; wait for it or end it"
            raise UserError(message) from None
        except OSError:  # a file system without locks
            pass
        file.truncate(journal.read_bytes().rfind(b"\n") + 1)
        journal.with_name(f"{_FILE}.lock").unlink(missing_ok=True)  # Optuna's
        yield file
