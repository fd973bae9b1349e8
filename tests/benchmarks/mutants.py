"""Put each fault of `tests/*/mutants.yaml` into a copy of the source, and check that a test fails.

Run `python tests/benchmarks/mutants.py [FOLDER...]`; a fault takes about ten seconds. Exit code 1 if one is not found.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
COPIED = ("experiments", "lightning_modules", "datamodules", "tests", "pyproject.toml", "README.md")


def failing_test(copy: Path, mutant: dict[str, str]) -> str | None:
    """Return the first test that fails with a fault in the source, or nothing if all pass."""
    file = copy / mutant["file"]
    source = file.read_text(encoding="utf-8")
    if source.count(mutant["before"]) != 1:
        raise SystemExit(f"{mutant['file']} does not have once: {mutant['before']}")
    file.write_text(source.replace(mutant["before"], mutant["after"]), encoding="utf-8")
    try:
        options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not gpu and not network"]
        command = [sys.executable, "-m", "pytest", *options, mutant["tests"]]
        environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    finally:
        file.write_text(source, encoding="utf-8")
    return next((line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), None)


def main() -> int:
    """Try the faults of all folders, or of those named, and return the number that no test finds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", help="folders of tests/ (default: all)")
    folders = parser.parse_args().folders or sorted(path.parent.name for path in ROOT.glob("tests/*/mutants.yaml"))
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            copied = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copied(ROOT / name, copy / name)
        for name in folders:
            for mutant in yaml.safe_load((ROOT / "tests" / name / "mutants.yaml").read_text(encoding="utf-8")):
                found = failing_test(copy, mutant)
                missed += found is None
                print(f"{mutant['file']}: {mutant['before']}\n    {found or 'NOT FOUND'}", flush=True)
    print(f"{missed} faults were not found")
    return missed


if __name__ == "__main__":
    sys.exit(bool(main()))
