"""The parts of a run of byte-pair encoding: its data, the counting of words, and the metrics."""

import multiprocessing
import os
import select
import signal
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from helpers import text
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordPiece
from tokenizers.pre_tokenizers import Whitespace
from torch.utils.data import DataLoader

from datamodules import base
from datamodules.bpe.data import BatchStream, BPEDataModule, SplitText
from datamodules.sources import ListText, Piece, Source
from datamodules.splits import SplitDocuments
from lightning_modules.bpe import word_counter
from lightning_modules.bpe.metrics import TokenizerMetrics
from lightning_modules.bpe.report import tokens_of
from lightning_modules.bpe.rust_tokenizers import rust_tokenizer
from lightning_modules.bpe.textbook import GPT2_PATTERN, count_words
from lightning_modules.bpe.tokenizer import to_tokenizer_json
from lightning_modules.bpe.word_counter import WordCounter, _count

END = "<|endoftext|>"
DOCUMENTS = [text(30, seed) for seed in range(20)]


class Pieces(Source):
    """Forty documents of two pieces."""

    def pieces(self):
        for number in range(40):
            yield Piece(f"begin {number}", False)
            yield Piece(f"end {number}", True)

    def fingerprint(self):
        return ""


# --- the data --------------------------------------------------------------------------------------------------------


def test_splits_hold_whole_documents_and_lose_none():
    text = SplitDocuments(Pieces(), "documents", 0.3, 0.2)
    splits = [list(SplitText(text, name)) for name in ("train", "val", "test")]
    assert all(splits)
    for split in splits:
        assert [piece.replace("begin", "end") for piece in split[::2]] == split[1::2]
    assert sorted(chain(*splits)) == sorted(piece for piece, _ in Pieces().pieces())


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("skip", [0, 4])
def test_shares_of_all_processes_make_up_the_global_batches_in_order(num_workers, skip):
    shares = []
    for rank in range(3):
        stream = BatchStream(SplitText(SplitDocuments(Pieces())), batch_size=7, rank=rank, world_size=3)
        stream.skip = skip
        shares.append(list(DataLoader(stream, batch_size=None, num_workers=num_workers)))
    assert len({len(share) for share in shares}) == 1
    joined = [list(chain(*parts)) for parts in zip(*shares, strict=True)]
    pieces = [piece for piece, _ in Pieces().pieces()]
    assert joined == [pieces[start : start + 7] for start in range(7 * skip, len(pieces), 7)]


def test_one_document_is_cut_if_asked_for(capsys):
    data = BPEDataModule(ListText(["".join(f"line {i}\n" for i in range(1000))]), val_fraction=0.1, split="auto")
    data.setup("fit")
    train, val = ("".join(chain(*loader)) for loader in (data.train_dataloader(), data.val_dataloader()))
    assert (train[-9:], val[:9]) == ("line 900\n", "line 901\n")
    assert "data    1 document, 8.9 kB: the first 90 % trains, the last 10 % validates" in capsys.readouterr().err


class Handlers(Source):
    """What a process does on Ctrl-C, and whether it has blocked it."""

    def pieces(self):
        blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        yield Piece(f"{signal.getsignal(signal.SIGINT)!r} {blocked}", True)

    def fingerprint(self):
        return ""


def test_workers_of_a_loader_ignore_interrupts():
    loader = BPEDataModule(Handlers(), val_fraction=0.0, num_workers=1).train_dataloader()
    assert list(loader) == [["<Handlers.SIG_IGN: 1> False"]]


def test_workers_of_a_stream_are_guarded_as_those_of_other_loaders(monkeypatch):
    processes, state = [], torch.get_rng_state()
    monkeypatch.setattr(base, "_kill_workers_at_exit", processes.append)
    monkeypatch.setattr(base, "leave_signals_to_the_parent", bool)
    loader = BPEDataModule(Handlers(), val_fraction=0.0, num_workers=1).train_dataloader()
    assert [text.endswith("True") for (text,) in loader] == [True]  # blocked until the worker leaves it to its parent
    assert processes == [os.getpid()]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_skipping_is_for_one_iteration(num_workers):
    loader = BPEDataModule(Pieces(), 10, val_fraction=0.0, num_workers=num_workers).train_dataloader()
    loader.dataset.skip = 5
    assert [len(list(loader)) for _ in range(2)] == [3, 8]


def test_validation_and_test_may_have_sources_of_their_own():
    own = {"val_source": ListText(["val"]), "test_source": ListText(["test"])}
    data = BPEDataModule(ListText(DOCUMENTS), batch_size=100, val_fraction=0.5, **own)
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    assert [next(iter(loader)) for loader in loaders] == [DOCUMENTS, ["val"], ["test"]]


@pytest.mark.parametrize(
    ("arguments", "stage", "message"),
    [
        ({"source": ListText([])}, "fit", r"data\.source: the corpus is empty"),
        ({"source": ListText(DOCUMENTS[:1]), "val_fraction": 1e-9}, "fit", "there is no val text"),
        ({"source": ListText(DOCUMENTS)}, "test", r"no test text.*data\.test_fraction higher"),
    ],
)
def test_a_split_without_text_costs_one_line(arguments, stage, message):
    with pytest.raises(MisconfigurationException, match=message) as caught:
        BPEDataModule(**arguments).setup(stage)
    assert "\n" not in str(caught.value)


def test_fractions_leave_something_to_train_on():
    with pytest.raises(MisconfigurationException, match="leave something to train on"):
        BPEDataModule(ListText(DOCUMENTS), val_fraction=0.9, test_fraction=0.1)


# --- the counting of words -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_counter_counts_all_texts_once_it_has_waited(workers):
    counter = WordCounter(GPT2_PATTERN, [END], workers)
    for document in DOCUMENTS:
        counter.add([document, "é"])
    counter.wait()
    counter.add(["after the wait"])
    counter.wait()
    counter.close()
    assert counter.words == count_words([*DOCUMENTS, *["é"] * len(DOCUMENTS), "after the wait"])
    assert counter.n_bytes == len("".join(DOCUMENTS)) + 2 * len(DOCUMENTS) + len("after the wait")


def test_a_counter_raises_the_error_of_its_process_and_counts_on():
    counter = WordCounter(r"\w+", workers=1)
    counter.add(["loses space"])
    with pytest.raises(ValueError, match="loses text"):
        counter.add(["more"])
    counter.add(["more"])
    counter.wait()
    counter.close()
    assert counter.words == {b"more": 1}


def test_a_counting_process_answers_until_its_pipe_is_closed(monkeypatch):
    received = [["a b"], ["c"]]
    sent = []

    def receive() -> list[str]:
        if not received:
            raise EOFError
        return received.pop(0)

    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(signal, "pthread_sigmask", lambda how, numbers: None)
    _count(SimpleNamespace(close=bool), SimpleNamespace(recv=receive, send=sent.append), r"\w+", [])
    error, counts = sent
    assert isinstance(error, ValueError)
    assert counts == {b"c": 1}


def test_a_counting_process_ends_if_nobody_reads_its_answer(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(signal, "pthread_sigmask", lambda how, numbers: None)
    ours, theirs = multiprocessing.Pipe()
    ours.send(["a"])
    ours.close()
    _count(SimpleNamespace(close=bool), theirs, GPT2_PATTERN, [])


def test_a_killed_process_is_reported_and_does_not_hang():
    counter = WordCounter(GPT2_PATTERN, workers=2)
    counter.add(["a"])
    counter.wait()
    os.kill(counter._processes[0].pid, signal.SIGKILL)
    counter._processes[0].join()
    with pytest.raises(MisconfigurationException, match=r"was killed.*set model\.count_workers lower"):
        counter.add(["b"])
    counter.close()


def test_a_process_that_is_killed_while_it_counts_is_reported(monkeypatch):
    monkeypatch.setattr(word_counter, "count_words", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    counter = WordCounter(GPT2_PATTERN, workers=1)
    counter.add(["a"])
    with pytest.raises(MisconfigurationException, match="was killed"):
        counter.wait()
    counter.close()


def test_processes_end_at_close_even_if_their_parent_ignores_signals_and_they_have_just_begun():
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        counter = WordCounter(GPT2_PATTERN, workers=2)
        counter.add(["a"])
        counter.add(["b"])
        processes = counter._processes
        counter.close()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [process.is_alive() for process in processes] == [False, False]


def test_processes_leave_the_signals_of_a_terminal_and_of_a_job_to_their_parent():
    counter = WordCounter(GPT2_PATTERN, workers=1)
    for number in (signal.SIGINT, signal.SIGUSR1):
        counter.add(["a"])
        counter.wait()
        os.kill(counter._processes[0].pid, number)
    counter.add(["a"])
    counter.wait()
    counter.close()
    assert counter.words == {b"a": 3}


def test_processes_leave_when_their_parent_is_killed():
    reading, writing = os.pipe()  # reading ends when no process has the other end any more
    child = os.fork()
    if child == 0:
        counter = WordCounter(GPT2_PATTERN, workers=3)
        for document in DOCUMENTS[:5]:
            counter.add([document])
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(writing)
    os.waitpid(child, 0)
    ended, *_ = select.select([reading], [], [], 60)
    assert ended
    assert os.read(reading, 1) == b""
    os.close(reading)


# --- the metrics -----------------------------------------------------------------------------------------------------


def test_metrics_of_a_text_by_hand():
    merged = rust_tokenizer(to_tokenizer_json([(b"a", b"b"), (b"ab", b"ab")]))
    single = rust_tokenizer(to_tokenizer_json([]))
    metrics = TokenizerMetrics({"merged": merged, "single": single}, GPT2_PATTERN)
    metrics.update(["ababc", "ab"])  # abab c ab, two words
    metrics.update(["é"])  # two bytes
    metrics.update([])
    found = {name: {k: v.item() for k, v in result.items()} for name, result in metrics.compute().items()}
    assert found == {
        "merged": pytest.approx(
            {"bytes_per_token": 9 / 5, "tokens_per_word": 5 / 3, "vocabulary_use": 5 / 258, "single_byte_tokens": 3 / 5}
        ),
        "single": pytest.approx(
            {"bytes_per_token": 1, "tokens_per_word": 3, "vocabulary_use": 5 / 256, "single_byte_tokens": 1}
        ),
    }


def test_a_tokenizer_of_characters_has_no_single_bytes_and_its_tokens_are_parts_of_the_text():
    pieces = Tokenizer(WordPiece({"[UNK]": 0, "é": 1, "play": 2, "##ing": 3}, unk_token="[UNK]"))
    pieces.pre_tokenizer = Whitespace()
    metrics = TokenizerMetrics({"pieces": pieces}, GPT2_PATTERN)
    metrics.update(["é é playing"])  # 13 bytes, three words
    found = {name: value.item() for name, value in metrics.compute()["pieces"].items()}
    assert found == pytest.approx({"bytes_per_token": 13 / 4, "tokens_per_word": 4 / 3, "vocabulary_use": 3 / 4})
    pieces.decoder = decoders.WordPiece()
    assert tokens_of(pieces, "é é playing") == [(1, "é".encode()), (1, "é".encode()), (2, b"play"), (3, b"ing")]


def test_texts_with_bytes_that_are_not_utf_8_are_counted():
    counter = WordCounter(GPT2_PATTERN)
    counter.add([b"caf\xe9 x".decode("utf-8", "surrogateescape")])
    assert (counter.n_bytes, counter.words) == (6, {b"caf": 1, b"\xe9": 1, b" x": 1})


def test_tokens_of_bytes_are_known_in_a_sequence_of_decoders_and_as_a_fallback():
    pieces = rust_tokenizer(to_tokenizer_json([]))
    pieces.decoder = decoders.Sequence([decoders.ByteLevel()])
    assert [token for _, token in tokens_of(pieces, "é")] == [b"\xc3", b"\xa9"]
    fallback = Tokenizer(BPE({"a": 0, "<0xC3>": 1, "<0xA9>": 2}, [], byte_fallback=True))
    assert tokens_of(fallback, "aé") == [(0, b"a"), (1, b"\xc3"), (2, b"\xa9")]
