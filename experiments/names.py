"""Experiments, presets and studies by name: a file of the working folder, else the one that comes with the project."""

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.errors import UsageError, did_you_mean
from lightning_modules.common import run_files

SHIPPED = Path(__file__).parent
_HERE = "experiments"  # the folder of experiments in a checkout
ROOTS = (Path(), Path(_HERE), SHIPPED)  # in which a name is looked for; the first file counts
FILE_FLAGS = ("-c", "--config")  # before a configuration file, or the name of one


def find(name: str) -> Path | None:
    """Return the YAML file of a name, or `None` if there is none.

    The name of `experiments/TOPIC/offline.yaml` is `TOPIC/offline`, that of `experiments/TOPIC/studies/STUDY.yaml` is
    `TOPIC/STUDY`. The path of a file is a name of it too, as is the path with `experiments/` in a folder without one.
    """
    path = Path(name)
    if path.is_file() or path.is_absolute() or name.startswith((".", "~")) or not path.name:
        return path if path.is_file() else None
    inside = path.relative_to(_HERE) if path.parts[0] == _HERE else path
    below = [inside, inside.parent / "studies" / inside.name] if len(inside.parts) == 2 else [inside]
    places = [path, *(root / part for root in ROOTS for part in below)]
    files = (file for place in places for file in (place, place.with_name(f"{place.name}.yaml")))
    return next(filter(Path.is_file, files), None)


def find_or_explain(name: str, what: str) -> Path:
    """Return the YAML file of a name.

    Args:
        name: The name, see `find`.
        what: What the user gave it for, such as `-c` or the file that names it.

    Raises:
        UsageError: If there is none.
    """
    if (file := find(name)) is not None:
        return file
    if (folder := Path(name)).is_dir():
        of_run = folder / run_files.CONFIG
        advice = f"did you mean {str(of_run)!r}?" if of_run.is_file() else "give a YAML file or a name"
        raise UsageError(f"{what} {name}: is a folder; {advice}")
    in_roots = {name for root in ROOTS for name in names(root)}
    known = sorted(in_roots | {file.stem for file in Path().glob("*.yaml")})
    asked = name.removeprefix(f"{_HERE}/").removesuffix(".yaml")
    raise UsageError(
        f"{what} {name}: does not exist in {Path.cwd()}, and no experiment has this name{did_you_mean(asked, known)}; "
        "`llm-train list` shows those that come with the project"
    )


def names(root: Path = SHIPPED) -> Iterator[str]:
    """Yield the names of the experiments, presets and studies in a folder, such as `TOPIC/offline`."""
    for file in filter(is_experiment, sorted(root.glob("*/*.yaml"))):
        yield f"{file.parent.name}/{file.stem}"
    for file in filter(is_experiment, sorted(root.glob("*/studies/*.yaml"))):
        yield f"{file.parts[-3]}/{file.stem}"


def files(*patterns: str) -> dict[str, Path]:
    """Return the experiments, presets and studies that match a pattern by name, each with the file of `find`.

    Args:
        *patterns: Patterns of paths below the folders of experiments, such as `*/studies/*.yaml`.
    """
    found: dict[str, Path] = {}
    for root in ROOTS:
        for file in sorted(file for pattern in patterns for file in root.glob(pattern)):
            name = "/".join(part for part in file.relative_to(root).with_suffix("").parts if part != "studies")
            if name not in found and find(name) == file and is_experiment(file):
                found[name] = file
    return found


def is_experiment(file: Path) -> bool:
    """Return whether a YAML file is an experiment, a preset or a study, and not one of claims, or of something else."""
    text = file.read_text(encoding="utf-8", errors="replace")
    return re.search(r"^(trainer|model|parameters):", text, re.MULTILINE) is not None


def plain(key: str) -> str:
    """Return the name of a setting as a flag has it mostly: without `init_args`."""
    return key.replace(".init_args", "")


def flags(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the flags of a command line as they are written, with their values, or with the words that follow them.

    A `+` at the end of a flag stays. The flag of `-cFILE` is `-c`.
    """
    for word, following in itertools.pairwise([*args, ""]):
        if word.startswith("-c") and len(word) > 2:  # -cFILE
            yield "-c", word[2:].removeprefix("=")
        elif word.startswith("-"):
            flag, equals, value = word.partition("=")
            yield flag, value if equals else following


def with_files(args: Sequence[str]) -> list[str]:
    """Return a command line, such as one of `fit`, with the files of the names that `-c` and `--config` give.

    Raises:
        UsageError: If there is no file of a name, or a file is there without a flag.
    """
    words = list(args)
    if len(words) > 1 and not words[1].startswith("-") and find(words[1]):
        if Path(words[1]).is_file() and Path(words[1]).suffix.lower() not in (".yaml", ".yml"):
            raise UsageError(
                f"{words[0]} {words[1]}: give an experiment by -c NAME, and a text or data set of your own by a flag "
                f"of its data, in most experiments --data.source {words[1]}"
            )
        raise UsageError(f"{words[0]} {words[1]}: a file needs -c (did you mean 'llm-train {words[0]} -c {words[1]}'?)")
    if not any(word.startswith((*FILE_FLAGS, "--model", "--print_config")) for word in words):
        raise UsageError(f"{words[0]}: give an experiment by -c NAME; `llm-train list experiments` lists them")
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in FILE_FLAGS and equals:
            words[i] = f"{flag}={_file(value, flag)}"
        elif flag in FILE_FLAGS and i + 1 < len(words):
            words[i + 1] = _file(words[i + 1], flag)
        elif word.startswith("-c") and not word.startswith("-c=") and len(word) > 2:  # -cFILE
            words[i] = f"-c{_file(word[2:], '-c')}"
    return words


def _file(name: str, flag: str) -> str:
    if name.startswith(("-", "{", "[")) or ": " in name or "\n" in name:  # a missing value, or settings in YAML
        return name
    return str(find_or_explain(name, flag))
