"""Token files: those of small texts never change; those of large ones are written in parts, by any processes."""

import hashlib
import json

import numpy as np
import pytest
from helpers import text

from datamodules import sources
from datamodules.decoder_pretrain import PretrainDataModule
from datamodules.sources import Files, ListText
from datamodules.tokenizers import byte_tokenizer
from datamodules.tokens import prepare_tokens

MERGES = ["a n", "e r", "i t", "Ġ s", "o u", "Ġ t", "Ġs t", "m n", "an er", "Ġ n", "Ġ m", "u n", "e e"]


@pytest.fixture
def bpe(tmp_path):
    """Return the path of a small byte-level BPE tokenizer of GPT-2's pattern."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = [*bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)]
    vocabulary = {letter: number for number, letter in enumerate(["<|endoftext|>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split()) for merge in MERGES]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


# --- small texts -----------------------------------------------------------------------------------------------------


def hashed(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


LINES = "".join(f"{line}\n" for line in text(40_000).split("."))  # 190 kB: several pieces
DOCUMENTS = [f"{part}\n" for part in text(3_000, seed=1).split(".")]

# Tokens of the splits and batches of the third epoch, computed with version 0.2 before texts were prepared in parts.
BYTES = ["d615c708cb0e44f4", "788ff259ae15e136", "7671e1d7531fcd35"]
PAIRS = ["6b33a062e35a7947", "9a230798e33d35ea", "c4ef8a8780cfb9b3"]
OF_DOCUMENTS = ["33ae500b709389b5", "577c6a4010e96c36", "7dc323768822714d"]
CHARACTERS = ["f983d7b782862447", "180afa74c9b5063c", "8395915b186e9289"]


@pytest.mark.parametrize(
    ("tokenizer", "split", "windows", "expected"),
    [
        ("byte", "tail", "random", [*BYTES, "b2c62c9ec99d403a"]),
        ("byte", "tail", "sequential", [*BYTES, "e7c41c0caaeacb37"]),
        ("bpe", "tail", "sequential", [*PAIRS, "69db8cb5ac382006"]),
        ("bpe", "documents", "random", [*OF_DOCUMENTS, "5ee54887a6cb65ef"]),
        ("character", "auto", "sequential", [*CHARACTERS, "3db539888600cfa0"]),
    ],
)
def test_tokens_and_windows_of_small_texts_are_those_of_earlier_versions(
    tokenizer, split, windows, expected, bpe, tmp_path
):
    (tmp_path / "text.txt").write_text(LINES)
    source = Files(str(tmp_path / "text.txt")) if split == "tail" else ListText(DOCUMENTS)
    name = bpe if tokenizer == "bpe" else tokenizer
    data = PretrainDataModule(source, 16, 4, name, windows, split, 0.1, 0.05, cache_dir=str(tmp_path), seed=3)
    found = [hashed(data.files[side].open()) for side in ("train", "val", "test")]
    loader = data.train_dataloader()
    loader.sampler.set_epoch(2)
    assert [*found, hashed(np.stack([batch["input_ids"].numpy() for batch in loader]))] == expected


# --- large texts -----------------------------------------------------------------------------------------------------


def all_tokens(files):
    """Return the tokens of each split as lists."""
    places = {side: np.arange(file.n_tokens)[None] for side, file in files.items()}
    return {side: files[side].open()[places[side]].tolist() for side in files if files[side].n_tokens}


@pytest.mark.parametrize("split", ["tail", "documents", "auto"])
@pytest.mark.parametrize("kind", ["text", "files", "rows", "crlf"])
def test_a_text_in_parts_has_the_tokens_of_the_whole(kind, split, tmp_path, monkeypatch):
    folder = tmp_path / "texts"
    folder.mkdir()
    if kind == "files":
        for number in range(30):
            (folder / f"{number:02d}.txt").write_text(text(700, seed=number).replace(". ", "é\n"), encoding="utf-8")
    elif kind == "rows":
        rows = [json.dumps({"id": "x", "text": text(50, seed=n)}) for n in range(400)]
        (folder / "a.jsonl").write_text("\n".join(rows) + "\n")
    else:
        lines = (LINES[:60_000].replace("\n ", "\n") + "\n\n  \n").replace("\n", "\r\n" if kind == "crlf" else "\n")
        (folder / "a.txt").write_bytes(("\ufeff" + lines).encode())
    source = Files(str(folder))
    options = {"split": split, "val_fraction": 0.2, "test_fraction": 0.1}
    monkeypatch.setattr(sources, "PIECE_SIZE", 1_000)
    whole = prepare_tokens(source, byte_tokenizer(), tmp_path / "whole", **options)
    monkeypatch.setattr(sources, "PART_SIZE", 10_000)
    parts = prepare_tokens(source, byte_tokenizer(), tmp_path / "parts", **options)
    few = split == "auto" and kind in ("text", "crlf")  # one document, which is cut by its length
    assert len(list((tmp_path / "parts/tokens").glob("*/0*"))) == (0 if few else len(source.parts()))
    assert len(source.parts()) >= 5
    assert all_tokens(parts) == all_tokens(whole)
    assert [file.split for file in parts.values()] == [file.split for file in whole.values()]
    assert prepare_tokens(source, byte_tokenizer(), tmp_path / "parts", **options) == parts
