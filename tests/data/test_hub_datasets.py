"""A hub that cannot be reached is reported in one line."""

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.hub_datasets import load_hub_dataset


def test_an_unreachable_hub_is_one_line_that_names_the_dataset_and_the_advice(monkeypatch):
    monkeypatch.setattr("datamodules.hub_datasets.hub_answers", lambda: False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: pytest.fail("the library would try for long"))
    with pytest.raises(MisconfigurationException) as caught:
        load_hub_dataset("nobody/nothing", "train", "small", advice="take FILE")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("dataset nobody/nothing (config small, split train) could not be read")
    assert "the Hugging Face hub does not answer; HF_HUB_OFFLINE=1 takes an earlier download" in str(caught.value)
    assert str(caught.value).endswith("take FILE")
