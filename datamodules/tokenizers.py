"""Fast tokenizers of Transformers: bytes, characters, those of pretrained models and of runs, or a name on the hub."""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from datamodules.rows import check_characters
from datamodules.sources import Source
from lightning_modules.common.byte_level import is_byte_level
from lightning_modules.common.cache import cache_root
from lightning_modules.common.files import write_text
from lightning_modules.common.hub import hub_answers, is_path
from lightning_modules.common.makers import maker_of
from lightning_modules.common.messages import first_line
from lightning_modules.common.pretrained import is_packed, model_folder
from lightning_modules.common.tokenizer_threads import use_threads

if TYPE_CHECKING:  # imported where used: transformers is slow to import
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

use_threads()  # before a loader starts its workers

END_OF_TEXT = "<|endoftext|>"

# Files with a vocabulary, and the class of Transformers that reads each where nothing else in the folder names one.
_FORMS = {
    "tokenizer.json": "PreTrainedTokenizerFast",
    "vocab.json": "GPT2Tokenizer",
    "vocab.txt": "BertTokenizer",
    "tokenizer.model": "LlamaTokenizer",
}

_BYTE_FALLBACK = re.compile(r"<0x[0-9A-F]{2}>")  # of SentencePiece, for characters that are not in the vocabulary


def load_tokenizer(name: str, source: Source | None = None, cache_dir: Path | None = None) -> "PreTrainedTokenizerFast":
    """Return a tokenizer.

    Args:
        name: `byte` has the 256 bytes and `<|endoftext|>` as tokens, for any text in any language. `character` has one
            token for each distinct character of the source, and `<|endoftext|>` if the source has several documents.
            Other names are a folder with a `tokenizer.json` or the files of an older form (`vocab.json` and
            `merges.txt`, `vocab.txt`, `tokenizer.model`), such a `tokenizer.json`, the folder of a run, a `.gguf` file,
            `package:NAME` for a model that an installed package carries, or a model on the Hugging Face hub.
        source: Text with the characters of `character`. It is read once, and its characters are cached.
        cache_dir: Folder of the cache; `cache_root()` by default.
    """
    if name == "byte":
        return byte_tokenizer()
    if name == "character":
        if source is None:
            raise MisconfigurationException("tokenizer character needs a source of text: give one")
        return character_tokenizer(*_scan(source, cache_dir or cache_root()))
    if is_packed(name):
        tokenizer = _from_disk(_folder_of_model(name))
    elif is_path(name):
        tokenizer = _from_disk(Path(name).expanduser())
    else:
        tokenizer = _from_hub(name)
    if not tokenizer.is_fast:
        raise MisconfigurationException(f"tokenizer {name} has no fast (tokenizer.json) form: choose one that has")
    if len(tokenizer) <= 1:
        raise MisconfigurationException(
            f"tokenizer {name} has a vocabulary of {len(tokenizer)}, it is incomplete: make or download it again"
        )
    if tokenizer.eos_token is None and END_OF_TEXT in tokenizer.get_vocab():
        tokenizer.eos_token = END_OF_TEXT  # a tokenizer.json does not name this token
    return tokenizer


class WithTokenizer:
    """Mixin of the datamodules with a tokenizer: values that are linked to the module, and the encoding of a prompt."""

    tokenizer: "PreTrainedTokenizerFast"

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return vocab_size(self.tokenizer)

    @property
    def pad_token_id(self) -> int | None:
        """Padding token of the tokenizer, or `None`."""
        return self.tokenizer.pad_token_id

    def encode(self, text: str) -> Tensor:
        """Return the token ids of a text, (T,) int64."""
        return torch.from_numpy(encode(self.tokenizer, [text])[0].astype("int64"))

    def decode(self, tokens: Iterable[int], before: Sequence[int] = ()) -> str:
        """Return the text that `tokens` add after `before`."""
        return self.tokenizer.decode([*before, *tokens])[len(self.tokenizer.decode(list(before))) :]


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """Return the tokenizer whose ids are the bytes of UTF-8 text; the last id is `<|endoftext|>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    backend = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in bytes_to_unicode().items()}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _wrap(backend, "byte", end_of_text=True)


def character_tokenizer(characters: str, end_of_text: bool) -> "PreTrainedTokenizerFast":
    """Return a tokenizer with one token for each character, and `<|endoftext|>` as the last id if asked for.

    Unknown characters are an error, because their token is not in the vocabulary. So a text can be decoded from its
    tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(characters)}, unk_token="unknown"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return _wrap(backend, "character", end_of_text)


def vocab_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """Return the largest token id plus 1, which is the number of rows that an embedding needs."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return a hash of all settings that decide which tokens a text has."""
    text = f"{_whole_texts(tokenizer).to_str()} {tokenizer.eos_token_id}"
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _whole_texts(tokenizer: "PreTrainedTokenizerFast") -> "Tokenizer":
    """Return the tokenizer of the library, which no longer truncates or pads, as its file may have asked for."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


def encode(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str]) -> list[np.ndarray]:
    """Return the token ids of each text, (T,). No special token is added, and none is recognised in the text."""
    for text in texts:
        check_characters(text, f"text {text[:30]!r}")
    unit = tokenizer.init_kwargs.get("unit")
    if unit is not None:  # a look-up gives the same ids about a hundred times as fast
        return [_look_up(tokenizer, unit, text) for text in texts]
    backend = _whole_texts(tokenizer)
    backend.encode_special_tokens = True  # the characters "<|endoftext|>" in a text are text
    encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]


def without_prefix(tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedTokenizerFast":
    """Return the tokenizer of texts that follow others: it puts no space before a text, as those of SentencePiece do.

    A space before each piece of a text would be one more than the text has. Byte-level tokenizers stay as they are.
    """
    backend = _whole_texts(tokenizer)
    if not re.search("Prepend|Metaspace", f"{backend.normalizer} {backend.pre_tokenizer}"):
        return tokenizer
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    nothing = {"Prepend": {"prepend": ""}, "Metaspace": {"prepend_scheme": "never"}}
    settings = json.loads(backend.to_str(), object_hook=lambda part: part | nothing.get(part.get("type", ""), {}))
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(settings)))


def decode_stream(
    tokenizer: "PreTrainedTokenizerFast", tokens: Iterable[int], before: Sequence[int] = ()
) -> Iterator[str]:
    """Yield the text of tokens as they come: the parts joined are what decoding all tokens at once adds to the text.

    A part is held back while a later token can change it: an incomplete character, and the last words of a tokenizer
    that removes spaces before punctuation.

    Args:
        tokenizer: Tokenizer of the tokens.
        tokens: Tokens as they are generated.
        before: Tokens before them, such as the prompt. Some tokenizers drop the space before a first token.
    """
    ids = list(before)
    printed = len(tokenizer.decode(ids))
    for token in tokens:
        ids.append(token)
        if not _is_byte(tokenizer, token):  # a byte can change the text of the bytes before it
            text = tokenizer.decode(ids)
            end = max(printed, _settled(tokenizer, text))
            yield text[printed:end]
            printed = end
    yield tokenizer.decode(ids)[printed:]


def _is_byte(tokenizer: "PreTrainedTokenizerFast", token: int) -> bool:
    """Return whether a token is a byte of SentencePiece's byte fallback."""
    return _BYTE_FALLBACK.fullmatch(tokenizer.convert_ids_to_tokens(token) or "") is not None


def _settled(tokenizer: "PreTrainedTokenizerFast", text: str) -> int:
    """Return the number of characters that no later token changes."""
    if not tokenizer.clean_up_tokenization_spaces:
        return len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
    last_words = re.search(r"(\s+\S*){1,3}$", text)  # a space before punctuation may be removed
    return last_words.start() if last_words else 0


def token_byte_lengths(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray:
    """Return the number of UTF-8 bytes of each token, (vocab,) int64; 0 for special tokens.

    The numbers are exact for byte-level and character tokenizers. WordPiece and SentencePiece do not keep all spaces of
    a text; for these, the number is the length of the token.
    """
    byte_level = is_byte_level(tokenizer.backend_tokenizer)
    is_character = tokenizer.init_kwargs.get("unit") == "character"
    lengths = np.zeros(vocab_size(tokenizer), dtype=np.int64)
    for token, i in tokenizer.get_vocab().items():
        if byte_level:
            lengths[i] = len(token)  # each character of a byte-level token is one byte
        elif is_character:
            lengths[i] = len(token.encode())
        elif _BYTE_FALLBACK.fullmatch(token):
            lengths[i] = 1
        else:
            lengths[i] = len(token.removeprefix("##").replace("▁", " ").encode())
    for i, added in tokenizer.added_tokens_decoder.items():
        lengths[i] = 0 if added.special else len(added.content.encode())
    return lengths


def _wrap(backend: object, unit: Literal["byte", "character"], end_of_text: bool) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    # `unit` is saved in tokenizer_config.json, so that a loaded copy can use the look-up too.
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
            f"character {letter!r} (U+{ord(letter):04X}) is not in the character tokenizer's vocabulary: remove it, "
            "choose a source that has it, or use tokenizer byte, which encodes every text"
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
    """Return the sorted distinct characters of a source, and whether it has several documents."""
    file = cache_dir / "characters" / f"{source.fingerprint()}.json"
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        return known["characters"], known["several_documents"]
    except (OSError, ValueError, KeyError, TypeError):  # missing or damaged
        pass
    letters: set[str] = set()
    n_documents = 0
    for text, ends_document in source.pieces():
        letters.update(text)
        n_documents += ends_document
    if not letters:
        raise MisconfigurationException("tokenizer character: the source has no text; give another")
    characters = "".join(sorted(letters))
    write_text(file, json.dumps({"characters": characters, "several_documents": n_documents > 1}))
    return characters, n_documents > 1


def _folder_of_model(name: str) -> Path:
    """Return the folder of a model in a package or a GGUF file."""
    try:
        return model_folder(name) or Path(name)
    except ValueError as error:
        raise MisconfigurationException(f"tokenizer {error}") from error


def _from_disk(path: Path) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    # The tokenizer of a run is in a folder of its own, and with the exported model.
    folders = [folder for folder in (path, path / "tokenizer", path / "model") if _form(folder)]
    if path.is_dir() and folders:
        path = folders[0]
    elif path.is_dir() or not path.exists():
        problem = f"folder {path} holds no tokenizer" if path.is_dir() else f"{path} does not exist"
        advice = (
            "give a folder with tokenizer.json, vocab.json and merges.txt, or vocab.txt; byte, character, or a name on "
            "the hub"
        )
        if maker := maker_of(path):
            of_other_run = "" if maker.startswith("did you mean") else "; for the model of another run, give that run"
            advice = maker + of_other_run
        raise MisconfigurationException(f"tokenizer {problem}: {advice}")
    try:
        return _from_folder(path) if path.is_dir() else PreTrainedTokenizerFast(tokenizer_file=str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the Rust library raises plain exceptions, and panics, which are none
        file = path / _form(path) if path.is_dir() else path
        needs = " (is the package sentencepiece installed?)" if file.suffix == ".model" else ""
        again = "make or download it again"
        if path == file and file.suffix != ".json":
            again = "a file is a tokenizer.json; give others in a folder, and convert the ranks of tiktoken to one"
        raise MisconfigurationException(
            f"tokenizer {file} could not be read ({first_line(error)}){needs}: {again}"
        ) from error


def _form(folder: Path) -> str:
    """Return the name of the file in a folder that has the vocabulary, or an empty name without one."""
    with_merges = (folder / "merges.txt").is_file()
    return next((name for name in _FORMS if (folder / name).is_file() and (with_merges or name != "vocab.json")), "")


def _from_folder(folder: Path) -> "PreTrainedTokenizerFast":
    """Return the tokenizer of a folder in any of the `_FORMS`."""
    import transformers

    names_class = (folder / "config.json").is_file() or "tokenizer_class" in _settings(folder)
    if _form(folder) == "tokenizer.json":
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        if tokenizer.all_special_tokens or not names_class:
            return tokenizer
        # In older folders, only the class of the model knows which tokens are special.
    if names_class:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    kind = _FORMS[_form(folder)]
    if kind == "BertTokenizer" and "do_lower_case" not in _settings(folder):
        words = (folder / "vocab.txt").read_text(encoding="utf-8").split()
        cased = any(word != word.lower() for word in words if not word.startswith("["))
        return transformers.BertTokenizer.from_pretrained(folder, do_lower_case=not cased)
    return getattr(transformers, kind).from_pretrained(folder)


def _settings(folder: Path) -> dict[str, Any]:
    """Return the content of `tokenizer_config.json`, empty without it."""
    file = folder / "tokenizer_config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _from_hub(name: str) -> "PreTrainedTokenizerFast":
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=not hub_answers(), trust_remote_code=False)
    except Exception as error:  # OSError, ValueError or ImportError, depending on the cause
        raise MisconfigurationException(
            f"tokenizer {name} is no local folder or file, and could not be loaded from the Hugging Face hub "
            f"({first_line(error)}): check the name and the network; byte and character need neither"
        ) from error
