"""Run folders that were moved or copied, without the runs that their configurations name."""

import os
import shutil
from pathlib import Path

import pytest
import yaml
from helpers import RUNS, TINY, text, with_settings
from shared_runs import own_world, run_command

from experiments.run import moved_runs

TOKENIZER = "runs/words/first/tokenizer"


def tokenizer_of_a_run(folder: str = TOKENIZER, seed: int = 0) -> Path:
    """Write a tokenizer with merges, and return its folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([text(200, seed)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(folder)
    return Path(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Return the folder of a run whose tokenizer is that of another run."""
    folder = tmp_path_factory.mktemp("finished")
    with own_world(folder):
        tokenizer_of_a_run()
        Path("text.txt").write_text(text(2_000))
        settings = {
            "data__init_args__source__init_args__paths": str(folder / "text.txt"),
            "data__init_args__tokenizer": TOKENIZER,
            "trainer__max_steps": 8,
        }
        Path("tiny.yaml").write_text(yaml.safe_dump(with_settings(yaml.safe_load(TINY.read_text()), settings)))
        done = run_command("fit", "-c", "tiny.yaml")
    assert done.code == 0, done.err
    return folder / RUNS / "tiny"


@pytest.fixture
def copied(finished) -> Path:
    """Return a copy of the run, without the run that its tokenizer was of."""
    return Path(shutil.copytree(finished, "copies/run"))


@pytest.mark.slow
def test_a_copy_is_evaluated_resumed_and_compared_with_its_own_tokenizer(llm_train, copied):
    config = copied / "config.yaml"
    before = config.read_text()
    validated = llm_train("validate", "-c", config, "--ckpt_path", "best")
    assert validated.code == 0, validated.err
    assert f"data.tokenizer: {TOKENIZER} does not exist; the tokenizer of the run, {copied}/tokenizer" in validated.err
    resumed = llm_train("fit", "-c", config, "--ckpt_path", "last", "--trainer.max_steps", "12")
    assert resumed.code == 0, resumed.err
    assert yaml.safe_load(config.read_text()) == with_settings(
        yaml.safe_load(before), {"trainer__max_steps": 12, "run__name": "run"}
    )
    assert (copied / "model/tokenizer.json").is_file()
    compared = llm_train("compare", "copies")
    assert compared.code == 0, compared.err


def test_another_tokenizer_in_the_same_place_is_not_used(llm_train, copied):
    tokenizer_of_a_run(seed=1)
    done = llm_train("validate", "-c", copied / "config.yaml", "--ckpt_path", "best")
    assert done.code == 0, done.err
    assert f"data.tokenizer: {TOKENIZER} has another vocabulary than when the run started; " in done.err
    tokenizer_of_a_run()
    assert not moved_runs._is_not_that_of(copied / "tokenizer", TOKENIZER)


def test_a_run_that_cannot_be_written_to_is_refused_before_its_data_is_read(llm_train, copied, monkeypatch):
    access = os.access  # is replaced, for root may write to a folder of mode 0500
    monkeypatch.setattr(os, "access", lambda path, *rest, **more: path != copied and access(path, *rest, **more))
    refused = llm_train("validate", "-c", copied / "config.yaml", "--ckpt_path", "best")
    assert refused.code == 1
    assert f"error: {copied} cannot be written to, and validate writes its results there: copy the run" in refused.err
    assert "data    " not in refused.err
    sampled = llm_train("generate", "--run", copied, "--prompt", "a", "--max_new_tokens", "2")
    assert sampled.code == 0, sampled.err


def test_a_copy_without_a_tokenizer_is_refused_in_one_line(llm_train, copied):
    shutil.rmtree(copied / "tokenizer")
    done = llm_train("validate", "-c", copied / "config.yaml", "--ckpt_path", "best")
    assert (done.code, len(done.err.splitlines())) == (1, 1), done.err
    assert f"tokenizer {TOKENIZER} does not exist: " in done.err


@pytest.mark.slow
def test_a_run_that_started_from_another_needs_it_no_more(llm_train, tiny, whole):
    first = whole(trainer__max_steps=8)
    shutil.copytree(first, "runs/base")
    start = tiny("second", model__init_args__pretrained="runs/base", trainer__max_steps=8)
    assert llm_train("fit", "-c", start).code == 0
    second = RUNS / "second"
    shutil.rmtree("runs/base")
    done = llm_train("fit", "-c", second / "config.yaml", "--ckpt_path", "last", "--trainer.max_steps", "12")
    assert done.code == 0, done.err
    assert "model.pretrained: runs/base does not exist; the model is built as runs/" in done.err
    assert "architecture: null" in (second / "config.yaml").read_text()
    assert llm_train("generate", "--run", second, "--prompt", "a", "--max_new_tokens", "2").code == 0


@pytest.mark.slow
def test_another_working_folder_is_named_in_one_line(llm_train, tiny, tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text(text(2_000))
    config = tiny(trainer__max_steps=8, data__init_args__source__init_args__paths="texts/*.txt")
    assert llm_train("fit", "-c", config).code == 0
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    run = tmp_path / RUNS / "tiny"
    done = llm_train("validate", "-c", run / "config.yaml", "--ckpt_path", "best")
    assert (done.code, len(done.err.splitlines())) == (1, 1), done.err
    assert f"data.source.paths: texts/*.txt is not in the working folder, but in {tmp_path}, where the run" in done.err
    given = llm_train("validate", "-c", run / "config.yaml", "--ckpt_path", "best", "--data.source.paths", "../texts")
    assert given.code == 0, given.err
    shutil.move(run, "moved")
    assert moved_runs._started_in(Path("moved/config.yaml")) is None
