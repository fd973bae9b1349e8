"""The launcher for a SLURM cluster: it submits the runs of a study as a job array, through submitit."""

import contextlib
import functools
import getpass
import io
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import BinaryIO

from experiments.errors import UserError
from experiments.study.journal import JOB
from experiments.study.runs import LOGS, Attempt, Plan
from lightning_modules.common.messages import say

_OF_THE_STUDY = ("array", "error", "job_name", "open_mode", "output")
_DEFAULTS = {"requeue": True, "signal": "TERM@300"}  # five minutes before the time is up, the run saves and exits
_SAVED = 143  # exit code of a run that has saved a checkpoint on SIGTERM
_MOST_RESTARTS = 200  # of a job: one whose time is too short for a single step would never end

# What the batch script does after `srun`. SLURM ends the script, too, when it cancels or preempts a job. So a run that
# has saved, and whose script goes on, is one whose time is almost up.
_AFTERWARDS = """
code=$?
if [ "$code" -eq {saved} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {most} ]; then
    scontrol requeue "$SLURM_JOB_ID" && exit "$code"
fi
id="${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}"
echo "$code" > {folder}/"$id.part" && mv {folder}/"$id.part" {folder}/"$id.code"
exit "$code"
"""
# The process of a task becomes the run, so each signal of SLURM reaches the run exactly once. $0 is the log of the run;
# the output of further tasks stays in the folder of the jobs.
_BECOME_THE_RUN = '[ "${SLURM_PROCID:-0}" != 0 ] || exec >> "$0" 2>&1; exec "$@"'


class SlurmJob:
    """A run as a job of SLURM."""

    def __init__(self, launcher: "SlurmLauncher", run: Attempt, job_id: str) -> None:
        self.id = job_id
        self._launcher = launcher
        self._run = run
        self._code: int | None = None
        self._submitted = time.monotonic()  # or found in the queue
        self._missing_since: float | None = None

    def poll(self) -> int | None:
        """Return the exit code, `None` while the job is queued or running; 1 if SLURM has ended it before its end."""
        if self._code is None and (code := self._find_code()) is not None:
            self._code = code
        return self._code

    def _find_code(self) -> int | None:
        with contextlib.suppress(FileNotFoundError):
            code = int((self._launcher.folder / f"{self.id}.code").read_text())
            if code and not self._run.log.is_file():
                self._append(f"it has not started; {self._launcher.folder} has the output of job {self.id}")
            return code
        asked, queued = self._launcher.queue()
        if self.id in queued or asked < self._submitted:
            self._missing_since = None
        elif self._missing_since is None:
            self._missing_since = asked
        elif asked > self._missing_since:  # a second answer: the files of another machine can be late
            if self._run.is_finished:
                return 0
            self._append(f"SLURM has ended job {self.id}: {_state(self.id)}")
            return 1
        return None

    def _append(self, line: str) -> None:
        with self._run.log.open("a", encoding="utf-8") as log:
            print(f"error: {line}", file=log)

    def send_signal(self, _: int) -> None:
        """Cancel the job: SLURM sends SIGTERM, on which a run saves and exits."""
        subprocess.run(["scancel", self.id], check=False)


class SlurmLauncher:
    """Submits runs to SLURM, all at once where none depends on the results of others.

    A run that SLURM interrupts is queued again and resumes from its last checkpoint, also while no study watches it.

    Args:
        plan: The study.
        options: Options of `sbatch` by name, with underscores.
    """

    pause = 1.0
    refresh = 30.0  # least number of seconds between two calls of `squeue`

    def __init__(self, plan: Plan, options: dict[str, str | bool]) -> None:
        for program in ("sbatch", "srun", "squeue", "scancel"):
            if shutil.which(program) is None:
                raise UserError(f"--launcher slurm: there is no {program} here; use a machine that has it")
        for name in _OF_THE_STUDY:
            if name in options:
                raise UserError(f"--slurm.{name}: the study sets it; leave it out")
        try:
            from submitit import SlurmExecutor
        except ImportError as error:
            raise UserError("--launcher slurm needs submitit: pip install submitit") from error
        self.folder = (plan.folder / LOGS / "slurm").absolute()
        self._study = plan.folder.name
        self._jobs: list[SlurmJob] = []
        self._asked, self._queued = 0.0, dict[str, str]()
        self.at_once = plan.jobs if plan.sweep.uses_results else plan.n_runs
        self._executor = SlurmExecutor(self.folder, python=f"{shlex.quote(sys.executable)} -P")
        self._executor.update_parameters(
            time=None,  # that of the partition, unless the options have one
            wckey=None,
            array_parallelism=plan.jobs,
            additional_parameters=_DEFAULTS | options,
            teardown=self.afterwards,
        )

    @property
    def afterwards(self) -> list[str]:
        """The lines of a batch script that follow `srun`."""
        folder = shlex.quote(str(self.folder))
        return _AFTERWARDS.format(saved=_SAVED, most=_MOST_RESTARTS, folder=folder).strip().splitlines()

    def left_alone(self) -> str:
        """Return what a study prints that is stopped: its jobs go on."""
        numbers = sorted({job.id.partition("_")[0] for job in self._jobs if job.poll() is None})
        return f"stopping: the jobs go on, and the same command finds them; `scancel {' '.join(numbers)}` ends them"

    def start(self, runs: Sequence[Attempt], lock: BinaryIO) -> None:
        """Submit the runs as one job array, or a single run as a job."""
        name = f"{self._study}.{secrets.token_hex(4)}"
        for place, run in enumerate(runs):
            run.prepare()
            # Before the submission: if the study is killed now, the next one finds the jobs by their name.
            run.trial.set_user_attr(JOB, [name, place if len(runs) > 1 else None])
        self._executor.update_parameters(job_name=name)
        for run, job_id in zip(runs, self._submit(runs), strict=True):
            run.job = self._job(run, job_id)
        number = self._jobs[-1].id.partition("_")[0]
        say(f"slurm   job {number}: {len(runs)} run{'s' if len(runs) > 1 else ''}")

    def _submit(self, runs: Sequence[Attempt]) -> list[str]:
        """Return the ids of the jobs of runs."""
        from submitit.core.utils import FailedJobError

        try:
            with contextlib.redirect_stderr(io.StringIO()):  # submitit prints the error, and raises it
                jobs = self._executor.submit_array([task_of(run) for run in runs])
        except FailedJobError as error:
            raise UserError(" ".join(str(error).split())) from error
        return [job.job_id for job in jobs]

    def _job(self, run: Attempt, job_id: str) -> SlurmJob:
        job = SlurmJob(self, run, job_id)
        self._jobs.append(job)
        return job

    def find(self, run: Attempt) -> bool:
        """Set the job of a run that an earlier command has submitted, and return whether it is queued or running."""
        name, place = run.trial.user_attrs[JOB]
        _, queued = self.queue()
        for job_id, job_name in queued.items():
            if job_name == name and place in (None, int(job_id.partition("_")[2] or 0)):
                run.job = self._job(run, job_id)
                return True
        return False

    def queue(self) -> tuple[float, dict[str, str]]:
        """Return when `squeue` was called last, and the names of the user's jobs by id, as it has listed them."""
        if not self._asked or time.monotonic() - self._asked > self.refresh:
            words = ["squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--format=%i|%j"]
            listed = subprocess.run(words, capture_output=True, text=True)
            if listed.returncode == 0:
                pairs = (line.strip().partition("|") for line in listed.stdout.splitlines())
                self._queued, self._asked = {job_id: name for job_id, _, name in pairs}, time.monotonic()
            elif not self._asked:
                raise UserError(f"squeue fails, so the jobs of this study cannot be found: {listed.stderr.strip()}")
        return self._asked, self._queued


def task_of(run: Attempt) -> Callable[[], object]:
    """Return the function that submitit calls in each task of a job: it replaces the process by the run."""
    changes = run.environment()
    removed = [word for name, value in changes.items() if value is None for word in ("-u", name)]
    added = [f"{name}={value}" for name, value in changes.items() if value is not None]
    words = ["env", *removed, *added, *run.command, "--auto_resume"]
    return functools.partial(os.execvp, "sh", ["sh", "-c", _BECOME_THE_RUN, str(run.log.absolute()), *words])


def _state(job_id: str) -> str:
    """Return the state that a job has ended in, such as `TIMEOUT`."""
    words = ["sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={job_id}", "--format=State"]
    with contextlib.suppress(OSError):
        if lines := subprocess.run(words, capture_output=True, text=True).stdout.split("\n")[0].strip():
            return lines
    return "its accounting gives no reason"
