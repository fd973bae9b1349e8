"""`llm-train claims`: run what the claims need, judge them, and say which verdicts are not the expected ones."""

import functools
import os
import shlex
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments import names
from experiments.claims import tables
from experiments.claims.claims_file import FILE, RecordsSpec, Topic, claims_files, read_claims
from experiments.claims.judge import Judgement, judge
from experiments.claims.page import write_page
from experiments.claims.records import Recorded, make_records, read_records
from experiments.comparison.runs import FINISHED
from experiments.errors import CommandParser, UserError, count
from experiments.study import command as study_command
from experiments.study.runs import number_of_runs, own_package, study_folder
from experiments.study.sweep_file import Sweep, read_sweep_file
from lightning_modules.common import run_files
from lightning_modules.common.files import read_json, write_json, write_text
from lightning_modules.common.messages import say

_HOW_TO_RUN = """\
  here: finished in the folder of runs; minutes: of all recorded runs, one after the other. A study that needs
  something, besides two CPU cores, runs only by its own name.

llm-train claims NAME      run what is missing of a topic or study, and judge its claims
llm-train claims --all     the same for all of them
llm-train claims --check   run nothing: judge the committed records"""
_MOST_LISTED = 5  # of the verdicts that are not expected, in the error


@dataclass(frozen=True)
class ClaimedStudy:
    """A study that decides claims of a topic."""

    place: Path  # folder of the topic, with its claims, records and README
    name: str
    spec: RecordsSpec

    @property
    def topic(self) -> str:
        """Its topic."""
        return self.place.name

    @property
    def records(self) -> Path:
        """The file of its committed records."""
        return self.place / "records" / f"{self.name}.csv"

    @property
    def title(self) -> str:
        """Its name on the command line."""
        return f"{self.topic}/{self.name}"

    @functools.cached_property
    def sweep(self) -> Sweep:
        """Its sweep file."""
        name = f"{self.topic}/{self.spec.file or self.name}"
        return read_sweep_file(names.find_or_explain(name, f"{self.topic}/{FILE}, studies.{self.name}:"))

    def folder(self, root: str) -> Path:
        """Return the folder of its runs, in a folder of runs."""
        return study_folder(self.sweep, [*self.spec.flags, f"--run.root={root}"], self._run_name)

    @property
    def _run_name(self) -> str | None:
        return self.name if self.spec.flags else None  # other flags make other runs than `llm-train study` does

    def run(self, root: str, jobs: int, words: Sequence[str] = ()) -> None:
        """Start the runs that are missing, and test them if the claims need it; exit on a signal.

        Args:
            root: Folder of the runs.
            jobs: Runs at a time.
            words: What each run of the study gets on its command line, such as the place of its text.
        """
        for experiment in self.spec.first:
            if not _has_finished(Path("runs", experiment, run_files.SUMMARY)):
                _run(["fit", "-c", experiment, "--auto_resume"])
        name = ["--name", self._run_name] if self._run_name else []
        flags = [*self.spec.flags, *([f"--run.root={root}"] if root != "runs" else [])]
        flags += ["--", *words] if words else []
        try:
            study_command.main(["study", str(self.sweep.path), *name, "--jobs", str(jobs), *flags])
        except SystemExit as leave:
            if leave.code != 1:  # a signal; a run that fails is recorded as failed
                raise
        if not self.spec.test:
            return
        tested = run_files.of_command(run_files.SUMMARY, "test")
        for folder in sorted(file.parent for file in self.folder(root).glob(f"*/{run_files.SUMMARY}")):
            if _has_finished(folder / run_files.SUMMARY) and not _has_finished(folder / tested):
                _run(["test", "-c", str(folder / run_files.CONFIG), "--ckpt_path", "best"])


def _has_finished(summary: Path) -> bool:
    """Return whether a run, or its test, has reached its end, and not failed or been stopped."""
    return read_json(summary, {}).get("status") == FINISHED


def _run(words: Sequence[str]) -> None:
    """Run a command of the project in a process of its own; raise a `UserError` if it fails, and exit on Ctrl-C."""
    shown = shlex.join(["llm-train", *words])
    say(f"run     {shown}")
    program, environment = [sys.executable, "-m", "experiments", *words], os.environ | own_package(os.environ)
    process, interrupted = subprocess.Popen(program, env=environment, stdout=subprocess.DEVNULL), False
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:  # the terminal interrupts the process too, which saves a checkpoint and ends
            interrupted = True
    if interrupted:
        raise SystemExit(128 - code if code < 0 else code or 128 + signal.SIGINT)
    if code:
        raise UserError(f"{shown}: ended with code {code}")


def main(args: Sequence[str]) -> None:
    """Judge the claims of topics, or write records and tables."""
    options, words = _parse(args)
    files = _files_of_topics()
    topics = {topic: read_claims(file) for topic, file in files.items()}
    studies = _chosen(files, topics, options.names)
    if options.record:
        for study in studies:
            runs = study.folder(options.runs)
            if runs.is_dir() or options.names:
                text = make_records(runs, study.spec, study.sweep)
                write_text(study.records, text)
                print(f"{study.records}: {text.count(chr(10)) - 1} runs")
    if options.write:
        for topic in dict.fromkeys(study.topic for study in studies):
            _write_tables(files[topic].parent, topics[topic])
    if options.record or options.write:
        return
    if not (options.names or options.all or options.check):
        print(tables.overview([_state(study, options.runs) for study in studies]), f"\n{_HOW_TO_RUN}", sep="\n")
        return
    judgements: list[Judgement] = []
    recorded: dict[str, Recorded] = {}
    for study in studies:
        if study.spec.needs and not options.check and study.title not in options.names:
            say(f"left out: {study.title} needs {study.spec.needs}; it runs if its own name is given")
            continue
        if options.check:
            found = committed(study)
        else:
            study.run(options.runs, options.jobs, words)
            found = read_records(make_records(study.folder(options.runs), study.spec, study.sweep), study.title)
        if found is not None:
            recorded[study.title] = found
        judgements += judged(topics[study.topic], study, found)
    print(tables.as_text(judgements))
    if not options.check:
        write_json(options.out / "claims.json", as_json(judgements, recorded))
        pages = {study.title: (study.spec, recorded[study.title]) for study in studies if study.title in recorded}
        write_page(options.out / "index.html", ["llm-train", *args], judgements, pages)
        seconds = sum(float(row["seconds"]) for found in recorded.values() for row in found.rows)
        print(f"page    {options.out / 'index.html'}\nfiles   {options.out / 'claims.json'}")
        print(f"time    {seconds / 60:.0f} min of {sum(len(found.rows) for found in recorded.values())} runs")
    _conclude(judgements, are_committed=options.check)


def _files_of_topics() -> dict[str, Path]:
    """Return the files of claims by topic: those of a clone, else those that come with the project; and of this folder.

    A topic of the user is a folder in the working folder, see `llm-train new`.
    """
    of_clone = claims_files(Path("experiments"))
    return (of_clone or claims_files(names.SHIPPED)) | claims_files(Path())


def _state(study: ClaimedStudy, root: str) -> tables.State:
    """Return what is recorded of a study, what a folder of runs has of it, and what its runs took."""
    found = committed(study)
    summaries = study.folder(root).glob(f"*/{run_files.SUMMARY}")
    return tables.State(
        study=study.title,
        n_runs=number_of_runs(study.sweep, None),
        n_recorded=len(found.rows) if found else 0,
        n_here=sum(map(_has_finished, summaries)),
        minutes=sum(float(row["seconds"] or 0) for row in found.rows) / 60 if found else None,
        needs=study.spec.needs,
    )


def _conclude(judgements: Sequence[Judgement], are_committed: bool) -> None:
    stale = [each for each in judgements if are_committed and each.effects and each.claim.records == "pending"]
    if stale:
        first = "; ".join(f"{each.topic}, {each.claim.name}" for each in stale[:_MOST_LISTED])
        raise UserError(f"these claims have records; remove `records: pending`: {first}")
    n_pending = sum(each.verdict == "no records" for each in judgements)
    pending = f", {n_pending} without records" if n_pending else ""
    wrong = [each for each in judgements if not each.is_as_expected]
    if not wrong:
        print(f"{len(judgements)} claims: the verdicts are as expected{pending}")
        return
    listed = [
        f"{each.topic}, {each.claim.name}: {each.verdict}, expected {each.claim.expected}"
        for each in wrong[:_MOST_LISTED]
    ]
    more = [f"and {len(wrong) - _MOST_LISTED} more"] if len(wrong) > _MOST_LISTED else []
    raise UserError(
        f"{len(wrong)} of {len(judgements)} verdicts are not the expected ones{pending}: {'; '.join(listed + more)}"
    )


def _parse(args: Sequence[str]) -> tuple[Namespace, Sequence[str]]:
    parser = CommandParser(
        prog="llm-train claims",
        usage="llm-train claims [TOPIC[/STUDY] ...] [options] [-- WORD ...]",
        description="Check the claims in experiments/TOPIC/claims.yaml, and in TOPIC/claims.yaml of a topic of yours: "
        "run their studies as far as runs are missing, judge each claim by its records, print the verdicts, and leave "
        "claims.json and a page. The exit code is 1 if a verdict is not the expected one. The same command resumes "
        "what was interrupted. Without a name and options, list the studies: how many runs are recorded and here, and "
        "how long they took.",
        epilog="Every run gets what follows --, such as --data.source.path FOLDER for a text that is elsewhere.",
    )
    parser.add_argument("names", nargs="*", metavar="TOPIC[/STUDY]", help="what to check")
    parser.add_argument("--all", action="store_true", help="check everything, which can take hours")
    parser.add_argument("--check", action="store_true", help="run nothing: judge the committed records")
    parser.add_argument("--record", action="store_true", help="run nothing: write the records of finished runs")
    parser.add_argument("--write", action="store_true", help="run nothing: write the tables of the READMEs")
    parser.add_argument("--jobs", type=count, default=1, help="runs at a time, which share the cores (default: 1)")
    parser.add_argument("--runs", default="runs", metavar="FOLDER", help="folder of the runs (default: runs)")
    parser.add_argument("--out", type=Path, default=Path("runs/claims"), help="folder to write to (runs/claims)")
    split = args.index("--") if "--" in args else len(args)
    options, words = parser.parse_args(args[1:split]), args[split + 1 :]
    if options.all and options.names:
        parser.error("--all is all topics: leave out the names")
    runs_nothing = options.check or options.record or options.write
    if options.all and runs_nothing:
        parser.error("--all is for runs, and --check, --record and --write run nothing: leave it out")
    if (words or options.jobs != 1) and not (options.names or options.all or runs_nothing):
        parser.error("give the topics or studies to run, or --all")
    if options.check and (options.record or options.write):
        parser.error("--check writes nothing: leave out --record and --write")
    if words and runs_nothing:
        parser.error(f"{' '.join(words)}: is for runs, and --check, --record and --write run nothing")
    return options, words


def _chosen(files: dict[str, Path], topics: dict[str, Topic], asked: Sequence[str]) -> list[ClaimedStudy]:
    """Return the studies of these names: all of a topic, or one; without names all."""
    studies = [
        ClaimedStudy(files[name].parent, key, spec)
        for name, topic in topics.items()
        for key, spec in topic.studies.items()
    ]
    for name in asked:
        if name not in topics and name not in {study.title for study in studies}:
            there = ", ".join([*topics, *(study.title for study in studies)])
            raise UserError(f"claims {name}: no topic and no study has claims of this name; there is {there}")
    return [study for study in studies if not asked or study.topic in asked or study.title in asked]


def committed(study: ClaimedStudy) -> Recorded | None:
    """Return the committed records of a study, or `None` if there are none."""
    file = study.records
    return read_records(file.read_text(encoding="utf-8"), str(file)) if file.is_file() else None


def judged(topic: Topic, study: ClaimedStudy, found: Recorded | None) -> list[Judgement]:
    """Return the verdicts on the claims that a study decides."""
    return [
        judge(study.topic, claim, None if found is None else found.runs, study.spec.deterministic)
        for claim in topic.claims
        if claim.study == study.name
    ]


def _write_tables(place: Path, claims: Topic) -> None:
    readme = place / "README.md"
    text = filled(place, claims)
    if text != readme.read_text(encoding="utf-8"):
        write_text(readme, text)
        print(readme)


def filled(place: Path, claims: Topic) -> str:
    """Return the README in the folder of a topic with its tables and numbers made from the committed records."""

    @functools.cache
    def recorded(name: str) -> tuple[ClaimedStudy, Recorded]:
        study = ClaimedStudy(place, name, claims.studies[name]) if name in claims.studies else None
        found = committed(study) if study else None
        if study is None or found is None:
            raise UserError(f"{place}/README.md: {name} has no records in records/{name}.csv")
        return study, found

    def table_of(name: str) -> str:
        study, found = recorded(name)
        return tables.block(name, study.spec, found, judged(claims, study, found))

    def number_of(name: str) -> str:
        claim = next((claim for claim in claims.claims if claim.name == name), None)
        if claim is None:
            raise UserError(f"{place}/README.md: there is no claim {name} in {FILE}")
        study, found = recorded(claim.study)
        return judge(place.name, claim, found.runs, study.spec.deterministic).shown

    return tables.fill(place / "README.md", table_of, number_of)


def as_json(judgements: Sequence[Judgement], recorded: dict[str, Recorded]) -> list[dict[str, object]]:
    """Return the verdicts for `claims.json`."""
    return [
        {
            "topic": each.topic,
            **each.claim.model_dump(exclude_none=True),
            "verdict": each.verdict,
            "as_expected": each.is_as_expected,
            "effects": [effect._asdict() for effect in each.effects],
            "runs": recorded[title].rows if (title := f"{each.topic}/{each.claim.study}") in recorded else [],
        }
        for each in judgements
    ]
