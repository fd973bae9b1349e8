"""Fast learning of byte-pair encoding: the merges of `textbook.py`, in a fraction of the time.

The textbook counts all pairs again after a merge that changed few of them. Four ideas avoid that; none of them changes
the result:

1. All words are in one array of symbols, with a gap between two words, and each symbol has links to its neighbours. A
   merge writes the new symbol over the left one and unlinks the right one, so no symbol moves. The
   positions of each pair are recorded.

2. The count of a pair never grows: one merge makes all occurrences of a token, so a new pair has its full count at
   once, and later merges can only take positions away from it. An old count is therefore an upper bound, and need not
   be updated. A heap gives the pair with the highest bound; the learner checks which of its positions still hold it. If
   the count has fallen, the pair goes back into the heap with the true count; otherwise it is the next merge.

3. Most pairs are rare and never merged. The heap holds only the pairs with a count of at least `least_count`. When it
   is empty, that number is lowered and all pairs are counted again, which happens a few times in all.

4. Several merges are made at once, because NumPy is fast on long arrays and slow on many short ones, and late merges
   have few positions. Pairs are taken off the heap in order, as long as no symbol is the left one of a pair and the
   right one of another (or of the same) pair. The merge of `a b` takes positions away from pairs `. a` and `b .` only,
   so none of the pairs taken changes another. Nor can a new pair have to come before them: `. ab` has at most the
   positions that `. a` had, and `. a` is not among the pairs taken, so it comes after all of them; with an equal count,
   too, since the id of `ab` is higher than that of `a`. The same holds for `ab .` and `b .`.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lightning_modules.bpe.textbook import SINGLE_BYTES, SPELLINGS, Merge, check_vocab_size, spell, vocabulary

# Pairs in ascending order, each as one integer (left << 32 | right), their counts, the index in the last array where
# the positions of each start, the positions.
Pairs = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def learn_merges(
    word_counts: Mapping[bytes, int],
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> list[Merge]:
    """Return the merges, in order, that enlarge the vocabulary to `vocab_size` tokens, or fewer if no pair is left.

    Args:
        word_counts: Number of occurrences of each word, by its bytes.
        vocab_size: Tokens of the vocabulary, special tokens and bytes included; at least 256 + special tokens.
        special_tokens: Texts that are tokens as a whole; they get the first ids, on which the order of ties depends.
        progress: Called repeatedly with the number of merges learned so far.
    """
    check_vocab_size(word_counts, vocab_size, special_tokens)
    ids = vocabulary(special_tokens=special_tokens)
    tokens = {ids[spell(token)]: token for token in SINGLE_BYTES}
    corpus = _Corpus(word_counts, ids)
    merges: list[Merge] = []
    places: dict[int, np.ndarray] = {}  # positions by pair
    heap: list[tuple[int, int]] = []  # (-count, pair), so that the smallest ids win a tie
    least_count = 0

    def push(pairs: np.ndarray, counts: np.ndarray, starts: np.ndarray, positions: np.ndarray) -> None:
        table = np.stack([pairs, counts, starts, np.append(starts, len(positions))[1:]], axis=1)
        for pair, count, start, end in table[counts >= least_count].tolist():
            places[pair] = positions[start:end]
            heapq.heappush(heap, (-count, pair))

    while len(ids) < vocab_size:
        if not heap:
            pairs = corpus.recount()
            if not len(pairs[0]):
                break
            least_count = max(1, pairs[1].max() // 16)
            push(*pairs)
        lefts: set[int] = set()
        rights: set[int] = set()
        taken: list[np.ndarray] = []
        made: list[int] = []
        while heap and len(ids) < vocab_size:
            bound, pair = -heap[0][0], heap[0][1]
            left, right = divmod(pair, 1 << 32)
            if left in rights or right in lefts:
                break
            where, count = corpus.confirm(places[pair], left, right)
            heapq.heappop(heap)
            del places[pair]
            if count < bound:
                if count >= least_count:
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
                break  # the pair changes itself, or it spells a special token, whose id is not the highest
        if taken:
            push(*corpus.merge(taken, made))
            if progress is not None:
                progress(len(merges))
    return merges


_GAP, _GONE = -1, -2  # between two words; the right symbol of a merged pair


def _starts(values: np.ndarray) -> np.ndarray:
    """Return the indices at which a run of equal values begins."""
    return np.flatnonzero(np.append(True, values[1:] != values[:-1])[: len(values)])


class _Corpus:
    """All distinct words in one array of symbols, `_GAP word _GAP word ... _GAP`, with links to the neighbours.

    A position is an index into four arrays of equal length: the id of a symbol, the count of its word, and the
    positions of the symbols before and after it.
    """

    def __init__(self, word_counts: Mapping[bytes, int], ids: Mapping[str, int]) -> None:
        lengths = np.fromiter(map(len, word_counts), np.int64, len(word_counts))
        counts = np.fromiter(word_counts.values(), np.int64, len(word_counts))
        id_of_byte = np.array([ids[character] for character in SPELLINGS])
        text = np.frombuffer(b"".join(word_counts), np.uint8)
        # The k-th word (from 0) is shifted by the k + 1 gaps before it.
        positions = np.arange(len(text)) + np.repeat(np.arange(1, len(lengths) + 1), lengths)
        self.symbol = np.full(len(text) + len(lengths) + 1, _GAP)
        self.symbol[positions] = id_of_byte[text]
        self.count = np.zeros_like(self.symbol)
        self.count[positions] = np.repeat(counts, lengths)

    def recount(self) -> Pairs:
        """Remove the symbols that were unlinked, and return all pairs."""
        alive = self.symbol != _GONE
        self.symbol, self.count = self.symbol[alive], self.count[alive]
        positions = np.arange(len(self.symbol))
        self.before, self.after = positions - 1, positions + 1
        return self._group(positions[:-1])

    def confirm(self, places: np.ndarray, left: int, right: int) -> tuple[np.ndarray, int]:
        """Return the positions that still hold the pair, and its count."""
        places = places[(self.symbol[places] == left) & (self.symbol[self.after[places]] == right)]
        return places, int(self.count[places].sum())

    def without_overlap(self, places: np.ndarray) -> np.ndarray:
        """Return every second position of each run `a a a ...`, from its left, of the positions of a pair `a a`."""
        places = np.sort(places)
        index = np.arange(len(places))
        starts_run = np.append(True, self.after[places[:-1]] != places[1:])
        index_of_start = np.maximum.accumulate(np.where(starts_run, index, 0))
        return places[(index - index_of_start) % 2 == 0]

    def merge(self, taken: list[np.ndarray], made: list[int]) -> Pairs:
        """Write the symbol `made[k]` at the positions `taken[k]` of its pair, and return the new pairs."""
        left = np.concatenate(taken)
        right = self.after[left]
        beyond = self.after[right]
        self.symbol[left] = np.repeat(made, [len(where) for where in taken])
        self.symbol[right] = _GONE
        self.after[left] = beyond
        self.before[beyond] = left
        positions = np.sort(np.concatenate((self.before[left], left)))
        return self._group(positions[_starts(positions)])

    def _group(self, positions: np.ndarray) -> Pairs:
        """Group positions by the pair that begins there."""
        left, right = self.symbol[positions], self.symbol[self.after[positions]]
        inside = (left >= 0) & (right >= 0)  # not across a gap
        positions, pairs = positions[inside], left[inside] << 32 | right[inside]
        order = np.argsort(pairs)
        positions, pairs = positions[order], pairs[order]
        starts = _starts(pairs)
        return pairs[starts], np.add.reduceat(self.count[positions], starts), starts, positions
