"""The commands in READMEs, in the comments of YAML files and in messages: each can be run as it is written."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import RUNS, TINY

from experiments.__main__ import COMMANDS, HELP
from experiments.comparison import command as compare
from experiments.generate import _parse as parse_generate
from experiments.study import command as study

ROOT = Path(__file__).parents[2]
PLACES = {"FILE.yaml": str(TINY), "FILE": str(TINY), "FOLDER": "folder", "ROWS.npy": "rows.npy"}
DOCUMENTS = [ROOT / "README.md", *ROOT.glob("experiments/*/README.md"), *ROOT.glob("experiments/**/*.yaml")]


def commands() -> Iterator[str]:
    """Yield each command of the documents once: lines that begin with it, and those that a backslash continues."""
    texts = [path.read_text() for path in DOCUMENTS if "template" not in path.parts] + [HELP]
    lines = "\n".join(texts).replace("\\\n", " ").replace("\n#", "\n")
    found = re.findall(r"^ *(?:Needs: |Next: |- |.*\|\| )?llm-train ((?!COMMAND)[a-z].*)$", lines, re.MULTILINE)
    yield from dict.fromkeys(re.sub(r"  .*| +#.*", "", re.sub(r"(?<=\S) #? +(?=--|-c)", " ", line)) for line in found)


def words_of(command: str) -> list[str]:
    words = [PLACES.get(word, word) for word in shlex.split(command)]
    if words[:2] == ["fit", "-c"] and "TOPIC" in words[2]:
        words[2] = str(TINY)
    return words


FOUND = list(commands())
PLAIN = re.compile(r"(fit -c|study) \S+( --jobs 2)?")  # the tests of the experiments run these


def test_commands_are_found():
    assert len(FOUND) > 80
    assert {command.split()[0] for command in FOUND} <= COMMANDS.keys()


def test_the_commands_name_files_that_are_there():
    named = {word for command in FOUND for word in shlex.split(command) if word.startswith("experiments/")}
    assert [word for word in named if "TOPIC" not in word and not (ROOT / word).is_file()] == []


@pytest.mark.parametrize("command", [command for command in FOUND if not PLAIN.fullmatch(command)])
def test_a_command_parses(parse, monkeypatch, tmp_path, command):
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    name, *words = words_of(command)
    if name in ("fit", "validate", "test", "predict"):
        # The configuration of a run is that of its experiment; the flags are those of fit, but for some of the data.
        words = [re.sub(r"^runs/TOPIC/NAME/config.yaml$", str(TINY), word) for word in words]
        words = [re.sub(r"^runs/(\w+)/(\w+)/config.yaml$", experiment_of, word) for word in words]
        assert parse("fit", *(word for word in words if word != "--print_config"))
    elif name == "study":
        file, *flags = words
        study._parse(["study", file.replace("TOPIC/studies/STUDY", "x/studies/y"), *flags])
    elif name == "compare":
        compare._parse(["compare", *words])
    elif name == "generate":
        parse_generate(["generate", *words])


def experiment_of(config: re.Match) -> str:
    """Return the experiment that a run is of; a row of a study is over the experiment of another name."""
    topic, name = config.groups()
    file = ROOT / f"experiments/{topic}/{name}.yaml"
    return str(file if file.is_file() else next((ROOT / "experiments" / topic).glob("offline.yaml")))


def test_the_next_command_of_a_run_without_a_tokenizer_works(llm_train, tiny):
    only_checkpoints = [{"class_path": "lightning_modules.runtime.checkpoint.RunCheckpoint"}]
    done = llm_train("fit", "-c", tiny(trainer__callbacks=only_checkpoints))
    (following,) = (line for line in done.err.splitlines() if line.startswith("next"))
    assert llm_train(*shlex.split(following)[2:]).code == 0
    generated = llm_train("generate", "--run", RUNS / "tiny", "--prompt", "a")
    assert (generated.code, len(generated.err.splitlines())) == (1, 1)
    assert "there is no tokenizer in it; train with the callback" in generated.err
