"""Byte-pair encoding through the real command: what a run learns, evaluates and leaves, and how it resumes."""

import csv
import json
import os
import shutil
import signal
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import forks
import pytest
import torch
import yaml
from helpers import text, with_settings
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from shared_runs import own_world, run_command
from tokenizers import Tokenizer, models

from datamodules.bpe.data import BPEDataModule, SplitText
from datamodules.decoder_pretrain import PretrainDataModule
from datamodules.sources import ListText
from datamodules.splits import SplitDocuments
from lightning_modules.bpe import report
from lightning_modules.bpe.learner import learn_merges
from lightning_modules.bpe.module import BPEModule
from lightning_modules.bpe.report import TokenizerReport, readable, tokens_of, write_merges
from lightning_modules.bpe.rust_tokenizers import load_reference
from lightning_modules.bpe.textbook import Merge, count_words, learn_merges_textbook, spell, vocabulary
from lightning_modules.bpe.tokenizer import ByteLevelBPE
from lightning_modules.common.byte_level import is_byte_level
from lightning_modules.runtime.checkpoint_io import AtomicCheckpointIO

ROOT = Path(__file__).parents[2]
RUNS = Path("runs/bpe")
LAST = "checkpoints/last.ckpt"
END = "<|endoftext|>"
SIZE = 400
DOCUMENTS = [text(30, seed) for seed in range(51)]
SPLIT = SplitDocuments(ListText(DOCUMENTS), "documents", 0.2, 0.1)
SPLITS = {side: list(SplitText(SPLIT, side)) for side in ("train", "val", "test")}


def write_config(folder: Path, **settings: object) -> Path:
    """Write offline.yaml with a small corpus: twelve steps, a validation after every six; settings go over it."""
    config = yaml.safe_load((ROOT / "experiments/bpe/offline.yaml").read_text())
    config["model"]["init_args"] |= {"vocabulary_size": SIZE, "count_workers": 0}
    source = {"class_path": "datamodules.sources.ListText", "init_args": {"texts": DOCUMENTS}}
    # On two processes, the shares of a batch are one document and two.
    config["data"]["init_args"] = {"source": source, "batch_size": 3, "val_fraction": 0.2, "test_fraction": 0.1}
    config["trainer"] |= {"log_every_n_steps": 5, "val_check_interval": 6}
    *_, sample, checkpoint = config["trainer"]["callbacks"]
    sample["init_args"] = {"sample": "A short sample:\n    drawn soon."}
    checkpoint["init_args"]["every_n_train_steps"] = 1
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(with_settings(config, settings), sort_keys=False))
    return file


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was not interrupted, to read only."""
    folder = tmp_path_factory.mktemp("whole")
    with own_world(folder):
        done = run_command("fit", "-c", write_config(folder))
    assert done.code == 0, done.err
    return folder / RUNS / "tiny"


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the drawing, which takes longer than a run; the run `whole` draws."""
    for name in ("draw_compression", "draw_token_lengths", "draw_tokenization"):
        monkeypatch.setattr(report, name, lambda *given: given[-1])
    monkeypatch.setattr(report, "show_figures", lambda trainer, files: None)


@cache
def expected_merges(n_documents: int | None = None) -> list[Merge]:
    """Return what the first training documents teach."""
    return learn_merges(count_words(SPLITS["train"][:n_documents]), SIZE, [END])


def merges_of(run: Path) -> list[str]:
    return (run / "merges.txt").read_text().splitlines()[1:]


def spelled(merges: list[Merge]) -> list[str]:
    return [f"{spell(left)} {spell(right)}" for left, right in merges]


def metrics(run: Path, name: str = "summary.json") -> dict[str, float]:
    return json.loads((run / name).read_text())["metrics"]


def compression_of(n_documents: int | None, split: str) -> float:
    """Return bytes per token of a split (the text is ASCII) after learning from the first training documents."""
    tokenizer = ByteLevelBPE(expected_merges(n_documents), [END])
    return len("".join(SPLITS[split])) / sum(len(tokenizer.encode(document)) for document in SPLITS[split])


def assert_same_files(one: Path, other: Path, *more: str) -> None:
    for file in ("merges.txt", "vocabulary.txt", "compression.csv", "tokenizer/tokenizer.json", *more):
        assert (one / file).read_text() == (other / file).read_text()


# --- what a run learns and leaves ------------------------------------------------------------------------------------


def test_a_run_learns_the_merges_of_its_training_documents_and_leaves_what_it_promises(whole):
    from transformers import AutoTokenizer

    merges = learn_merges_textbook(count_words(SPLITS["train"]), SIZE, [END])
    assert merges_of(whole) == spelled(merges)

    tokenizer = AutoTokenizer.from_pretrained(whole / "tokenizer")
    assert tokenizer.is_fast
    assert len(tokenizer) == SIZE
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token) == (END, END, END)
    assert tokenizer.model_max_length == 1024
    ours = ByteLevelBPE(merges, [END])
    strange = "don't ümläut\n\n  x = 12345\t🙂" + END + DOCUMENTS[0]
    assert tokenizer(strange)["input_ids"] == ours.encode(strange)
    assert tokenizer.decode(ours.encode(strange)) == strange

    held_out = "".join(SPLITS["val"])
    ids = [i for document in SPLITS["val"] for i in ours.encode(document)]
    expected = {
        "bytes_per_token": len(held_out) / len(ids),  # the text is ASCII
        "tokens_per_word": len(ids) / count_words(SPLITS["val"]).total(),
        "vocabulary_use": len(set(ids)) / SIZE,
        "single_byte_tokens": sum(1 <= i <= 256 for i in ids) / len(ids),
    }
    logged = metrics(whole)
    assert {name: logged[f"val/{name}"] for name in expected} == pytest.approx(expected)
    assert logged["train/bytes_seen"] == len("".join(SPLITS["train"][:30]))  # as of the last step logged
    with (whole / "metrics.csv").open() as file:
        values = {int(row["step"]): row["val/bytes_per_token"] for row in csv.DictReader(file)}
    # A validation on the way learns from what was counted so far.
    assert float(values[6]) == pytest.approx(compression_of(18, "val"))

    with (whole / "compression.csv").open() as file:
        rows = [(int(row["vocabulary_size"]), float(row["bytes_per_token"])) for row in csv.DictReader(file)]
    assert rows == [(257, 1.0), (SIZE, pytest.approx(expected["bytes_per_token"], abs=1e-4))]

    counted = Counter(i for document in SPLITS["train"] for i in ours.encode(document))
    lines = (whole / "vocabulary.txt").read_text().splitlines()[1:]
    assert [int(line.split()[0]) for line in lines] == list(range(SIZE))
    assert {int(i): int(count) for i, count, *_ in map(str.split, lines) if int(count)} == counted
    assert lines[0].split()[2:] == ["0", END, "special", "token"]
    left, right = merges[0]
    assert lines[257].split(maxsplit=2)[2] == f"2  {readable(left + right):<28} {readable(left)} + {readable(right)}"

    for figure in ("compression", "token_lengths", "tokenization"):
        assert (whole / f"figures/{figure}.png").read_bytes().startswith(b"\x89PNG")
    assert (whole / "checkpoints/best.ckpt").is_file()
    assert not [path for path in whole.rglob("*") if path.name.startswith(".") or "tmp" in path.name]


def test_the_tokenizer_is_what_the_decoder_takes(whole):
    source = ListText(DOCUMENTS)
    data = PretrainDataModule(source, block_size=16, batch_size=4, tokenizer=str(whole / "tokenizer"), val_fraction=0.2)
    assert data.vocab_size == SIZE
    command = BPEModule().next_command(str(whole))
    assert command == f"llm-train fit -c decoder_pretrain/offline --data.tokenizer {whole}/tokenizer"


def test_a_text_and_a_split_given_by_flags_are_those_of_the_next_command_too(llm_train, config, no_figures):
    Path("a text.txt").write_text("One short line, and not more.\n")
    flags = ("--data.source", "a text.txt", "--run.name=mine", "--data.val_fraction", "0", "--data.test_fraction=0")
    done = llm_train("fit", "-c", config, *flags)
    assert done.code == 0, done.err
    assert "so the vocabulary has 276 tokens, not 400; give more text" in done.err
    assert "val     none, since no data is held out; the run writes no best checkpoint\n" in done.err
    assert "\nsteps " not in done.err
    assert "train    1 batch read [" in done.err
    assert done.err.splitlines()[-1] == (
        "next    llm-train fit -c decoder_pretrain/offline --data.tokenizer runs/bpe/mine/tokenizer "
        "--data.source 'a text.txt' --run.name mine --data.val_fraction 0 --data.test_fraction 0"
    )
    assert "ranks is zero" not in done.err  # a warning of Lightning


def test_a_trial_run_leaves_nothing(llm_train, config):
    assert llm_train("fit", "-c", config, "--trainer.fast_dev_run", "true").code == 0
    assert not (RUNS / "tiny").exists()


@pytest.mark.slow
def test_a_smaller_vocabulary_is_measured_beside_a_reference_and_at_each_power_of_two(
    llm_train, tmp_path, whole, monkeypatch
):
    drawn = []
    monkeypatch.setattr(report, "draw_tokenization", lambda text, samples, file: drawn.append(samples) or file)
    monkeypatch.setattr(report, "show_figures", lambda trainer, files: None)
    config = write_config(tmp_path, model__init_args__vocabulary_size=300, model__init_args__special_tokens=[])
    done = llm_train("fit", "-c", config, "--model.reference", whole / "tokenizer")
    assert done.code == 0, done.err
    first, beside = metrics(whole), metrics(RUNS / "tiny")
    for name in ("bytes_per_token", "tokens_per_word", "vocabulary_use", "single_byte_tokens"):
        assert beside[f"val/reference/{name}"] == pytest.approx(first[f"val/{name}"])
    assert beside["val/bytes_per_token"] < first["val/bytes_per_token"]
    assert (RUNS / "tiny/compression.csv").read_text().splitlines()[1:] == [
        "this run,256,1.0000",
        f"this run,300,{beside['val/bytes_per_token']:.4f}",
        f"tokenizer,{SIZE},{first['val/bytes_per_token']:.4f}",
    ]
    assert [list(samples) for samples in drawn] == [["this run", "tokenizer"]]
    assert (RUNS / "tiny/figures/compression.png").is_file()


def test_a_reference_may_be_a_folder_a_file_or_the_two_files_of_gpt2(whole, tmp_path):
    merges = expected_merges()
    (tmp_path / "two").mkdir()
    (tmp_path / "two/vocab.json").write_text(json.dumps(vocabulary(merges, [END])))
    write_merges(tmp_path / "two/merges.txt", merges)
    strange = f"don't ümläut {END} 12345  \n {DOCUMENTS[0]}"
    expected = ByteLevelBPE(merges, []).encode(strange)  # the text of a special token is ordinary text here
    for reference in (whole / "tokenizer", whole / "tokenizer/tokenizer.json", tmp_path / "two"):
        tokenizer = load_reference(str(reference))
        ids = tokenizer.encode(strange, add_special_tokens=False).ids
        assert [i - 1 for i in ids] == expected  # one special token takes the first id
        assert is_byte_level(tokenizer)  # so that its single bytes are counted
        assert tokenizer.decode(ids) == strange


def test_a_reference_on_the_hub_runs_no_code_and_is_looked_up_only_if_the_hub_answers(monkeypatch):
    def refuse(name: str, **settings: object) -> None:
        asked.append((name, settings))
        raise ValueError

    asked: list[tuple[str, dict]] = []
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    monkeypatch.setattr("lightning_modules.bpe.rust_tokenizers.hub_answers", lambda: False)
    with pytest.raises(MisconfigurationException, match=r"'owner/name' could not be loaded \(ValueError\)"):
        load_reference("owner/name")
    with pytest.raises(
        MisconfigurationException, match=r"'runs/lost' could not be loaded \(OSError: it does not exist"
    ):
        load_reference("runs/lost")
    assert asked == [("owner/name", {"local_files_only": True, "trust_remote_code": False})]


@pytest.mark.slow
def test_a_checkpoint_is_evaluated_on_the_validation_and_the_test_split(llm_train, whole):
    shutil.copytree(whole, RUNS / "tiny")
    config = RUNS / "tiny/config.yaml"
    assert llm_train("validate", "-c", config, "--ckpt_path", "best").code == 0
    fitted = {name: value for name, value in metrics(whole).items() if name.startswith("val/")}
    assert metrics(RUNS / "tiny", "summary_validate.json") == pytest.approx(fitted)
    tested = llm_train("test", "-c", config, "--ckpt_path", "last")
    assert tested.code == 0, tested.err
    compression = metrics(RUNS / "tiny", "summary_test.json")["test/bytes_per_token"]
    assert compression == pytest.approx(compression_of(None, "test"))


def test_tokens_of_a_vocabulary_that_is_not_byte_level_are_their_text():
    tokenizer = Tokenizer(models.WordLevel({"日本": 7}, unk_token="日本"))
    assert tokens_of(tokenizer, "日本") == [(7, "日本".encode())]


def test_loggers_that_take_images_and_tables_get_them(tmp_path):
    shown, tables = [], {}
    logger = SimpleNamespace(
        log_image=lambda key, images: shown.append((key, Path(images[0]).is_file())),
        log_table=lambda key, columns, data: tables.update({key: (columns, data)}),
    )
    module = BPEModule(vocabulary_size=261, special_tokens=(END, "<end>\n\r"))
    module.counter.add(["lalalala la la"])
    module.merges = [(b"l", b"a"), (b"la", b"la"), (b" ", b"la")]
    module.learn = lambda: None
    trainer = SimpleNamespace(fast_dev_run=False, default_root_dir=tmp_path, loggers=[logger])
    TokenizerReport(sample="la lala é").on_train_end(trainer, module)
    assert shown == [("figures/token_lengths", True), ("figures/tokenization", True)]
    columns, rows = tables["tokenization"]
    assert columns == ["tokenizer", "id", "token"]
    assert [row[2] for row in rows] == ["'la'", "' '", "'lala'", "' '", r"b'\xc3'", r"b'\xa9'"]
    assert [row[1] for row in rows][:3] == [258, 222, 259]
    lines = (tmp_path / "vocabulary.txt").read_text().splitlines()
    assert [line.split()[3] for line in lines[1:3]] == [END, r"'<end>\n\r'"]
    assert len(lines) == 1 + 261


@pytest.mark.usefixtures("no_figures")
def test_a_corpus_with_too_few_pairs_gives_a_smaller_tokenizer_and_a_message(llm_train, tmp_path):
    from transformers import AutoTokenizer

    possible = len(learn_merges(count_words(SPLITS["train"]), 100_000, [END]))
    done = llm_train("fit", "-c", write_config(tmp_path, model__init_args__vocabulary_size=100_000))
    assert done.code == 0, done.err
    assert f"ran out of pairs: learned {possible} of 99743 merges" in done.err
    assert f"has {257 + possible} tokens, not 100000; give more text" in done.err
    tokenizer = AutoTokenizer.from_pretrained(RUNS / "tiny/tokenizer")
    assert len(tokenizer) == 257 + possible
    assert tokenizer.decode(tokenizer(DOCUMENTS[0])["input_ids"]) == DOCUMENTS[0]
    with (RUNS / "tiny/compression.csv").open() as file:
        rows = {int(row["vocabulary_size"]): float(row["bytes_per_token"]) for row in csv.DictReader(file)}
    assert list(rows) == [257, 512, 1024, 257 + possible]  # the bytes, powers of two, all
    by_512 = ByteLevelBPE(learn_merges(count_words(SPLITS["train"]), 512, [END]), [END])
    tokens = sum(len(by_512.encode(document)) for document in SPLITS["val"])
    assert rows[512] == pytest.approx(len("".join(SPLITS["val"])) / tokens, abs=1e-4)


# --- interrupted, shortened, on several processes --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
def test_a_killed_run_with_readers_and_counters_resumes_to_the_same_tokenizer(llm_train, forked, tmp_path, whole):
    config = write_config(tmp_path, data__init_args__num_workers=2, model__init_args__count_workers=2)
    assert forked("fit", "-c", config, prepare=lambda: forks.die_after_step(4)) == -signal.SIGKILL
    assert AtomicCheckpointIO().load_checkpoint(RUNS / "tiny" / LAST)["global_step"] == 4
    # As the message of a run whose counters lack memory advises.
    resumed = llm_train("fit", "-c", config, "--model.count_workers", "0", "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert_same_files(RUNS / "tiny", whole, "metrics.csv")


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
def test_a_run_killed_while_it_learned_resumes_to_the_same_tokenizer(llm_train, forked, config, whole):
    def die_in_the_last_learning() -> None:
        learn = BPEModule.learn

        def learn_or_die(self: BPEModule) -> None:
            if self.global_step == 12:
                os.kill(os.getpid(), signal.SIGKILL)
            learn(self)

        BPEModule.learn = learn_or_die

    assert forked("fit", "-c", config, prepare=die_in_the_last_learning) == -signal.SIGKILL
    resumed = llm_train("fit", "-c", config, "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert merges_of(RUNS / "tiny") == merges_of(whole)


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
def test_a_signal_saves_and_the_run_resumes_from_there(llm_train, forked, tmp_path, whole):
    config = write_config(tmp_path, model__init_args__count_workers=1)
    assert forked("fit", "-c", config, prepare=lambda: forks.signal_after_step(4, signal.SIGTERM)) == 143
    assert AtomicCheckpointIO().load_checkpoint(RUNS / "tiny" / LAST)["global_step"] == 4
    assert llm_train("fit", "-c", config, "--ckpt_path", "last").code == 0
    assert merges_of(RUNS / "tiny") == merges_of(whole)


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
def test_an_unfinished_epoch_teaches_what_was_counted_and_can_be_finished_from_the_saved_configuration(
    llm_train, config, whole, tmp_path
):
    assert llm_train("fit", "-c", config, "--trainer.max_steps", "5").code == 0
    assert merges_of(RUNS / "tiny") == spelled(expected_merges(15))
    saved = tmp_path / "saved.yaml"  # a copy: in its folder, the configuration would mean the run `whole`
    shutil.copyfile(whole / "config.yaml", saved)
    assert llm_train("fit", "-c", saved, "--run.name", "tiny", "--ckpt_path", "last").code == 0
    assert_same_files(RUNS / "tiny", whole)


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
def test_two_processes_learn_and_evaluate_what_one_does_and_one_resumes_where_they_stopped(
    llm_train, config, whole, tmp_path
):
    flags = ("-c", config, *forks.TWO_PROCESSES, "--run.name", "two", "--trainer.max_steps", "8")
    output = tmp_path / "output.txt"
    ranks = forks.start_ranks(2, "fit", *flags, output=output)
    assert forks.wait(ranks) == [0, 0], output.read_text()
    assert merges_of(RUNS / "two") == spelled(expected_merges(24))
    assert llm_train("fit", "-c", config, "--run.name", "two", "--ckpt_path", "last").code == 0
    rows = (RUNS / "two/metrics.csv").read_text().splitlines()
    del rows[next(i for i, row in enumerate(rows) if row.startswith("8,"))]  # the validation where it had stopped
    assert rows == (whole / "metrics.csv").read_text().splitlines()


def test_the_first_process_keeps_the_sum_of_all_counts(monkeypatch):
    def gather(mine: tuple[Counter, int], gathered: list | None) -> None:
        if gathered is not None:
            gathered[:] = [mine, (Counter({b"a": 2, b"c": 1}), 5)]

    monkeypatch.setattr(torch.distributed, "gather_object", gather)
    for rank, expected in ((0, ({b"a": 3, b" b": 1, b"c": 1}, 8)), (1, ({}, 0))):
        module = BPEModule()
        module._trainer = SimpleNamespace(world_size=2, global_rank=rank)
        module.counter.add(["a b"])
        module._gather_counts()
        assert (module.counter.words, module.counter.n_bytes) == expected


def test_an_older_checkpoint_loads(whole):
    older = AtomicCheckpointIO().load_checkpoint(whole / LAST)
    older["state_dict"]["unused"] = torch.zeros(())
    module = BPEModule.of_checkpoint(older)
    assert module.merges == expected_merges()
    assert module.counter.words == count_words(SPLITS["train"], special_tokens=[END])


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_a_pattern_that_loses_text_is_refused_when_it_meets_that_text():
    module = BPEModule(pattern=r"\S+")
    with pytest.raises(MisconfigurationException, match=r"^model\.pattern: the pattern loses text"):
        module.training_step(["two words"], 0)


def test_a_pattern_that_loses_text_in_a_counting_process_is_refused_by_the_end():
    module = BPEModule(pattern=r"\S+", count_workers=1)
    module.counter.add(["two words"])
    with pytest.raises(MisconfigurationException, match=r"^model\.pattern: the pattern loses text"):
        module.learn()
    module.counter.close()


def test_a_pattern_that_loses_text_of_the_validation_alone_is_refused():
    module = BPEModule(pattern=r"\S+")
    with pytest.raises(MisconfigurationException, match=r"^model\.pattern: the pattern loses text"):
        module.evaluation_step(["two words"], module._metrics())


def test_a_second_epoch_is_refused():
    module = BPEModule()
    module._trainer = SimpleNamespace(max_epochs=2)
    with pytest.raises(MisconfigurationException, match=r"trainer\.max_epochs is 2: give 1"):
        module.on_fit_start()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocabulary_size": 256}, r"model\.vocabulary_size is 256.*at least 257"),
        ({"pattern": "(?:"}, r"model\.pattern: the pattern does not compile"),
        ({"pattern": r"(\s)|\S+"}, r"model\.pattern: the pattern has a group that captures"),
        ({"pattern": r"(?r)[\s\S]"}, r"model\.pattern: the tokenizers library"),
        ({"special_tokens": (END, END)}, r"model\.special_tokens: special token.*given twice"),
        ({"reference": "./lost"}, r"model\.reference: '\./lost' could not be loaded"),
        ({"reference": "."}, r"neither tokenizer\.json nor vocab\.json and merges\.txt"),
    ],
)
def test_a_wrong_argument_costs_one_line(arguments, message):
    with pytest.raises(MisconfigurationException, match=message) as caught:
        BPEModule(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "flag", ["model.vocabulary_size=0", "model.model_max_length=0", "model.count_workers=-1", "data.batch_size=0"]
)
def test_a_number_out_of_range_is_refused_by_the_parser(flag):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(BPEDataModule, "data")
    parser.add_class_arguments(BPEModule, "model")
    with pytest.raises(ArgumentError, match=flag.split("=")[0]) as refused:
        parser.parse_args([f"--{flag}"])
    assert "does not conform to restriction" in str(refused.value)


def test_a_checkpoint_that_counted_other_words_is_refused(whole):
    checkpoint = AtomicCheckpointIO().load_checkpoint(whole / LAST)
    for name, value in (("pattern", "gpt4"), ("special_tokens", ["<|end|>"])):
        with pytest.raises(MisconfigurationException, match=f"the checkpoint was made with model.{name}"):
            BPEModule(**{"vocabulary_size": SIZE, name: value}).on_load_checkpoint(checkpoint)


def test_the_study_is_a_sweep_over_the_offline_experiment():
    study = yaml.safe_load((ROOT / "experiments/bpe/studies/vocab_size.yaml").read_text())
    assert study["command"] == ["${env}", "${interpreter}", "-m", "experiments", "fit", "-c",
                                "experiments/bpe/offline.yaml", "${args}"]  # fmt: skip
    assert set(study["parameters"]) == {"model.vocabulary_size"}
    assert study["metric"] == {"name": "val/bytes_per_token", "goal": "maximize"}
