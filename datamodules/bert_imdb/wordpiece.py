"""WordPiece, the tokenizer of BERT (Schuster and Nakajima, 2012; Devlin et al., 2019), learned from texts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from datamodules.cache import digest
from datamodules.tokenizers import vocab_size
from lightning_modules.common.cache import cache_root
from lightning_modules.common.files import write_text

if TYPE_CHECKING:  # imported where used: transformers is slow to import
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = {
    name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
}
_FORMAT = 1  # part of the cache key: increase it when the tokens learned from the same texts change


def learn_wordpieces(texts: Sequence[str], size: int) -> "PreTrainedTokenizerFast":
    """Return a lower-case tokenizer like that of BERT, with at most `size` tokens learned from texts, and cache it."""
    from tokenizers import Tokenizer
    from tokenizers.implementations import BertWordPieceTokenizer
    from transformers import PreTrainedTokenizerFast

    file = cache_root() / "wordpiece" / f"{digest([_FORMAT, size, *texts])}.json"
    try:
        backend = Tokenizer.from_file(str(file))
    except Exception:  # missing or damaged; the Rust library raises no narrower class
        backend = Tokenizer.from_str(BertWordPieceTokenizer(_learn(texts, size)).to_str())
        write_text(file, backend.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS)


def _learn(texts: Sequence[str], size: int) -> dict[str, int]:
    from tokenizers.implementations import BertWordPieceTokenizer

    learner = BertWordPieceTokenizer()
    letters = sorted({letter for text in texts for letter in learner.normalize(text)} - {" "})
    # The library numbers the letters within words in an order that changes from run to run, and breaks ties between
    # merges by these numbers. As special tokens, the letters have fixed numbers.
    first = [*SPECIAL_TOKENS.values(), *letters, *(f"##{letter}" for letter in letters)]
    limits = {"min_frequency": 0, "limit_alphabet": len(first)}
    learner.train_from_iterator(texts, size, special_tokens=first, show_progress=False, **limits)
    return learner.get_vocab()


def continues_word(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray:
    """Return whether each token continues the word of the token before it, such as `##ing`, (V,) bool."""
    continues = np.zeros(vocab_size(tokenizer), dtype=bool)
    continues[[i for token, i in tokenizer.get_vocab().items() if token.startswith("##") and len(token) > 2]] = True
    return continues
