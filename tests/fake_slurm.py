"""The commands of SLURM for tests, on this machine: sbatch, srun, squeue, sacct, scancel and scontrol.

They act as SLURM's do in what a study depends on:

- A job array has one element for each run, at most so many of them at a time; each runs the batch script, in the
  environment of a job.
- `srun` starts the tasks of a step. A signal to the step reaches every process of it, and not the batch script.
- `srun` and the batch script end with the exit code of the run, 128 + the number for a signal.
- A job that is cancelled or preempted gets SIGTERM in all its processes, the batch script among them. A preempted job
  is queued again, as is one after `scontrol requeue`, which ends the batch script.

A link of a command's name to this file is the command. The jobs are folders in `$FAKE_SLURM`.
"""

import contextlib
import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

JOBS = Path(os.environ.get("FAKE_SLURM", ""))
COMMANDS = ("sbatch", "srun", "squeue", "sacct", "scancel", "scontrol")
KNOWN = {
    "array",
    "error",
    "gpus",
    "gpus-per-node",
    "job-name",
    "nodes",
    "ntasks-per-node",
    "open-mode",
    "output",
    "partition",
    "requeue",
}
KNOWN |= {"signal", "time"}


def install(folder: Path) -> Path:
    """Write the commands, which end at the end of a test at the latest; return their folder."""
    programs = folder / "slurm_bin"
    programs.mkdir()
    for name in COMMANDS:
        script = f'#!/bin/sh\nexec {sys.executable} -I -S {__file__} {name} "$@"\n'
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    (folder / "slurm").mkdir()
    return programs


class Job:
    """A job, or an element of a job array, as a folder of files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.id = folder.name

    def read(self, name: str) -> str:
        file = self.folder / name
        return file.read_text() if file.exists() else ""

    def write(self, name: str, value: object) -> None:
        part = self.folder / f"{name}.part"
        part.write_text(str(value))
        part.rename(self.folder / name)

    @property
    def state(self) -> str:
        return self.read("state")

    @property
    def turn(self) -> tuple[int, int]:
        """The place in the queue: a job that was queued again waits for the others of its array."""
        return int(self.read("restarts")), int(self.id.partition("_")[2] or 0)

    def signal_step(self, number: int) -> None:
        for group in self.read("step").split():
            _signal_group(int(group), number)

    def signal_all(self, number: int) -> None:
        self.signal_step(number)
        if group := self.read("batch"):
            _signal_group(int(group), number)

    # What SLURM does without being asked:

    def time_is_almost_up(self) -> None:
        """Send the signal that the job has asked for with `--signal=NAME@SECONDS`."""
        self.signal_step(signal.Signals[f"SIG{self.read('signal').partition('@')[0]}"])

    def preempt(self) -> None:
        """Queue the job again for one of a higher priority."""
        self.write("requeued", "")
        self.signal_all(signal.SIGTERM)

    def end(self, state: str) -> None:
        """End the job with SIGKILL."""
        self.write("state", state)
        self.signal_all(signal.SIGKILL)


def jobs(asked: str = "") -> list[Job]:
    """Return the jobs of an id: all elements for that of an array."""
    found = [Job(folder) for folder in sorted(JOBS.iterdir()) if folder.is_dir()]
    return [job for job in found if not asked or asked in (job.id, job.id.partition("_")[0], job.read("raw_id"))]


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def sbatch(*args: str) -> None:
    script = Path(args[-1])
    options: dict[str, str] = {}
    for line in script.read_text().splitlines():
        if line.startswith("#SBATCH"):
            name, _, value = shlex.split(line)[1].removeprefix("--").partition("=")
            if name not in KNOWN:
                sys.exit(f"sbatch: unrecognized option '--{name}={value}'")
            options[name] = value
    with (JOBS / "number").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        number = JOBS.joinpath("number").read_text().count("\n") + 7
        file.write("\n")
    places = re.fullmatch(r"0-(\d+)%(\d+)", options.get("array", ""))
    for place in range(int(places[1]) + 1) if places else [None]:
        job = Job(JOBS / (f"{number}" if place is None else f"{number}_{place}"))
        job.folder.mkdir()
        job.write("raw_id", number if place is None else 100 * number + place)
        job.write("script", script.read_text())
        for name in ("job-name", "nodes", "ntasks-per-node", "signal"):
            job.write(name, options.get(name, ""))
        job.write("at_a_time", places[2] if places else 1)
        job.write("restarts", 0)
        job.write("state", "PENDING")
        control = [sys.executable, "-I", "-S", __file__, "slurmd", job.id]
        subprocess.Popen(control, start_new_session=True, stdin=-3, stdout=-3, stderr=-3)
    print(f"Submitted batch job {number}")


def slurmd(job_id: str) -> None:
    """Run one job until it has ended."""
    signal.alarm(600)
    job = Job(JOBS / job_id)
    array, _, place = job_id.partition("_")
    while job.state == "PENDING":
        with (JOBS / "number").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            others = [other for other in jobs(array) if other.id != job.id]
            n_running = sum(other.state == "RUNNING" for other in others)
            is_next = all(other.turn > job.turn for other in others if other.state == "PENDING")
            if starts := is_next and n_running < int(job.read("at_a_time")):
                job.write("state", "RUNNING")
        if not starts:
            time.sleep(0.05)
            continue
        n_nodes, n_tasks = job.read("nodes") or "1", job.read("ntasks-per-node") or "1"
        given = {"SLURM_JOB_ID": job.read("raw_id"), "SLURM_JOB_NUM_NODES": n_nodes}
        given |= {"SLURM_NTASKS": str(int(n_nodes) * int(n_tasks))}
        given |= {"SLURM_JOB_NAME": job.read("job-name"), "SLURM_RESTART_COUNT": job.read("restarts")}
        given |= {"SLURM_NTASKS_PER_NODE": n_tasks} if job.read("ntasks-per-node") else {}
        given |= {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": place} if place else {}
        words = ["bash", job.folder / "script"]
        with (job.folder / "output").open("ab") as output:
            batch = subprocess.Popen(
                words, env=os.environ | given, stdout=output, stderr=output, start_new_session=True
            )
        job.write("batch", batch.pid)
        code = batch.wait()
        if (job.folder / "requeued").exists():
            (job.folder / "requeued").unlink()
            job.write("restarts", int(job.read("restarts")) + 1)
            job.write("state", "PENDING")
        elif job.state == "RUNNING":
            job.write("state", "COMPLETED" if code == 0 else "FAILED")


def srun(*args: str) -> None:
    words, files = list(args), {"output": "", "error": ""}
    while words[0].startswith("-"):
        option = words.pop(0).removeprefix("--")
        if option in files:
            files[option] = words.pop(0)
    job = next(job for job in jobs(os.environ["SLURM_JOB_ID"]))
    array, _, place = job.id.partition("_")
    tasks = []
    of_node = int(os.environ["SLURM_NTASKS"]) // int(os.environ["SLURM_JOB_NUM_NODES"])
    for rank in range(int(os.environ["SLURM_NTASKS"])):
        node, local_rank = divmod(rank, of_node)
        given = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local_rank), "SLURM_NODEID": str(node)}
        opened = []
        for name in files.values():
            for letter, value in (("A", array), ("a", place), ("j", job.read("raw_id")), ("t", rank)):
                name = name.replace(f"%{letter}", str(value))
            opened.append(open(name, "ab"))  # noqa: SIM115
        output, error = opened
        tasks.append(subprocess.Popen(words, env=os.environ | given, stdout=output, stderr=error, process_group=0))
    job.write("step", " ".join(str(task.pid) for task in tasks))
    codes = [task.wait() for task in tasks]
    sys.exit(max(code if code >= 0 else 128 - code for code in codes))


def squeue(*args: str) -> None:
    assert "--format=%i|%j" in args
    assert "--array" in args
    for job in jobs():
        if job.state in ("PENDING", "RUNNING"):
            print(f"{job.id}|{job.read('job-name')}")


def sacct(*args: str) -> None:
    asked = next(arg.partition("=")[2] for arg in args if arg.startswith("--jobs="))
    for job in jobs(asked):
        print(job.state)


def scancel(*args: str) -> None:
    for job in jobs(args[-1]):
        if job.state in ("PENDING", "RUNNING"):
            job.write("state", "CANCELLED by 1000")
            job.signal_all(signal.SIGTERM)


def scontrol(command: str, job_id: str) -> None:
    assert command == "requeue"
    (job,) = jobs(job_id)
    job.write("requeued", "")
    _signal_group(int(job.read("batch")), signal.SIGTERM)


if __name__ == "__main__":
    if not os.environ["FAKE_SLURM"]:
        sys.exit(f"{sys.argv[1]}: error: Unable to contact slurm controller (connect failure)")
    globals()[sys.argv[1]](*sys.argv[2:])
