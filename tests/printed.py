"""The commands that READMEs, comments in YAML files and messages print, and the tests that run them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from shortened import ROOT, offline_experiments, run_of

from experiments.__main__ import HELP

DOCUMENTS = [ROOT / "README.md", *ROOT.glob("experiments/*/README.md"), *ROOT.glob("experiments/**/*.yaml")]


def commands() -> Iterator[str]:
    """Yield each command of the documents once: lines that begin with it, and those that a backslash continues."""
    texts = [path.read_text() for path in DOCUMENTS if "template" not in path.parts] + [HELP]
    lines = "\n".join(texts).replace("\\\n", " ").replace("\n#", "\n")
    found = re.findall(r"^ *(?:Needs: |Next: |- |.*\|\| )?llm-train ((?!COMMAND)[a-z].*)$", lines, re.MULTILINE)
    yield from dict.fromkeys(re.sub(r"  .*| +#.*", "", re.sub(r"(?<=\S) #? +(?=--|-c)", " ", line)) for line in found)


FOUND = list(commands())
GUIDES = "\n".join(path.read_text() for path in sorted(ROOT.glob("experiments/guides/*.md")))


def experiments_of(command: str) -> list[Path]:
    """Return the YAML files of this repository that a command names."""
    paths = [ROOT / "experiments" / word.removeprefix("experiments/") for word in shlex.split(command)]
    return [path for path in (path.with_suffix(".yaml") for path in paths) if path.is_file()]


def runs_of(command: str) -> list[str]:
    """Return the runs and studies that a command names."""
    return re.findall(r"\bruns/\w+/\w+", command)


def kind_of(command: str) -> str:
    """Return which test runs a command, as a word.

    `guide`: the test of the guides. `experiment` and `study`: the tests of experiments run each file.
    `run` and `compare`: the same tests run them after the run or the study that they name. `claims`: tests/claims.
    `variant`: an experiment with other settings. `general`: on any file.
    """
    name, files = command.split()[0], experiments_of(command)
    if f"llm-train {command}\n" in GUIDES:
        return "guide"
    if "TOPIC" in command or re.search(r"-c FILE(.yaml)?( |$)", command):
        return "general"
    if name == "compare":
        return "compare"
    if re.search(r"(-c|--run) runs/", command):
        return "run"
    if name == "study":
        return "study"
    if name == "fit":
        plain = re.fullmatch(r"fit -c \S+", command)
        return "experiment" if plain and files[0] in offline_experiments() else "variant"
    return name


def stand_in(run: str) -> str:
    """Return the run that takes the place of one in a test: the offline run of the topic, or itself if it is one."""
    made = [run_of(path) for path in offline_experiments()]
    return run if Path(run) in made else str(Path(run).with_name("offline"))


def after(run: str) -> list[tuple[str, str]]:
    """Return the commands of the documents that can be run after a run, each with the run that it names."""
    named = [(name, command) for command in FOUND if kind_of(command) == "run" for name in runs_of(command)]
    return [(name, command) for name, command in named if stand_in(name) == run]
