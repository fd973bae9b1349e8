r"""The guides in experiments/guides/: every command and every block of Python is run, in the order of the page.

A page runs in one empty folder, small. What is run:

- A line that is indented by four spaces, or is in a fence ```` ```bash ````, and begins with `llm-train`. A comment may
  follow after two spaces, a backslash continues the line, and `NAME=value` may precede the command. Other lines are
  what is shown to the reader, and are not run.
- A fence ```` ```python ````. The blocks of a page share their variables, as in one session.
- A fence whose first line is only the name of a file (`# my_model.py`, `# my.yaml`) writes that file.
- `python FILE.py` as a line runs a file, as a program of its own.

A command must succeed, unless a line `error: ...` follows it, which it must print (`...` stands for any text).
Name shipped experiments as a reader in an empty folder does (`-c TOPIC/offline`), not by a path in the clone.

Each shipped experiment that a command names is made small by tests/TOPIC/conf.yaml. For the rest, a page may begin with
an HTML comment, which a reader does not see, of YAML with these keys; what a key names must be on the page:

    <!-- test
    files:                              # what the reader is assumed to have
      my.txt: {words: 2000}             # so many random words
      notes.txt: "Any text."            # the text itself
      films.csv: {head: "text,label\n", repeat: "fine,good\ndull,bad\n", times: 40}
      my-base: {base: gpt_neo}          # a folder with the model that `save_gpt_neo` of tests/tiny_bases.py writes
    small:                              # flags added to the commands that begin with the key (after `llm-train `)
      fit -c my.yaml: --model.n_layer 1 --trainer.max_steps 2
      generate: --max_new_tokens 2
    replace:                            # in commands, Python and files
      max_steps=500: max_steps=2
    skip:                               # commands that begin with the key are not run, and why
      fit -c large.yaml: it needs a GPU
    -->
"""

import io
import itertools
import re
import runpy
import shlex
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forks
import pytest
import tiny_bases
import yaml
from helpers import TINY, text
from shortened import shortened

ROOT = Path(__file__).parents[2]
GUIDES = sorted((ROOT / "experiments/guides").glob("*.md"))
EXPERIMENTS = [
    file for conf in ROOT.glob("tests/*/conf.yaml") for file in ROOT.glob(f"experiments/{conf.parent.name}/*")
]
KEYS = ("files", "small", "replace", "skip")

Part = tuple[str, str, str]  # "command", text and expected error; "python" and text; "file", text and its name


def settings_of(page: str) -> dict[str, dict[str, Any]]:
    """Return the settings in the comment at the top of a page."""
    comment = re.match(r"<!-- test\n(.*?)-->", page, re.DOTALL)
    settings = yaml.safe_load(comment[1]) if comment else {}
    assert set(settings) <= set(KEYS), f"the comment has the keys {KEYS}"
    for key in itertools.chain(*(settings.get(section, ()) for section in ("small", "replace", "skip"))):
        assert page.count(key) > 1, f"{key!r} is not on the page"
    return {key: settings.get(key) or {} for key in KEYS}


def parts_of(page: str) -> Iterator[Part]:
    """Yield what is run of a page, in its order."""
    page = re.sub(r"\A<!-- test\n.*?-->", "", page, flags=re.DOTALL)
    fence, indented = r"^```(\w*)\n((?s:.*?))^```$", r"((?:^ {4}.*\n)+)"
    for part in re.finditer(f"{fence}|{indented}", page, re.MULTILINE):
        language, content = part[1], part[2]
        if content is None:
            yield from commands_of(textwrap.dedent(part[3]))
        elif name := re.match(r"# ([\w./-]+\.\w+)\n", content):
            yield "file", content, name[1]
        elif language == "python":
            yield "python", content, ""
        elif language in ("bash", "sh"):
            yield from commands_of(content)


def commands_of(block: str) -> Iterator[Part]:
    """Yield the commands among the lines of a block, each with the error that the next line shows."""
    lines = [*re.sub(r"\s*\\\n\s*", " ", block).splitlines(), ""]
    for line, following in itertools.pairwise(lines):
        if re.match(r"(\w+=\S+ )*(llm-train|python \S+\.py)\b", line):
            yield "command", re.sub(r"  +#?.*", "", line), following if following.startswith("error: ") else ""


def write_files(files: dict[str, Any]) -> None:
    """Write the files that a reader is assumed to have."""
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            Path(name).write_text(content)
        elif "words" in content:
            Path(name).write_text(text(content["words"]))
        elif "repeat" in content:
            Path(name).write_text(content.get("head", "") + content["repeat"] * content["times"])
        else:
            getattr(tiny_bases, f"save_{content['base']}")(Path(name))


def small(words: list[str]) -> list[str]:
    """Return a command with the settings of tests/TOPIC/conf.yaml after each shipped experiment that it names."""
    arguments: list[str] = []
    for option, word in itertools.pairwise(["", *words]):
        arguments.append(word)
        experiment = ROOT / "experiments" / f"{word.removesuffix('.yaml')}.yaml"
        if option in ("-c", "--config") and experiment in EXPERIMENTS and not Path(word).exists():
            arguments += shortened(experiment)
    return arguments


def beginning(settings: dict[str, str], command: str) -> list[str]:
    """Return the values of the keys that a command begins with."""
    return [value for key, value in settings.items() if command.startswith(key)]


@pytest.fixture
def run_page(llm_train, no_pictures, monkeypatch):
    """Return a function that runs a page in the working folder of the test, as a session of a user."""
    monkeypatch.setattr("sys.stdin", io.StringIO())  # a chat ends with its input
    monkeypatch.setattr("experiments.study.launchers.Popen", forks.StudyProcess)

    def run(page: str) -> None:
        settings, variables = settings_of(page), {"__name__": "__main__"}
        write_files(settings["files"])
        for kind, content, more in parts_of(page):
            for old, new in settings["replace"].items():
                content = content.replace(old, str(new))
            if kind == "file":
                Path(more).parent.mkdir(parents=True, exist_ok=True)
                Path(more).write_text(content)
            elif kind == "python":
                with pytest.MonkeyPatch.context() as patch:
                    patch.syspath_prepend("")  # Python looks in the working folder; the command does not
                    exec(compile(content, "<page>", "exec"), variables)
            else:
                run_line(content, more, settings)

    def run_line(line: str, error: str, settings: dict[str, dict[str, str]]) -> None:
        environment, command = re.fullmatch(r"((?:\w+=\S+ )*)(.*)", line).groups()
        if beginning(settings["skip"], command.removeprefix("llm-train ")):
            return
        program, *words = shlex.split(command)
        with pytest.MonkeyPatch.context() as patch:
            for setting in environment.split():
                patch.setenv(*setting.split("=", 1))
            if program == "python":
                patch.setattr(sys, "argv", words)
                patch.syspath_prepend(Path(words[0]).parent)
                runpy.run_path(words[0], run_name="__main__")
                return
            flags = beginning(settings["small"], command.removeprefix("llm-train "))
            done = llm_train(*small(words), *itertools.chain(*map(shlex.split, flags)))
        assert (done.code != 0, "Traceback" in done.err) == (bool(error), False), f"{command}: {done.err}"
        if error:
            shown = ".*".join(map(re.escape, error.split("...")))
            assert re.fullmatch(shown, done.err.splitlines()[-1]), f"{command}: {done.err}"

    return run


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_a_guide_runs_from_top_to_bottom(run_page, guide):
    run_page(guide.read_text())


PAGE = """<!-- test
files:
  my.txt: {words: 2000}
  films.csv: {head: "text,label\\n", repeat: "fine,good\\n", times: 2}
  bases/mine: {base: gpt_neo}
small:
  fit -c small.yaml: --trainer.max_steps 1
replace:
  n_embd=1000: n_embd=16
skip:
  fit -c large.yaml: it needs a GPU
-->
# A page

```yaml
# small.yaml
model: {class_path: PretrainModule, init_args: {n_layer: 1, n_head: 1}}
```

Text, and a command with a comment:

    llm-train fit -c small.yaml \\
        --model.n_embd=1000    # what it does
    run     runs/small/small (what is shown is not run)

```python
# my_package/mine.py
n = 3
```

```python
from pathlib import Path
from my_package.mine import n
```

```python
seen = [n, Path("films.csv").read_text(), Path("bases/mine/config.json").is_file()]
```

    llm-train fit -c large.yaml
    python my_package/mine.py
    WANDB_MODE=offline llm-train fti
    error: no such command: 'fti' (did you mean ...?)
"""


def test_what_is_run_of_a_page_is_found_and_made_small():
    assert [(kind, content.splitlines()[-1], more[:10]) for kind, content, more in parts_of(PAGE)] == [
        ("file", "model: {class_path: PretrainModule, init_args: {n_layer: 1, n_head: 1}}", "small.yaml"),
        ("command", "llm-train fit -c small.yaml --model.n_embd=1000", ""),
        ("file", "n = 3", "my_package"),
        ("python", "from my_package.mine import n", ""),
        ("python", 'seen = [n, Path("films.csv").read_text(), Path("bases/mine/config.json").is_file()]', ""),
        ("command", "llm-train fit -c large.yaml", ""),
        ("command", "python my_package/mine.py", ""),
        ("command", "WANDB_MODE=offline llm-train fti", "error: no "),
    ]
    shipped = f"{TINY.parent.name}/offline"
    assert small(["fit", "-c", shipped, "--x", "1"])[:4] == ["fit", "-c", shipped, "-c"]


@pytest.mark.parametrize(
    ("page", "wrong"),
    [
        ("    llm-train fti\n", "no such command"),
        ("    llm-train --help\n    error: no help\n", "--help"),
        ("    llm-train fti\n    error: another ... line\n", "no such command"),
        ("<!-- test\nsmall: {fit: --trainer.max_steps 1}\n-->\nNo command.\n", "not on the page"),
        ("```python\nassert 1 == 2, 'in the block'\n```\n", "in the block"),
    ],
)
def test_a_wrong_page_fails(run_page, page, wrong):
    with pytest.raises(AssertionError, match=re.escape(wrong)):
        run_page(page)


def test_files_commands_and_python_of_a_page_share_a_folder(run_page):
    run_page(
        '<!-- test\nfiles:\n  a.txt: {words: 9}\n  b.csv: {head: "x\\n", repeat: "1\\n", times: 2}\n-->\n'
        "```python\n# ours.py\nn = 3\nif __name__ == '__main__':\n    open('seen', 'w').write('run')\n```\n"
        "    python ours.py\n    WANDB_MODE=offline llm-train --help\n"
        "```python\nassert (open('seen').read(), len(open('a.txt').read().split())) == ('run', 9)\nimport ours\n```\n"
        "```python\nassert (ours.n, open('b.csv').read()) == (3, 'x\\n1\\n1\\n')\n```\n"
    )


PAGES = [
    page for page in sorted({*ROOT.glob("*.md"), *ROOT.glob("experiments/**/*.md")}) if "template" not in page.parts
]


def headings(page: Path) -> set[str]:
    """Return the names by which links can name the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in link:
            target, _, heading = link.partition("#")
            file = page.parent / target if target else page
            assert file.exists(), link
            assert not heading or heading in headings(file), link


def test_the_architecture_names_files_that_are_there():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    tops = "experiments|lightning_modules|datamodules|tests"
    named = set(re.findall(rf"`((?:{tops})/[\w./]+)`", text))
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    # Each shared Python file of these folders has a word in the tables.
    for folder in ("experiments", "lightning_modules", "datamodules"):
        files = {file.name for file in (ROOT / folder).glob("*.py")} - {"__init__.py"}
        assert [name for name in sorted(files) if name not in text] == [], folder
