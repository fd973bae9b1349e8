"""Tokenizers of the `tokenizers` library: the one that a run learned, and another to compare it with."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.common.hub import hub_answers, is_path
from lightning_modules.common.messages import first_line

if TYPE_CHECKING:  # imported where it is used: it is slow to import
    from tokenizers import Tokenizer


def rust_tokenizer(content: dict[str, Any]) -> "Tokenizer":
    """Return the tokenizer of the library for the result of `to_tokenizer_json`."""
    from tokenizers import Tokenizer

    return _of_text_only(Tokenizer.from_str(json.dumps(content)))


def load_reference(name: str) -> "Tokenizer":
    """Return a tokenizer to compare with, by its name; see `reference` of `BPEModule`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    path = Path(name).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    gpt2_files = [path / "vocab.json", path / "merges.txt"]
    try:
        if file.is_file():
            tokenizer = Tokenizer.from_file(str(file))
        elif all(part.is_file() for part in gpt2_files):
            tokenizer = Tokenizer(models.BPE.from_file(*map(str, gpt2_files)))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
        elif path.is_dir():
            raise OSError("the folder holds neither tokenizer.json nor vocab.json and merges.txt")
        elif is_path(name):
            raise OSError(f"it does not exist (working folder: {Path.cwd()})")
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(
                name, local_files_only=not hub_answers(), trust_remote_code=False
            ).backend_tokenizer
    except Exception as error:  # the two libraries raise nothing narrower
        raise MisconfigurationException(
            f"model.reference: {name!r} could not be loaded ({first_line(error)}); give a folder with "
            "tokenizer.json, or with GPT-2's vocab.json and merges.txt, or null"
        ) from error
    return _of_text_only(tokenizer)


def _of_text_only(tokenizer: "Tokenizer") -> "Tokenizer":
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
