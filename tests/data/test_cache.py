"""The cache keeps arrays, and replaces files that are damaged or could run code."""

import numpy as np
import pytest

from datamodules.cache import cached_array, read_array
from lightning_modules.common.cache import cache_root


def test_the_folder_of_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LLM_TRAIN_CACHE", str(tmp_path / "chosen"))
    assert cache_root() == tmp_path / "chosen"
    monkeypatch.delenv("LLM_TRAIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg/llm-train"


def test_an_array_is_computed_once(tmp_path):
    computed = []

    def compute() -> np.ndarray:
        computed.append(1)
        return np.arange(4)

    file = tmp_path / "arrays" / "a.npy"
    for mmap_mode in (None, "r"):
        assert cached_array(file, compute, mmap_mode).tolist() == [0, 1, 2, 3]
    assert len(computed) == 1


@pytest.mark.parametrize("damage", ["torn", "pickled", "empty"])
def test_a_file_that_is_damaged_or_pickled_is_replaced(tmp_path, damage):
    file = tmp_path / "a.npy"
    np.save(file, np.array([{}, 1], dtype=object) if damage == "pickled" else np.arange(400), allow_pickle=True)
    if damage != "pickled":
        file.write_bytes(file.read_bytes()[: 200 if damage == "torn" else 0])
    assert cached_array(file, lambda: np.ones(2)).tolist() == [1, 1]
    assert np.load(file).tolist() == [1, 1]


@pytest.mark.parametrize(
    "content",
    [
        b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', (",  # its header is parsed as Python
        b"\x93NUMPY\x01\x00\x10\x00{'a': 1}        ",
        b"PK\x05\x06" + bytes(18),  # an archive without arrays
        b"",
        b"\x80\x04.",
    ],
)
def test_a_file_that_is_no_array_is_a_value_error_and_is_computed_again(tmp_path, content):
    file = tmp_path / "a.npy"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"\w"):
        read_array(file)
    assert cached_array(file, lambda: np.arange(3)).tolist() == [0, 1, 2]
