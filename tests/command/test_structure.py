"""The layout of the repository: a package a topic in each top-level folder, and no topic named outside its packages."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
FOLDERS = ("experiments", "lightning_modules", "datamodules", "tests")
TOPICS = sorted({path.parent.name for path in (ROOT / "experiments").glob("*/offline*.yaml")})


def test_every_topic_has_a_package_in_each_folder():
    assert len(TOPICS) > 1
    assert [f"{top}/{topic}" for topic in TOPICS for top in FOLDERS if not (ROOT / top / topic).is_dir()] == []
    for topic in TOPICS:
        assert (ROOT / "tests" / topic / "conf.yaml").is_file()
        assert (ROOT / "experiments" / topic / "README.md").is_file()


def test_no_file_outside_the_packages_of_a_topic_names_it():
    names = re.compile(rf"\b({'|'.join(TOPICS)})\b")
    files = [ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / "constraints.txt", ROOT / ".ci/run"]
    files += [path for top in FOLDERS for path in (ROOT / top).rglob("*") if path.suffix in (".py", ".sbatch", ".txt")]
    outside = [path for path in files if not set(path.relative_to(ROOT).parts[:-1]) & set(TOPICS)]
    named = {
        f"{path.relative_to(ROOT)}, line {number}: {line.strip()}"
        for path in outside
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if names.search(line)
    }
    assert not named, "\n".join(sorted(named))


def test_every_fault_of_the_benchmark_can_be_put_into_the_source():
    faults = [fault for file in ROOT.glob("tests/*/mutants.yaml") for fault in yaml.safe_load(file.read_text())]
    assert len(faults) > 80
    for fault in faults:
        assert (ROOT / fault["file"]).read_text(encoding="utf-8").count(fault["before"]) == 1, fault
        assert (ROOT / fault["tests"].split("::")[0]).exists(), fault
