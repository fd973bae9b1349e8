"""Running a study: start its runs, pass signals on to them, and print how each ends."""

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import BinaryIO

from experiments.errors import UserError, did_you_mean
from experiments.study.journal import Journal, locked
from experiments.study.launchers import Launcher
from experiments.study.runs import LOGS, Attempt, Plan
from lightning_modules.common import run_files
from lightning_modules.common.files import naming
from lightning_modules.common.messages import say

_USAGE = 2  # exit code of a command that refuses its settings before a run begins
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Study:
    """The runs of one sweep file."""

    def __init__(self, plan: Plan, launcher: Launcher) -> None:
        self.plan = plan
        self.launcher = launcher
        self.running: list[Attempt] = []
        self.signals: list[int] = []  # received so far
        self.n_refused = 0  # runs that would fail again, as long as what the study asks is the same
        self._n_ended = 0
        self._is_new = False  # whether no run was started by an earlier call
        # Whether the first runs are all refused, as the others would be; the next call goes on with the others.
        self._is_refused = False
        self._n_passed_on = 0

    def run(self) -> int:
        """Start the runs that are left, and return the exit code: 1 if one fails, 128 + the number of a signal."""
        folder = self.plan.folder
        if (folder / run_files.CONFIG).is_file():
            raise UserError(f"{folder} is the folder of a run; give the study another --name")
        (folder / LOGS).mkdir(parents=True, exist_ok=True)
        with naming(folder), locked(folder) as lock, self._listening(), self._stopping_on_error():
            self.journal = Journal(self.plan, find=self.launcher.find)
            self.running, self._is_new = self.journal.found, not self.journal.outcomes
            done = f", {self.n_done} of them done" if self.journal.outcomes else ""
            goes_on = f", {len(self.running)} submitted before" if self.running else ""
            say(f"study   {folder}: {self._total} runs{done}{goes_on}; their output goes to {folder / LOGS}")
            for file in self.journal.changed_files if self.n_done < self._total else ():
                say(f"study   {file} has changed since the study began: runs before and after differ")
            while True:
                self._start(lock)
                goes_on_alone = self._pass_signals_on()
                if not self.running or goes_on_alone:
                    break
                for run in list(self.running):
                    self._check(run)
                time.sleep(self.launcher.pause)
        target = ", the target is reached" if self.journal.reached_target else ""
        say(f"\nstudy   {folder} ({self.n_done} of {self._total} runs done, {self.n_failed} failed{target})")
        return 128 + self.signals[0] if self.signals else int(self.n_failed > 0)

    def _start(self, lock: BinaryIO) -> None:
        """Start as many runs as the launcher takes; those that have finished before get no job."""
        new: list[Attempt] = []
        while len(self.running) < self.launcher.at_once and not self._ends and (run := self.journal.next()):
            self.running.append(run)
            if not run.is_finished:
                new.append(run)
        if new:
            self.launcher.start(new, lock)

    @property
    def _ends(self) -> bool:
        return self._is_refused or bool(self.signals)

    @property
    def n_failed(self) -> int:
        """Number of runs that have failed."""
        return self.journal.count("FAIL")

    @property
    def n_done(self) -> int:
        """Number of runs that have reached their end, or were stopped early."""
        return self.journal.count("COMPLETE", "PRUNED")

    @property
    def _total(self) -> int:
        return max(self.plan.n_runs, len(self.journal.outcomes))

    def _check(self, run: Attempt) -> None:
        """Stop a run that the pruner gives up, and record a run that has ended."""
        code = run.exit_code()
        watched = self.plan.sweep.early_terminate and not run.stopped_early
        if watched and run.should_stop() and code is None:
            run.stopped_early = True
            run.stop()
        if code is not None:
            self.running.remove(run)
            if not (self.signals and code):  # an interrupted run keeps its trial open, and is resumed later
                self._record(run, code)

    def _record(self, run: Attempt, code: int) -> None:
        """Record how a run has ended, and print it."""
        metric, value = run.result()
        error = None if run.stopped_early else run.error(code)
        lacks_metric = False
        if self.plan.sweep.metric and value is None and not (error or run.stopped_early):
            lacks_metric = metric not in run.logged
            hint = did_you_mean(metric, run.logged)
            error = f"it has logged no {metric}{hint}" if lacks_metric else f"no value of {metric} is finite"
        self.journal.record(run, value, error)

        number = len(self.journal.outcomes) - self.journal.count("RUNNING", "AGAIN")
        best = f"{metric} {value:.4f}" if value is not None else ""
        how = f"failed: {error}" if error else f"{best}, stopped early" if run.stopped_early else best
        took = _duration(run.seconds) if run.job else "finished before"
        say(f"[{number:>{len(str(self._total))}}/{self._total}] {run.arm}  {how}  ({took})")
        self._n_ended, self.n_refused = self._n_ended + 1, self.n_refused + (code == _USAGE or lacks_metric)
        if self._is_new and not self._is_refused and self.n_refused == self._n_ended:
            self._is_refused = lacks_metric or self._n_ended >= self.launcher.at_once
            if self._is_refused:
                why = f"has logged no {metric}" if lacks_metric else "is refused"
                which = "the first run" if self._n_ended == 1 else f"{run.arm}, one of the first runs,"
                say(f"stopping: {which} {why}, so no further run starts")

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Collect Ctrl-C, SIGTERM and SIGHUP, except for signals that are ignored, as by `nohup`."""
        heard = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, lambda number, _: self.signals.append(number)) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def _stopping_on_error(self) -> Iterator[None]:
        """Tell the runs to save and exit if the study ends with an error, unless they are made to go on without it."""
        try:
            yield
        except BaseException:
            if self.launcher.left_alone() is None:
                for run in self.running:
                    run.stop()
            raise

    def _pass_signals_on(self) -> bool:
        """Tell the runs to save and exit after the first signal, and kill them after the second.

        Returns:
            Whether the runs go on without the study.
        """
        n_before, self._n_passed_on = self._n_passed_on, len(self.signals)
        if n_before == len(self.signals):
            return False
        left_alone = self.launcher.left_alone()
        if not n_before:
            say(left_alone or "stopping: the runs save and exit; once more kills them")
        for run in [] if left_alone else self.running:
            run.stop(kill=n_before > 0)
        return left_alone is not None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
