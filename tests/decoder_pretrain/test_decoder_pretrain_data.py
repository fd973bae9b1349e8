"""Tokenised text: the cache, the splits, the windows, and the datamodule."""

import json
import multiprocessing
import os
import pickle
import re
import signal
import tracemalloc
from itertools import chain

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules import token_cache
from datamodules.decoder_pretrain.data import PretrainDataModule
from datamodules.sources import ListText, Piece, Source, TextFiles
from datamodules.token_cache import prepare_tokens
from datamodules.token_files import TokenFile
from datamodules.tokenizers import byte_tokenizer
from datamodules.windows import TokenWindows, random_windows, sequential_windows
from lightning_modules.runtime.samples import SampleText, prompts_of

TEXT = "".join(f"line {i}\n" for i in range(200))  # 1,690 bytes
TRAIN, VAL = TEXT[:1521], TEXT[1521:]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_TRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Counted(ListText):
    """A source that counts its readings."""

    readings = 0

    def pieces(self):
        self.readings += 1
        return super().pieces()


def prepare(source, cache, tokenizer=None, **options):
    return prepare_tokens(source, tokenizer or byte_tokenizer(), cache, **options)


def read(file):
    return file.open().tolist() if file.n_tokens else []


def texts(file):
    """Return the documents of a file with byte tokens."""
    ids = read(file)
    ends = [i for i, token in enumerate(ids) if token == 256]
    return [bytes(ids[a + 1 : b]).decode() for a, b in zip([-1, *ends], [*ends, len(ids)], strict=True)]


def module(source=None, stage="fit", **options):
    options = {"block_size": 16, "batch_size": 4} | options
    datamodule = PretrainDataModule(source or ListText([TEXT]), **options)
    datamodule.prepare_data()
    datamodule.setup(stage)
    return datamodule


# --- the cache -------------------------------------------------------------------------------------------------------


def test_a_text_is_tokenized_once(cache):
    source = Counted([TEXT])
    first, second = prepare(source, cache), prepare(source, cache)
    assert source.readings == 1
    assert first == second
    assert bytes(read(first["train"])).decode() == TEXT
    assert first["train"].dtype == "uint16"


def test_the_cache_depends_on_the_source_the_tokenizer_and_the_split(cache, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("abab\n" * 4)
    byte = prepare(TextFiles(str(file)), cache)["train"]
    assert prepare(TextFiles(str(file)), cache, split="documents")["train"].path != byte.path
    assert prepare(TextFiles(str(file)), cache, val_fraction=0.5)["train"].n_tokens == 10
    datamodule = module(TextFiles(str(file)), tokenizer="character", block_size=2, batch_size=1, val_fraction=0)
    assert read(datamodule.files["train"])[:5] == [1, 2, 1, 2, 0]
    file.write_text("changed\n")
    assert bytes(read(prepare(TextFiles(str(file)), cache)["train"])) == b"changed\n"


@pytest.mark.parametrize("harm", ["cut", "longer", "missing", "meta", "empty"])
def test_a_damaged_cache_is_written_again(cache, harm, monkeypatch):
    said = []
    monkeypatch.setattr(token_cache, "say", said.append)
    source = Counted([TEXT])
    file = prepare(source, cache, val_fraction=0.1)["train"]
    meta = file.path.with_name("meta.json")
    if harm == "cut":
        os.truncate(file.path, 100)
    elif harm == "longer":
        file.path.write_bytes(file.path.read_bytes() + b"..")
    elif harm == "missing":
        file.path.unlink()
    elif harm == "meta":
        meta.write_text(meta.read_text()[:20])
    else:
        meta.write_text("[]")
    del said[:]
    assert bytes(read(prepare(source, cache, val_fraction=0.1)["train"])).decode() == TRAIN
    assert source.readings == 2
    assert sum("is damaged" in line for line in said) == 1
    assert len(list((cache / "tokens").iterdir())) == 1


class Deadly(Source):
    """A source that kills the process in the middle, if asked to."""

    def __init__(self, kill):
        self.kill = kill

    def fingerprint(self):
        return "deadly"

    def pieces(self):
        for number in range(4):
            if self.kill and number == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            yield Piece("x" * 2**20, number == 3)


def test_the_files_of_a_killed_process_are_not_used(cache):
    process = multiprocessing.get_context("fork").Process(target=prepare, args=(Deadly(kill=True), cache))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (unfinished,) = (cache / "tokens").iterdir()  # something was written
    assert sum(path.stat().st_size for path in unfinished.rglob("*.bin")) > 0
    assert prepare(Deadly(kill=False), cache)["train"].n_tokens == 4 * 2**20


class Overtaken(ListText):
    """A source of which another process has prepared the same text before this one has read it."""

    def pieces(self):
        yield from super().pieces()
        self.files = prepare(ListText(self.texts), self.cache)
        self.inode = self.files["train"].path.stat().st_ino


def test_if_two_processes_prepare_a_text_the_files_of_the_first_are_kept(cache):
    slow = Overtaken([TEXT])
    slow.cache = cache
    files = prepare(slow, cache)
    assert files == slow.files
    assert files["train"].path.stat().st_ino == slow.inode
    assert len(list((cache / "tokens").iterdir())) == 1  # the files of the second are deleted


def test_a_failure_leaves_no_files(cache, tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes(b"a" * 2**21 + b"\xe9")
    with pytest.raises(MisconfigurationException, match=f"byte {2**21} "):
        prepare(TextFiles(str(file)), cache)
    assert not list((cache / "tokens").iterdir())


def test_a_cache_that_cannot_be_written_gives_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MisconfigurationException, match=r"cannot be written to .*data.cache_dir") as caught:
        prepare(ListText([TEXT]), tmp_path / "file")
    assert "\n" not in str(caught.value)


def test_many_tokens_need_wider_files(cache):
    from datamodules.tokenizers import character_tokenizer

    letters = "".join(chr(0x10000 + i) for i in range(2**16 + 1))
    file = prepare(ListText([letters]), cache, character_tokenizer(letters, end_of_text=False))["train"]
    assert file.dtype == "uint32"
    assert read(file) == list(range(2**16 + 1))


def test_memory_does_not_grow_with_the_text(cache, tmp_path):
    file = tmp_path / "large.txt"
    file.write_bytes(b"The quick brown fox.\n" * 1_200_000)  # 25 MB
    tracemalloc.start()
    files = prepare(TextFiles(str(file)), cache, val_fraction=0.1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert files["train"].n_tokens + files["val"].n_tokens == 25_200_000
    assert peak < 20e6


# --- splits ----------------------------------------------------------------------------------------------------------


def test_the_tail_is_cut_at_the_position_of_nanogpt(cache):
    source = ListText(["abcdefghij" * 111_539 + "abcd"])  # as many characters as tinyshakespeare
    files = prepare(source, cache, val_fraction=0.1)
    assert [files[side].n_tokens for side in ("train", "val", "test")] == [1_003_854, 111_540, 0]


def test_the_splits_of_a_tail_are_the_text_in_order(cache):
    files = prepare(ListText([TEXT]), cache, val_fraction=0.2, test_fraction=0.1)
    sides = [bytes(read(files[side])).decode() for side in ("train", "val", "test")]
    assert "".join(sides) == TEXT
    assert [len(side) for side in sides] == [1183, 338, 169]


def test_a_document_and_its_copies_are_in_one_split(cache):
    documents = [f"document {i % 300}" for i in range(400)]
    files = prepare(ListText(documents), cache, split="documents", val_fraction=0.2, test_fraction=0.1)
    sides = {side: texts(file) for side, file in files.items()}
    assert sorted(chain.from_iterable(sides.values())) == sorted(documents)
    assert not set(sides["train"]) & set(sides["val"])
    assert not set(sides["train"]) & set(sides["test"])
    assert not set(sides["val"]) & set(sides["test"])
    assert 0.1 < len(set(sides["val"])) / 300 < 0.3
    assert 0.04 < len(set(sides["test"])) / 300 < 0.2
    # The split of a document does not depend on the other documents.
    alone = prepare(ListText([sides["val"][0]]), cache, split="documents", val_fraction=0.2, test_fraction=0.1)
    assert texts(alone["val"]) == [sides["val"][0]]


def test_few_documents_are_cut_and_no_window_crosses_a_cut(cache, capsys):
    documents = [TEXT, TEXT.upper(), "x" * 20]
    datamodule = module(ListText(documents), split="auto", val_fraction=0.1)
    sides = {side: texts(datamodule.files[side]) for side in ("train", "val")}
    assert [train + val for train, val in zip(*sides.values(), strict=True)] == documents
    assert "data    3 documents, 3.4 kB: the first 90 % of each trains, the last 10 %" in capsys.readouterr().err
    targets = torch.cat([batch["targets"].flatten() for batch in datamodule.val_dataloader()])
    assert targets[targets != -100].tolist() == read(datamodule.files["val"])[1:]


def test_many_documents_have_the_same_tokens_whether_the_split_is_auto_or_documents(cache):
    source = ListText([f"document {i}" for i in range(60)])
    auto, documents = (prepare(source, cache, split=split, val_fraction=0.2) for split in ("auto", "documents"))
    assert [read(auto[side]) for side in auto] == [read(documents[side]) for side in documents]
    assert auto["val"].n_tokens


def test_a_document_of_many_pieces_is_not_divided(cache):
    long = "".join(f"{i}\n" for i in range(100_000))
    files = prepare(ListText([long, "short", long + "!"]), cache)
    assert texts(files["train"]) == [long, "short", long + "!"]


def test_validation_and_test_from_sources_of_their_own(capsys):
    datamodule = module(val_source=ListText(["val"]), test_source=ListText(["test!"]))
    sides = [bytes(read(datamodule.files[side])) for side in ("train", "val", "test")]
    assert sides == [TEXT.encode(), b"val", b"test!"]
    said = re.findall(r"prepared text in .* \(tokens: (.*)\)", capsys.readouterr().err)
    assert said == [f"train {len(TEXT.encode()):,}", "val 3", "test 5"]


# --- windows ---------------------------------------------------------------------------------------------------------


def test_random_windows_start_anywhere_and_end_within_the_text():
    n, order = random_windows(n_tokens=100, block_size=10, seed=1)
    starts = torch.cat([order(epoch) for epoch in range(200)])
    assert n == len(order(0)) == 10
    assert set(starts.tolist()) == set(range(90))  # the last reaches the last token as its last target
    assert order(0).tolist() == random_windows(100, 10, seed=1)[1](0).tolist()
    assert order(0).tolist() != order(1).tolist()
    assert order(0).tolist() != random_windows(100, 10, seed=2)[1](0).tolist()


@pytest.mark.parametrize("n_tokens", [11, 15, 20, 21, 99, 100, 101, 1000])
def test_sequential_windows_never_overlap(n_tokens):
    n, order = sequential_windows(n_tokens, block_size=10, seed=1)
    offsets, trained = set(), set()
    for epoch in range(300):
        starts = np.sort(order(epoch).numpy())
        assert len(starts) == n
        assert (np.diff(starts) == 10).all()
        assert starts[0] >= 0
        assert starts[-1] + 10 < n_tokens  # the last window's last target is there
        assert n_tokens - (starts[-1] + 11) + starts[0] < 20  # tokens skipped at both ends
        offsets.add(int(starts[0]))
        trained |= {*range(starts[0] + 1, starts[-1] + 11)}
    assert len(offsets) == n_tokens - 10 * n  # the boundaries move
    assert trained == {*range(1, n_tokens)}  # each token is a target in some epoch
    assert n < 5 or order(0).tolist() != sorted(order(0).tolist())


def token_windows(tmp_path, n_tokens=25, block_size=4):
    (tmp_path / "tokens.bin").write_bytes(np.arange(n_tokens, dtype=np.uint16).tobytes())
    byte_lengths = np.arange(100) % 3
    return TokenWindows(TokenFile(tmp_path / "tokens.bin", "uint16", n_tokens), block_size, byte_lengths, 99)


def test_a_batch_has_the_next_token_as_target(tmp_path):
    batch = token_windows(tmp_path)[torch.tensor([20, 3])]
    assert batch["input_ids"].tolist() == [[20, 21, 22, 23], [3, 4, 5, 6]]
    assert batch["targets"].tolist() == [[21, 22, 23, 24], [4, 5, 6, 7]]
    assert batch["target_bytes"].item() == (0 + 1 + 2 + 0) + (1 + 2 + 0 + 1)
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert batch["target_bytes"].dim() == 0


def test_after_the_end_is_padding_without_targets(tmp_path):
    batch = token_windows(tmp_path, n_tokens=23)[torch.tensor([20])]
    assert batch["input_ids"].tolist() == [[20, 21, 22, 99]]
    assert batch["targets"].tolist() == [[21, 22, -100, -100]]
    assert batch["target_bytes"].item() == 0 + 1


def test_no_windows_give_an_empty_batch(tmp_path):
    batch = token_windows(tmp_path)[torch.tensor([], dtype=torch.int64)]
    assert batch["input_ids"].shape == batch["targets"].shape == (0, 4)
    assert batch["target_bytes"].item() == 0


@pytest.mark.parametrize("n_tokens", [2, 4, 5, 6, 8, 9, 25])
def test_evaluation_predicts_every_token_but_the_first_once(tmp_path, n_tokens):
    windows = token_windows(tmp_path, n_tokens)
    targets = windows[windows.covering_starts()]["targets"]
    assert targets[targets != -100].tolist() == list(range(1, n_tokens))


@pytest.mark.parametrize(("n_windows", "most"), [(100, 8), (2**24 + 4, 8)])
def test_some_windows_of_many_are_spread_over_the_file(tmp_path, n_windows, most):
    file = TokenFile(tmp_path / "none.bin", "uint16", 4 * n_windows + 1)
    windows = TokenWindows(file, 4, np.ones(1)).covering_starts(most) // 4
    evenly = torch.linspace(0, n_windows - 1, most, dtype=torch.float64)
    assert (windows - evenly).abs().max() < 2
    assert (windows[0], windows[-1]) == (0, n_windows - 1)


def test_the_windows_are_those_of_older_runs(tmp_path):
    windows = token_windows(tmp_path, n_tokens=4 * 148 + 1).covering_starts(64) // 4
    assert windows[27] == 62  # 63 in float64


def test_a_pickled_dataset_holds_the_path_and_not_the_tokens(tmp_path):
    windows = token_windows(tmp_path, n_tokens=60_000)
    before = windows[torch.tensor([50])]["input_ids"]
    pickled = pickle.dumps(windows)
    assert len(pickled) < 5_000
    assert pickle.loads(pickled)[torch.tensor([50])]["input_ids"].tolist() == before.tolist()


# --- the datamodule --------------------------------------------------------------------------------------------------


def inputs(loader, epoch=0):
    loader.sampler.set_epoch(epoch)
    return [batch["input_ids"].tolist() for batch in loader]


def test_the_values_that_the_module_reads_from_the_data():
    datamodule = PretrainDataModule(ListText(["no text is read for this"]), block_size=8, batch_size=2)
    assert (datamodule.vocab_size, datamodule.pad_token_id, datamodule.block_size) == (257, None, 8)
    assert datamodule.tokenizer.decode([104, 105]) == "hi"
    characters = PretrainDataModule(ListText(["abc"]), block_size=8, batch_size=2, tokenizer="character")
    assert characters.vocab_size == 3


@pytest.mark.parametrize("windows", ["random", "sequential"])
def test_training_windows_are_parts_of_the_training_text(windows):
    datamodule = module(windows=windows)
    loader = datamodule.train_dataloader()
    assert len(loader) == {"random": 95, "sequential": 94}[windows] // 4
    for batch in inputs(loader):
        for row in batch:
            assert bytes(row).decode() in TRAIN
    assert inputs(loader, epoch=1) != inputs(loader, epoch=0)
    assert inputs(loader, epoch=1) == inputs(module(windows=windows).train_dataloader(), epoch=1)
    assert inputs(loader) != inputs(module(windows=windows, seed=1).train_dataloader())


def test_a_worker_gives_the_same_batches():
    alone, helped = module(), module(num_workers=1)
    assert inputs(helped.train_dataloader(), epoch=3) == inputs(alone.train_dataloader(), epoch=3)


def test_validation_covers_the_whole_split_for_any_batch_size():
    for batch_size in (1, 4, 64):
        batches = list(module(batch_size=batch_size).val_dataloader())
        targets = torch.cat([batch["targets"].flatten() for batch in batches])
        assert bytes(targets[targets != -100].tolist()).decode() == VAL[1:]
        assert sum(batch["target_bytes"] for batch in batches) == len(VAL[1:])


def test_validation_windows_can_be_fewer_and_are_spread_over_the_text():
    every = [row for batch in module().val_dataloader() for row in batch["input_ids"].tolist()]
    assert len(every) == 11
    for most, chosen in ((1, [0]), (3, [0, 5, 10]), (11, range(11)), (100, range(11))):
        few = [row for batch in module(val_windows=most).val_dataloader() for row in batch["input_ids"].tolist()]
        assert few == [every[i] for i in chosen]


def test_bytes_do_not_depend_on_the_tokenizer():
    text = "naïve café — 終\n" * 200
    counts = []
    for tokenizer in ("byte", "character"):
        datamodule = module(ListText([text[:100], text]), tokenizer=tokenizer, val_source=ListText(["né", "終é"]))
        assert datamodule.tokenizer.eos_token_id == datamodule.vocab_size - 1
        counts.append(sum(batch["target_bytes"].item() for batch in datamodule.val_dataloader()))
    # All bytes after the first token, which is the one byte of "n" in both cases; <|endoftext|> has no bytes.
    assert counts == [len("é終é".encode())] * 2


def test_the_test_split():
    datamodule = module(stage="test", test_fraction=0.1, val_windows=1)  # the test has all windows of its text
    targets = torch.cat([batch["targets"].flatten() for batch in datamodule.test_dataloader()])
    assert bytes(targets[targets != -100].tolist()).decode() == VAL[1:]


def test_training_without_validation():
    assert module(val_fraction=0).val_dataloader() == []


def test_the_cache_folder_can_be_chosen(tmp_path, cache):
    datamodule = module(tokenizer="character", cache_dir=str(tmp_path / "chosen"))
    assert datamodule.files["train"].path.is_relative_to(tmp_path / "chosen")
    assert not cache.exists()


# --- errors ----------------------------------------------------------------------------------------------------------


def one_line_error(*args, make=module, **options):
    with pytest.raises(MisconfigurationException) as caught:
        make(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_text_shorter_than_a_block_is_refused():
    assert "the training text has 16 tokens" in one_line_error(ListText(["x" * 16]), val_fraction=0)
    assert module(ListText(["x" * 17]), val_fraction=0, batch_size=1).train_dataloader()


def test_fewer_windows_than_a_batch_are_refused():
    short = module(ListText(["x" * 50]), val_fraction=0)
    message = one_line_error(make=short.train_dataloader)
    assert message.startswith("an epoch has 3 training examples, too few for one batch of data.batch_size 4: ")
    assert "a smaller data.block_size" in message


@pytest.mark.parametrize(("stage", "side"), [("test", "test"), ("validate", "val")])
def test_a_split_that_was_not_held_out_is_refused(stage, side):
    message = one_line_error(stage=stage, val_fraction=0)
    assert (
        f"there is no {side} text (1 document, 1.7 kB: all of it trains): set data.{side}_fraction above 0" in message
    )


def test_a_split_of_documents_without_validation_is_refused():
    message = one_line_error(ListText([TEXT]), split="documents", val_fraction=0.1)
    assert "there is no val text (1 document, 1.7 kB: 1 train, 0 validate (0.0% of the text)): set " in message
    assert "or set data.split auto" in message


@pytest.mark.parametrize("fractions", [(-0.1, 0), (0, -0.1), (0.5, 0.5), (1, 0)])
def test_fractions_that_leave_nothing_to_train_on_are_refused(fractions):
    message = one_line_error(val_fraction=fractions[0], test_fraction=fractions[1])
    assert f"data.val_fraction {fractions[0]} and data.test_fraction {fractions[1]}" in message


def test_characters_that_are_not_in_the_training_text_are_refused():
    message = one_line_error(tokenizer="character", val_source=ListText(["line 1 é"]))
    assert "'é' (U+00E9) is not in" in message


def test_a_missing_tokenizer_is_refused(tmp_path):
    assert "give a folder with tokenizer.json" in one_line_error(tokenizer=str(tmp_path / "here"))
    assert "`llm-train fit -c bpe/offline --run.name mine` makes one" in one_line_error(
        tokenizer="runs/bpe/mine/tokenizer"
    )


def test_meta_holds_the_type_and_the_numbers_of_tokens(cache):
    file = prepare(ListText([TEXT]), cache)["train"]
    meta = json.loads(file.path.with_name("meta.json").read_text())
    split = "1 document, 1.7 kB: all of it trains"
    assert meta == {"dtype": "uint16", "tokens": {"train": len(TEXT), "val": 0, "test": 0}, "split": split}


def test_samples_continue_whole_words_of_the_validation_text_by_default():
    callback, data = SampleText(), module(block_size=32, val_fraction=0.2)
    assert callback.prompts == []
    prompts = prompts_of(data)
    assert len(prompts) == 2
    for prompt in prompts:
        assert prompt in TEXT[-len(TEXT) // 5 :]
        assert len(prompt.split()) == 3
        assert set(prompt.split()) <= set(TEXT.split())
    assert SampleText(prompts=["a"]).prompts == ["a"]
    data = module(ListText(["no_space" * 200]), block_size=32)
    assert prompts_of(data)[0] in "no_space" * 5
