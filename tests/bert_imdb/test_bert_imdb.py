"""Encoders: pretraining on masked tokens, then classification; evaluated, frozen, exported, used for prediction."""

import csv
import json
import re
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forks
import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import assert_same_weights
from jsonargparse import ArgumentParser
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from shared_runs import own_world, run_command

from datamodules.bert_imdb.data import BertImdbDataModule, MaskedReviewsDataModule, TokenizedReviews
from datamodules.bert_imdb.film_reviews import FilmReviews
from datamodules.bert_imdb.reviews import HubReviews, Review, ReviewFiles
from experiments.api import load_run
from lightning_modules.bert_imdb.bag_of_words import BagOfWords
from lightning_modules.bert_imdb.cached_features import CachedFeatures, weights_digest
from lightning_modules.bert_imdb.classification_report import ClassificationReport, read_predictions
from lightning_modules.bert_imdb.masked_lm import BertMaskedLMModule
from lightning_modules.bert_imdb.module import BertImdbModule
from lightning_modules.bert_imdb.predictions import PredictedLabels
from lightning_modules.finetuning.bases import load_pretrained
from lightning_modules.finetuning.freeze import Freeze
from lightning_modules.finetuning.lora import LoRA
from lightning_modules.finetuning.selection import ModelParts
from lightning_modules.metrics import CorpusLoss
from lightning_modules.runtime.checkpoint import RunCheckpoint
from lightning_modules.runtime.checkpoint_io import AtomicCheckpointIO
from lightning_modules.runtime.export import ExportModel
from lightning_modules.runtime.learning_curve import read_metric

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "experiments/bert_imdb/studies"
CLASSES = ["negative", "positive"]
SIZES = {"vocab_size": 400, "block_size": 48, "classes": CLASSES}
REPORT = {"class_path": "lightning_modules.bert_imdb.ClassificationReport"}
CALLBACKS = [
    {"class_path": "lightning_modules.bert_imdb.BagOfWords"},
    REPORT,
    {"class_path": "lightning_modules.bert_imdb.PredictedLabels"},
    {"class_path": "lightning_modules.runtime.export.ExportModel"},
]


def write_config(base: Path, callbacks: list[dict]) -> Path:
    """Write the YAML of a classifier that is trained for twelve steps in two epochs, and validated every four steps."""
    config = {
        "seed_everything": 5,
        "model": {"class_path": "lightning_modules.bert_imdb.BertImdbModule", "init_args": {"base": str(base)}},
        "data": {
            "class_path": "datamodules.bert_imdb.BertImdbDataModule",
            "init_args": {
                "reviews": {
                    "class_path": "datamodules.bert_imdb.FilmReviews",
                    "init_args": {"n_train": 48, "n_val": 20, "n_test": 20},
                },
                "tokenizer": str(base / "tokenizer"),
                "max_tokens": 48,
                "batch_size": 8,
            },
        },
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "val_check_interval": 4,
            "log_every_n_steps": 4,
            "callbacks+": callbacks,
        },
    }
    file = Path("classified.yaml").absolute()
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file


def train(module: L.LightningModule, data: L.LightningDataModule, callbacks: Sequence[L.Callback], **settings: Any):
    """Train for two epochs with the Trainer alone, without the command, and return the Trainer."""
    L.seed_everything(7)
    module.data = data
    module.optimizer_factory = lambda groups: torch.optim.AdamW(groups, lr=1e-2)
    settings = {"max_epochs": 2, "default_root_dir": Path.cwd(), "num_sanity_val_steps": 0} | settings
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    checkpoints = {"enable_checkpointing": any(isinstance(callback, RunCheckpoint) for callback in callbacks)}
    trainer = L.Trainer(accelerator="cpu", callbacks=list(callbacks), **quiet, **checkpoints, **settings)
    trainer.fit(module, datamodule=data)
    return trainer


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> SimpleNamespace:
    """A BERT of two layers with dropout, pretrained on masked tokens and exported."""
    run = tmp_path_factory.mktemp("pretrained")
    with own_world(run):
        reviews = FilmReviews(n_train=24, n_val=8, n_test=4, n_unlabelled=24)
        data = MaskedReviewsDataModule(reviews, "wordpiece", 8, 48, wordpieces=400)
        sizes = {"vocab_size": data.vocab_size, "block_size": data.block_size, "pad_token_id": data.pad_token_id}
        module = BertMaskedLMModule(n_layer=2, n_head=2, n_embd=16, **sizes)
        trainer = train(module, data, [RunCheckpoint(), ExportModel()], plugins=[AtomicCheckpointIO()])
    return SimpleNamespace(run=run, loss=float(trainer.callback_metrics["val/loss"]))


@pytest.fixture(scope="module")
def classified(pretrained, tmp_path_factory) -> SimpleNamespace:
    """A run of the command that trains the pretrained encoder on labels."""
    folder = tmp_path_factory.mktemp("classified")
    with own_world(folder):
        done = run_command("fit", "-c", write_config(pretrained.run, CALLBACKS))
    assert done.code == 0, done.err
    return SimpleNamespace(folder=folder, run=folder / "runs/bert_imdb/classified", printed=done.err)


@pytest.fixture(scope="module")
def base(pretrained, tmp_path_factory) -> Path:
    """A BERT of two layers with dropout and a pooler, and its tokenizer."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("base") / "bert"
    shutil.copytree(pretrained.run / "tokenizer", folder)
    sizes = {"vocab_size": 400, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, intermediate_size=32, max_position_embeddings=64)).save_pretrained(folder)
    return folder


def reviews_of(base: Path, **settings: Any) -> BertImdbDataModule:
    source = FilmReviews(n_train=24, n_val=12, n_test=4)
    return BertImdbDataModule(
        **{"reviews": source, "tokenizer": str(base), "batch_size": 8, "max_tokens": 48} | settings
    )


def some_batch(base: Path, n: int = 6) -> dict[str, torch.Tensor]:
    data = reviews_of(base)
    data.setup("fit")
    return data.datasets["train"][torch.arange(n)]


@pytest.mark.parametrize("truncation", ["tail", "head_tail"])
def test_texts_are_prepared_as_in_training(base, truncation):
    data = reviews_of(base, truncation=truncation, max_tokens=12)
    data.setup("fit")
    texts = [f"{review.text.replace(' ', '<br /><br />')}\n" for review in data.texts["val"][:5]]
    batch = data.batch_of_texts(data.tokenizer, {"truncation": truncation, "max_tokens": 12}, texts)
    expected = data.datasets["val"][torch.arange(5)]
    assert batch["input_ids"].shape == (5, 12)
    assert all(torch.equal(batch[name], expected[name]) for name in batch if name != "labels")


@pytest.mark.parametrize("pooling", ["cls", "both"])
def test_the_ends_of_the_reviews_replace_the_mask_on_a_gpu(base, pooling):
    lengths = [7, 20, 11]
    rows = [np.arange(100, 100 + n) for n in lengths]
    batch = TokenizedReviews(rows, labels=[0, 1, 0], pad_token_id=0)[torch.arange(3)]
    assert batch["cu_seqlens"].diff()[::2].tolist() == lengths
    assert batch["cu_seqlens"][::2].diff().tolist() == [20, 20, 20]
    module = BertImdbModule(str(base), pooling, vocab_size=400, block_size=48, classes=["bad", "good"]).eval()
    expected = module(batch)
    for device in ("cpu", "cuda"):  # the set-up for a GPU; the model stays on the CPU
        module.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))
        module.setup("fit")
        assert module.within_records == (device == "cuda")
        torch.testing.assert_close(module(batch), expected, rtol=1e-5, atol=1e-5)


# --- pretraining -----------------------------------------------------------------------------------------------------


def test_pretraining_lowers_the_loss_and_is_exported(pretrained, monkeypatch):
    from transformers import AutoModelForMaskedLM, pipeline

    assert pretrained.loss < np.log(400) - 0.3
    model = AutoModelForMaskedLM.from_pretrained(pretrained.run / "model")
    assert model.config.max_position_embeddings == 48
    fill = pipeline("fill-mask", model=str(pretrained.run / "model"), device="cpu")
    assert len(fill("a [MASK] film")) == 5

    further = BertMaskedLMModule(str(pretrained.run), vocab_size=400, block_size=48)
    for name, weight in model.state_dict().items():
        assert torch.equal(further.model.state_dict()[name], weight)
    checkpoint = torch.load(pretrained.run / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["module_class"] == "lightning_modules.bert_imdb.BertMaskedLMModule"
    loaded = BertMaskedLMModule.of_checkpoint(checkpoint)
    assert type(loaded.model).__name__ == "BertForMaskedLM"
    assert loaded.next_command("RUN").endswith("--model.base RUN --data.tokenizer RUN/tokenizer")
    loaded.data = SimpleNamespace(have_labels=False)
    assert loaded.next_command("RUN") == "llm-train validate -c RUN/config.yaml --ckpt_path best"
    for reviews, experiment in (("mine.csv", "classify"), (HubReviews(), "full"), (FilmReviews(), "offline")):
        further.data = MaskedReviewsDataModule(reviews, str(pretrained.run), 2)
        monkeypatch.setattr(MaskedReviewsDataModule, "have_labels", True)
        assert further.next_command("RUN").startswith(f"llm-train fit -c bert_imdb/{experiment} --model.base RUN ")


@pytest.mark.slow
def test_the_next_command_reads_the_reviews_that_were_given(llm_train, no_pictures):
    rows = "".join(f"{n},{('dull', 'fine')[n % 2]} film {n},{n % 2}\n" for n in range(60))
    Path("mine.csv").write_text("id,message,label\n" + rows)
    length = ("--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=null")
    small = ("--model.n_layer=1", "--model.n_head=1", "--model.n_embd=8", "--data.wordpieces=300")
    given = ("--data.reviews", "mine.csv:message", "--data.max_tokens", "160", "--run.name", "mine")
    done = llm_train("fit", "-c", "bert_imdb/offline_pretrain", *given, *small, *length, "--data.batch_size=8")
    assert done.code == 0, done.err
    following = done.err.splitlines()[-1]
    base = "--model.base runs/bert_imdb/mine --data.tokenizer runs/bert_imdb/mine/tokenizer"
    # The name is that of this run.
    assert following == f"next    llm-train fit -c bert_imdb/offline {base} {' '.join(given[:-2])}"
    done = llm_train(*following.split()[2:], *length)
    assert done.code == 0, done.err


def test_the_loss_is_that_of_the_masked_tokens_and_halves_of_a_batch_make_up_the_whole(tmp_path):
    data = MaskedReviewsDataModule(
        FilmReviews(n_train=24, n_val=4, n_test=4), "wordpiece", 8, 48, mask_fraction=0.3, wordpieces=300
    )
    data.setup("fit")
    sizes = {"vocab_size": data.vocab_size, "block_size": 48, "pad_token_id": 0}
    module = BertMaskedLMModule(n_layer=1, n_head=2, n_embd=16, dropout=0.0, **sizes)
    module.log_train_loss = lambda *_: None
    dataset, positions = data.datasets["train"], torch.arange(8)
    batch = dataset[positions]
    logits = module.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum")
    whole = module.training_step(batch, 0)
    torch.testing.assert_close(whole, expected / (8 * dataset.mean_targets))
    parts = [module.training_step(dataset[part], 0) for part in positions.tensor_split(2)]  # as two processes have them
    torch.testing.assert_close(sum(parts) / 2, whole)

    metrics = CorpusLoss()
    for part in (positions, positions[:0]):  # a process may have no share of the last batch
        module.evaluation_step(dataset[part], metrics)
    torch.testing.assert_close(metrics.compute()["loss"], (expected / (batch["targets"] >= 0).sum()).detach())
    data.setup("test")
    assert sum(len(batch["input_ids"]) for batch in data.test_dataloader()) == len(data.datasets["test"])


# --- classification --------------------------------------------------------------------------------------------------


def test_a_run_starts_from_the_pretrained_encoder(pretrained, classified):
    assert "has no pooler.dense.bias, pooler.dense.weight: initialised at random" in classified.printed
    assert "next    llm-train predict -c runs/bert_imdb/classified/config.yaml --ckpt_path best --data.text" in (
        classified.printed
    )
    start = BertImdbModule(str(pretrained.run), **SIZES).state_dict()
    pretrained_weights = torch.load(pretrained.run / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(start[f"model.encoder.{name}"], pretrained_weights[f"model.bert.{name}"])
    checkpoint = torch.load(classified.run / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["module_class"] == "lightning_modules.bert_imdb.BertImdbModule"
    assert not torch.equal(checkpoint["state_dict"][f"model.encoder.{name}"], start[f"model.encoder.{name}"])


def test_the_metrics_are_those_of_the_predictions(classified):
    from sklearn.metrics import f1_score, roc_auc_score

    run = classified.run
    best_step = json.loads((run / "summary.json").read_text())["best"]["step"]
    classes, labels, probabilities = read_predictions(run / "predictions_val.csv")
    assert classes == CLASSES
    assert labels.tolist() == [0, 1] * 10
    predicted = probabilities.argmax(1)
    best = {}
    for name in ("loss", "accuracy", "f1", "auroc"):
        steps, values = read_metric(run / "metrics.csv", f"val/{name}")
        assert steps == [4, 8, 12]
        best[name] = values[steps.index(best_step)]
    assert best["accuracy"] == pytest.approx((predicted == labels).mean())
    assert best["f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    auroc = [roc_auc_score(labels == label, probabilities[:, label]) for label in (0, 1)]
    assert best["auroc"] == pytest.approx(np.mean(auroc), abs=1e-4)
    assert best["loss"] == pytest.approx(-np.log(probabilities[range(20), labels]).mean(), abs=1e-4)
    for name in ("accuracy", "f1", "auroc", "calibration_error", "loss"):
        assert len(read_metric(run / "metrics.csv", f"val/bag_of_words/{name}")[1]) == 3


def test_the_closing_lines_have_the_accuracies(classified):
    best = re.search(r"^best .*\n( {8}val/accuracy .*)", classified.printed, re.MULTILINE)
    names = ("val/accuracy", "val/bag_of_words/accuracy", "always the most frequent class")
    assert re.fullmatch(" {8}" + ", ".join(rf"{name} [01]\.\d{{4}}" for name in names), best[1])


def test_the_report_has_figures_and_the_mistakes(classified):
    for figure in ("confusion_val", "reliability_val", "learning_curve"):
        assert (classified.run / f"figures/{figure}.png").is_file()
    _, labels, probabilities = read_predictions(classified.run / "predictions_val.csv")
    with (classified.run / "wrong_val.csv").open(newline="") as file:
        wrong = list(csv.DictReader(file))
    assert len(wrong) == (probabilities.argmax(1) != labels).sum()
    assert [row["probability"] for row in wrong] == sorted((row["probability"] for row in wrong), reverse=True)
    assert all(row["label"] != row["predicted"] for row in wrong)


def test_a_test_evaluates_the_model_and_the_bag_of_words(classified, pretrained, tmp_path):
    checkpoint = torch.load(classified.run / "checkpoints/best.ckpt", weights_only=True)
    module, data = BertImdbModule.of_checkpoint(checkpoint), reviews_of(pretrained.run / "tokenizer")
    module.data = data
    callbacks = [BagOfWords(), ClassificationReport()]
    trainer = L.Trainer(accelerator="cpu", callbacks=callbacks, logger=False, enable_progress_bar=False)
    trainer.test(module, datamodule=data, verbose=False)
    names = {"test/loss", "test/accuracy", "test/f1", "test/auroc", "test/calibration_error"}
    assert trainer.callback_metrics.keys() == names | {name.replace("/", "/bag_of_words/") for name in names}
    _, labels, probabilities = read_predictions(tmp_path / "predictions_test.csv")
    accuracy = (probabilities.argmax(1) == labels).mean()
    assert float(trainer.callback_metrics["test/accuracy"]) == pytest.approx(accuracy)
    assert (tmp_path / "wrong_test.csv").is_file()
    assert (tmp_path / "figures/reliability_test.png").is_file()


@pytest.mark.slow
def test_predict_and_the_exported_model_agree(llm_train, classified, tmp_path, monkeypatch):
    from transformers import pipeline

    monkeypatch.chdir(classified.folder)
    texts = [review.text for review in FilmReviews(n_test=6).reviews("test")]
    written = [f"{text.replace('. ', '.<br /><br />')}\n" for text in texts]  # as on a page of reviews
    assert any("<br />" in text for text in written)
    with (tmp_path / "new.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "text", "predicted"), *((n, text, "?") for n, text in enumerate(written))])
    flags = ("--ckpt_path", "best", "--data.file", tmp_path / "new.csv")
    done = llm_train("predict", "-c", classified.run / "config.yaml", *flags)
    assert done.code == 0, done.err
    assert "initialised at random" not in done.err  # the checkpoint has all weights
    assert f"\nresult  {classified.run}/predictions.csv\n" in done.err
    with (classified.run / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [*rows[0]] == ["id", "text", "predicted", "predicted.2", "probability", *CLASSES]
    assert [(row["id"], row["text"], row["predicted"]) for row in rows] == [
        (str(n), text, "?") for n, text in enumerate(written)
    ]
    from_python = load_run(classified.run).classify(written)
    classifier = pipeline("text-classification", str(classified.run / "model"), truncation=True)
    for row, line, answer in zip(rows, done.out.splitlines(), classifier(texts), strict=True):
        predicted = row["predicted.2"]
        assert predicted == answer["label"]
        assert float(row["probability"]) == pytest.approx(answer["score"], abs=1e-5)
        probabilities = from_python.pop(0)
        assert probabilities.keys() == set(CLASSES)
        assert {name: float(row[name]) for name in CLASSES} == pytest.approx(probabilities, abs=1e-5)
        assert probabilities[predicted] == max(probabilities.values()) == pytest.approx(answer["score"], abs=1e-5)
        label, shown, _ = line.split("  ", 2)
        assert label == predicted
        assert float(shown) == pytest.approx(float(row["probability"]), abs=5.1e-5)  # both are rounded


def test_few_predictions_are_printed_all_are_written_and_none_is_lost(tmp_path, capsys):
    """The rows are of JSON, in which each may have other fields."""
    rows = [{"message": f"text {n}"} | ({"id": n} if n else {}) for n in range(12)]
    texts = [Review(row["message"], None) for row in rows]
    data = SimpleNamespace(classes=CLASSES, texts={"predict": texts}, rows_to_predict=rows)
    module = SimpleNamespace(data=data, result_files=[])
    trainer = SimpleNamespace(world_size=1, is_global_zero=True, fast_dev_run=False, default_root_dir=tmp_path)
    outputs = {"positions": torch.arange(12).flip(0), "probabilities": torch.tensor([[0.25, 0.75]] * 12)}
    for _ in range(2):
        callback = PredictedLabels()
        callback.on_predict_batch_end(trainer, module, outputs)
        callback.on_predict_end(trainer, module)
        printed = capsys.readouterr().out.splitlines()
        assert (len(printed), printed[0], printed[-1]) == (11, "positive  0.7500  text 0", "... and 2 more")
    first, second = module.result_files
    assert (first.name, second.name) == ("predictions.csv", "predictions.2.csv")
    lines = first.read_text().splitlines()
    assert (len(lines), first.read_bytes()) == (13, second.read_bytes())
    assert lines[:3] == [
        "message,id,predicted,probability,negative,positive",
        "text 0,,positive,0.750000,0.250000,0.750000",
        "text 1,1,positive,0.750000,0.250000,0.750000",
    ]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights_metrics_and_predictions(llm_train, classified, pretrained):
    """Killed after step 8, in the middle of the second epoch."""
    killed = Path("runs/bert_imdb/classified")
    config = write_config(pretrained.run, [REPORT])
    process = forks.start("fit", "-c", config, prepare=lambda: forks.die_after_step(8))
    assert forks.wait([process]) == [-signal.SIGKILL]
    resumed = llm_train("fit", "-c", config, "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert_same_weights(classified.run / "checkpoints/last.ckpt", killed / "checkpoints/last.ckpt")
    for name in ("val/loss", "val/auroc"):
        one, other = (
            dict(zip(*read_metric(run / "metrics.csv", name), strict=True)) for run in (classified.run, killed)
        )
        assert other.items() <= one.items()  # a row that was not yet written when the run was killed may be missing
        assert max(other) == 12
    assert (classified.run / "predictions_val.csv").read_text() == (killed / "predictions_val.csv").read_text()


def test_three_classes_are_classified_and_reported(base, tmp_path):
    rows = [{"text": f"Film {i} was seen.", "label": i % 3} for i in range(60)]
    (tmp_path / "three.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = reviews_of(base, reviews=ReviewFiles(str(tmp_path / "three.jsonl"), classes=["bad", "fair", "good"]))
    module = BertImdbModule(str(base), **SIZES | {"classes": data.classes})
    trainer = train(module, data, [ClassificationReport(n_wrong=3), BagOfWords()], max_epochs=1)
    assert read_predictions(tmp_path / "predictions_val.csv")[0] == ["bad", "fair", "good"]
    assert len((tmp_path / "wrong_val.csv").read_text().splitlines()) == 4
    assert trainer.callback_metrics.keys() >= {"val/accuracy", "val/bag_of_words/accuracy"}


def test_a_report_keeps_the_best_validation_over_a_resume():
    report = ClassificationReport()
    report.load_state_dict({"best_loss": 0.25})
    fitting = SimpleNamespace(fn=TrainerFn.FITTING)
    trainer = SimpleNamespace(state=fitting, sanity_checking=False, callback_metrics={"val/loss": 0.3})
    report.on_validation_end(trainer, None)  # a worse validation writes nothing
    assert report.state_dict() == {"best_loss": 0.25}


def test_fast_dev_run_writes_no_files(base, tmp_path):
    data, module = reviews_of(base, text="I would see it again."), BertImdbModule(str(base), **SIZES)
    trainer = train(module, data, [ClassificationReport(), PredictedLabels()], fast_dev_run=True)
    trainer.predict(module, datamodule=data)
    assert not list(tmp_path.glob("*.csv"))


# --- pooling, head, export -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["cls", "mean", "both"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_every_pooling_and_head_is_exported_as_it_is(base, tmp_path, monkeypatch, pooling, head):
    from transformers import AutoModel, AutoModelForSequenceClassification, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    module = BertImdbModule(str(base), pooling=pooling, head=head, **SIZES).eval()
    batch = some_batch(base)
    module.save_pretrained(tmp_path / "model")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", trust_remote_code=True).eval()
    assert loaded.config.id2label == {0: "negative", 1: "positive"}
    assert (type(loaded).__name__ == "BertForSequenceClassification") == ((pooling, head) == ("cls", "mlp"))
    with torch.no_grad():
        logits = loaded(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        hidden = AutoModel.from_pretrained(base).eval()(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        assert torch.equal(logits, module(batch))
        mean = torch.stack([h[m.bool()].mean(0) for h, m in zip(hidden, batch["attention_mask"], strict=True)])
        expected = {"cls": hidden[:, 0], "mean": mean, "both": torch.cat([hidden[:, 0], mean], dim=1)}[pooling]
        torch.testing.assert_close(module.features(batch), expected)
    if type(loaded).__name__ == "EncoderClassifier":  # its encoder is a base; the code in the folder is not run
        (tmp_path / "model/encoder_classifier.py").write_text("raise SystemExit('the code is run')")
        encoder = BertImdbModule(str(tmp_path / "model"), **SIZES).model.encoder
        for name, weight in module.model.encoder.state_dict().items():
            assert torch.equal(encoder.state_dict()[name], weight)
    # The module of a checkpoint is built without its base.
    again = BertImdbModule("gone", pooling, head, **SIZES, architecture=module.hparams["architecture"]).eval()
    again.load_state_dict(module.state_dict())
    with torch.no_grad():
        assert torch.equal(again(batch), logits)


def test_a_model_without_a_mask_reads_all_tokens(base):
    model = BertImdbModule(str(base), pooling="mean", **SIZES).eval().model
    ids = some_batch(base)["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids, torch.ones_like(ids)).logits)


def test_the_head_of_bert_starts_with_the_weights_of_its_pooler(base):
    from transformers import BertModel

    bert = BertModel.from_pretrained(base)
    module = BertImdbModule(str(base), **SIZES)
    assert torch.equal(module.model.head.dense.weight, bert.pooler.dense.weight)
    assert not any("pooler" in name for name in module.state_dict())
    for name, weight in module.model.encoder.state_dict().items():
        assert torch.equal(weight, bert.state_dict()[name])
    assert all(part.training for part in module.modules())


def test_the_parts_of_the_model_are_found(base):
    parts = ModelParts(BertImdbModule(str(base), pooling="mean", **SIZES))
    assert [len(layer) for layer in parts.layers] == [16, 16]
    assert {name.split(".")[2] for name in parts.embeddings} == {"embeddings"}
    assert {name.split(".")[1] for name in parts.head} == {"head"}


def test_without_dropout_in_the_base_its_features_are_those_of_the_evaluation(base):
    batch = some_batch(base)
    for p, same in ((None, False), (0.0, True)):  # the tiny base has dropout in its configuration
        module = BertImdbModule(base=str(base), base_dropout=p, **SIZES)
        in_training, in_evaluation = module.train().features(batch), module.eval().features(batch)
        assert torch.allclose(in_training, in_evaluation, atol=1e-5) == same
        assert module.model.encoder.config.attention_probs_dropout_prob == 0.1  # as it will be exported


def test_other_encoders_are_loaded_too(tmp_path, base):
    from transformers import DistilBertConfig, DistilBertModel

    DistilBertModel(DistilBertConfig(vocab_size=400, dim=16, n_layers=1, n_heads=2, hidden_dim=32)).save_pretrained(
        tmp_path / "distil"
    )
    module = BertImdbModule(str(tmp_path / "distil"), pooling="mean", **SIZES)
    assert module(some_batch(base)).shape == (6, 2)


# --- frozen encoders -------------------------------------------------------------------------------------------------


def callbacks_of(arm: str) -> list[L.Callback]:
    """Return the callbacks of a file of studies/unfreeze."""
    trainer = yaml.safe_load((STUDIES / f"unfreeze/{arm}.yaml").read_text())["trainer"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[L.Callback])
    return parser.instantiate(parser.parse_object({"callbacks": trainer["callbacks+"]})).callbacks


def test_a_frozen_base_and_cached_features_train_the_same_head(base, monkeypatch):
    """With dropout in the base and in the head: that of the base is inactive, that of the head draws the same."""
    computed = []
    features = BertImdbModule.features

    def counted(self: BertImdbModule, batch: dict) -> torch.Tensor:
        computed.append(self.model.encoder.training)
        return features(self, batch)

    monkeypatch.setattr(BertImdbModule, "features", counted)
    frozen, cached = (BertImdbModule(str(base), **SIZES).eval() for _ in range(2))
    cached.load_state_dict(frozen.state_dict())
    before = {name: weight.clone() for name, weight in frozen.state_dict().items()}
    train(frozen.train(), reviews_of(base), [Freeze(patterns=["model.encoder.*"])])
    assert (len(computed), any(computed)) == (2 * (3 + 2), False)  # batches of two epochs and of their validations
    after = frozen.state_dict()
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in after if name.startswith("model.head.")}

    computed.clear()
    train(cached.train(), reviews_of(base), callbacks_of("head_only"))
    assert (len(computed), any(computed)) == (3 + 2, False)
    for name, weight in cached.state_dict().items():
        torch.testing.assert_close(weight, after[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cached.predictions, frozen.predictions, rtol=0, atol=1e-5)

    computed.clear()
    other_head = BertImdbModule(str(base), dropout=0.3, **SIZES)
    train(other_head, reviews_of(base), callbacks_of("head_only"), max_epochs=1)
    assert not computed  # another head, the same features
    other_pooling = BertImdbModule(str(base), pooling="mean", **SIZES)
    train(other_pooling, reviews_of(base), callbacks_of("head_only"), max_epochs=1)
    assert len(computed) == 3 + 2


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_two_processes_compute_a_batch_of_features_each_at_a_time(pretrained, tmp_path):
    callbacks = yaml.safe_load((STUDIES / "unfreeze/head_only.yaml").read_text())["trainer"]["callbacks+"]
    config = write_config(pretrained.run, [*callbacks, {"class_path": "lightning_modules.bert_imdb.BagOfWords"}])

    def prepare(rank: int) -> None:
        def lengths(self: BertImdbModule, batch: dict) -> torch.Tensor:
            with (tmp_path / f"computed_{rank}.txt").open("a") as file:
                file.write(f"{len(batch['input_ids'])} ")
            return batch["attention_mask"].sum(1, keepdim=True).expand(-1, 16)

        BertImdbModule.features = lengths  # of this process, which ends

    flags = ("-c", config, *forks.TWO_PROCESSES, "--trainer.max_epochs", "1", "--trainer.val_check_interval", "6")
    output = tmp_path / "output.txt"
    assert forks.wait(forks.start_ranks(2, "fit", *flags, prepare=prepare, output=output)) == [0, 0], output.read_text()
    # 6 batches of training reviews, 3 of validation reviews
    assert [(tmp_path / f"computed_{rank}.txt").read_text() for rank in (0, 1)] == ["8 8 8 8 4 ", "8 8 8 8 "]
    data = reviews_of(pretrained.run / "tokenizer", reviews=FilmReviews(n_train=48, n_val=20, n_test=20))
    data.setup("fit")
    kept = {len(features): features[:, 0].tolist() for features in map(np.load, (tmp_path / "cache").rglob("*.npy"))}
    assert kept == {len(rows): rows.lengths.tolist() for rows in data.datasets.values()}
    assert len(read_metric(Path("runs/bert_imdb/classified/metrics.csv"), "val/bag_of_words/accuracy")[1]) == 1


def test_features_of_an_encoder_that_is_trained_are_not_cached(base):
    with pytest.raises(
        MisconfigurationException, match="CachedFeatures: the encoder is trained, so its features change"
    ):
        train(BertImdbModule(str(base), **SIZES), reviews_of(base), [CachedFeatures()])


def test_a_digest_of_weights_tells_models_apart(base):
    one, other = (load_pretrained(str(base), "AutoModel") for _ in range(2))
    assert weights_digest(one) == weights_digest(other)
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1e-3
    assert weights_digest(one) != weights_digest(other)


@pytest.mark.parametrize(
    ("arm", "trained"),
    [
        ("last_1", {"head", "layer.1"}),
        ("lora", {"head", "layer.0", "layer.1"}),
        ("gradual", {"head", "layer.1"}),
        ("layerwise", {"head", "layer.0", "layer.1", "embeddings"}),
    ],
)
def test_every_way_of_unfreezing_trains_what_it_says(base, tmp_path, arm, trained):
    """In two epochs; gradual unfreezing would thaw the rest in the third."""
    module = BertImdbModule(str(base), **SIZES)
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    export = [RunCheckpoint(), ExportModel()] if arm == "lora" else []
    train(module, reviews_of(base), [*callbacks_of(arm), *export], plugins=[AtomicCheckpointIO()])
    after = module.state_dict()
    # Adapters are new, and the layers that they adapt are unchanged.
    changed = {name for name, weight in after.items() if name not in before or not torch.equal(weight, before[name])}
    if arm == "lora":
        for name in before.keys() - after.keys():
            wrapped = name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
            assert torch.equal(after[wrapped], before[name])
    parts = {re.search(r"head|layer\.\d|embeddings", name)[0] for name in changed if "base_layer" not in name}
    assert parts == trained
    if arm == "lora":  # the exported model has no adapters
        exported = load_pretrained(str(tmp_path / "model"), "AutoModel").state_dict()
        assert not any("lora" in name for name in exported)


def test_adapters_are_trained_with_the_new_head(base, capfd):
    module = BertImdbModule(str(base), **SIZES)
    train(module, reviews_of(base), [LoRA(rank=2)], fast_dev_run=True)
    trained = [name for name, p in module.named_parameters() if p.requires_grad and ".lora_" not in name]
    assert trained == [f"model.head.{name}" for name in ("dense.weight", "dense.bias", "out.weight", "out.bias")]
    assert f"LoRA trains new parameters too: {', '.join(trained)}\n" in capfd.readouterr().err


def test_the_studies_name_files_that_exist():
    arms = yaml.safe_load((STUDIES / "unfreeze_depth.yaml").read_text())["parameters"]["config"]["values"]
    assert [Path(arm).stem for arm in arms] == ["head_only", "last_1", "last_2", "last_4", "lora", "all"]
    assert all((ROOT / arm).is_file() for arm in arms)
    assert (ROOT / yaml.safe_load((STUDIES / "pooling.yaml").read_text())["parameters"]["config"]["value"]).is_file()


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_base_that_is_not_an_encoder_or_does_not_fit_is_refused(base, tmp_path):
    from transformers import GPT2Config, GPT2Model

    GPT2Model(GPT2Config(vocab_size=400, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    for given, changes, message in (
        (tmp_path / "gpt2", {}, "holds a GPT2Model, which is not an encoder: give a model such as"),
        ("runs/bert_imdb/offline_pretrain", {}, r"llm-train fit -c bert_imdb/offline_pretrain"),
        (base, {"vocab_size": 401}, "401 tokens, more than the 400 of"),
        (base, {"block_size": 65}, "data.max_tokens: 65 is longer than the context of"),
        (base, {"classes": None}, "classes must be set"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            BertImdbModule(str(given), **SIZES | changes)
    with pytest.raises(MisconfigurationException, match="3 does not divide n_embd, 16"):
        BertMaskedLMModule(n_head=3, n_embd=16, vocab_size=400, block_size=48)


def test_a_head_of_another_size_is_refused(pretrained, classified):
    checkpoint = torch.load(classified.run / "checkpoints/last.ckpt", weights_only=True)
    for changes, message in (
        ({"pooling": "both"}, r"model.head.dense.bias is \(16,\) in the checkpoint and \(32,\) in the model"),
        ({"classes": ["bad", "fair", "good"]}, r"model.head.out.bias is \(2,\) in the checkpoint and \(3,\)"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            BertImdbModule(str(pretrained.run), **SIZES | changes).on_load_checkpoint(checkpoint)
