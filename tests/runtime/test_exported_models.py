"""Exported models of every topic in another program, which has Transformers and not this project.

One process answers all questions about them, since importing Transformers takes seconds. The models are those of the
files `exports.py` of the topics.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import Exported
from shared_runs import own_world

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
TOPICS = [importlib.import_module(f"{file.parent.name}.exports") for file in sorted(TESTS.glob("*/exports.py"))]
MODELS: dict[str, Callable[[Path], Exported]] = {
    f"{topic.__name__.split('.')[0]}_{name}": make for topic in TOPICS for name, make in topic.MODELS.items()
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """All models with random weights, exported."""
    root, made = tmp_path_factory.mktemp("exported"), {}
    with own_world(root):
        for name, make in MODELS.items():
            torch.manual_seed(0)
            made[name] = make(root / name)
            made[name].export()
    return made


@pytest.fixture(scope="module")
def answers(models: dict[str, Exported], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the other program says about each model."""
    questions = [{"folder": str(model.folder)} | model.question for model in models.values()]
    home = tmp_path_factory.mktemp("hub")
    done = subprocess.run(
        [sys.executable, "-P", TESTS / "other_program.py"],
        input=json.dumps(questions),
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)},
        cwd=home,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["ours"] == []
    assert "must be `None` or an integer within the vocabulary" not in done.stderr
    return dict(zip(models, said["answers"], strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_another_program_uses_a_model_as_this_one_does(models, answers, name):
    assert "failed" not in answers[name], answers[name]["failed"]
    models[name].check(models[name], answers[name])


@pytest.mark.parametrize("name", MODELS)
def test_the_files_follow_the_umask_and_name_a_tokenizer_that_every_version_of_transformers_has(models, name):
    if not (models[name].folder / "model.safetensors").is_file():
        return  # a tokenizer alone
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in models[name].folder.iterdir()}
    assert modes == dict.fromkeys(modes, "0o640"), modes
    settings = json.loads((models[name].folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "is_local" not in settings
