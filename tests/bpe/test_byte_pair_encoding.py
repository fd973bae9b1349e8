"""Byte-pair encoding: the fast learner against the textbook and against the `tokenizers` library, and back to bytes."""

import json
import random
import re
import string
import sysconfig
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from lightning_modules.bpe.learner import learn_merges
from lightning_modules.bpe.textbook import (
    GPT2_PATTERN,
    GPT4_PATTERN,
    SINGLE_BYTES,
    Merge,
    count_words,
    learn_merges_textbook,
    spell,
    unspell,
    vocabulary,
    word_finder,
)
from lightning_modules.bpe.tokenizer import ByteLevelBPE, to_tokenizer_json

PATTERNS = pytest.mark.parametrize("pattern", [GPT2_PATTERN, GPT4_PATTERN], ids=["gpt2", "gpt4"])

# Characters that every engine's Unicode tables know: those of Unicode 3.2, whose table Python keeps.
KNOWN_CHARACTERS = [
    chr(point)
    for point in range(0x110000)
    if unicodedata.ucd_3_2_0.category(chr(point)) not in ("Cn", "Cs", "Co")
    and unicodedata.ucd_3_2_0.category(chr(point)) == unicodedata.category(chr(point))
]


def train_with_tokenizers(
    texts: list[str], vocab_size: int, pattern: str, special_tokens: list[str]
) -> tuple[list[tuple[bytes, bytes]], dict[str, int]]:
    """Return the merges and the vocabulary of the library's trainer."""
    tokenizer = Tokenizer(models.BPE())
    if pattern == GPT2_PATTERN:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=0,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return [(unspell(left), unspell(right)) for left, right in model["merges"]], model["vocab"]


def generated_texts(seed: int, characters: str | list[str], n_texts: int = 40, length: int = 400) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(characters, k=rng.randrange(length))) for _ in range(n_texts)]


def library_texts(n_texts: int) -> list[str]:
    """Return some of the standard library's source: much of what a run of the project's own corpus has in it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return [path.read_text(encoding="utf-8") for path in sorted(root.glob("*.py"))[:n_texts]]


def train(
    texts: list[str], vocab_size: int, pattern: str = GPT2_PATTERN, special_tokens: Sequence[str] = ()
) -> list[Merge]:
    return learn_merges(count_words(texts, pattern, special_tokens), vocab_size, special_tokens)


# ---- the learner ----


def test_golden_case_by_hand() -> None:
    # "low" 5 times, "lower" twice, "newest" 6 times, "widest" 3 times (Sennrich et al.'s corpus, without word ends):
    # e s 9, s t 9 (a tie that the smaller left id, e, wins), then es t 9, l o 7, lo w 7, then 6 each: e w, n e, w est.
    # "e" < "n" < "w": e w comes first and breaks n e and w est; then ew est and n ew, the smaller left id being n's.
    counts = {b"low": 5, b"lower": 2, b"newest": 6, b"widest": 3}
    expected = [(b"e", b"s"), (b"es", b"t"), (b"l", b"o"), (b"lo", b"w"), (b"e", b"w"), (b"n", b"ew"), (b"new", b"est")]
    assert learn_merges_textbook(counts, 256 + 7) == expected
    assert learn_merges(counts, 256 + 7) == expected


def test_run_of_one_symbol_is_joined_from_its_left() -> None:
    # aaaaa: a a counts 4, gives aa aa a; then aa a and aa aa count 1 each, and a's id is the smaller.
    assert learn_merges({b"aaaaa": 1}, 259) == [(b"a", b"a"), (b"aa", b"a"), (b"aa", b"aaa")]


def test_pairs_whose_counts_have_all_fallen_below_the_least_count_are_counted_again() -> None:
    # a b 103 and b c 7 are watched (the least count is 6). The merge of a b leaves 4 of b c, and a b c has 3: too few.
    counts = {b"ab": 100, b"abc": 3, b"dbc": 4}
    expected = [(b"a", b"b"), (b"b", b"c"), (b"d", b"bc"), (b"ab", b"c")]
    assert learn_merges(counts, 260) == learn_merges_textbook(counts, 260) == expected


@given(
    words=st.dictionaries(
        st.text("ab", max_size=9) | st.text("abcd ", max_size=12) | st.text(max_size=5), st.integers(1, 4), min_size=1
    ),
    vocab_size=st.integers(256, 330),
)
@settings(max_examples=100, deadline=None)
def test_fast_equals_textbook(words: dict[str, int], vocab_size: int) -> None:
    counts = {word.encode(): count for word, count in words.items()}
    assert learn_merges(counts, vocab_size) == learn_merges_textbook(counts, vocab_size)


@given(
    words=st.dictionaries(st.text("abc", min_size=2, max_size=9), st.integers(1, 3), min_size=1),
    special_tokens=st.lists(st.sampled_from(["ab", "abc", "ca", "<s>"]), unique=True),
)
@settings(max_examples=50, deadline=None)
def test_fast_equals_textbook_where_a_merge_spells_a_special_token(
    words: dict[str, int], special_tokens: list[str]
) -> None:
    counts = {word.encode(): count for word, count in words.items()}
    merges = learn_merges_textbook(counts, 290, special_tokens)
    assert learn_merges(counts, 290, special_tokens) == merges


def test_fast_equals_textbook_over_many_recounts() -> None:
    # Counts from 1 to a million, so that the bar for watched pairs is lowered again and again.
    rng = random.Random(3)
    words = {"".join(rng.choices("abcdefgh", k=rng.randrange(1, 12))).encode() for _ in range(300)}
    counts = {word: int(10 ** rng.uniform(0, 6)) for word in sorted(words)}
    assert learn_merges(counts, 700) == learn_merges_textbook(counts, 700)


@PATTERNS
@pytest.mark.parametrize("special_tokens", [[], ["<|endoftext|>", "<|pad|>"], ["ab", "cab"]])
@pytest.mark.parametrize("characters", ["ab ", "abcd e'1!\n", KNOWN_CHARACTERS], ids=["two", "ten", "unicode"])
def test_same_merges_and_ids_as_tokenizers(
    pattern: str, special_tokens: list[str], characters: str | list[str]
) -> None:
    texts = generated_texts(1, characters)
    merges, ids = train_with_tokenizers(texts, 700, pattern, special_tokens)
    # The library counts a special token's text as ordinary text; ours leaves it out, so it is not told here.
    ours = learn_merges(count_words(texts, pattern), 700, special_tokens)
    assert ours == merges
    assert vocabulary(ours, special_tokens) == ids


@PATTERNS
def test_same_merges_as_tokenizers_on_source_code(pattern: str) -> None:
    texts = library_texts(10)
    merges, ids = train_with_tokenizers(texts, 1000, pattern, ["<|endoftext|>"])
    ours = train(texts, 1000, pattern, ["<|endoftext|>"])
    assert ours == merges
    assert len(vocabulary(ours, ["<|endoftext|>"])) == len(ids) == 1000


def test_progress_ends_at_the_number_of_merges() -> None:
    seen: list[int] = []
    merges = learn_merges(count_words(library_texts(3)), 600, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == len(merges) == 600 - 256


# ---- counting ----


def test_words_of_each_pattern() -> None:
    text = "He'll say\n\n  x = 12345!\nWE'LL go"
    gpt2 = ["He", "'ll", " say", "\n\n ", " x", " =", " 12345", "!", "\n", "WE", "'", "LL", " go"]
    gpt4 = ["He", "'ll", " say", "\n\n", " ", " x", " =", " ", "123", "45", "!\n", "WE", "'LL", " go"]
    assert count_words([text], GPT2_PATTERN) == Counter(word.encode() for word in gpt2)
    assert count_words([text], GPT4_PATTERN) == Counter(word.encode() for word in gpt4)


@PATTERNS
@given(text=st.text(st.characters(max_codepoint=127), max_size=60) | st.text("aZ0' \t\r\n\x0b\x1c!.'sS", max_size=60))
@settings(max_examples=100, deadline=None)
def test_ascii_twin_finds_the_same_words(pattern: str, text: str) -> None:
    assert word_finder(pattern)(text) == regex.findall(pattern, text)


def test_counts_of_parts_add_up() -> None:
    texts = library_texts(6)
    whole = count_words(iter(texts))
    assert whole == count_words(texts[:5]) + count_words(texts[5:])
    assert whole == Counter(word.encode() for text in texts for word in regex.findall(GPT2_PATTERN, text))


def test_the_empty_text_is_no_word_where_a_pattern_matches_it() -> None:
    assert count_words(["a bc", "<s>", ""], r"\s*\S*", ["<s>"]) == {b"a": 1, b" bc": 1}


def test_special_tokens_are_not_counted() -> None:
    # The longer token wins where two begin at the same place.
    assert count_words(["a<s>b<s>>c"], special_tokens=["<s>", "<s>>"]) == {b"a": 1, b"b": 1, b"c": 1}


# ---- encoding and decoding ----


SPECIAL_TOKENS = ["<|endoftext|>", "<|pad|>"]


@pytest.fixture(scope="module")
def merges() -> list[Merge]:
    texts = [*library_texts(8), *generated_texts(5, KNOWN_CHARACTERS, 10)]
    return train(texts, 1200, special_tokens=SPECIAL_TOKENS)


@pytest.fixture(scope="module")
def tokenizers(merges: list[Merge]) -> dict[str, ByteLevelBPE]:
    return {pattern: ByteLevelBPE(merges, SPECIAL_TOKENS, pattern) for pattern in (GPT2_PATTERN, GPT4_PATTERN)}


@PATTERNS
@given(data=st.binary(max_size=80) | st.text(max_size=40).map(str.encode) | st.sampled_from([b"<|pad|>", b"\xc3\xa9"]))
@settings(max_examples=100, deadline=None)
def test_round_trip_of_any_bytes(tokenizers: dict[str, ByteLevelBPE], pattern: str, data: bytes) -> None:
    assert tokenizers[pattern].decode(tokenizers[pattern].encode(data)) == data


def test_escaped_bytes_count_as_the_bytes_they_are() -> None:
    escaped = b"\xc3".decode("utf-8", "surrogateescape") + b"\xa9".decode("utf-8", "surrogateescape")
    assert count_words(["é", escaped]) == {"é".encode(): 2}


@PATTERNS
def test_ids_equal_the_exported_tokenizer(
    merges: list[Merge], tokenizers: dict[str, ByteLevelBPE], pattern: str, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    content = to_tokenizer_json(merges, SPECIAL_TOKENS, pattern)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    exported = AutoTokenizer.from_pretrained(tmp_path)
    ours = tokenizers[pattern]
    assert len(exported) == len(ours.ids) == 1200
    texts = [
        *generated_texts(7, KNOWN_CHARACTERS),
        *generated_texts(8, string.printable + "é’“ſK"),
        *library_texts(2),
        "one<|endoftext|>two <|pad|><|endoftext|>",
    ]
    for text in texts:
        ids = ours.encode(text)
        assert ids == exported(text, add_special_tokens=False)["input_ids"]
        assert exported.decode(ids) == text == ours.decode(ids).decode()


def test_spelling_is_gpt2s() -> None:
    assert set(map(spell, SINGLE_BYTES)) == set(pre_tokenizers.ByteLevel.alphabet())
    assert spell(b" the\n") == "ĠtheĊ"
    assert unspell("ĠtheĊ") == b" the\n"


# ---- what a user can get wrong ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": ["ab"], "vocab_size": 257, "special_tokens": ["<s>", "<e>"]}, "smaller than 256 bytes + 2 special"),
        ({"texts": ["ab"], "vocab_size": 300, "pattern": r"(?:a"}, "does not compile"),
        ({"texts": ["ab"], "vocab_size": 300, "pattern": r"(a)|b"}, "group that captures"),
        ({"texts": ["ab", "c d"], "vocab_size": 300, "pattern": r"\w+"}, "loses text"),
        ({"texts": ["ab"], "vocab_size": 300, "special_tokens": ["<s>", "<s>"]}, "'<s>' is given twice"),
        ({"texts": ["ab"], "vocab_size": 300, "special_tokens": ["é"]}, "'é' is empty or one character"),
        ({"texts": ["ab"], "vocab_size": 300, "special_tokens": [""]}, "'' is empty or one character"),
        ({"texts": [], "vocab_size": 300}, "the corpus is empty"),
        ({"texts": ["", ""], "vocab_size": 300}, "the corpus is empty"),
        ({"texts": ["", ""], "vocab_size": 300, "pattern": r"\s*\S*"}, "the corpus is empty"),
    ],
)
def test_mistakes_cost_one_line(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        train(**arguments)
    assert "\n" not in str(caught.value)


def test_too_few_pairs_stop_early() -> None:
    merges = train(["abc abc"], 1000)
    assert merges == learn_merges_textbook(count_words(["abc abc"]), 1000)
    assert len(vocabulary(merges)) == 256 + 3  # ab, abc, " abc"
    assert train(["a b"], 256) == train(["a"], 1000) == []


def test_mistakes_of_the_encoder() -> None:
    tokenizer = ByteLevelBPE([(b"a", b"b")])
    with pytest.raises(ValueError, match="id 257 is not in the vocabulary of 257 tokens"):
        tokenizer.decode([256, 257])
    with pytest.raises(ValueError, match="loses text"):
        ByteLevelBPE([], pattern=r"\w+").encode("a b")
    with pytest.raises(ValueError, match="spells a learned token that stands for other bytes"):
        ByteLevelBPE([(b" ", b"a")], ["Ġa"])
