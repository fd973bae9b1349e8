"""Every tokenizer is a transformers fast tokenizer: bytes, characters, a tokenizer.json, or a name on the hub."""

import functools
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from datamodules.cache import cache_root
from datamodules.sources import Source
from lightning_modules.common.files import atomic_file
from lightning_modules.common.hub import hub_answers

if TYPE_CHECKING:  # imported where used: transformers is slow to import
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(name: str, source: Source | None = None, cache_dir: Path | None = None) -> "PreTrainedTokenizerFast":
    """Return the tokenizer of that name.

    Args:
        name: `byte`: the 256 bytes and `<|endoftext|>`, for any text in any language. `character`: one token for each
            distinct character of the source, and `<|endoftext|>` where the source has several documents. Otherwise a
            folder with a `tokenizer.json`, such a file itself, or the name of a model on the Hugging Face hub.
        source: the text whose characters `character` takes; read once, then remembered in the cache.
        cache_dir: where to remember them; by default `cache_root()`.

    Raises:
        MisconfigurationException: there is no such tokenizer, or it is incomplete.
    """
    if name == "byte":
        return byte_tokenizer()
    if name == "character":
        if source is None:
            raise MisconfigurationException("tokenizer character needs a source whose characters it takes")
        return character_tokenizer(*_scan(source, cache_dir or cache_root()))
    path = Path(name).expanduser()
    tokenizer = _from_disk(path) if path.exists() or _looks_like_path(name) else _from_hub(name)
    if len(tokenizer) <= 1:
        raise MisconfigurationException(
            f"tokenizer {name} has a vocabulary of {len(tokenizer)}, so its files are incomplete: make or download it "
            "again"
        )
    if tokenizer.eos_token is None and END_OF_TEXT in tokenizer.get_vocab():
        tokenizer.eos_token = END_OF_TEXT  # a bare tokenizer.json does not say what its special tokens are for
    return tokenizer


class WithTokenizer:
    """What a datamodule with a tokenizer tells the module, and does with a prompt."""

    tokenizer: "PreTrainedTokenizerFast"

    @property
    def vocab_size(self) -> int:
        """The number of token ids."""
        return vocab_size(self.tokenizer)

    @property
    def pad_token_id(self) -> int | None:
        """The tokenizer's padding token, where it has one."""
        return self.tokenizer.pad_token_id

    def encode(self, text: str) -> Tensor:
        """Return the token ids of a text, a prompt say: (T,) int64."""
        return torch.from_numpy(encode(self.tokenizer, [text])[0].astype("int64"))


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """Return the tokenizer whose token ids are the bytes of the UTF-8 text, with `<|endoftext|>` after them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(_byte_letters())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _wrap(backend, "byte", end_of_text=True)


def character_tokenizer(characters: str, end_of_text: bool) -> "PreTrainedTokenizerFast":
    """Return the tokenizer with one token for each of these characters, and perhaps `<|endoftext|>` after them.

    It has no token for other characters: one would make the vocabulary larger than the text's own, and a text could
    not be read back from its tokens. Encoding a text that holds others is an error.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    # The unknown token is none of the vocabulary, so that the model refuses what it does not know.
    backend = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(characters)}, unk_token="unknown"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return _wrap(backend, "character", end_of_text)


def vocab_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """Return one more than the largest token id: the rows that an embedding needs."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return a hash of everything that decides how the tokenizer splits a text."""
    text = f"{tokenizer.backend_tokenizer.to_str()} {tokenizer.eos_token_id}"
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def encode(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str]) -> list[np.ndarray]:
    """Return the token ids of each text: the text alone, no special tokens added, none recognised in it.

    Raises:
        MisconfigurationException: a text holds a character that a character tokenizer does not know.
    """
    unit = tokenizer.init_kwargs.get("unit")
    if unit is not None:  # a table gives the same ids a hundred times as fast as the search for merges
        return [_look_up(tokenizer, unit, text) for text in texts]
    # Set, it also keeps the library from warning of the fork whenever a loader starts its workers.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True  # "<|endoftext|>" in a text is text
    backend.no_truncation()
    backend.no_padding()
    encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]


def token_byte_lengths(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray:
    """Return how many bytes of UTF-8 text each token stands for: (vocab,) int64, 0 for special tokens.

    Bits per byte divides by their sum. Exact for byte-level and character tokenizers; for WordPiece and SentencePiece,
    which do not keep a text's every space, the length of the token as it is written.
    """
    from tokenizers import decoders

    byte_level = isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)
    lengths = np.zeros(vocab_size(tokenizer), dtype=np.int64)
    for token, i in tokenizer.get_vocab().items():
        if byte_level:
            lengths[i] = len(token)  # each letter of a byte-level token is one byte
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            lengths[i] = 1  # SentencePiece's byte fallback
        else:
            lengths[i] = len(token.removeprefix("##").replace("▁", " ").encode())
    for i, added in tokenizer.added_tokens_decoder.items():
        lengths[i] = 0 if added.special else len(added.content.encode())
    return lengths


def _byte_letters() -> list[str]:
    """Return the printable letter that stands for each byte in byte-level vocabularies (Radford et al., 2019).

    Bytes that are printable in Latin-1 stand for themselves, the others for the letters from U+0100 onwards.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _wrap(backend: object, unit: Literal["byte", "character"], end_of_text: bool) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    # `unit` travels in tokenizer_config.json, so that a saved copy is as fast.
    special = {"eos_token": END_OF_TEXT} if end_of_text else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, unit=unit, **special)


def _look_up(tokenizer: "PreTrainedTokenizerFast", unit: str, text: str) -> np.ndarray:
    if unit == "byte":
        return np.frombuffer(text.encode(), dtype=np.uint8)
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    ids = _character_table(tokenizer)[code_points]
    if (unknown := np.flatnonzero(ids < 0)).size:
        letter = text[unknown[0]]
        raise MisconfigurationException(
            f"character {letter!r} (U+{ord(letter):04X}) is not in the character tokenizer's vocabulary: leave it out, "
            "take a source that holds it, or use tokenizer byte, which knows every text"
        )
    return ids


@functools.lru_cache(maxsize=1)
def _character_table(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray:
    table = np.full(0x110000, -1, dtype=np.int32)  # one entry for each code point of Unicode
    for token, i in tokenizer.get_vocab().items():
        if len(token) == 1:
            table[ord(token)] = i
    return table


def _scan(source: Source, cache_dir: Path) -> tuple[str, bool]:
    """Return the distinct characters of a source, sorted, and whether it has several documents."""
    file = cache_dir / "characters" / f"{source.fingerprint()}.json"
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        return known["characters"], known["several_documents"]
    except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged
        pass
    letters: set[str] = set()
    n_documents = 0
    for text, ends_document in source.pieces():
        letters.update(text)
        n_documents += ends_document
    if not letters:
        raise MisconfigurationException("tokenizer character: the source holds no text; give one that does")
    characters = "".join(sorted(letters))
    with atomic_file(file) as target:
        target.write(json.dumps({"characters": characters, "several_documents": n_documents > 1}).encode())
    return characters, n_documents > 1


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith(".json") or name.count("/") > 1


def _from_disk(path: Path) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.exists():
        what = "tokenizer folder" if path.is_dir() else "tokenizer"
        problem = "holds no tokenizer.json" if path.is_dir() else "does not exist"
        if run := re.search(r"\bruns/([^/]+)/([^/]+)/", path.as_posix()):
            advice = f"`llm-train fit -c experiments/{run[1]}/{run[2]}.yaml` makes one"
        else:
            advice = "give a folder that holds a tokenizer.json, byte, character, or a name on the hub"
        raise MisconfigurationException(f"{what} {path} {problem}: {advice}")
    try:
        if path.is_dir():
            return PreTrainedTokenizerFast.from_pretrained(path)
        return PreTrainedTokenizerFast(tokenizer_file=str(file))
    except Exception as error:  # the Rust library raises nothing narrower
        raise MisconfigurationException(
            f"tokenizer {file} could not be read ({type(error).__name__}: {error}): make or download it again"
        ) from error


def _from_hub(name: str) -> "PreTrainedTokenizerFast":
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=not hub_answers())
    except Exception as error:  # OSError, ValueError or ImportError, by what is missing
        reason = str(error).strip().split("\n")[0]
        raise MisconfigurationException(
            f"tokenizer {name} is no local folder or file, and could not be loaded from the Hugging Face hub "
            f"({type(error).__name__}: {reason}): check the name and the network; byte and character need neither"
        ) from error
    if not tokenizer.is_fast:
        raise MisconfigurationException(f"tokenizer {name} has no fast (tokenizer.json) form: choose one that has")
    return tokenizer
