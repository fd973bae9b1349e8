"""The JSON schema for editors, which accepts every YAML file and no misspelt key."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path
    for path in (ROOT / "experiments").rglob("*.yaml")
    if "class_path" in path.read_text() or path.parent.name == "trainer"
)
SWEEPS = [path for path in FILES if "method" in yaml.safe_load(path.read_text())]
SCHEMA = """
import gc
gc.disable()  # nothing of what a short process imports is garbage
from experiments.__main__ import main
main(["schema"])
"""


@pytest.fixture(scope="module")
def written() -> str:
    """Return the schema."""
    # In a process of its own: it describes every class that is loaded, and tests load a great many.
    return subprocess.run([sys.executable, "-c", SCHEMA], cwd=ROOT, capture_output=True, check=True, text=True).stdout


@pytest.fixture(scope="module")
def is_valid(written) -> Callable[[Any], bool]:
    schema = json.loads(written)
    return jsonschema.validators.validator_for(schema)(schema).is_valid


def test_the_schema_has_the_sections_and_is_small(written):
    schema = json.loads(written)
    assert {"model", "data", "optimizer", "trainer"} <= set(schema["properties"])
    assert schema["$defs"]["Module"] == {}  # any network
    assert len(written) < 1e6  # editors read it whole
    assert not re.search(rf'"default": "({re.escape(str(Path.home()))}|{re.escape(str(ROOT))}|.* at 0x)', written)


def experiments() -> list[Path]:
    return [path for path in FILES if path not in SWEEPS and "template" not in path.parts]


def sections(config: Any, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the arguments of each class of a configuration, and the sections, with their keys."""
    if isinstance(config, list):
        for number, item in enumerate(config):
            yield from sections(item, f"{key}.{number}")
    elif isinstance(config, dict):
        if key in ("", ".trainer", ".run"):
            yield key, config
        if "class_path" in config and "init_args" in config:
            yield f"{key}.init_args", config["init_args"]
        for name, item in config.items():
            yield from sections(item, f"{key}.{name}")


@pytest.mark.parametrize("path", experiments(), ids=lambda path: "/".join(path.parts[-2:]))
def test_every_file_is_valid_and_with_a_misspelt_key_is_not(is_valid, path):
    config = yaml.safe_load(path.read_text())
    assert is_valid(config)
    for number, (key, _) in enumerate(sections(config)):
        misspelt = copy.deepcopy(config)
        [*sections(misspelt)][number][1]["misspelt"] = 1
        assert not is_valid(misspelt), key


def test_classes_of_the_user_are_valid_and_misspelt_ones_of_the_project_are_not(is_valid):
    def with_callback(path: str) -> dict[str, Any]:
        return {"trainer": {"callbacks+": [{"class_path": path}]}}

    assert is_valid(with_callback("my_package.Mine"))
    assert is_valid(with_callback("lightning_modules.runtime.stop.GracefulStop"))
    assert not is_valid(with_callback("lightning_modules.runtime.stop.GracefulStopp"))
    assert is_valid({"model": {"init_args": {"n_layer": 2}}})  # over another file
    assert not is_valid({"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": "fast"}}})
