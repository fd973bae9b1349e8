"""WordPiece, the tokenizer of BERT (Schuster and Nakajima, 2012; Devlin et al., 2019), learned from texts."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datamodules.cache import cache_root, digest
from lightning_modules.common.files import atomic_file

if TYPE_CHECKING:  # imported where used: transformers is slow to import
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = {
    name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
}
_FORMAT = 1  # part of the cache key: increase it when the tokens learned from the same texts change


def learn_wordpieces(texts: Sequence[str], size: int, cache_dir: Path | None = None) -> "PreTrainedTokenizerFast":
    """Return a lower-case tokenizer as that of BERT, whose tokens are learned from texts and kept in the cache.

    Args:
        texts: Texts to learn from.
        size: Largest number of tokens.
        cache_dir: Folder of the cache; by default `cache_root()`.
    """
    from tokenizers import Tokenizer

    file = (cache_dir or cache_root()) / "wordpiece" / f"{digest([_FORMAT, size, *texts])}.json"
    with contextlib.suppress(Exception):  # missing or damaged; the Rust library raises no narrower class
        return _wrap(Tokenizer.from_file(str(file)))
    backend = _backend(_learn(texts, size))
    with atomic_file(file) as target:
        target.write(backend.to_str().encode())
    return _wrap(backend)


def _learn(texts: Sequence[str], size: int) -> dict[str, int]:
    from tokenizers import trainers

    learner = _backend({})
    letters = sorted({letter for text in texts for letter in learner.normalizer.normalize_str(text)} - {" "})
    # The library numbers the letters within words in an order that changes from run to run, and breaks ties between
    # merges by these numbers. As special tokens, the letters have fixed numbers.
    first = [*SPECIAL_TOKENS.values(), *letters, *(f"##{letter}" for letter in letters)]
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=first, show_progress=False)
    learner.train_from_iterator(texts, trainer)
    return learner.get_vocab()


def _backend(vocabulary: dict[str, int]) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    backend = Tokenizer(models.WordPiece(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    if vocabulary:
        backend.add_special_tokens(list(SPECIAL_TOKENS.values()))
        ends = [(SPECIAL_TOKENS[name], vocabulary[SPECIAL_TOKENS[name]]) for name in ("sep_token", "cls_token")]
        backend.post_processor = processors.BertProcessing(*ends)
    return backend


def _wrap(backend: "Tokenizer") -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS)


def continues_word(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray:
    """Return whether each token continues the word of the token before it, such as `##ing`, (V,) bool."""
    vocabulary = tokenizer.get_vocab()
    continues = np.zeros(max(vocabulary.values()) + 1, dtype=bool)
    continues[[i for token, i in vocabulary.items() if token.startswith("##") and len(token) > 2]] = True
    return continues
