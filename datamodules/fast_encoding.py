"""Encoding of long texts by tiktoken, which has the ids of the `tokenizers` library at several times its speed.

tiktoken merges, in each word, the neighbours that together are the token of the lowest rank. The library merges the
neighbours that the list of merges names, the earliest first. Both give the same tokens for every word if the library
encodes each token of the list as itself: then, where two neighbours make up a token, they are those that the list names
for it. This is checked for each tokenizer. The words are found by two engines for regular expressions; that they agree
is checked on the beginning of each text.
"""

import functools
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.tokenizers import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Encode = Callable[[str], np.ndarray]

_SAMPLE = 2**17  # characters at the beginning of a text that both encode; a shorter text is left to the library

# What the library's pre-tokenizer ByteLevel finds; without backtracking in words, which is faster.
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+"

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False}
# Settings of a model that only merges: of others, the ids can depend on more than the merges.
_PLAIN_BPE: dict[str, Any] = {
    "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
    "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
}  # fmt: skip


class TextEncoder:
    """Encodes a text batch by batch, by tiktoken if that gives the same ids for the beginning of the text.

    Args:
        tokenizer: Tokenizer of the text.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self.tokenizer = tokenizer
        self._fast: Encode | None = None
        self._sample: list[tuple[str, np.ndarray]] = []  # texts at the beginning, and their ids by the library
        self._missing = _SAMPLE  # characters of the sample

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of each text, (T,); see `datamodules.tokenizers.encode`."""
        sample = self._encode_sample(texts) if self._missing > 0 else []
        rest = texts[len(sample) :]
        if self._fast is None:
            return sample + encode(self.tokenizer, rest)
        with ThreadPoolExecutor(_n_threads()) as pool:
            return sample + list(pool.map(self._fast, rest))

    def _encode_sample(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of the first texts, which complete the sample, or of all; choose when it is complete."""
        sizes = accumulate(map(len, texts))
        n = next((number for number, size in enumerate(sizes, start=1) if size >= self._missing), len(texts))
        ids = encode(self.tokenizer, texts[:n])
        self._sample += zip(texts[:n], ids, strict=True)
        self._missing -= sum(map(len, texts[:n]))
        if self._missing <= 0:
            fast = fast_encoder(self.tokenizer)
            if fast is not None and all(np.array_equal(fast(text), known) for text, known in self._sample):
                self._fast = fast
            self._sample = []
        return ids


def _n_threads() -> int:
    """Return the number of threads, by the variable of the library."""
    return 1 if os.environ.get("TOKENIZERS_PARALLELISM") == "false" else len(os.sched_getaffinity(0))


@functools.lru_cache(maxsize=1)
def fast_encoder(tokenizer: "PreTrainedTokenizerFast") -> Encode | None:
    """Return a function that encodes a text by tiktoken; `None` if the ids would not be those of the tokenizer."""
    try:
        import tiktoken
    except ImportError:
        return None
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if "unit" in tokenizer.init_kwargs:
        return None
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    pattern = _pattern(content["pre_tokenizer"])
    is_plain = all((model.get(key) or None) == (value or None) for key, value in _PLAIN_BPE.items())
    if pattern is None or not is_plain or content["normalizer"] is not None:
        return None
    if any(not token["special"] for token in content["added_tokens"]):
        return None
    bytes_of = {letter: bytes([byte]) for byte, letter in bytes_to_unicode().items()}
    vocabulary, merged = model["vocab"], ["".join(merge) for merge in model["merges"]]
    tokens = [*bytes_of, *merged]  # by rank
    if len(set(tokens)) < len(tokens) or not vocabulary.keys() >= set(tokens):
        return None
    merge = tokenizer.backend_tokenizer.model.tokenize
    if any([part.value for part in merge(token)] != [token] for token in merged):
        return None
    ranks = {b"".join(map(bytes_of.__getitem__, token)): rank for rank, token in enumerate(tokens)}
    ids = np.array([vocabulary[token] for token in tokens], dtype=np.uint32)
    # An encoding without a special token would look for the empty one everywhere. This one is not allowed in a text, so
    # that its characters are text.
    encoding = tiktoken.Encoding(
        "text", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|not in a text|>": len(tokens)}
    )
    return lambda text: ids[encoding.encode_to_numpy(text, disallowed_special=())]


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """Return the regular expression with which a byte-level pre-tokenizer finds words; `None` for any other."""
    steps = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    if any(steps[-1].get(key) != value for key, value in _BYTE_LEVEL.items()):
        return None
    if len(steps) == 1 and steps[0]["use_regex"]:
        return _GPT2_PATTERN
    if len(steps) != 2 or steps[1]["use_regex"]:
        return None
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    found = all(steps[0].get(key) == value for key, value in split.items())
    return steps[0]["pattern"].get("Regex") if found else None
