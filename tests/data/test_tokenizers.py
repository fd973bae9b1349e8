"""Tokenizers of bytes and of characters, from a folder, from a file and from the hub."""

import json
import multiprocessing
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import experiments
from datamodules import sources
from datamodules.sources import ListText
from datamodules.tokenizers import (
    END_OF_TEXT,
    byte_tokenizer,
    character_tokenizer,
    decode_stream,
    encode,
    load_tokenizer,
    token_byte_lengths,
    tokenizer_fingerprint,
    vocab_size,
)

TEXT = "First, second, third.\nThe naïve café isn't 'there'; it’s 12 345 away!\n\n  Then\tthe end — 終.\n" * 3


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_TRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory):
    """A small GPT-2-like tokenizer, as a run that learns one leaves it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=[END_OF_TEXT], show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    folder = tmp_path_factory.mktemp("run") / "tokenizer"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def byte_pairs(bpe_folder):
    return load_tokenizer(str(bpe_folder))


def one_line_error(name, source=None):
    with pytest.raises(MisconfigurationException) as caught:
        load_tokenizer(name, source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- byte ------------------------------------------------------------------------------------------------------------


@given(st.text())
@settings(deadline=None, max_examples=50)
def test_byte_ids_are_the_bytes(text):
    tokenizer = byte_tokenizer()
    ids = encode(tokenizer, [text])[0].tolist()
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    if END_OF_TEXT not in text:  # the slow way, through the library, is the same
        assert tokenizer(text)["input_ids"] == ids


def test_byte_vocabulary():
    tokenizer = load_tokenizer("byte")
    assert len(tokenizer) == vocab_size(tokenizer) == 257
    assert tokenizer.eos_token_id == 256
    assert tokenizer.is_fast
    assert token_byte_lengths(tokenizer).tolist() == [1] * 256 + [0]


# --- character -------------------------------------------------------------------------------------------------------


def test_characters_of_one_document_are_the_whole_vocabulary():
    tokenizer = load_tokenizer("character", ListText(["héllo\n"]))
    assert tokenizer.get_vocab() == {"\n": 0, "h": 1, "l": 2, "o": 3, "é": 4}
    assert tokenizer.eos_token_id is None
    assert token_byte_lengths(tokenizer).tolist() == [1, 1, 1, 1, 2]


def test_several_documents_need_a_token_between_them():
    tokenizer = load_tokenizer("character", ListText(["ba", "c"]))
    assert tokenizer.get_vocab() == {"a": 0, "b": 1, "c": 2, END_OF_TEXT: 3}
    assert tokenizer.eos_token_id == 3
    assert token_byte_lengths(tokenizer).tolist() == [1, 1, 1, 0]


@given(st.text(alphabet=sorted(set(TEXT))))
@settings(deadline=None, max_examples=50)
def test_characters_round_trip_both_ways(text):
    tokenizer = character_tokenizer("".join(sorted(set(TEXT))), end_of_text=True)
    ids = encode(tokenizer, [text])[0].tolist()
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text


def test_an_unknown_character_is_named_and_never_dropped():
    tokenizer = character_tokenizer("ab", end_of_text=False)
    with pytest.raises(MisconfigurationException, match=r"character 'é' \(U\+00E9\) is not in") as caught:
        encode(tokenizer, ["abba", "abéb"])
    assert "\n" not in str(caught.value)
    with pytest.raises(Exception, match="Missing"):
        tokenizer("abéb")


def test_the_text_is_read_once_for_its_characters(cache):
    source = ListText(["abc"])
    load_tokenizer("character", source)
    with mock.patch.object(ListText, "pieces", side_effect=AssertionError("read again")):
        assert len(load_tokenizer("character", source)) == 3
    (file,) = (cache / "characters").iterdir()
    file.write_text('{"characters": "ab')  # damaged
    assert len(load_tokenizer("character", source)) == 3


def test_characters_need_a_text():
    assert "needs a source" in one_line_error("character")
    assert "has no text" in one_line_error("character", ListText([]))


# --- files and the hub -----------------------------------------------------------------------------------------------


def test_a_folder_and_its_file_are_the_same_tokenizer(bpe_folder):
    folder, file = load_tokenizer(str(bpe_folder)), load_tokenizer(str(bpe_folder / "tokenizer.json"))
    assert len(folder) == 300
    assert folder.eos_token_id == file.eos_token_id == folder.get_vocab()[END_OF_TEXT]
    assert tokenizer_fingerprint(folder) == tokenizer_fingerprint(file)
    assert encode(folder, [TEXT])[0].tolist() == encode(file, [TEXT])[0].tolist() == folder(TEXT)["input_ids"]


@pytest.mark.parametrize("make", [byte_tokenizer, lambda: character_tokenizer("abc", end_of_text=True)])
def test_a_saved_tokenizer_loads_as_the_same(make, tmp_path):
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = load_tokenizer(str(tmp_path / "saved"))
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.eos_token_id == tokenizer.eos_token_id
    assert encode(loaded, ["cab"])[0].tolist() == encode(tokenizer, ["cab"])[0].tolist()


def test_fingerprints_differ(bpe_folder):
    tokenizers = [byte_tokenizer(), load_tokenizer(str(bpe_folder))]
    tokenizers += [character_tokenizer("ab", end_of_text) for end_of_text in (True, False)]
    assert len({tokenizer_fingerprint(tokenizer) for tokenizer in tokenizers}) == 4


def test_the_fingerprint_is_the_same_before_and_after_encoding(bpe_folder, tmp_path):
    plain, backend = load_tokenizer(str(bpe_folder)), Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    backend.enable_truncation(5)
    backend.enable_padding(length=5)
    backend.save(str(tmp_path / "cut.json"))
    tokenizer = load_tokenizer(str(tmp_path / "cut.json"))
    before = tokenizer_fingerprint(tokenizer)
    assert encode(tokenizer, [TEXT])[0].tolist() == encode(plain, [TEXT])[0].tolist()
    assert tokenizer_fingerprint(tokenizer) == before


OTHER = "for the model of another run, give that run"


def test_a_missing_tokenizer_of_a_run_names_the_command_that_makes_it(tmp_path):
    topic = next(Path(experiments.__file__).parent.glob("*/offline.yaml")).parent.name
    for name in (str(tmp_path / f"runs/{topic}/offline/tokenizer"), f"runs/{topic}/offline/tokenizer/tokenizer.json"):
        assert one_line_error(name).endswith(f"does not exist: `llm-train fit -c {topic}/offline` makes one; {OTHER}")
    (tmp_path / f"runs/{topic}/mine/tokenizer").mkdir(parents=True)
    assert one_line_error(f"runs/{topic}/my/tokenizer").endswith(
        f"`llm-train fit -c {topic}/offline --run.name my` makes one; there is runs/{topic}/mine/tokenizer; {OTHER}"
    )
    assert one_line_error(f"runs/{topic}/mine/tokeniser").endswith(f"did you mean runs/{topic}/mine/tokenizer?")
    for name in ("./elsewhere", "runs/words/offline/tokenizer"):
        assert "llm-train" not in one_line_error(name)


def test_an_incomplete_folder_is_one_line(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    assert "holds no tokenizer: give a folder with tokenizer.json, vocab.json and merges.txt" in one_line_error(
        str(tmp_path)
    )
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "mo')
    assert "could not be read" in one_line_error(str(tmp_path))


def test_a_file_of_another_form_names_what_a_file_is(tmp_path):
    (tmp_path / "my.tiktoken").write_text("IQ== 0\nIg== 1\n")
    assert one_line_error(str(tmp_path / "my.tiktoken")).endswith(
        "): a file is a tokenizer.json; give others in a folder, and convert the ranks of tiktoken to one"
    )


def test_a_vocabulary_of_one_token_is_refused(tmp_path):
    Tokenizer(models.WordLevel({"only": 0}, unk_token="only")).save(str(tmp_path / "tokenizer.json"))
    assert "vocabulary of 1" in one_line_error(str(tmp_path))


def test_a_folder_without_a_fast_form_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("<cls>\n<pad>\n<eos>\n<unk>\nA\nC\n<mask>\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "EsmTokenizer"}')
    assert one_line_error(str(tmp_path)).endswith("has no fast (tokenizer.json) form: choose one that has")


def test_an_unreachable_hub_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets
    message = one_line_error("nobody/nothing")
    assert "tokenizer nobody/nothing is no local folder" in message
    assert "byte and character need neither" in message


def test_a_name_on_the_hub_goes_through_transformers(bpe_folder, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    asked = []
    monkeypatch.setattr("datamodules.tokenizers.hub_answers", lambda: True)
    monkeypatch.setattr(
        "transformers.AutoTokenizer.from_pretrained",
        lambda name, **_: asked.append(name) or PreTrainedTokenizerFast.from_pretrained(bpe_folder),
    )
    assert load_tokenizer("owner/name").eos_token == END_OF_TEXT
    assert asked == ["owner/name"]


# --- encoding --------------------------------------------------------------------------------------------------------


def test_special_tokens_in_a_text_are_text(bpe_folder):
    text = f"one{END_OF_TEXT}two"
    for tokenizer in (byte_tokenizer(), load_tokenizer(str(bpe_folder))):
        ids = encode(tokenizer, [text])[0]
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids.tolist()) == text


def test_truncation_and_templates_of_a_tokenizer_do_not_touch_the_text(bpe_folder, tmp_path):
    settings = json.loads((bpe_folder / "tokenizer.json").read_text())
    backend = Tokenizer.from_str(json.dumps(settings))
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    ids = encode(load_tokenizer(str(tmp_path)), [TEXT, "a"])
    assert ids[0].tolist() == encode(load_tokenizer(str(bpe_folder)), [TEXT])[0].tolist()
    assert len(ids[1]) == 1


@given(st.text(min_size=1))
@settings(deadline=None, max_examples=100)
def test_byte_lengths_of_the_tokens_add_up_to_the_text(byte_pairs, text):
    assert token_byte_lengths(byte_pairs)[encode(byte_pairs, [text])[0]].sum() == len(text.encode())


def test_the_mark_of_sentencepiece_is_a_character_of_a_text(tmp_path):
    character_tokenizer("a▁終", end_of_text=False).save_pretrained(tmp_path)
    assert token_byte_lengths(load_tokenizer(str(tmp_path))).tolist() == [1, 3, 3]


def test_bytes_that_a_sequence_of_decoders_decodes_are_counted():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    assert token_byte_lengths(tokenizer).tolist() == [1] * 256 + [0]


def test_byte_lengths_of_written_tokens():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2, "▁été": 3, "<0x0A>": 4}))
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    assert token_byte_lengths(tokenizer).tolist() == [0, 4, 3, 6, 1]


lines = st.text(alphabet="ab1'.,é \t", min_size=1, max_size=10).filter(lambda line: line == line.strip())


@given(st.lists(lines, min_size=1, max_size=30))
@settings(deadline=None, max_examples=100)
def test_pieces_have_the_tokens_of_the_whole(byte_pairs, lines):
    text = "\n".join(lines)
    with mock.patch.object(sources, "PIECE_SIZE", 12):  # each piece has room for a line and its end
        pieces = [piece.text for piece in ListText([text]).pieces()]
    assert len(pieces) > 1 or len(text) <= 12
    assert np.concatenate(encode(byte_pairs, pieces)).tolist() == byte_pairs(text)["input_ids"]


# --- streams ---------------------------------------------------------------------------------------------------------


def _wrapped(backend, **settings):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


def _metaspace():
    pieces = ["▁on", "▁small", "▁fam", "ily", "▁", "é", "▁終", "s"]
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=4))
    backend.decoder = decoders.Metaspace()
    return _wrapped(backend)


def _byte_fallback():
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁so": 256, "▁": 257, "k": 258}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return _wrapped(backend)


def _wordpiece(**settings):
    words = ["don", "'", "t", "it", "s", "##ily", "fam", ".", "!", "do", "not", "m", "n't", ","]
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="."))
    backend.decoder = decoders.WordPiece()
    return _wrapped(backend, **settings)


KINDS = {
    "byte": byte_tokenizer,
    "character": lambda: character_tokenizer("aé終 \n", True),
    "metaspace": _metaspace,
    "byte fallback": _byte_fallback,
    "wordpiece": _wordpiece,
    "without spaces before punctuation": lambda: _wordpiece(clean_up_tokenization_spaces=True),
}


@pytest.fixture(scope="module", params=KINDS)
def any_kind(request):
    return KINDS[request.param]()


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_streamed_text_is_the_decoded_text(any_kind, data):
    some = st.integers(0, vocab_size(any_kind) - 1)
    if "unit" in any_kind.init_kwargs and vocab_size(any_kind) > 200:  # bytes of two to four that make a character
        some = st.one_of(some, st.sampled_from([*"é終😀".encode()]))
    before, tokens = data.draw(st.lists(some, max_size=4)), data.draw(st.lists(some, max_size=12))
    parts = list(decode_stream(any_kind, tokens, before))
    assert "".join(parts) == any_kind.decode([*before, *tokens])[len(any_kind.decode(before)) :]


def test_streamed_text_comes_word_by_word_and_keeps_its_spaces(byte_pairs):
    metaspace = _metaspace()
    assert list(decode_stream(metaspace, [1, 2, 3], [0])) == [" small", " fam", "ily", ""]
    assert list(decode_stream(metaspace, [0, 1])) == ["on", " small", ""]
    assert list(decode_stream(byte_tokenizer(), "é終".encode())) == ["", "é", "", "", "終", ""]
    assert list(decode_stream(_wordpiece(), [6, 5, 7, 9])) == ["fam", "ily", ".", " do", ""]
    clean = KINDS["without spaces before punctuation"]()
    assert "".join(decode_stream(clean, [3, 1, 4, 9, 10, 7])) == "it's do not."
    text = "The naïve café — 終."
    assert "".join(decode_stream(byte_pairs, encode(byte_pairs, [text])[0].tolist())) == text


@pytest.mark.parametrize("tokenizer", [byte_tokenizer, lambda: character_tokenizer("ab", False), _metaspace])
def test_half_of_a_surrogate_pair_is_no_text(tokenizer):
    with pytest.raises(MisconfigurationException, match=r"a text has \\ud83d, half of a surrogate pair"):
        encode(tokenizer(), ["fine", "not \ud83d"])
    with pytest.raises(MisconfigurationException, match=r"text 1 of the list: a text has \\udc00"):
        ListText(["fine", "\udc00"])


def test_a_copy_of_a_process_whose_tokenizer_has_threads_encodes_the_same_ids(bpe_folder, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    tokenizer = load_tokenizer(str(bpe_folder))
    texts = [TEXT] * 64
    here = encode(tokenizer, texts)  # starts the threads, which a copy does not have

    def compare() -> None:
        there = encode(tokenizer, texts)
        os._exit(0 if all(map(np.array_equal, here, there)) else 1)

    copy = multiprocessing.get_context("fork").Process(target=compare, daemon=True)
    copy.start()
    copy.join(timeout=30)
    ended = copy.exitcode
    copy.kill()
    assert ended == 0
