"""`llm-train study`: the runs of a W&B sweep file, on this machine and without an account."""

import argparse
import difflib
import re
import shlex
import sys
from collections.abc import Sequence

from experiments import names
from experiments.errors import CommandParser, UsageError, count
from experiments.study.journal import Journal
from experiments.study.launchers import Launcher, LocalLauncher
from experiments.study.runs import Plan, number_of_runs, study_folder
from experiments.study.slurm import SlurmLauncher
from experiments.study.study import Study
from experiments.study.sweep_file import Sweep, read_sweep_file
from lightning_modules.common.messages import say

_OWN_FLAGS = ("--jobs", "--runs", "--name", "--seed", "--dry_run", "--launcher")
_PASSED_ON = re.compile(r"--[\w.]+\+?=.*", re.DOTALL)


def main(args: Sequence[str]) -> None:
    """Start the runs of a sweep file, resume those that were interrupted, and print how each ends."""
    options, flags, slurm_options = _parse(args)
    sweep = read_sweep_file(names.find_or_explain(options.file, "study"))
    _check_flags(flags, sweep)
    n_runs = number_of_runs(sweep, options.runs)
    jobs = options.jobs or (n_runs if options.launcher == "slurm" and not sweep.uses_results else 1)
    plan = Plan(sweep, study_folder(sweep, flags, options.name), flags, n_runs, jobs, options.seed)
    if options.dry_run:
        is_bayes = sweep.method == "bayes"
        journal = Journal(plan, in_memory=True)
        for _ in range(1 if is_bayes else n_runs):
            if run := journal.next():
                print(shlex.join(plan.command(run.arm, run.settings)))
        if is_bayes:
            print("# the next ones depend on the results")
        return
    launcher: Launcher = SlurmLauncher(plan, slurm_options) if options.launcher == "slurm" else LocalLauncher(plan)
    study = Study(plan, launcher)
    code = study.run()
    if study.signals or study.n_failed > study.n_refused:
        say(f"{'resume' if study.signals else 'again '}  {shlex.join(['llm-train', *args])}")
    if not study.signals and study.n_done:
        say(f"next    llm-train compare {shlex.quote(str(plan.folder))}")
    if code:
        sys.exit(code)


def _parse(args: Sequence[str]) -> tuple[argparse.Namespace, list[str], dict[str, str | bool]]:
    parser = CommandParser(
        prog="llm-train study",
        usage="llm-train study FILE [options] [--key=value ...] [-- WORD ...]",
        description="Run a W&B sweep file on this machine, or as jobs of a SLURM cluster. The same command resumes a "
        "study that was interrupted: it does not repeat finished runs, and resumes the others. Every run is an "
        "ordinary one in runs/TOPIC/STUDY/ARM, and W&B shows it in the study's group: online if you are logged in.",
        epilog="Every run gets --key=value, such as --trainer.max_steps=100, and what follows --. With an account, "
        "`wandb sweep FILE` and `wandb agent` run the same file on any number of machines.",
    )
    parser.add_argument("file", metavar="FILE", help="sweep file, or the name of a study: TOPIC/STUDY")
    parser.add_argument(
        "--jobs",
        type=count,
        help="runs at a time, which share the cores and have GPUs of their own (default: 1; with slurm, all runs that "
        "need no results of others)",
    )
    parser.add_argument("--runs", type=count, help="maximum number of runs; random and bayes need it, or run_cap")
    parser.add_argument("--name", help="name of the study (default: `name:` in FILE, or the name of FILE)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws of random and bayes (default: 0)")
    parser.add_argument("--dry_run", action="store_true", help="print the commands of the runs and exit")
    parser.add_argument("--launcher", choices=("local", "slurm"), default="local", help="where (default: local)")
    parser.add_argument(
        "--slurm.NAME",
        metavar="VALUE",
        help="option of sbatch for each run, such as --slurm.partition gpu --slurm.time 8:00:00 --slurm.gpus 1",
    )
    args = list(args[1:])
    split = args.index("--") if "--" in args else len(args)
    words, slurm_options = _without_slurm_options(args[:split])
    options, flags = parser.parse_known_args(words)
    if slurm_options and options.launcher != "slurm":
        raise UsageError(f"--slurm.{next(iter(slurm_options))} needs --launcher slurm")
    for flag in flags:
        if close := difflib.get_close_matches(flag.split("=")[0], _OWN_FLAGS, n=1, cutoff=0.75):
            parser.error(f"no such option: {flag} (did you mean {close[0]}?)")
        if not _PASSED_ON.fullmatch(flag):
            parser.error(f"no such option: {flag}; write --key=value for the runs, or put it after --")
    return options, flags + args[split + 1 :], slurm_options


def _without_slurm_options(args: Sequence[str]) -> tuple[list[str], dict[str, str | bool]]:
    """Return the words that are not `--slurm.NAME VALUE` or `--slurm.NAME=VALUE`, and these options."""
    words, options, rest = list[str](), dict[str, str | bool](), list(args)
    while rest:
        name, has_value, value = rest.pop(0).partition("=")
        if not name.startswith("--slurm."):
            words.append(name + has_value + value)
            continue
        if not has_value and rest and not rest[0].startswith("--"):
            has_value, value = "=", rest.pop(0)
        options[name.removeprefix("--slurm.").replace("-", "_")] = value if has_value else True
    return words, options


def _check_flags(flags: Sequence[str], sweep: Sweep) -> None:
    """Refuse flags that would replace what the study sets for each run, as the last flag does.

    A further configuration file is merged over that of an arm, and `--KEY+` adds to a list.
    """
    varied = {names.plain(".".join(key)) for key, spec in sweep.distributions.items() if spec.is_swept}
    for flag, _ in names.flags(flags):
        key = names.plain(flag.removeprefix("--"))
        if key in varied and flag not in names.FILE_FLAGS:
            raise UsageError(f"{flag}: the study varies {key}, and the flag would set it in every run; leave one out")
        if key in ("run.name", "run.study"):
            raise UsageError(f"{flag}: the study names its runs; --name gives the study another name")
