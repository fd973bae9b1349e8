"""Byte-pair encoding through the real command: what it learns, measures, leaves, resumes, and refuses."""

import csv
import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import forks
import pytest
import torch
import yaml
from helpers import kill_when, text
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from datamodules.bpe.data import BatchStream, BPEDataModule, Side
from datamodules.sources import ListText, Piece, Source
from lightning_modules.bpe.byte_pair_encoding import (
    GPT2_PATTERN,
    ByteLevelBPE,
    count_words,
    learn_merges,
    learn_merges_textbook,
    spell,
    vocabulary,
)
from lightning_modules.bpe.module import BPEModule, TokenizerMeasures, WordCounter, load_reference
from lightning_modules.bpe.report import TokenizerReport, readable, write_merges
from lightning_modules.runtime.checkpoint_io import AtomicCheckpointIO

ROOT = Path(__file__).parents[2]
RUNS = Path("runs/bpe")
LAST = "checkpoints/last.ckpt"
END = "<|endoftext|>"
DOCUMENTS = [text(30, seed) for seed in range(100)]
SIDES = {side: list(Side(ListText(DOCUMENTS), side, 0.2, 0.1)) for side in ("train", "val", "test")}


@pytest.fixture
def tiny_bpe(tmp_path: Path) -> Callable[..., Path]:
    """Writes offline.yaml with a corpus of a hundred short documents; settings go over it by key path."""

    def write(**settings: object) -> Path:
        config = yaml.safe_load((ROOT / "experiments/bpe/offline.yaml").read_text())
        config["model"]["init_args"] |= {"vocabulary_size": 600, "pattern": "gpt2", "count_workers": 0}
        source = {"class_path": "datamodules.sources.ListText", "init_args": {"texts": DOCUMENTS}}
        config["data"]["init_args"] = {"source": source, "batch_size": 4, "val_fraction": 0.2, "test_fraction": 0.1}
        config["trainer"]["log_every_n_steps"] = 5
        *_, report, checkpoint = config["trainer"]["callbacks"]
        report["init_args"] = {"sample": "A short sample:\n    drawn soon."}
        checkpoint["init_args"]["every_n_train_steps"] = 1
        for path, value in settings.items():
            section, key = path.split("__")
            (config[section] if section == "trainer" else config[section]["init_args"])[key] = value
        file = tmp_path / "tiny.yaml"
        file.write_text(yaml.safe_dump(config, sort_keys=False))
        return file

    return write


@cache
def expected_merges(n_documents: int | None = None) -> list[tuple[bytes, bytes]]:
    """What the first training documents teach, by the textbook."""
    return learn_merges_textbook(count_words(SIDES["train"][:n_documents]), 600, [END])


def merges_of(run: str) -> list[str]:
    return (RUNS / run / "merges.txt").read_text().splitlines()[1:]


def rows(run: str) -> int:
    """Rows that a run's metrics have so far."""
    file = RUNS / run / "metrics.csv"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def spelled(merges: list[tuple[bytes, bytes]]) -> list[str]:
    return [f"{spell(left)} {spell(right)}" for left, right in merges]


def metrics(run: str, name: str = "summary.json") -> dict[str, float]:
    return json.loads((RUNS / run / name).read_text())["metrics"]


# --- what a run learns and leaves ------------------------------------------------------------------------------------


def test_a_run_learns_the_merges_of_its_training_documents_and_leaves_what_it_promises(llm_train, tiny_bpe):
    from transformers import AutoTokenizer

    done = llm_train("fit", "-c", tiny_bpe())
    assert done.code == 0, done.err
    run = RUNS / "tiny"
    assert f"llm-train fit -c experiments/decoder_pretrain/offline.yaml --data.tokenizer {run}/tokenizer" in done.err
    merges = expected_merges()
    assert merges_of("tiny") == spelled(merges)

    tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer")
    assert tokenizer.is_fast
    assert len(tokenizer) == 600
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token) == (END, END, END)
    assert tokenizer.model_max_length == 1024
    ours = ByteLevelBPE(merges, [END])
    strange = "don't ümläut\n\n  x = 12345\t🙂" + END + DOCUMENTS[0]
    assert tokenizer(strange)["input_ids"] == ours.encode(strange)
    assert tokenizer.decode(ours.encode(strange)) == strange

    held_out = "".join(SIDES["val"])
    ids = [i for document in SIDES["val"] for i in ours.encode(document)]
    expected = {
        "bytes_per_token": len(held_out) / len(ids),  # the text is ASCII
        "tokens_per_word": len(ids) / count_words(SIDES["val"]).total(),
        "vocabulary_use": len(set(ids)) / 600,
        "single_byte_tokens": sum(1 <= i <= 256 for i in ids) / len(ids),
    }
    logged = metrics("tiny")
    assert {name: logged[f"val/{name}"] for name in expected} == pytest.approx(expected)
    assert logged["train/bytes_seen"] <= len("".join(SIDES["train"]))

    with (run / "compression.csv").open() as file:
        rows = [(int(row["vocabulary_size"]), float(row["bytes_per_token"])) for row in csv.DictReader(file)]
    by_512 = ByteLevelBPE(merges[: 512 - 257], [END])
    tokens_by_512 = sum(len(by_512.encode(document)) for document in SIDES["val"])
    assert rows == [
        (257, 1.0),
        (512, pytest.approx(len(held_out) / tokens_by_512, abs=1e-4)),
        (600, pytest.approx(expected["bytes_per_token"], abs=1e-4)),
    ]

    counted = Counter(i for document in SIDES["train"] for i in ours.encode(document))
    lines = (run / "vocabulary.txt").read_text().splitlines()[1:]
    assert [int(line.split()[0]) for line in lines] == list(range(600))
    assert {int(i): int(count) for i, count, *_ in map(str.split, lines) if int(count)} == counted
    assert lines[0].split()[2:] == ["0", END, "special", "token"]
    left, right = merges[0]
    assert lines[257].split(maxsplit=2)[2] == f"2  {readable(left + right):<28} {readable(left)} + {readable(right)}"

    for figure in ("compression", "token_lengths", "tokenization"):
        assert (run / f"figures/{figure}.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "checkpoints/best.ckpt").is_file()
    assert not [path for path in run.rglob("*") if path.name.startswith(".") or "tmp" in path.name]


def test_the_tokenizer_is_what_the_decoder_takes(llm_train, tiny_bpe, tiny):
    llm_train("fit", "-c", tiny_bpe())
    done = llm_train("fit", "-c", tiny(trainer__max_steps=8), "--data.tokenizer", RUNS / "tiny/tokenizer")
    assert done.code == 0, done.err
    embedding = torch.load("runs/decoder_pretrain/tiny/" + LAST, weights_only=True)["state_dict"]
    assert embedding["decoder.token_embedding.weight"].shape[0] == 600


def test_the_saved_configuration_repeats_the_run(llm_train, tiny_bpe):
    llm_train("fit", "-c", tiny_bpe())
    assert llm_train("fit", "-c", RUNS / "tiny/config.yaml").code == 0
    assert merges_of("tiny.2") == merges_of("tiny")


def test_a_trial_run_leaves_nothing(llm_train, tiny_bpe):
    assert llm_train("fit", "-c", tiny_bpe(), "--trainer.fast_dev_run", "true").code == 0
    assert not (RUNS / "tiny").exists()


def test_a_reference_is_measured_beside_ours(llm_train, tiny_bpe):
    llm_train("fit", "-c", tiny_bpe(), "--run.name", "first")
    reference = RUNS / "first/tokenizer"
    done = llm_train("fit", "-c", tiny_bpe(model__vocabulary_size=300), "--model.reference", reference)
    assert done.code == 0, done.err
    first, beside = metrics("first"), metrics("tiny")
    for name in ("bytes_per_token", "tokens_per_word", "vocabulary_use", "single_byte_tokens"):
        assert beside[f"val/reference/{name}"] == pytest.approx(first[f"val/{name}"])
    assert beside["val/bytes_per_token"] < first["val/bytes_per_token"]
    assert f"tokenizer,600,{first['val/bytes_per_token']:.4f}" in (RUNS / "tiny/compression.csv").read_text()


def test_a_reference_may_be_a_folder_a_file_or_the_two_files_of_gpt2(tmp_path):
    module = BPEModule(300)
    module.counter.add(DOCUMENTS)
    module.merges = learn_merges(module.counter.words, 300, [END])
    module.save_pretrained(tmp_path / "folder")
    (tmp_path / "two").mkdir()
    (tmp_path / "two/vocab.json").write_text(json.dumps(vocabulary(module.merges, [END])))
    write_merges(tmp_path / "two/merges.txt", module.merges)
    strange = f"don't ümläut {END} 12345  \n {DOCUMENTS[0]}"
    expected = ByteLevelBPE(module.merges, []).encode(strange)  # what looks like a special token is text
    for reference in ("folder", "folder/tokenizer.json", "two"):
        encoding = load_reference(str(tmp_path / reference)).encode(strange, add_special_tokens=False)
        assert [i - 1 for i in encoding.ids] == expected  # one special token takes the first id


def test_a_checkpoint_is_measured_on_the_validation_and_the_test_documents(llm_train, tiny_bpe):
    llm_train("fit", "-c", tiny_bpe())
    config = RUNS / "tiny/config.yaml"
    assert llm_train("validate", "-c", config, "--ckpt_path", "best").code == 0
    fitted = {name: value for name, value in metrics("tiny").items() if name.startswith("val/")}
    assert metrics("tiny", "summary_validate.json") == pytest.approx(fitted)
    tested = llm_train("test", "-c", config, "--ckpt_path", "last")
    assert tested.code == 0, tested.err
    ours = ByteLevelBPE(expected_merges(), [END])
    tokens = sum(len(ours.encode(document)) for document in SIDES["test"])
    compression = metrics("tiny", "summary_test.json")["test/bytes_per_token"]
    assert compression == pytest.approx(len("".join(SIDES["test"])) / tokens)


def test_loggers_that_take_pictures_and_tables_get_them(tmp_path):
    shown, tables = [], {}
    logger = SimpleNamespace(
        log_image=lambda key, images: shown.append((key, Path(images[0]).is_file())),
        log_table=lambda key, columns, data: tables.update({key: (columns, data)}),
    )
    module = BPEModule(vocabulary_size=260)
    module.counter.add(["lalalala la la"])
    module.merges = [(b"l", b"a"), (b"la", b"la"), (b" ", b"la")]
    module.learn = lambda: None
    trainer = SimpleNamespace(fast_dev_run=False, default_root_dir=tmp_path, loggers=[logger])
    TokenizerReport(sample="la lala é").on_train_end(trainer, module)
    assert shown == [("figures/token_lengths", True), ("figures/tokenization", True)]
    columns, rows = tables["tokenization"]
    assert columns == ["tokenizer", "id", "token"]
    assert [row[2] for row in rows] == ["'la'", "' '", "'lala'", "' '", r"b'\xc3'", r"b'\xa9'"]
    assert [row[1] for row in rows][:3] == [257, 221, 258]


# --- interrupted, shortened, spread over processes -------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"data__num_workers": 2}, {"model__count_workers": 2}], ids=["plain", "readers", "counters"]
)
def test_a_killed_run_resumes_to_the_same_tokenizer(llm_train, forked, tiny_bpe, settings):
    config = tiny_bpe(data__batch_size=1, **settings)  # some seventy steps
    saved = RUNS / "tiny" / LAST
    status = forked("fit", "-c", config, meanwhile=kill_when(lambda: rows("tiny") >= 4 and saved.is_file()))
    assert status == -signal.SIGKILL
    assert 0 < AtomicCheckpointIO().load_checkpoint(saved)["global_step"] < len(SIDES["train"])
    resumed = llm_train("fit", "-c", config, "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert merges_of("tiny") == spelled(expected_merges())
    whole = BPEModule(600)
    whole.counter.add(SIDES["train"])
    whole.merges = expected_merges()
    lines = (RUNS / "tiny/vocabulary.txt").read_text().splitlines()[1:]
    assert [int(line.split()[1]) for line in lines] == whole.token_counts().tolist()
    assert metrics("tiny")["train/bytes_seen"] == len("".join(SIDES["train"][:65]))  # as of the last step logged


def test_an_older_checkpoint_is_measured_again(llm_train, tiny_bpe):
    llm_train("fit", "-c", tiny_bpe())
    checkpoints = AtomicCheckpointIO()
    older = checkpoints.load_checkpoint(RUNS / "tiny" / LAST)
    older["state_dict"]["unused"] = torch.zeros(())
    checkpoints.save_checkpoint(older, RUNS / "tiny" / LAST)
    measured = llm_train("validate", "-c", RUNS / "tiny/config.yaml", "--ckpt_path", "last")
    assert measured.code == 0, measured.err


def test_a_run_killed_while_it_learned_resumes_to_the_same_tokenizer(llm_train, forked, tiny_bpe):
    def die_in_learning() -> None:
        BPEModule.learn = lambda self: os.kill(os.getpid(), signal.SIGKILL)

    assert forked("fit", "-c", tiny_bpe(), prepare=die_in_learning) == -signal.SIGKILL
    resumed = llm_train("fit", "-c", tiny_bpe(), "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert merges_of("tiny") == spelled(expected_merges())


def test_a_signal_saves_and_the_run_goes_on_from_there(llm_train, forked, tiny_bpe):
    config = tiny_bpe(data__batch_size=1, model__count_workers=1)
    status = forked("fit", "-c", config, meanwhile=kill_when((RUNS / "tiny" / LAST).is_file, signal.SIGTERM))
    assert status == 143
    assert llm_train("fit", "-c", config, "--ckpt_path", "last").code == 0
    assert merges_of("tiny") == spelled(expected_merges())


def test_an_unfinished_epoch_teaches_what_was_counted_and_can_be_finished(llm_train, tiny_bpe):
    config = tiny_bpe()
    assert llm_train("fit", "-c", config, "--trainer.max_steps", "5").code == 0
    assert merges_of("tiny") == spelled(expected_merges(20))
    assert llm_train("fit", "-c", config, "--ckpt_path", "last").code == 0
    assert merges_of("tiny") == spelled(expected_merges())


def test_validations_in_between_measure_what_was_learned_so_far(llm_train, tiny_bpe):
    done = llm_train("fit", "-c", tiny_bpe(trainer__val_check_interval=6))
    assert done.code == 0, done.err
    with (RUNS / "tiny/metrics.csv").open() as file:
        values = {int(row["step"]): row["val/bytes_per_token"] for row in csv.DictReader(file)}
    early = ByteLevelBPE(expected_merges(24), [END])
    tokens = sum(len(early.encode(document)) for document in SIDES["val"])
    assert float(values[6]) == pytest.approx(len("".join(SIDES["val"])) / tokens)
    assert merges_of("tiny") == spelled(expected_merges())


def test_two_processes_learn_and_measure_what_one_does_and_one_goes_on_where_they_stopped(llm_train, tiny_bpe):
    config = tiny_bpe(data__batch_size=3, trainer__val_check_interval=6)  # shares of one and two documents
    # Anew: a copy of a process whose tokenizers have started threads would wait for those.
    flags = ("-c", config, *forks.TWO_PROCESSES, "--run.name", "two", "--trainer.max_steps", "10")
    two = forks.start_anew("fit", *flags)
    assert llm_train("fit", "-c", config, "--run.name", "one").code == 0
    output = two.communicate(timeout=200)[0]
    assert two.returncode == 0, output
    assert merges_of("two") == spelled(expected_merges(30))
    assert llm_train("fit", "-c", config, "--run.name", "two", "--ckpt_path", "last").code == 0
    for file in ("merges.txt", "vocabulary.txt", "compression.csv", "tokenizer/tokenizer.json", "metrics.csv"):
        assert (RUNS / "two" / file).read_text() == (RUNS / "one" / file).read_text()


def test_a_corpus_with_too_few_pairs_gives_a_smaller_tokenizer_and_says_so(llm_train, tiny_bpe):
    from transformers import AutoTokenizer

    possible = len(learn_merges(count_words(SIDES["train"]), 100_000, [END]))
    with pytest.warns(UserWarning, match=f"ran out of pairs: learned {possible} of 99743 merges"):
        assert llm_train("fit", "-c", tiny_bpe(model__vocabulary_size=100_000)).code == 0
    tokenizer = AutoTokenizer.from_pretrained(RUNS / "tiny/tokenizer")
    assert len(tokenizer) == 257 + possible
    assert tokenizer.decode(tokenizer(DOCUMENTS[0])["input_ids"]) == DOCUMENTS[0]


# --- mistakes --------------------------------------------------------------------------------------------------------

ALL_ONE_SIDE = {"class_path": "datamodules.sources.ListText", "init_args": {"texts": SIDES["train"][:1]}}
EMPTY = {"class_path": "datamodules.sources.ListText", "init_args": {"texts": []}}
WRONG = {
    "empty corpus": ({"data__source": EMPTY}, "data.source: the corpus is empty"),
    "nothing held out": ({"data__source": ALL_ONE_SIDE}, "there is no val text"),
    "fractions": ({"data__val_fraction": 0.9}, "must be 0 or more, and leave something to train on"),
    "small vocabulary": ({"model__vocabulary_size": 256}, "model.vocabulary_size is 256", "at least 257"),
    "bad pattern": ({"model__pattern": "(?:"}, "model.pattern: the pattern does not compile"),
    "capturing pattern": ({"model__pattern": r"(\s)|\S+"}, "model.pattern: the pattern has a group that captures"),
    "lossy pattern": ({"model__pattern": r"\S+"}, "model.pattern: the pattern loses text"),
    "lossy pattern in processes": ({"model__pattern": r"\S+", "model__count_workers": 1}, "the pattern loses text"),
    "pattern of another dialect": ({"model__pattern": r"(?r)[\s\S]"}, "model.pattern: the tokenizers library"),
    "special token twice": (
        {"model__special_tokens": [END, END]},
        "model.special_tokens: special token",
        "given twice",
    ),
    "no such reference": ({"model__reference": "./lost"}, "model.reference: './lost' could not be loaded"),
    "incomplete reference": ({"model__reference": "."}, "neither tokenizer.json nor vocab.json and merges.txt"),
    "two epochs": ({"trainer__max_epochs": 2}, "trainer.max_epochs is 2", "give 1"),
    "context": ({"model__model_max_length": 0}, "model.model_max_length is 0"),
    "counters": ({"model__count_workers": -1}, "model.count_workers is -1"),
}


@pytest.mark.parametrize(("settings", "said"), [(v[0], v[1:]) for v in WRONG.values()], ids=WRONG.keys())
def test_a_mistake_costs_one_line(llm_train, tiny_bpe, settings, said):
    done = llm_train("fit", "-c", tiny_bpe(**settings))
    assert done.code == 1
    error = done.err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert all(part in error for part in said), error
    assert "Traceback" not in done.err


def test_a_checkpoint_that_counted_other_words_is_refused(llm_train, tiny_bpe):
    llm_train("fit", "-c", tiny_bpe(), "--trainer.max_steps", "5")
    for flag, value in (("pattern", "gpt4"), ("special_tokens", '["<|end|>"]')):
        done = llm_train("fit", "-c", tiny_bpe(), "--ckpt_path", "last", f"--model.{flag}", value)
        assert done.code == 1
        assert f"the checkpoint was made with model.{flag}" in done.err.splitlines()[-1]


def test_a_test_without_documents_is_one_line():
    data = BPEDataModule(ListText(DOCUMENTS))
    with pytest.raises(MisconfigurationException, match=r"no test text.*data\.test_fraction higher"):
        data.setup("test")


# --- the parts -------------------------------------------------------------------------------------------------------


class Pieces(Source):
    """Documents of two pieces."""

    def pieces(self):
        for number in range(40):
            yield Piece(f"begin {number}", False)
            yield Piece(f"end {number}", True)

    def fingerprint(self):
        return ""


def test_sides_split_whole_documents_and_lose_none():
    sides = [list(Side(Pieces(), name, 0.3, 0.2)) for name in ("train", "val", "test")]
    assert all(sides)
    for side in sides:
        assert [text.replace("begin", "end") for text in side[::2]] == side[1::2]
    assert sorted(chain(*sides)) == sorted(text for text, _ in Pieces().pieces())


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("skip", [0, 4])
def test_shares_of_all_processes_make_up_the_global_batches_in_order(num_workers, skip):
    shares = []
    for rank in range(3):
        stream = BatchStream(Side(Pieces()), batch_size=7, rank=rank, world_size=3)
        stream.skip = skip
        shares.append(list(DataLoader(stream, batch_size=None, num_workers=num_workers)))
    assert len({len(share) for share in shares}) == 1
    joined = [list(chain(*parts)) for parts in zip(*shares, strict=True)]
    pieces = [text for text, _ in Pieces().pieces()]
    assert joined == [pieces[start : start + 7] for start in range(7 * skip, len(pieces), 7)]


class Handlers(Source):
    """What this process does on Ctrl-C."""

    def pieces(self):
        yield Piece(repr(signal.getsignal(signal.SIGINT)), True)

    def fingerprint(self):
        return ""


def test_workers_leave_ctrl_c_to_the_training_process():
    loader = BPEDataModule(Handlers(), val_fraction=0.0, num_workers=1).train_dataloader()
    assert list(loader) == [["<Handlers.SIG_IGN: 1>"]]


def test_skipping_is_for_one_iteration():
    stream = BatchStream(Side(Pieces()), batch_size=10)
    stream.skip = 5
    assert [len(list(stream)) for _ in range(2)] == [3, 8]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_counter_counts_all_texts_once_it_has_waited(workers):
    counter = WordCounter(GPT2_PATTERN, [END], workers)
    for document in DOCUMENTS:
        counter.add([document, "é"])
    counter.wait()
    counter.close()
    assert counter.words == count_words([*DOCUMENTS, *["é"] * len(DOCUMENTS)])
    assert counter.n_bytes == len("".join(DOCUMENTS)) + 2 * len(DOCUMENTS)


def test_measures_of_a_text_worked_by_hand():
    measures = TokenizerMeasures(torch.tensor([False, True, True, False]))
    measures.update(torch.tensor([1, 3, 3]), n_bytes=7, n_words=2)
    measures.update(torch.tensor([3]), n_bytes=3, n_words=1)
    measures.update(torch.tensor([], dtype=torch.int64), n_bytes=0, n_words=0)
    assert {name: value.item() for name, value in measures.compute().items()} == pytest.approx(
        {"bytes_per_token": 2.5, "tokens_per_word": 4 / 3, "vocabulary_use": 0.5, "single_byte_tokens": 0.25}
    )


def test_the_study_is_a_sweep_over_the_offline_experiment():
    study = yaml.safe_load((ROOT / "experiments/bpe/studies/vocab_size.yaml").read_text())
    assert study["command"] == ["${env}", "${interpreter}", "-m", "experiments", "fit", "-c",
                                "experiments/bpe/offline.yaml", "${args}"]  # fmt: skip
    assert set(study["parameters"]) == {"model.vocabulary_size"}
    assert study["metric"] == {"name": "val/bytes_per_token", "goal": "maximize"}
