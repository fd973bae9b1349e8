"""Token files: those of small texts never change; those of large ones are written in parts, by any processes."""

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import contents, text
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tqdm import tqdm

from datamodules import fast_encoding, sources, token_cache, token_files
from datamodules.decoder_pretrain import PretrainDataModule
from datamodules.fast_encoding import TextEncoder, fast_encoder
from datamodules.sources import Files, ListText, Shuffled
from datamodules.token_cache import prepare_tokens
from datamodules.tokenizers import byte_tokenizer, encode, load_tokenizer

MERGES = ["a n", "e r", "i t", "Ġ s", "o u", "Ġ t", "Ġs t", "m n", "an er", "Ġ n", "Ġ m", "u n", "e e"]


@pytest.fixture
def bpe(tmp_path):
    """Return the path of a small byte-level BPE tokenizer of GPT-2's pattern."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = [*bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)]
    vocabulary = {letter: number for number, letter in enumerate(["<|endoftext|>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split()) for merge in MERGES]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


# --- small texts -----------------------------------------------------------------------------------------------------


def hashed(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


LINES = "".join(f"{line}\n" for line in text(40_000).split("."))  # 190 kB: several pieces
DOCUMENTS = [f"{part}\n" for part in text(3_000, seed=1).split(".")]

# Tokens of the splits and batches of the third epoch, computed with version 0.2 before texts were prepared in parts.
# The first two sequential orders are later: they had left out the last tokens of the text.
BYTES = ["d615c708cb0e44f4", "788ff259ae15e136", "7671e1d7531fcd35"]
PAIRS = ["6b33a062e35a7947", "9a230798e33d35ea", "c4ef8a8780cfb9b3"]
OF_DOCUMENTS = ["33ae500b709389b5", "577c6a4010e96c36", "7dc323768822714d"]
CHARACTERS = ["f983d7b782862447", "180afa74c9b5063c", "8395915b186e9289"]


@pytest.mark.parametrize(
    ("tokenizer", "split", "windows", "expected"),
    [
        ("byte", "tail", "random", [*BYTES, "fcb84a409eb1e7b8"]),
        ("byte", "tail", "sequential", [*BYTES, "c2e3fe01233844e9"]),
        ("bpe", "tail", "sequential", [*PAIRS, "731228df84541518"]),
        ("bpe", "documents", "random", [*OF_DOCUMENTS, "11d9f384c5a42f6d"]),
        ("character", "auto", "sequential", [*CHARACTERS, "62b80d869feb2126"]),
    ],
)
def test_tokens_and_windows_of_small_texts_are_those_of_earlier_versions(
    tokenizer, split, windows, expected, bpe, tmp_path
):
    (tmp_path / "text.txt").write_text(LINES)
    source = Files(str(tmp_path / "text.txt")) if split == "tail" else ListText(DOCUMENTS)
    name = bpe if tokenizer == "bpe" else tokenizer
    data = PretrainDataModule(source, 64, 16, name, windows, split, 0.1, 0.05, cache_dir=str(tmp_path), seed=3)
    found = [hashed(data.files[side].open()) for side in ("train", "val", "test")]
    loader = data.train_dataloader()
    loader.sampler.set_epoch(2)
    assert [*found, hashed(np.stack([batch["input_ids"].numpy() for batch in loader]))] == expected


# --- large texts -----------------------------------------------------------------------------------------------------


def all_tokens(files):
    """Return the tokens of each split as lists."""
    places = {side: np.arange(file.n_tokens)[None] for side, file in files.items()}
    return {side: files[side].open()[places[side]].tolist() for side in files if files[side].n_tokens}


@pytest.mark.parametrize(
    ("kind", "split"),
    [(kind, split) for kind in ("text", "files", "rows", "crlf") for split in ("tail", "documents")]
    + [("files", "auto"), ("rows", "auto")],
)
def test_a_text_in_parts_has_the_tokens_of_the_whole(kind, split, tmp_path, monkeypatch):
    folder = tmp_path / "texts"
    folder.mkdir()
    if kind == "files":
        for number in range(30):
            (folder / f"{number:02d}.txt").write_text(text(700, seed=number).replace(". ", "é\n"), encoding="utf-8")
    elif kind == "rows":
        rows = [json.dumps({"id": "x", "text": text(50, seed=n)}) for n in range(400)]
        (folder / "a.jsonl").write_text("\n".join(rows) + "\n")
    else:
        lines = (LINES[:60_000].replace("\n ", "\n") + "\n\n  \n").replace("\n", "\r\n" if kind == "crlf" else "\n")
        (folder / "a.txt").write_bytes(("\ufeff" + lines).encode())
    source = Files(str(folder))
    options = {"split": split, "val_fraction": 0.2, "test_fraction": 0.1}
    monkeypatch.setattr(sources, "PIECE_SIZE", 1_000)
    whole = prepare_tokens(source, byte_tokenizer(), tmp_path / "whole", **options)
    monkeypatch.setattr(sources, "PART_SIZE", 10_000)
    parts = prepare_tokens(source, byte_tokenizer(), tmp_path / "parts", **options)
    assert len(list((tmp_path / "parts/tokens").glob("*/*/0*"))) == len(source.parts())
    assert len(source.parts()) >= 5
    assert all_tokens(parts) == all_tokens(whole)
    assert [file.split for file in parts.values()] == [file.split for file in whole.values()]
    assert prepare_tokens(source, byte_tokenizer(), tmp_path / "parts", **options) == parts


@pytest.mark.parametrize("kind", ["rows", "files"])
@pytest.mark.parametrize("size", [2_000, 10**9])
def test_the_documents_of_each_part_are_shuffled(kind, size, tmp_path, monkeypatch):
    if kind == "rows":
        rows = [json.dumps({"text": text(50, seed=n)}) for n in range(300)]
        (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n")
    else:
        for number, n in enumerate([40, 7_000, 30, 20, 2_000, 10, *[200] * 20]):  # the second is in several parts
            (tmp_path / f"{number:02d}.txt").write_text(text(n, seed=number))
    source = Files(str(tmp_path / "*.*"))
    monkeypatch.setattr(sources, "PIECE_SIZE", 1_000)
    monkeypatch.setattr(sources, "PART_SIZE", 10_000)
    monkeypatch.setattr(sources, "SHUFFLED_SIZE", size)
    documents, (one, same, other) = list(source.documents()), (Shuffled(source, seed) for seed in (1, 1, 2))
    assert len(one.parts()) == len(source.parts()) >= 4
    assert list(one.documents()) == list(same.documents()) != documents
    assert list(one.documents()) != list(other.documents())
    assert sorted(one.documents()) == sorted(documents)
    assert [piece for part in one.parts() for piece in part.pieces()] == list(one.pieces())
    for part, shuffled in zip(source.parts(), one.parts(), strict=True):
        assert sorted(part.pieces()) == sorted(shuffled.pieces())
        assert part.opening() == shuffled.opening()
    if size > 10_000 and kind == "rows":
        moved = np.abs(np.diff([documents.index(document) for document in one.parts()[0].documents()]))
        assert moved.mean() > 5
    assert len({source.fingerprint(), one.fingerprint(), other.fingerprint()}) == 3


def test_few_shuffled_documents_are_cut_as_their_parts_are(tmp_path, monkeypatch):
    for number, n in enumerate([3_000, 40, 2_500, 500]):
        (tmp_path / f"{number}.txt").write_text(text(n, seed=number).replace(". ", ".\n"))
    source = Shuffled(f"{tmp_path}/*.txt", seed=3)
    monkeypatch.setattr(sources, "PIECE_SIZE", 1_000)
    monkeypatch.setattr(sources, "PART_SIZE", 10_000)
    parts = prepare_tokens(source, byte_tokenizer(), tmp_path / "parts", "auto", 0.2, 0.1)
    text_of = {side: bytes(t for t in found[0] if t < 256).decode() for side, found in all_tokens(parts).items()}
    for document in source.documents():
        assert document[:100] in text_of["train"]
        assert document[-12:] in text_of["test"]


def test_a_mixture_is_not_shuffled_as_a_whole():
    mixture = sources.Mixture([sources.ListText(["a"]), sources.ListText(["b"])], [1, 1])
    with pytest.raises(MisconfigurationException, match=r"give it texts that are each a Shuffled"):
        Shuffled(mixture)


@pytest.mark.parametrize("split", ["auto", "groups"])
@pytest.mark.parametrize("held_out", [(0.2, 0.1), (0.3, 0.0), (0.0, 0.45)])
def test_few_documents_are_cut_across_parts(split, held_out, tmp_path, monkeypatch):
    documents = [text(n, seed=seed).replace(". ", ".\n") for seed, n in enumerate((7_000, 500, 3_000))]
    for number, document in enumerate(documents):
        (tmp_path / f"{number}.txt").write_text(document)
    source = Files(f"{tmp_path}/*.txt")
    monkeypatch.setattr(sources, "PIECE_SIZE", 1_000)
    whole = prepare_tokens(source, byte_tokenizer(), tmp_path / "whole", split, *held_out)
    monkeypatch.setattr(sources, "PART_SIZE", 10_000)
    parts = prepare_tokens(source, byte_tokenizer(), tmp_path / "parts", split, *held_out)
    assert len(parts["train"].files) >= 3
    assert parts["train"].split == whole["train"].split
    cut = [[], [], []]
    for side, tokens_of_side in all_tokens(parts).items():
        ends = [place for place, token in enumerate(tokens_of_side[0]) if token == 256]
        assert len(ends) == 2  # between three documents
        for number, (begin, end) in enumerate(zip([-1, *ends], [*ends, None], strict=True)):
            cut[number].append(bytes(tokens_of_side[0][begin + 1 : end]).decode())
        assert abs(parts[side].n_tokens - whole[side].n_tokens) < 200  # a cut is at a line of its piece
    assert ["".join(sides) for sides in cut] == documents


@pytest.fixture
def large(tmp_path, monkeypatch):
    """Return a text of six parts of about 10 kB."""
    monkeypatch.setattr(sources, "PART_SIZE", 10_000)
    monkeypatch.setattr(sources, "PIECE_SIZE", 1_000)
    (tmp_path / "text.txt").write_text(LINES[:60_000].replace("\n ", "\n"))
    return Files(str(tmp_path / "text.txt"))


def prepare(source, cache, n_processes=1, **options):
    return prepare_tokens(source, byte_tokenizer(), cache, "documents", n_processes=n_processes, **options)


def parts_of(source, folder):
    return token_cache._Parts(folder, token_cache.SplitDocuments(source, "documents").parts(), byte_tokenizer())


def in_a_copy(function, *args):
    """Start a function in a copy of this process."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    return process


def files_in(cache):
    return {path.relative_to(cache): content for path, content in contents(cache).items()}


def test_any_number_of_processes_writes_the_same_files(large, tmp_path):
    n = len(large.parts())
    one, two, both = (tmp_path / name for name in ("one", "two", "both"))
    prepare(large, one)
    prepare(large, two, n_processes=2)
    beside = in_a_copy(prepare, large, both)
    prepare(large, both)
    beside.join()
    assert beside.exitcode == 0
    assert files_in(one) == files_in(two) == files_in(both)
    assert len(files_in(one)) == 4 * n + 1


def after_events(limit, function, *args):
    """Call a function; kill the process, or its copy, at one of the times at which it uses a file."""
    count = 0

    def hook(event, _):
        nonlocal count
        if event == "open" or event.startswith(("os.", "shutil.", "tempfile.", "fcntl.")):
            count += 1
            if count == limit:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    with contextlib.suppress(MisconfigurationException):  # of a copy that was killed
        function(*args)


@pytest.mark.slow
@pytest.mark.parametrize("n_processes", [1, 2])
def test_a_text_whose_preparation_is_killed_at_any_moment_has_the_same_files(large, tmp_path, n_processes):
    prepare(large, tmp_path / "whole")
    cache = tmp_path / "killed"
    for limit in random.Random(n_processes).sample(range(1, 120), k=10):
        in_a_copy(after_events, limit, prepare, large, cache, n_processes).join()
    prepare(large, cache)
    assert files_in(cache) == files_in(tmp_path / "whole")


@dataclass
class Failing(ListText):
    """A text in five parts, the fourth of which cannot be read until `works` is set."""

    works: bool = False
    readings: int = 0

    def parts(self):
        return [Failing([text], self.works or number != 3) for number, text in enumerate(self.texts)]

    def pieces(self):
        if not self.works:
            raise MisconfigurationException("the network is gone")
        Failing.readings += 1
        return super().pieces()


@pytest.mark.parametrize("n_processes", [1, 2])
def test_after_an_error_only_the_missing_parts_are_prepared(tmp_path, n_processes, capsys):
    source = Failing([f"document {number}" for number in range(5)])
    with pytest.raises(MisconfigurationException, match=r"^the network is gone$"):
        prepare(source, tmp_path, n_processes)
    there = len(list(tmp_path.glob("tokens/*/*/*/meta.json")))
    assert there >= 3
    source.works, Failing.readings = True, 0
    files = prepare(source, tmp_path)
    assert Failing.readings == 5 - there
    assert bytes(all_tokens(files)["train"][0][:10]) == b"document 0"
    assert f"preparing text in 5 parts in {files['train'].files[0].path.parents[2]} ({there} are there)" in (
        capsys.readouterr().err
    )


def test_a_full_disk_is_one_line_and_loses_no_part(large, tmp_path, monkeypatch):
    write_part = token_cache._write_part

    def full(text, tokenizer, follows, folder):
        if text.source == large.parts()[4]:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_part(text, tokenizer, follows, folder)

    monkeypatch.setattr(token_cache, "_write_part", full)
    with pytest.raises(MisconfigurationException) as caught:
        prepare(large, tmp_path / "cache")
    monkeypatch.setattr(token_cache, "_write_part", write_part)
    assert "cannot be written to" in str(caught.value)
    assert "No space left" in str(caught.value)
    assert "\n" not in str(caught.value)
    (folder,) = (tmp_path / "cache/tokens").glob("*/*")
    assert sorted(path.name for path in folder.iterdir()) == ["00000", "00001", "00002", "00003", "00004.lock"]
    assert len(prepare(large, tmp_path / "cache")["train"].files) == 6


def test_a_damaged_part_is_written_again(large, tmp_path):
    before = prepare(large, tmp_path)
    content = files_in(tmp_path)
    os.truncate(before["train"].files[2].path, 100)
    assert prepare(large, tmp_path) == before
    assert files_in(tmp_path) == content


@pytest.mark.parametrize("n_processes", [1, 2])
@pytest.mark.parametrize("moment", ["_write_parts", "_write_folder", "_write_part"])
def test_a_text_that_another_process_completes_in_other_parts_is_taken(
    large, tmp_path, monkeypatch, moment, n_processes
):
    original, began = getattr(token_cache, moment), []

    def after_another(*args):
        if not began:
            began.append(True)
            with monkeypatch.context() as other:
                other.setattr(sources, "PART_SIZE", 25_000)
                prepare(large, tmp_path / "cache")
        return original(*args)

    monkeypatch.setattr(token_cache, moment, after_another)
    files = prepare(large, tmp_path / "cache", n_processes)
    assert len(files["train"].files) == 3
    assert len(files_in(tmp_path / "cache")) == 4 * 3 + 1
    assert all_tokens(files)["train"][0] == all_tokens(prepare(large, tmp_path / "whole"))["train"][0]


def test_a_text_that_is_joined_in_two_divisions_at_once_has_the_files_of_the_first(large, tmp_path, monkeypatch):
    describe, others = token_cache.describe, []

    def beside_another(*args):
        if not others:
            with monkeypatch.context() as other:
                other.setattr(sources, "PART_SIZE", 25_000)
                other.setattr(token_cache, "describe", describe)
                others.append(in_a_copy(prepare, large, tmp_path))
            others[0].join(1)  # it would be complete by now, if it did not wait
        return describe(*args)

    monkeypatch.setattr(token_cache, "describe", beside_another)
    files = prepare(large, tmp_path)
    others[0].join()
    assert others[0].exitcode == 0
    assert len(files["train"].files) == 6
    assert prepare(large, tmp_path) == files
    assert len(files_in(tmp_path / "tokens")) == 4 * 6 + 1  # no lock, and nothing of the other division


def test_the_files_of_a_complete_text_stay(large, tmp_path, monkeypatch):
    folder, how = tmp_path / "text", ("documents", (0.0, 0.0))
    late = parts_of(large, folder)
    token_cache._write_parts(late, 1)
    late.folder.rename(tmp_path / "late")
    monkeypatch.setattr(sources, "PART_SIZE", 25_000)
    parts = parts_of(large, folder)
    token_cache._write_parts(parts, 1)
    parts.join(*how)
    (tmp_path / "late").rename(late.folder)
    files = token_cache.prepared(folder)
    late.join(*how)
    assert token_cache.prepared(folder) == files is not None


def test_the_parts_of_an_older_version_are_read_where_they_are(large, tmp_path):
    before = prepare(large, tmp_path)
    expected = all_tokens(before)
    division, folder = (before["train"].files[0].path.parents[n] for n in (1, 2))
    for part in division.iterdir():
        part.rename(folder / part.name)
    meta = json.loads((folder / "meta.json").read_text())
    del meta["division"]
    (folder / "meta.json").write_text(json.dumps(meta))
    after = prepare(large, tmp_path)
    assert after["train"].files[0].path.parents[1] == folder
    assert all_tokens(after) == expected


@pytest.mark.parametrize("n_processes", [1, 2])
def test_a_command_that_waits_for_another_says_so_once(large, tmp_path, monkeypatch, n_processes):
    holds = multiprocessing.get_context("fork").Event()

    def hold(*_):
        signal.alarm(20)
        holds.set()
        signal.pause()

    monkeypatch.setattr(token_cache, "_SILENT_WAIT", 0.0)
    monkeypatch.setattr(token_cache, "_WAIT", 0.01)
    with monkeypatch.context() as other:
        other.setattr(token_cache, "_write_part", hold)
        holder = in_a_copy(prepare, large, tmp_path)
    assert holds.wait(30)
    said = []

    def say(line):
        said.append(line)
        if "wait, or end it" in line:
            holder.kill()

    monkeypatch.setattr(token_cache, "say", say)
    prepare(large, tmp_path, n_processes)
    (line,) = (line for line in said if "wait, or end it" in line)
    assert line.startswith(f"the missing parts are being prepared by process {holder.pid} on ")


def test_dead_processes_are_not_waited_for(large, tmp_path, monkeypatch):
    parts = parts_of(large, tmp_path)
    parts.folder.mkdir(parents=True)
    for number in parts.missing():
        (parts.folder / f"{number:05d}.lock").write_text("process 1 on another machine\n")
    said = []
    monkeypatch.setattr(token_cache, "_SILENT_WAIT", 0.0)
    monkeypatch.setattr(token_cache, "say", said.append)
    token_cache._write_parts(parts, 1)
    assert said == [f"preparing text in 6 parts in {tmp_path}"]


def test_a_copy_that_waits_ends_with_the_process_that_started_it(large, tmp_path, monkeypatch):
    parts = parts_of(large, tmp_path)
    asked = []

    def held(file):
        asked.append(file)
        assert len(asked) <= len(parts.texts), "it waits on without looking at that process"

    monkeypatch.setattr(token_cache, "try_lock", held)
    assert next(parts.write_missing()) == [os.getpid()]


def test_copies_do_not_share_the_lock_of_the_bar():
    shared = tqdm.get_lock()

    def work():
        if tqdm.get_lock() is shared:
            raise OSError("a copy that is killed while it holds the lock would keep it")
        yield

    assert list(token_cache._in_processes(1, work))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_copies_leave_the_signals_of_a_terminal_and_of_a_job_to_their_parent(number):
    def work():
        signal.raise_signal(number)
        yield

    assert list(token_cache._in_processes(1, work))


def test_without_locks_the_folders_of_other_processes_stay(large, tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    parts = parts_of(large, tmp_path)
    unfinished = [parts.folder / f"{number:05d}-unfinished" for number in (0, 1)]
    for folder in unfinished:
        folder.mkdir(parents=True)
    working = parts.write_missing()
    next(working)
    monkeypatch.setattr("lightning_modules.common.files.fcntl.lockf", refuse)
    next(working)
    assert [folder.exists() for folder in unfinished] == [False, True]


def test_a_process_that_is_killed_is_named(large, tmp_path):
    with pytest.raises(MisconfigurationException, match=r"ended with exit code -9 .*run the command again"):
        prepare(Deadly(large.paths), tmp_path, n_processes=2)


class Deadly(Files):
    """A text that kills the process that reads it."""

    def read(self, text):
        os.kill(os.getpid(), signal.SIGKILL)


def test_windows_are_the_same_across_parts(large, tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "_MOST_OPEN", 2)
    data = [
        PretrainDataModule(source, 64, 4, windows=windows, split="documents", cache_dir=str(tmp_path), val_fraction=0)
        for source in (large, ListText([(tmp_path / "text.txt").read_text()]))
        for windows in ("random", "sequential")
    ]
    batches = [[batch["input_ids"].tolist() for batch in one.train_dataloader()] for one in data]
    assert batches[0] == batches[2]
    assert batches[1] == batches[3]
    windows = data[0].windows_of(data[0].files["train"])
    assert windows[torch.tensor([0, 20_000, 40_000])]["input_ids"].shape == (3, 64)
    assert len(windows.tokens._open) == 2
    assert len(data[0].files["train"].files) == len(large.parts()) == 6


# --- encoding by tiktoken --------------------------------------------------------------------------------------------

ODD = [
    "",
    " " * 3000 + "x",
    "\n" * 3000,
    "a" * 3000,
    "日本語🙂" * 999,
    "'s't 's <|endoftext|>",
    "\x00\r\n\t\u2028 a\x85b",
]


def test_tiktoken_has_the_ids_of_the_library(bpe):
    tokenizer = load_tokenizer(bpe)
    fast = fast_encoder(tokenizer)
    for one in [*ODD, LINES]:
        assert fast(one).tolist() == encode(tokenizer, [one])[0].tolist()


def rewritten(bpe, change):
    content = json.loads(Path(bpe).read_text())
    change(content)
    Path(bpe).write_text(json.dumps(content))
    return load_tokenizer(bpe)


# The library merges b and c first, and then has no merge for a and bc.
MERGED_OTHERWISE = [["b", "c"], ["a", "b"], ["ab", "c"]]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["model"].update(
            merges=MERGED_OTHERWISE, vocab=content["model"]["vocab"] | {"bc": 900, "ab": 901, "abc": 902}
        ),
        lambda content: content["model"].update(ignore_merges=True),
        lambda content: content["pre_tokenizer"].update(add_prefix_space=True),
        lambda content: content.update(normalizer={"type": "Lowercase"}),
        lambda content: content["added_tokens"][0].update(special=False),
        lambda content: content.update(pre_tokenizer={"type": "Whitespace"}),
    ],
)
def test_a_tokenizer_whose_ids_can_differ_is_left_to_the_library(bpe, change):
    assert fast_encoder(rewritten(bpe, change)) is None


def test_if_the_beginning_of_a_text_has_other_ids_the_library_encodes_it(bpe, monkeypatch):
    tokenizer = load_tokenizer(bpe)
    texts = [LINES, "more"]
    expected = [ids.tolist() for ids in encode(tokenizer, texts)]
    assert [ids.tolist() for ids in TextEncoder(tokenizer)(texts)] == expected
    monkeypatch.setattr(fast_encoding, "fast_encoder", lambda _: lambda text: np.zeros(9))
    assert [ids.tolist() for ids in TextEncoder(tokenizer)(texts)] == expected
    monkeypatch.setattr(fast_encoding, "encode", lambda _, texts: [np.zeros(9) for _ in texts])
    assert [len(ids) for ids in TextEncoder(tokenizer)(texts)] == [9, 9]


def test_the_beginning_of_a_text_may_be_in_several_batches(bpe, monkeypatch):
    tokenizer = load_tokenizer(bpe)
    by_library = []
    monkeypatch.setattr(fast_encoding, "_SAMPLE", 100)
    monkeypatch.setattr(fast_encoding, "encode", lambda _, texts: by_library.extend(texts) or encode(tokenizer, texts))
    encoder, batches = TextEncoder(tokenizer), [[f"{number:02d} short text"] * 3 for number in range(6)]
    found = [ids.tolist() for batch in batches for ids in encoder(batch)]
    texts = [*chain.from_iterable(batches)]
    assert found == [ids.tolist() for ids in encode(tokenizer, texts)]
    assert by_library == texts[:8]  # the first of at least 100 characters


def test_a_text_whose_later_beginning_has_other_ids_is_left_to_the_library(bpe, monkeypatch):
    tokenizer = load_tokenizer(bpe)
    monkeypatch.setattr(fast_encoding, "_SAMPLE", 100)
    first = ["a" * 60]
    known = encode(tokenizer, first)[0]
    monkeypatch.setattr(fast_encoding, "fast_encoder", lambda _: lambda text: known)
    encoder, second = TextEncoder(tokenizer), ["b" * 60, "more"]
    assert [ids.tolist() for batch in (first, second) for ids in encoder(batch)] == [
        ids.tolist() for ids in encode(tokenizer, first + second)
    ]
