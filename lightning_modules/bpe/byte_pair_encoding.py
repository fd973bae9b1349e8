r"""Byte-level byte-pair encoding, from the textbook's twenty lines to a trainer that keeps up with the Rust library.

A language model reads integers. Byte-pair encoding (BPE) makes them in three steps:

1. A *pattern* cuts the text into words (`" the"`, `"ing"`, `"!!"`), and words are counted: tokens never cross words.
2. Learning. Every word is a row of symbols, at first its UTF-8 bytes. The most frequent pair of neighbours becomes one
   new symbol, everywhere; then the next most frequent pair; until the vocabulary has the size asked for. The list of
   these *merges*, in order, is all there is to learn.
3. Encoding. A new word is cut into bytes, and the merges are applied to it in the order in which they were learned.

Starting from bytes, there is no text, nor anything else, that has no encoding (Radford et al., 2019); merging the most
frequent pair is Gage's compression (1994), brought to language by Sennrich et al. (2016, arXiv:1508.07909).

Below: the patterns; `learn_merges_textbook`, which is the definition in code; `count_words` and `learn_merges`, which
give the same merges in a fraction of the time; `ByteLevelBPE`, which encodes and decodes; and `to_tokenizer_json`,
which writes a tokenizer as the `tokenizers` library reads it.

Ties and ids follow that library's `BpeTrainer` with `min_frequency=0`, so that the merges are the same one by one:

- ids go to the special tokens in their order, then to the 256 bytes in the order of their spellings (below), then to
  the merges' results as they are made;
- the highest count wins, then the smallest left id, then the smallest right id.
"""

import heapq
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from itertools import pairwise

import numpy as np
import regex

Merge = tuple[bytes, bytes]

# ---------------------------------------------------------------------------------------------------------------------
# Words: the patterns, and how bytes are spelled
# ---------------------------------------------------------------------------------------------------------------------

# GPT-2: a word takes the one space before it, and letters, digits and the rest do not mix. The last but one
# alternative leaves the last space of a run to the word that follows.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# In GPT-4's manner: contractions in either case, any one sign may open a word, numbers go in threes, and line ends
# stay with the punctuation or the indentation before them, which suits source code.
GPT4_PATTERN = (
    r"'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?[\p{L}]+|[\p{N}]{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# On ASCII text, which most text is, these patterns need no tables of Unicode: the standard library's `re` finds the
# same words three times as fast as `regex`. (Each \p stands in brackets above, so that plain replacing is right.)
_ASCII_TWINS = {
    pattern: re.compile(pattern.replace(r"\p{L}", "a-zA-Z").replace(r"\p{N}", "0-9"), re.ASCII)
    for pattern in (GPT2_PATTERN, GPT4_PATTERN)
}


def _spell_bytes() -> list[str]:
    """Return one visible character per byte, as GPT-2 chose them: vocabularies are stored as text, bytes are not."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    substitutes = iter(range(256, 512))  # the space is the 33rd without a visible character: chr(256 + 32), "Ġ"
    return [chr(byte if byte in visible else next(substitutes)) for byte in range(256)]


_SPELLING = _spell_bytes()
_BYTE = {character: byte for byte, character in enumerate(_SPELLING)}
_SINGLE_BYTES = [bytes([byte]) for byte in range(256)]


def spell(token: bytes) -> str:
    """Write a token with one visible character per byte: `b" the"` is `"Ġthe"`."""
    return token.decode("latin-1").translate(_SPELLING)


def unspell(spelling: str) -> bytes:
    """Return the bytes that `spell` wrote."""
    return bytes(_BYTE[character] for character in spelling)


def vocabulary(merges: Iterable[Merge] = (), special_tokens: Sequence[str] = ()) -> dict[str, int]:
    """Return the id of every token by its spelling: special tokens, then bytes, then what the merges make.

    Raises:
        ValueError: a special token is empty, given twice, or is how a byte is spelled.
    """
    ids: dict[str, int] = {}
    for token in special_tokens:
        if token in ids:
            raise ValueError(f"special token {token!r} is given twice")
        if not token or token in _BYTE:
            raise ValueError(f"special token {token!r} is empty or one character that already stands for a byte")
        ids[token] = len(ids)
    for character in sorted(_SPELLING):
        ids[character] = len(ids)
    for left, right in merges:
        ids.setdefault(spell(left + right), len(ids))  # it is there already where it spells a special token
    return ids


def _check_vocab_size(word_counts: Mapping[bytes, int], vocab_size: int, special_tokens: Sequence[str]) -> None:
    """Raise a ValueError if nothing can be learned from these words or in this size."""
    if not word_counts:
        raise ValueError("the corpus is empty: no words were counted")
    if vocab_size < 256 + len(special_tokens):
        raise ValueError(
            f"vocab_size {vocab_size} is smaller than 256 bytes + {len(special_tokens)} special tokens: "
            f"ask for at least {256 + len(special_tokens)}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The textbook
# ---------------------------------------------------------------------------------------------------------------------


def learn_merges_textbook(
    word_counts: Mapping[bytes, int], vocab_size: int, special_tokens: Sequence[str] = ()
) -> list[Merge]:
    """Learn merges by counting every pair anew for each merge: slow, plainly right, and what the tests compare with."""
    _check_vocab_size(word_counts, vocab_size, special_tokens)
    ids = vocabulary(special_tokens=special_tokens)
    words = {word: [_SINGLE_BYTES[byte] for byte in word] for word in word_counts}
    merges: list[Merge] = []
    while len(ids) < vocab_size:
        pairs: Counter[Merge] = Counter()
        for word, symbols in words.items():
            for pair in pairwise(symbols):
                pairs[pair] += word_counts[word]
        if not pairs:
            break
        left, right = min(pairs, key=lambda pair: (-pairs[pair], ids[spell(pair[0])], ids[spell(pair[1])]))
        merges.append((left, right))
        ids.setdefault(spell(left + right), len(ids))
        words = {word: _replace_pair(symbols, left, right) for word, symbols in words.items()}
    return merges


def _replace_pair(symbols: list[bytes], left: bytes, right: bytes) -> list[bytes]:
    """Return the symbols with `left, right` joined wherever they meet, from the left: `a a a` gives `aa a`."""
    joined: list[bytes] = []
    for symbol in symbols:
        if joined and symbol == right and joined[-1] == left:
            joined[-1] = left + right
        else:
            joined.append(symbol)
    return joined


# ---------------------------------------------------------------------------------------------------------------------
# Counting words
# ---------------------------------------------------------------------------------------------------------------------

_BATCH_CHARACTERS = 1 << 22  # text given to a process at a time: enough to repeat its words, little enough to hold


def count_words(
    texts: Iterable[str], pattern: str = GPT2_PATTERN, special_tokens: Sequence[str] = (), workers: int = 1
) -> Counter[bytes]:
    """Count the words of a corpus; the counts of its parts add up to the counts of the whole.

    Special tokens end a word and are not counted themselves (the library's trainer counts them as ordinary text). The
    texts are read as a stream and never held together; one text and its words are in memory at a time, so a huge text
    should come in pieces.

    Args:
        texts: documents. Bytes that are not UTF-8 come as Python's `surrogateescape` decodes them.
        pattern: how words are found, for the `regex` module; the matches joined must give back the text.
        special_tokens: texts that stand for themselves.
        workers: processes that count beside this one; 1 counts here. Under the `spawn` method, the calling script
            needs its `if __name__ == "__main__"`.

    Raises:
        ValueError: the pattern does not compile, has groups that capture, or loses text.
    """
    _compile(pattern)  # a wrong pattern is told before any text is read
    count = partial(_count_batch, pattern=pattern, special_tokens=special_tokens)
    total: Counter[bytes] = Counter()
    if workers == 1:
        for batch in _batches(texts):
            total.update(count(batch))
        return total
    with ProcessPoolExecutor(workers) as pool:
        pending = deque()  # a bounded queue: `pool.map` would read all the texts ahead of the workers
        for batch in _batches(texts):
            pending.append(pool.submit(count, batch))
            if len(pending) > workers:
                total.update(pending.popleft().result())
        for future in pending:
            total.update(future.result())
    return total


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Group texts into lists of about `_BATCH_CHARACTERS` characters."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _count_batch(texts: list[str], pattern: str, special_tokens: Sequence[str]) -> Counter[bytes]:
    """Count the words of some texts; top-level, so that another process can run it."""
    find_words = _word_finder(pattern)
    words: Counter[str] = Counter()
    size = 0
    for text in texts:
        for stretch in _split_special(text, special_tokens)[::2]:
            words.update(find_words(stretch))
            size += len(stretch)
    if sum(len(word) * count for word, count in words.items()) != size:
        raise ValueError(f"the pattern loses text: its matches joined do not give back the text: {pattern!r}")
    counts: Counter[bytes] = Counter()
    for word, count in words.items():
        counts[word.encode("utf-8", "surrogateescape")] += count
    return counts


def _compile(pattern: str) -> regex.Pattern[str]:
    """Compile a pattern, or say in one line what is wrong with it."""
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"the pattern does not compile: {error}: {pattern!r}") from None
    if compiled.groups:
        raise ValueError(f"the pattern has a group that captures: write (?:...) instead of (...): {pattern!r}")
    return compiled


def _word_finder(pattern: str) -> Callable[[str], list[str]]:
    """Return the function that cuts a text into words."""
    find = _compile(pattern).findall
    find_in_ascii = _ASCII_TWINS[pattern].findall if pattern in _ASCII_TWINS else find
    return lambda text: find_in_ascii(text) if text.isascii() else find(text)


def _split_special(text: str, special_tokens: Sequence[str]) -> list[str]:
    """Cut a text at special tokens, the longest first: ordinary text at even places, special tokens at odd ones."""
    if not special_tokens:
        return [text]
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)


# ---------------------------------------------------------------------------------------------------------------------
# Learning merges, fast
# ---------------------------------------------------------------------------------------------------------------------
#
# The textbook spends its time counting all pairs again for a merge that changed few. Four ideas, each exact:
#
# 1. All words stand in one array of symbols, a gap between them, each symbol linked to its neighbours. Merging a pair
#    writes the new symbol over the left one and unlinks the right one; nothing moves. For each pair we know its places.
#
# 2. Counts only fall. A token is always put together in the same way, whatever stands around it, so all its occurrences
#    are made by one merge: a pair has its full count from the start, and later merges can only take places away from
#    it. An old count is thus an upper bound, and need not be kept up to date: a heap gives the pair with the highest
#    bound, we look which of its places still hold it, and if some do not, it goes back with its true count. What comes
#    out with its count confirmed is the next merge.
#
# 3. Most pairs are rare and never merged. Only pairs with a count of at least `watched_from` are put into the heap;
#    when it has run out, the bar is lowered and all pairs are counted anew, which happens a handful of times.
#
# 4. Several merges at once. NumPy is fast on long arrays and slow on many short ones, and late merges have few places.
#    Take pairs off the heap in order for as long as no symbol is the left one of a pair and the right one of another
#    (or of the same) pair. Merging `a b` takes places away from pairs `. a` and `b .` only, so none of these pairs
#    disturbs another. Nor can a new pair come before them: `. ab` has at most the places that `. a` had, and `. a` is
#    not among the pairs taken, so it comes after all of them; with an equal count, too, since the id of `ab` is higher
#    than that of `a`. The same goes for `ab .` and `b .`. So these are just the merges that would come one by one.


def learn_merges(
    word_counts: Mapping[bytes, int],
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> list[Merge]:
    """Learn the merges, in order, that grow the vocabulary from bytes to `vocab_size`.

    Fewer merges come back if the corpus runs out of pairs before.

    Args:
        word_counts: how often each word occurs, from `count_words`.
        vocab_size: tokens to have in the end, special tokens and bytes included; at least 256 + special tokens.
        special_tokens: they take the first ids, which ties depend on.
        progress: called now and then with the number of merges learned so far.

    Raises:
        ValueError: there are no words, or `vocab_size` is too small, or a special token is wrong.
    """
    _check_vocab_size(word_counts, vocab_size, special_tokens)
    ids = vocabulary(special_tokens=special_tokens)
    tokens = {ids[spell(token)]: token for token in _SINGLE_BYTES}
    corpus = _Corpus(word_counts, ids)
    merges: list[Merge] = []
    places: dict[int, np.ndarray] = {}
    heap: list[tuple[int, int]] = []  # (-count, pair), the smallest first, so ties go to the smallest ids
    watched_from = 0

    def watch(pairs: np.ndarray, counts: np.ndarray, starts: np.ndarray, positions: np.ndarray) -> None:
        ends = np.append(starts[1:], len(positions))
        often = counts >= watched_from
        columns = (pairs[often], counts[often], starts[often], ends[often])
        for pair, count, start, end in zip(*(column.tolist() for column in columns), strict=True):
            places[pair] = positions[start:end]
            heapq.heappush(heap, (-count, pair))

    while len(ids) < vocab_size:
        if not heap:
            pairs, counts, *where = corpus.recount()
            if not len(pairs):
                break
            watched_from = max(1, counts.max() // 16)
            watch(pairs, counts, *where)
        lefts: set[int] = set()
        rights: set[int] = set()
        taken: list[np.ndarray] = []
        made: list[int] = []
        while heap and len(ids) < vocab_size:
            bound, pair = -heap[0][0], heap[0][1]
            left, right = _split_pair(pair)
            if left in rights or right in lefts:
                break
            where, count = corpus.confirm(places[pair], left, right)
            heapq.heappop(heap)
            del places[pair]
            if count < bound:
                if count >= watched_from:
                    places[pair] = where
                    heapq.heappush(heap, (-count, pair))
                continue
            token = tokens[left] + tokens[right]
            highest = len(ids)
            new = ids.setdefault(spell(token), highest)
            tokens[new] = token
            merges.append((tokens[left], tokens[right]))
            taken.append(corpus.without_overlap(where) if left == right else where)
            made.append(new)
            lefts.add(left)
            rights.add(right)
            if left == right or new != highest:
                break  # it disturbs itself, or spells a special token, whose id is not the highest
        if taken:
            watch(*corpus.merge(taken, made))
            if progress is not None:
                progress(len(merges))
    return merges


_GAP, _GONE = -1, -2  # between two words; the right half of a merge


def _join_pair(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Put two ids into one integer that sorts as the pair does."""
    return left << 32 | right


def _split_pair(pair: int) -> tuple[int, int]:
    """Return the two ids that `_join_pair` put together."""
    return pair >> 32, pair & 0xFFFFFFFF


def _starts(values: np.ndarray) -> np.ndarray:
    """Return where each stretch of equal values begins."""
    return np.flatnonzero(np.append(True, values[1:] != values[:-1])[: len(values)])


class _Corpus:
    """All distinct words in one line of symbols, `_GAP word _GAP word ... _GAP`, each symbol linked to its neighbours.

    Positions are indices into four arrays of equal length: a symbol's id, the count of the word it stands in, and the
    positions of the symbols before and after it.
    """

    def __init__(self, word_counts: Mapping[bytes, int], ids: Mapping[str, int]) -> None:
        lengths = np.fromiter(map(len, word_counts), np.int64, len(word_counts))
        counts = np.fromiter(word_counts.values(), np.int64, len(word_counts))
        id_of_byte = np.array([ids[character] for character in _SPELLING])
        text = np.frombuffer(b"".join(word_counts), np.uint8)
        # The k-th word (from 0) is shifted by the k + 1 gaps before it.
        positions = np.arange(len(text)) + np.repeat(np.arange(1, len(lengths) + 1), lengths)
        self.symbol = np.full(len(text) + len(lengths) + 1, _GAP)
        self.symbol[positions] = id_of_byte[text]
        self.count = np.zeros_like(self.symbol)
        self.count[positions] = np.repeat(counts, lengths)

    def recount(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Close up the line and return all its pairs, as `_group` does."""
        alive = self.symbol != _GONE
        self.symbol, self.count = self.symbol[alive], self.count[alive]
        positions = np.arange(len(self.symbol))
        self.before, self.after = positions - 1, positions + 1
        return self._group(positions[:-1])

    def confirm(self, places: np.ndarray, left: int, right: int) -> tuple[np.ndarray, int]:
        """Return those of a pair's places that still hold it, and its count."""
        places = places[(self.symbol[places] == left) & (self.symbol[self.after[places]] == right)]
        return places, int(self.count[places].sum())

    def without_overlap(self, places: np.ndarray) -> np.ndarray:
        """Keep every second place of each run `a a a ...`, from its left, of the places of a pair `a a`."""
        places = np.sort(places)
        index = np.arange(len(places))
        starts_run = np.append(True, self.after[places[:-1]] != places[1:])
        index_of_start = np.maximum.accumulate(np.where(starts_run, index, 0))
        return places[(index - index_of_start) % 2 == 0]

    def merge(self, taken: list[np.ndarray], made: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Write symbol `made[k]` at the places `taken[k]` of its pair, and return the new pairs, as `_group` does."""
        left = np.concatenate(taken)
        right = self.after[left]
        beyond = self.after[right]
        self.symbol[left] = np.repeat(made, [len(where) for where in taken])
        self.symbol[right] = _GONE
        self.after[left] = beyond
        self.before[beyond] = left
        positions = np.sort(np.concatenate((self.before[left], left)))
        return self._group(positions[_starts(positions)])

    def _group(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Group positions by the pair that begins there.

        Returns:
            The distinct pairs, their counts, where the places of each start in the last array, and the places.
        """
        left, right = self.symbol[positions], self.symbol[self.after[positions]]
        inside = (left >= 0) & (right >= 0)  # not across a gap
        positions, pairs = positions[inside], _join_pair(left[inside], right[inside])
        order = np.argsort(pairs)
        positions, pairs = positions[order], pairs[order]
        starts = _starts(pairs)
        return pairs[starts], np.add.reduceat(self.count[positions], starts), starts, positions


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    pattern: str = GPT2_PATTERN,
    special_tokens: Sequence[str] = (),
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> list[Merge]:
    """Learn merges from a stream of texts: `learn_merges` of `count_words`, whose arguments these are."""
    return learn_merges(count_words(texts, pattern, special_tokens, workers), vocab_size, special_tokens, progress)


# ---------------------------------------------------------------------------------------------------------------------
# Encoding and decoding
# ---------------------------------------------------------------------------------------------------------------------


class ByteLevelBPE:
    """A tokenizer in plain Python, for reading and for testing.

    Training runs use the tokenizer that `to_tokenizer_json` exports: the same ids, from the Rust library. Here a word
    costs the square of its length, though words seen before come from a cache.

    Args:
        merges: pairs in the order in which they were learned.
        special_tokens: texts that stand for themselves and are found before anything else.
        pattern: how words are found.
        ids: the id of every token by its spelling, where it is not that of `vocabulary(merges, special_tokens)`.

    Raises:
        ValueError: the pattern or a special token is wrong, or `ids` lacks a token.
    """

    def __init__(
        self,
        merges: Sequence[Merge],
        special_tokens: Sequence[str] = (),
        pattern: str = GPT2_PATTERN,
        ids: Mapping[str, int] | None = None,
    ) -> None:
        expected = vocabulary(merges, special_tokens)
        self.ids = expected if ids is None else dict(ids)
        if missing := expected.keys() - self.ids.keys():
            raise ValueError(f"the vocabulary lacks {len(missing)} tokens of the merges, such as {min(missing)!r}")
        self.special_tokens = tuple(special_tokens)
        self.pattern = pattern
        self._find_words = _word_finder(pattern)
        self._rank = {pair: rank for rank, pair in enumerate(merges)}
        ordinary = _SINGLE_BYTES + [left + right for left, right in merges]
        self._bytes = {self.ids[spell(token)]: token for token in ordinary}
        for token in special_tokens:
            if self._bytes.setdefault(self.ids[token], token.encode()) != token.encode():
                raise ValueError(f"special token {token!r} spells a learned token that stands for other bytes")
        self._word_ids = lru_cache(maxsize=1 << 16)(self._encode_word)

    @classmethod
    def from_gpt2_files(
        cls, ids: Mapping[str, int], merge_lines: Iterable[str], pattern: str = GPT2_PATTERN
    ) -> "ByteLevelBPE":
        """Make the tokenizer of GPT-2's two files: the content of `vocab.json` and the lines of `merges.txt`.

        What the vocabulary has beyond bytes and merges is a special token, such as `<|endoftext|>`.

        Raises:
            ValueError: a line is not two tokens, or the vocabulary lacks one.
        """
        merges: list[Merge] = []
        for number, line in enumerate(merge_lines, start=1):
            if line.startswith("#version") or not line.strip():
                continue
            try:
                left, right = map(unspell, line.split())
            except (KeyError, ValueError):
                raise ValueError(f"merges, line {number}: {line.rstrip()!r} is not two tokens") from None
            merges.append((left, right))
        special_tokens = sorted(ids.keys() - vocabulary(merges).keys(), key=ids.__getitem__)
        return cls(merges, special_tokens, pattern, ids)

    def encode(self, text: str | bytes) -> list[int]:
        """Return the ids of a text, or of any bytes: what is not UTF-8 goes through `surrogateescape`."""
        if isinstance(text, bytes):
            text = text.decode("utf-8", "surrogateescape")
        ids: list[int] = []
        for place, stretch in enumerate(_split_special(text, self.special_tokens)):
            if place % 2:
                ids.append(self.ids[stretch])
                continue
            words = self._find_words(stretch)
            if sum(map(len, words)) != len(stretch):
                raise ValueError(f"the pattern loses text: its matches joined do not give back {stretch[:40]!r}")
            for word in words:
                ids += self._word_ids(word)
        return ids

    def decode(self, ids: Iterable[int]) -> bytes:
        """Return the bytes the ids stand for. As text: `.decode("utf-8", "replace")`, for ids may split a character.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        try:
            return b"".join([self._bytes[token_id] for token_id in ids])
        except KeyError as error:
            raise ValueError(f"id {error} is not in the vocabulary of {len(self._bytes)} tokens") from None

    def _encode_word(self, word: str) -> list[int]:
        """Apply to a word the merge that was learned first, at its leftmost place, until none applies."""
        symbols = [_SINGLE_BYTES[byte] for byte in word.encode("utf-8", "surrogateescape")]
        never = len(self._rank)
        while len(symbols) > 1:
            ranks = [self._rank.get(pair, never) for pair in pairwise(symbols)]
            first = min(ranks)
            if first == never:
                break
            place = ranks.index(first)
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
        return [self.ids[spell(symbol)] for symbol in symbols]


def to_tokenizer_json(
    merges: Sequence[Merge], special_tokens: Sequence[str] = (), pattern: str = GPT2_PATTERN
) -> dict[str, object]:
    """Return the content of a `tokenizer.json`, which `tokenizers` and `AutoTokenizer` load.

    The pattern is then read by another engine (Oniguruma) with Unicode tables of its own age: the patterns above mean
    the same to both, except on characters that one of the two does not know yet.
    """
    ids = vocabulary(merges, special_tokens)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": ids[token],
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token in special_tokens
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [[spell(left), spell(right)] for left, right in merges],
        },
    }
