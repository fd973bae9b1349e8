"""Names of models, tokenizers and datasets that mean a place on this machine are never looked up on the hub."""

from pathlib import Path

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.hub_datasets import load_hub_dataset
from datamodules.tokenizers import load_tokenizer
from experiments.__main__ import _mistake_behind
from lightning_modules.common.hub import is_path
from lightning_modules.finetuning.bases import load_pretrained

MISSING = [
    "runs/name",
    "runs/t/a/tokenizer",
    "here/model",
    "./model",
    "../x",
    "C:\\x",
    "~/lost",
    "gpt2/",
    "/lost",
    "a b",
]
LOADERS = {
    "tokenizer": load_tokenizer,
    "base": load_pretrained,
    "dataset": lambda name: load_hub_dataset(name, "train"),
}


@pytest.fixture(autouse=True)
def _no_look_up(monkeypatch):
    for module in ("datamodules.tokenizers", "lightning_modules.finetuning.bases", "datamodules.hub_datasets"):
        monkeypatch.setattr(f"{module}.hub_answers", lambda: pytest.fail("a look-up on the hub"))
    Path("here").mkdir()


@pytest.mark.parametrize("name", MISSING)
@pytest.mark.parametrize("loader", LOADERS)
def test_a_missing_place_is_one_line_with_advice(loader, name):
    with pytest.raises(MisconfigurationException, match=r"does not exist.*(give|makes)") as refused:
        LOADERS[loader](name)
    assert "Repo id" not in str(refused.value)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_file_in_the_place_of_a_folder_is_one_line(loader):
    Path("here/file").write_text("text")
    with pytest.raises(MisconfigurationException, match="here/file"):
        LOADERS[loader]("here/file")


@pytest.mark.parametrize("name", ["gpt2", "owner/name", "owner/name-0.5B_x.y"])
def test_other_names_may_be_on_the_hub(name):
    assert not is_path(name)


def test_a_user_who_is_not_there_is_one_line():
    with pytest.raises(RuntimeError) as raised:
        load_tokenizer("~nobody-of-this-name/tokenizer")
    assert _mistake_behind(raised.value) is raised.value
