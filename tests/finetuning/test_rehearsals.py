"""Experiments that download: each runs as it is shipped, with stand-ins for what it downloads, and in small sizes.

tests/TOPIC/rehearsals.yaml has, for each of these experiments:

- `bases`: for each pretrained model that it names, the function of tests/tiny_bases.py (without `save_`) that writes a
  model of the same architecture with random weights, laid out as the hub or the package has it;
- `dataset`: the rows of each split of a data set in the schema of the hub's, repeated twelve times;
- `files`: other files, by name;
- `replace`: texts of the YAML in place of others, for names and sizes;
- `flags`: further sizes;
- `follow`: whether to run the command that the run prints as the next one too.
"""

import importlib.util
import io
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import tiny_bases
import yaml

ROOT = Path(__file__).parents[2]
REHEARSALS = {
    f"{file.parent.name}/{name}": settings
    for file in sorted(ROOT.glob("tests/*/rehearsals.yaml"))
    for name, settings in yaml.safe_load(file.read_text()).items()
}


def download(base: str, form: str) -> None:
    """Write the stand-in for a pretrained model: a folder of its name, or the files of an installed package."""
    save = getattr(tiny_bases, f"save_{form}")
    if not base.startswith("package:"):
        save(Path(base.replace("/", "--")))
    elif form == "gguf":
        tiny_bases.install(Path("site"), base.removeprefix("package:"), save(Path("tiny.gguf"), tiny_bases.llama()))
    else:
        tiny_bases.install(Path("site"), base.removeprefix("package:"), save(Path("model")))


def write_dataset(folder: Path, splits: dict[str, list[dict[str, Any]]]) -> None:
    """Write a data set as the hub has one: a file for each split, and a card that names them."""
    folder.mkdir()
    files = [{"split": split, "path": f"{split}.jsonl"} for split in splits]
    card = yaml.safe_dump({"configs": [{"config_name": "default", "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{card}---\n")
    for split, rows in splits.items():
        # No text is twice in a split.
        lines = [json.dumps(row).replace("NUMBER", str(i)) for i in range(12) for row in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", REHEARSALS)
def test_an_experiment_that_downloads_runs_as_it_is_shipped(llm_train, no_pictures, monkeypatch, name):
    settings = REHEARSALS[name]
    if "gguf" in settings["bases"].values() and importlib.util.find_spec("gguf") is None:
        pytest.skip("gguf is not installed")
    monkeypatch.syspath_prepend(Path("site").absolute())
    text = (ROOT / f"experiments/{name}.yaml").read_text()
    for base, form in settings["bases"].items():
        assert base in text
        download(base, form)
        if not base.startswith("package:"):
            text = text.replace(base, f"./{base.replace('/', '--')}")
    for old, new in settings.get("replace", {}).items():
        assert old in text
        text = text.replace(old, new)
    if "dataset" in settings:
        write_dataset(Path("dataset"), settings["dataset"])
    for file, content in settings.get("files", {}).items():
        Path(file).write_text(content)
    config = Path(f"{Path(name).name}.yaml")
    config.write_text(text)

    done = llm_train("fit", "-c", config, *settings["flags"])
    assert done.code == 0, done.err
    # Only a head that is new to the base has random weights.
    assert not [line for line in done.err.splitlines() if "initialised at random" in line and "predictions" not in line]
    assert (Path("runs") / name / "summary.json").is_file()
    if settings.get("follow"):
        (command,) = (line.split("llm-train ", 1)[1] for line in done.err.splitlines() if line.startswith("next "))
        words = shlex.split(command)
        words += ["--max_new_tokens", "2"] if words[0] == "generate" else []
        if "--chat" in words:
            Path("notes.txt").write_text("A reference.")
            words += ["--references", "notes.txt"]
            monkeypatch.setattr("sys.stdin", io.StringIO("Why?\n"))
        followed = llm_train(*words)
        assert followed.code == 0, followed.err


def test_every_experiment_that_downloads_a_model_is_rehearsed():
    named = set()
    for file in ROOT.glob("experiments/*/*.yaml"):
        config = yaml.safe_load(file.read_text())
        model, data = (config.get(section, {}).get("init_args", {}) for section in ("model", "data"))
        models = [model.get("base"), model.get("pretrained"), model.get("reference"), data.get("source")]
        if any(isinstance(name, str) and not name.startswith("runs/") for name in models):  # no run, and no text
            named.add(f"{file.parent.name}/{file.stem}")
    assert named == REHEARSALS.keys()
