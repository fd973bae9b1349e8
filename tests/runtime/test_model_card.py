"""The model card: the fields that the hub reads, what a reader needs, and nothing of the machine."""

import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from lightning_modules.runtime.model_card import _hub_datasets, model_card

HOME = "/home/ada.lovelace"
COMMAND = ["llm-train", "fit", "-c", f"{HOME}/my experiments/offline.yaml", "--model.base", "../ada/model"]
COMMAND += [f'--data.source.init_args.paths=["{HOME}/a.txt", "b.txt"]', "--optimizer.lr", "1e-3", "--data.seed=01"]
CONFIG = {
    "run": {"topic": "some_topic", "study": None, "name": "offline"},
    "model": {"class_path": "lightning_modules.some_topic.Module", "init_args": {"base": "~/model", "width": None}},
    "data": {
        "class_path": "datamodules.some_topic.Data",
        "init_args": {
            "source": {"class_path": "datamodules.sources.HubText", "init_args": {"dataset": "org/some-data"}},
            "others": [
                "hub:org/other.data:column",
                f"{HOME}/books/emma.txt",
                "runs/some_topic/offline",
                "file:///home/ada/b",
            ],
        },
    },
}


def card(folder: Path, architecture: dict, base: str | None = None, licence: str | None = None) -> tuple[dict, str]:
    """Return the fields and the text of the card of a run, of a model with a context of 64 tokens."""
    (folder / "model").mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    session = {"started": "2026-11-27T04:00:00+00:00", "command": shlex.join(COMMAND), "packages": {"torch": "2.13.0"}}
    (folder / "environment.json").write_text(json.dumps([session, session | {"command": "llm-train fit -c again"}]))
    (folder / "model/config.json").write_text(json.dumps(architecture))
    save_file({"a": torch.zeros(20, 60), "b": torch.zeros(34)}, folder / "model/model.safetensors")
    results = {"val/loss": 1.23456, "val/auroc": float("nan")}
    text = model_card(folder, folder / "model", base, 64, 1200, results, {"train": 5000}, licence)
    start, header, *rest = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(header), "".join(rest)


@pytest.mark.parametrize(
    ("architecture", "task", "code"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "text-generation", ""),
        ({"architectures": ["LlamaForCausalLM"]}, "text-generation", ""),
        ({"architectures": ["RobertaForMaskedLM"]}, "fill-mask", ""),
        ({"architectures": ["BertForSequenceClassification"]}, "text-classification", ""),
        (
            {"architectures": ["Own"], "auto_map": {"AutoModelForSequenceClassification": "own.Own"}},
            "text-classification",
            ", trust_remote_code=True",
        ),
        ({"model_type": "our_own"}, None, ""),
    ],
)
def test_the_hub_reads_the_task_and_a_reader_how_to_use_the_model(tmp_path, architecture, task, code):
    fields, text = card(tmp_path, architecture)
    assert fields.get("pipeline_tag") == task
    assert fields.get("library_name") == (task and "transformers")
    assert (f'pipeline("{task}", model="FOLDER"{code})' in text) == (task is not None)
    assert ("Transformers has no class of these parts" in text) == (task is None)


def test_base_licence_and_data_on_the_hub_are_fields(tmp_path):
    fields, text = card(tmp_path, {"architectures": ["GPT2LMHeadModel"], "n_positions": 66}, "org/base", "mit")
    assert fields["base_model"] == "org/base"
    assert fields["license"] == "mit"
    assert fields["datasets"] == ["org/other.data", "org/some-data"]
    for row in (
        "| weights | 1,234 |",
        "| context | 64 tokens |",
        "| trained from | `org/base` |",
        "| training | 1,200 steps of `lightning_modules.some_topic.Module` |",
        "| licence | mit |",
        "| made | 2026-11-27 |",
        "| versions | torch 2.13.0 |",
        "| train | 5,000 |",
        "| `val/loss` | 1.235 |",
    ):
        assert row in text
    assert "auroc" not in text
    assert "# some_topic/offline" in text
    assert "    llm-train fit -c again" in text


def test_a_model_with_a_chat_template_is_used_with_messages(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/chat_template.jinja").touch()
    assert 'pipe([{"role": "user", "content":' in card(tmp_path, {"architectures": ["GPT2LMHeadModel"]})[1]


def test_no_path_and_no_user_of_the_machine_is_in_the_card(tmp_path):
    fields, text = card(tmp_path, {"architectures": ["GPT2LMHeadModel"]}, f"{HOME}/model")
    assert "base_model" not in fields
    assert fields["license"] == "unknown"
    assert "ada" not in text.replace("torch.optim.Adam", "")
    assert "home" not in text
    command = next(line for line in text.splitlines() if line.startswith("    llm-train fit -c off"))
    words = ["llm-train", "fit", "-c", "offline.yaml", "--model.base", "model"]
    words += ["--data.source.init_args.paths=['a.txt', 'b.txt']", "--optimizer.lr", "1e-3", "--data.seed=01"]
    assert shlex.split(command) == words
    assert "runs/some_topic/offline" in text  # a path in the working folder says where the model is from
    assert "width" not in text


def test_a_folder_named_as_a_model_on_the_hub_is_not_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/one").mkdir(parents=True)
    assert "base_model" not in card(tmp_path, {"architectures": ["GPT2LMHeadModel"]}, "runs/one")[0]


@pytest.mark.parametrize(
    ("dataset", "named"),
    [
        ("owner/data.set", ["owner/data.set"]),
        ("/home/alice/qa", []),
        ("./data/qa", []),
        ("~/data/qa", []),
        ("../alice/qa", []),
        ("alice/private/qa", []),
        ("alice/qa.json", []),
        ("here/qa", []),  # in a folder of this machine
        ("runs/qa", []),
    ],
)
def test_a_dataset_on_the_hub_is_named_and_a_path_is_not(tmp_path, monkeypatch, dataset, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert list(_hub_datasets({"dataset": dataset})) == named
    assert list(_hub_datasets({"records": [f"hub:{dataset}:answer"]})) == named
