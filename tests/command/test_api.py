"""Runs from Python: generation, further training with a plain Trainer, and what a folder lacks."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from helpers import BEST, LAST
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import experiments
from experiments.class_paths import import_class


def module_class(run: Path) -> Any:
    return import_class(yaml.safe_load((run / "config.yaml").read_text())["model"]["class_path"])


@pytest.mark.slow
def test_python_generates_what_the_command_generates(llm_train, whole):
    shown = llm_train("generate", "--run", whole(), "--prompt", "ae", "--max_new_tokens", "30", "--seed", "3")
    run = experiments.load_run(whole())
    assert isinstance(run, experiments.Run)
    text = run.generate("ae", 30, seed=3)
    assert shown.out == f"ae{text}\n"
    assert text == "".join(run.stream(torch.tensor(list(b"ae")).numpy(), 30, seed=3))
    assert text != run.generate("ae", 30, seed=4)
    assert run.generate("ae", 30, temperature=0) == run.generate("ae", 30, top_k=1)
    assert run.config["model"]["init_args"]["n_layer"] == 2
    with pytest.raises(MisconfigurationException, match=r"PretrainModule does not classify texts"):
        run.classify(["a"])
    with pytest.raises(TypeError, match=r"classify takes a list of texts"):
        run.classify("a")
    with pytest.raises(ValueError, match="top_p"):
        run.generate("ae", top_p=2.0)
    with pytest.raises(ValueError, match="prompt: there is no token in it"):
        run.generate("")
    with pytest.raises(TypeError, match="prompt: give one text"):
        run.generate(["a", "b"])
    with pytest.raises(TypeError, match=r"Run\.generate\(\) got an unexpected keyword argument 'max_tokens'"):
        run.generate("a", max_tokens=3)


def test_a_module_is_loaded_from_its_checkpoint_and_trains_on_ones_own_batches(whole):
    module = module_class(whole()).load_from_checkpoint(whole() / BEST)
    saved = torch.load(whole() / BEST, weights_only=True)["state_dict"]
    assert all(torch.equal(weight, saved[name]) for name, weight in module.state_dict().items())

    rows = [torch.tensor(list(text.encode())) for text in ("some words of mine", "some other letter")]
    batches = [{"input_ids": row[None, :15], "targets": row[None, 1:16]} for row in rows]
    module.optimizer_factory = lambda groups: torch.optim.AdamW(groups, lr=1e-2)
    torch.manual_seed(0)  # of the dropout
    before = [float(module.loss(batch)) for batch in batches]
    trainer = L.Trainer(max_epochs=8, accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    assert sum(float(module.loss(batch)) for batch in batches) < 0.8 * sum(before)


def test_arguments_of_the_constructor_replace_those_of_the_checkpoint(whole):
    loads = module_class(whole()).load_from_checkpoint
    module = loads(whole() / LAST, map_location="cpu", weights_only=True, dropout=0.3)
    assert module.decoder.config.residual_dropout == 0.3
    with pytest.raises(MisconfigurationException, match="the checkpoint does not fit the model"):
        loads(whole() / LAST, n_layer=1)


def test_a_folder_that_is_no_run_and_a_run_without_a_tokenizer(tmp_path, whole):
    with pytest.raises(MisconfigurationException, match=r"no config.yaml in it; give the folder of a run"):
        experiments.load_run(tmp_path)
    (tmp_path / "runs/topic/my/model").mkdir(parents=True)
    (tmp_path / "runs/topic/my/config.yaml").touch()
    for folder in ("topic/my", "runs/topic/my/model", "runs/topic/my/model/lost", "runs/topics/my"):
        with pytest.raises(MisconfigurationException, match=r"no config.yaml in it; did you mean runs/topic/my\?"):
            experiments.load_run(folder)
    (tmp_path / "checkpoints").mkdir()
    for name in ("config.yaml", LAST):
        (tmp_path / name).write_bytes((whole() / name).read_bytes())
    run = experiments.load_run(str(tmp_path), "last", "cpu")
    with pytest.raises(MisconfigurationException, match="there is no tokenizer in it"):
        run.generate("a")
    with pytest.raises(MisconfigurationException, match=r"config.yaml: has no section `data` with a class_path"):
        replace(run, config={"data": None}).classify(["a"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no section `model` with a class_path; give the folder of a run"),
        ("- a\n", "has no section `model`"),
        ("wandb_version: 1\n", "has no section `model`"),
        ("model: gpt2\n", "has no section `model`"),
        ("model: {class_path: }\n", "has no section `model`"),
        ("model: {class_path: lightning_modules.runtime.stop.GracefulStop}\n", "GracefulStop is no module of a run"),
    ],
)
def test_a_configuration_of_another_program_is_refused(tmp_path, content, said):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(MisconfigurationException, match=f"config.yaml: .*{said}"):
        experiments.load_run(tmp_path)


def test_a_class_of_another_package_is_not_imported_unless_it_is_allowed(tmp_path, whole, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    config = yaml.safe_load((whole() / "config.yaml").read_text())
    module, _, name = config["model"]["class_path"].rpartition(".")
    (tmp_path / "hostile.py").write_text(f"from {module} import {name} as Module\n")
    config["model"]["class_path"] = "hostile.Module"
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(MisconfigurationException, match="if you trust its code, add --allow hostile"):
        experiments.load_run(tmp_path / "run")
    assert "hostile" not in sys.modules
    with pytest.raises(MisconfigurationException, match="no such checkpoint"):
        experiments.load_run(tmp_path / "run", allow=["hostile"])


def test_a_device_that_is_not_there_is_an_error_of_one_line(whole, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MisconfigurationException, match="device cuda: PyTorch finds no GPU here"):
        experiments.load_run(whole(), device="cuda")
    with pytest.raises(MisconfigurationException, match="device gpu: PyTorch has none of this name; give cpu or cuda"):
        experiments.load_run(whole(), device="gpu")


def test_the_package_is_cheap_to_import():
    code = "import sys, experiments; sys.exit('torch' in sys.modules or hasattr(experiments, 'nothing'))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
