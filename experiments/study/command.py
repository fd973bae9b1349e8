"""`llm-train study`: the runs of a W&B sweep file, on this machine and without an account."""

import argparse
import bisect
import contextlib
import csv
import difflib
import fcntl
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import yaml

from experiments.errors import CommandParser, UserError
from experiments.study.sweep_file import Parameter, Sweep, arm_name, folder_name, quantized, read_sweep_file

if TYPE_CHECKING:  # imported where used
    import optuna

JOURNAL = "journal.log"
LAST_CHECKPOINT = Path("checkpoints/last.ckpt")
_OWN_FLAGS = ("--jobs", "--runs", "--name", "--seed", "--dry_run")
_PASSED_ON = re.compile(r"--[\w.]+\+?=.*", re.DOTALL)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_OF_ANOTHER_RUN = ("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH")  # no two runs may share an id


def main(args: Sequence[str]) -> None:
    """Runs a sweep file: starts its runs, goes on with those that were broken off, and says how each ended.

    Args:
        args: Command line, `study` first.
    """
    options, flags = _parse(args)
    sweep = read_sweep_file(options.file)
    n_runs = _number_of_runs(sweep, options.runs)
    study = Study(sweep, _folder(sweep, flags, options.name), flags, n_runs, options.jobs, options.seed)
    if options.dry_run:
        for words in study.plan():
            print(shlex.join(words))
        if sweep.method == "bayes":
            print("# the next ones depend on the results")
        return
    code = study.run()
    if code:
        _say(f"{'resume' if study.signals else 'again '}  {shlex.join(['llm-train', *args])}")
    if not study.signals:
        _say(f"next    llm-train compare {shlex.quote(str(study.folder))}")
    if code:
        sys.exit(code)


def _parse(args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = CommandParser(
        prog="llm-train study",
        usage="llm-train study FILE [options] [--key=value ...] [-- WORD ...]",
        description="Run a W&B sweep file on this machine. The same command goes on where it stopped: finished runs "
        "are not repeated, broken-off and failed ones are continued. Every run is an ordinary one, in "
        "runs/TOPIC/STUDY/ARM, and goes to W&B as any run does: online where you are logged in, "
        "in the study's group.",
        epilog="--key=value, and what comes after --, goes to every run: --trainer.max_steps=100. With an account, "
        "`wandb sweep FILE` and `wandb agent` run the same file on any number of machines.",
    )
    parser.add_argument(
        "file", metavar="FILE", type=Path, help="sweep file, such as experiments/TOPIC/studies/NAME.yaml"
    )
    parser.add_argument("--jobs", type=_count, default=1, help="runs at a time; they share the cores (default: 1)")
    parser.add_argument("--runs", type=_count, help="at most so many runs; random and bayes need it, or run_cap")
    parser.add_argument("--name", help="name of the study (default: `name:` in FILE, or FILE's own name)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of random and bayes: the same seed, the same draws (default: 0)"
    )
    parser.add_argument("--dry_run", action="store_true", help="print the commands of the runs, and do nothing")
    args = list(args[1:])
    split = args.index("--") if "--" in args else len(args)
    options, flags = parser.parse_known_args(args[:split])
    for flag in flags:
        if not _PASSED_ON.fullmatch(flag):
            parser.error(f"no such option: {flag}; what is for the runs is written --key=value, or comes after --")
        if close := difflib.get_close_matches(flag.split("=")[0], _OWN_FLAGS, n=1, cutoff=0.75):
            parser.error(f"no such option: {flag} (did you mean {close[0]}?)")
    return options, flags + args[split + 1 :]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def _number_of_runs(sweep: Sweep, at_most: int | None) -> int:
    limits = [limit for limit in (at_most, sweep.content.get("run_cap")) if limit is not None]
    if sweep.method == "grid":
        limits.append(math.prod(len(parameter.grid()) for parameter in sweep.parameters))
    if not limits:
        raise UserError(f"{sweep.path}: method {sweep.method} has no end; add run_cap: to the file, or --runs N here")
    return min(limits)


def _folder(sweep: Sweep, flags: Sequence[str], name: str | None) -> Path:
    """Where the study's runs go: beside the other runs of the topic that its command trains."""
    place: dict[str, str] = {"root": "runs"}
    words = [*sweep.words({}, Path()), *flags]
    pairs = list(itertools.pairwise(words)) + [word.split("=", 1) for word in words if "=" in word]
    for flag, value in pairs:
        if flag in ("-c", "--config"):
            config = _config(sweep, Path(value))
            model = config.get("model")
            class_path = str(model.get("class_path") if isinstance(model, dict) else model)
            if "." in class_path:
                place["topic"] = class_path.split(".")[-2]
            place |= {key: given for key, given in (config.get("run") or {}).items() if given is not None}
    place |= {flag.removeprefix("--run."): value for flag, value in pairs if flag in ("--run.root", "--run.topic")}
    if "topic" not in place:
        raise UserError(f"{sweep.path}: its command has no `-c FILE` with a model; add --run.topic=NAME to it")
    return Path(place["root"]) / place["topic"] / (folder_name(name) if name else sweep.name)


def _config(sweep: Sweep, file: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{sweep.path}: its command runs {file}, and there is no such file in {Path.cwd()}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{file}: {error}") from error
    return config if isinstance(config, dict) else {}


@dataclass
class Run:
    """One run that has been started.

    Args:
        arm: Its name, and that of its folder.
        trial: What Optuna knows of it.
        process: The process; none where the run turned out to have finished before.
        began: When, on the clock of `time.monotonic`.
        seen: How much of its metrics the pruner has seen: when the file changed, and how many values it had.
        stopped_early: Whether the pruner ended it.
    """

    arm: str
    trial: "optuna.Trial"
    process: subprocess.Popen | None
    began: float = field(default_factory=time.monotonic)
    seen: tuple[int, int] = (0, 0)
    stopped_early: bool = False


class Study:
    """The runs of one sweep file: which comes next, and what has become of each.

    Optuna chooses and remembers. Its journal, in the study's folder, has a trial for each time that a run was started,
    with the name of the run's arm; what the latest trial of an arm says is what has become of it.

    Args:
        sweep: The sweep.
        folder: The study's folder.
        flags: What every run's command is given besides.
        n_runs: How many runs there are to be.
        jobs: How many may run at a time.
        seed: Seed of the draws.
    """

    def __init__(self, sweep: Sweep, folder: Path, flags: Sequence[str], n_runs: int, jobs: int, seed: int) -> None:
        self.sweep = sweep
        self.folder = folder
        self.flags = list(flags)
        self.n_runs = n_runs
        self.jobs = jobs
        self.seed = seed
        self.running: list[Run] = []
        self.outcomes: dict[str, str] = {}  # of each arm that was ever started: a TrialState's name, or AGAIN
        self.signals: list[int] = []  # that told us to stop
        self._n_passed_on = 0
        self.reached_target = False

    def plan(self) -> Iterator[list[str]]:
        """The commands of the runs, as far as they can be known before there are results."""
        self._open(None)
        for i in range(1 if self.sweep.method == "bayes" else self.n_runs):
            _, arm, settings = self._draw(i)
            yield self._words(arm, settings)

    def run(self) -> int:
        """Starts what is left to run and sees it through.

        Returns:
            The exit code: 0 if nothing has failed, 1 if a run has, 128 and the signal's number if one broke it off.

        Raises:
            UserError: If the folder is another study's, or at work already.
        """
        if (self.folder / "config.yaml").is_file():
            raise UserError(f"{self.folder} is the folder of a run; give the study another --name")
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        with _alone(self.folder) as self._lock, self._listening():
            self._open(self.folder)
            waiting = self._take_up()
            while True:
                while len(self.running) < self.jobs and not self.signals and (run := self._next(waiting)):
                    self.running.append(run)
                self._pass_signals_on()
                if not self.running:
                    break
                for run in list(self.running):
                    self._look_after(run)
                time.sleep(0.05)
        return self._conclude()

    def _open(self, folder: Path | None) -> None:
        """Opens the journal; where there is no folder, a study that leaves nothing."""
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalStorage

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._distributions = {p.name: _distribution(p, self.sweep.method) for p in self.sweep.parameters if p.is_swept}
        pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
        if rule := self.sweep.content.get("early_terminate"):
            eta = int(rule.get("eta", 3))
            first = rule.get("min_iter") or max(1, int(rule["max_iter"] / eta ** rule["s"]))
            pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=eta)
        self._optuna = optuna.create_study(
            storage=folder and JournalStorage(JournalFileBackend(str(folder / JOURNAL))),
            study_name="study",
            direction="maximize" if self.sweep.maximize else "minimize",
            pruner=pruner,
            load_if_exists=True,
        )
        asked = {key: self.sweep.content.get(key) for key in ("method", "parameters", "metric", "command")}
        asked |= {"flags": self.flags, "seed": None if self.sweep.method == "grid" else self.seed}
        if "asked" not in self._optuna.user_attrs:
            self._optuna.set_user_attr("asked", asked)
        begun = self._optuna.user_attrs["asked"]
        if other := [key for key in asked if asked[key] != begun[key]]:
            raise UserError(
                f"{folder} was begun with other {' and '.join(other)}: remove it, or give this study another --name"
            )

    def _take_up(self) -> list["optuna.trial.FrozenTrial"]:
        """Reads what has become of earlier runs; returns those that were broken off or failed, to be started again."""
        from optuna.trial import TrialState

        while self._optuna.get_trials(states=(TrialState.WAITING,)):
            self._optuna.ask(self._distributions)
        for trial in self._optuna.get_trials(states=(TrialState.RUNNING,)):
            self._optuna.tell(trial.number, state=TrialState.FAIL)
        latest = {trial.user_attrs["arm"]: trial for trial in self._optuna.trials if "arm" in trial.user_attrs}
        again = [trial for trial in latest.values() if trial.state == TrialState.FAIL]
        self.outcomes = {arm: "AGAIN" if trial in again else trial.state.name for arm, trial in latest.items()}
        done = f", {len(latest) - len(again)} of them done" if latest else ""
        _say(f"study   {self.folder}: {self._total} runs{done}; what they print goes to {self.folder / 'logs'}")
        return again

    @property
    def _total(self) -> int:
        return max(self.n_runs, len(self.outcomes))

    def _draw(self, i: int) -> tuple["optuna.Trial", str, dict[str, Any]]:
        """The next run, the i-th that is not another attempt at an earlier one: its trial, name and settings."""
        from optuna.samplers import RandomSampler, TPESampler

        # From (seed, i) alone: a study that was broken off draws what it would have drawn.
        seed = random.Random(f"{self.seed} {i}").getrandbits(32)
        if self.sweep.method == "grid":
            grid = itertools.product(*(p.grid() for p in self.sweep.parameters if p.is_swept))
            point = next(itertools.islice(grid, i, None))
            self._optuna.enqueue_trial(dict(zip(self._distributions, map(json.dumps, point), strict=True)))
        elif self.sweep.method == "random":
            self._optuna.sampler = RandomSampler(seed)
        else:
            self._optuna.sampler = TPESampler(seed=seed, constant_liar=self.jobs > 1)
        trial = self._optuna.ask(self._distributions)
        values = [_value(p, trial.params.get(p.name)) for p in self.sweep.parameters]
        swept = {p.name: value for p, value in zip(self.sweep.parameters, values, strict=True) if p.is_swept}
        arm = arm_name(swept)
        if not arm or arm in self.outcomes or (self.folder / arm).exists():
            arm = f"{arm}{',' if arm else ''}run={i + 1}"
        settings = self.sweep.settings(values)
        trial.set_user_attr("settings", settings)
        trial.set_user_attr("arm", arm)
        return trial, arm, settings

    def _next(self, again: list["optuna.trial.FrozenTrial"]) -> Run | None:
        """Starts the next run, if there is one."""
        if again:
            earlier = again.pop(0)
            arm, settings = earlier.user_attrs["arm"], earlier.user_attrs["settings"]
            self._optuna.enqueue_trial(earlier.params, {"arm": arm, "settings": settings})
            trial = self._optuna.ask(self._distributions)
        elif len(self.outcomes) < self.n_runs and not self.reached_target:
            trial, arm, settings = self._draw(len(self.outcomes))
        else:
            return None
        self.outcomes[arm] = "RUNNING"
        return Run(arm, trial, self._start(arm, settings))

    def _words(self, arm: str, settings: dict[str, Any]) -> list[str]:
        root, topic = self.folder.parent.parent, self.folder.parent.name
        place = {"root": root, "topic": topic, "study": self.folder.name, "name": arm}
        words = self.sweep.words(settings, self.folder / "logs" / f"{arm}.json")
        return [*words, *self.flags, *(f"--run.{key}={value}" for key, value in place.items())]

    def _start(self, arm: str, settings: dict[str, Any]) -> subprocess.Popen | None:
        """Starts a run, or goes on with it where it has saved something."""
        folder, log = self.folder / arm, self.folder / "logs" / f"{arm}.log"
        words = self._words(arm, settings)
        if _summary(folder).get("status") == "finished":
            return None
        if (folder / LAST_CHECKPOINT).is_file():
            words.append("--ckpt_path=last")
        elif folder.exists():
            shutil.rmtree(folder)  # it was broken off before there was anything to go on from
        if "${args_json_file}" in self.sweep.command:
            log.with_suffix(".json").write_text(json.dumps(settings), encoding="utf-8")
        environment = {name: value for name, value in os.environ.items() if name not in _OF_ANOTHER_RUN}
        for key in ("project", "entity"):
            if key in self.sweep.content:
                environment.setdefault(f"WANDB_{key.upper()}", self.sweep.content[key])
        if self.jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // self.jobs)))
        with log.open("ab") as output:
            return start_run(words, environment, output, self._lock)

    def _look_after(self, run: Run) -> None:
        """Ends a run that the pruner gives up, and records one that has ended."""
        code = run.process.poll() if run.process else 0
        watched = "early_terminate" in self.sweep.content and not run.stopped_early
        if watched and self._falls_behind(run) and code is None:
            run.stopped_early = True
            run.process.terminate()
        if code is not None:
            self.running.remove(run)
            if not (self.signals and code):  # else it was broken off, and its trial stays open
                self._record(run, code)

    def _falls_behind(self, run: Run) -> bool:
        """Shows the pruner the values that are new; whether the run is not among the best at one of its rungs."""
        file = self.folder / run.arm / "metrics.csv"
        changed = file.stat().st_mtime_ns if file.is_file() else 0
        if changed == run.seen[0]:
            return False
        values = _values(file, self.sweep.metric)
        n_seen, run.seen = run.seen[1], (changed, len(values))
        for i, value in enumerate(values[n_seen:], start=n_seen + 1):
            run.trial.report(value, i)
            if run.trial.should_prune():
                return True
        return False

    def _record(self, run: Run, code: int) -> None:
        """Writes down how a run ended, and says so."""
        from optuna.trial import TrialState

        metric, value = self._result(run)
        error = None if run.stopped_early else self._error(run, code, value)
        if error:
            run.trial.set_user_attr("error", error)
        state = TrialState.FAIL if error else TrialState.PRUNED if run.stopped_early else TrialState.COMPLETE
        # Optuna wants a number of every trial that is complete; a sweep without a metric has none.
        self._optuna.tell(run.trial, (value or 0.0) if state == TrialState.COMPLETE else None, state)
        self.outcomes[run.arm] = state.name
        target = self.sweep.content.get("metric", {}).get("target")
        if state == TrialState.COMPLETE and target is not None:
            self.reached_target |= value >= target if self.sweep.maximize else value <= target

        number = sum(outcome not in ("RUNNING", "AGAIN") for outcome in self.outcomes.values())
        best = f"{metric} {value:.4f}" if value is not None else ""
        how = f"failed: {error}" if error else f"{best}, stopped early" if run.stopped_early else best
        took = _duration(time.monotonic() - run.began) if run.process else "finished before"
        _say(f"[{number:>{len(str(self._total))}}/{self._total}] {run.arm}  {how}  ({took})")

    def _result(self, run: Run) -> tuple[str | None, float | None]:
        """The metric that the run is judged by and its best value; the run's own where the sweep names none."""
        if self.sweep.metric is None:
            best = _summary(self.folder / run.arm).get("best") or {}
            return best.get("metric"), best.get("value")
        values = _values(self.folder / run.arm / "metrics.csv", self.sweep.metric)
        return self.sweep.metric, (max if self.sweep.maximize else min)(values, default=None)

    def _error(self, run: Run, code: int, value: float | None) -> str | None:
        """Why a run has failed, if it has."""
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        if code:
            return _last_line(self.folder / "logs" / f"{run.arm}.log") or f"exit code {code}"
        if not (self.folder / run.arm).is_dir():
            return f"it has left no {self.folder / run.arm}"
        if self.sweep.metric and value is None:
            return f"it has logged no {self.sweep.metric}"
        return None

    def _conclude(self) -> int:
        """Says how the study stands; returns the exit code."""
        n_failed = sum(outcome == "FAIL" for outcome in self.outcomes.values())
        n_over = sum(outcome in ("COMPLETE", "PRUNED") for outcome in self.outcomes.values())
        target = ", the target is reached" if self.reached_target else ""
        _say(f"\nstudy   {self.folder} ({n_over} of {self._total} runs done, {n_failed} failed{target})")
        return 128 + self.signals[0] if self.signals else int(n_failed > 0)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Takes note of Ctrl-C, SIGTERM and a closed terminal, unless they are to be ignored, as `nohup` wants it."""
        heard = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, lambda number, _: self.signals.append(number)) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_signals_on(self) -> None:
        """Tells the runs to save what they have and leave; a second time, ends them at once."""
        n_new, self._n_passed_on = len(self.signals) - self._n_passed_on, len(self.signals)
        if not n_new:
            return
        is_first = n_new == len(self.signals)
        if is_first:
            _say("stopping: the runs save what they have; once more ends them at once")
        for run in self.running:
            if run.process:
                (run.process.terminate if is_first else run.process.kill)()


def start_run(words: Sequence[str], environment: dict[str, str], output: BinaryIO, lock: BinaryIO) -> subprocess.Popen:
    """Starts the process of a run.

    Args:
        words: Its command.
        environment: Its environment.
        output: Where it prints to.
        lock: The study's lock, which the process holds too: a study is at work as long as one of its runs is.
    """
    return subprocess.Popen(
        words,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        process_group=0,  # Ctrl-C reaches us alone, and we tell the runs once
        pass_fds=(lock.fileno(),),
    )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[BinaryIO]:
    """Keeps a second study out of the folder, and mends what a killed one may have left of its journal."""
    journal = folder / JOURNAL
    with journal.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: the study is at work, or a run that has outlived it; wait for it or end it"
            ) from None
        content = journal.read_bytes()
        file.truncate(content.rfind(b"\n") + 1)  # a line is there when its end is
        journal.with_name(f"{JOURNAL}.lock").unlink(missing_ok=True)  # Optuna's
        yield file


def _distribution(parameter: Parameter, method: str) -> "optuna.distributions.BaseDistribution":
    """What Optuna draws from. Choices are JSON, which it takes of any type; what it does not know, by its quantiles."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    spec = parameter.spec
    if method == "grid":
        return CategoricalDistribution([json.dumps(value) for value in parameter.grid()])
    match parameter.distribution.removeprefix("q_"):
        case "categorical":
            return CategoricalDistribution([json.dumps(value) for value in spec["values"]])
        case "int_uniform":
            return IntDistribution(spec["min"], spec["max"])
        case "uniform":
            return FloatDistribution(spec["min"], spec["max"])
        case "log_uniform_values" | "inv_log_uniform_values":  # the same: log(1/x) is uniform where log(x) is
            return FloatDistribution(spec["min"], spec["max"], log=True)
    return FloatDistribution(1e-9, 1 - 1e-9)


def _value(parameter: Parameter, drawn: Any) -> Any:
    """The setting that a draw stands for."""
    spec, distribution = parameter.spec, parameter.distribution.removeprefix("q_")
    if not parameter.is_swept:
        return spec["value"] if "value" in spec else spec["values"][0]
    match distribution:
        case _ if isinstance(drawn, str):
            return json.loads(drawn)
        case "categorical_w_probabilities":
            shares = list(itertools.accumulate(spec["probabilities"]))
            return spec["values"][min(bisect.bisect(shares, drawn), len(shares) - 1)]
        case "normal" | "log_normal":
            drawn = spec["mu"] + spec["sigma"] * statistics.NormalDist().inv_cdf(drawn)
            drawn = math.exp(drawn) if distribution == "log_normal" else drawn
        case "beta":
            from scipy.special import betaincinv

            drawn = float(betaincinv(spec["a"], spec["b"], drawn))
    return quantized(drawn, spec["q"]) if "q" in spec else drawn


def _summary(folder: Path) -> dict[str, Any]:
    """What a run says of its end; nothing before it has ended."""
    file = folder / "summary.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _values(metrics_csv: Path, name: str) -> list[float]:
    """The finite values of a metric, as far as a run has written them."""
    values = []
    if metrics_csv.is_file():
        with metrics_csv.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                with contextlib.suppress(KeyError, TypeError, ValueError):  # not in this row, or half-written
                    values.append(float(row[name]))
    return [value for value in values if math.isfinite(value)]


def _last_line(log: Path) -> str:
    """The last thing that a run printed, its error where it printed one after the run was started."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "").removeprefix("error: ")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
