"""An encoder pretrained by masked words, and classifiers on top of it: measured, frozen, exported, asked."""

import csv
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import assert_same_weights, kill_when, weights, with_settings
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.bert_imdb.data import BertImdbDataModule, MaskedReviewsDataModule
from datamodules.bert_imdb.film_reviews import FilmReviews
from datamodules.bert_imdb.wordpiece import learn_wordpieces
from lightning_modules.bert_imdb.cached_features import weights_digest
from lightning_modules.bert_imdb.classification_report import (
    most_confidently_wrong,
    read_predictions,
    reliability,
)
from lightning_modules.bert_imdb.module import BertImdbModule, BertMaskedLMModule
from lightning_modules.classification import ClassificationMeasures
from lightning_modules.finetuning.selection import Anatomy
from lightning_modules.finetuning.bases import load_pretrained
from lightning_modules.runtime.learning_curve import read_metric

ROOT = Path(__file__).parents[2]
RUN = Path("runs/bert_imdb/tiny")
MODULE = "lightning_modules.bert_imdb.BertImdbModule"
CALLBACKS = "lightning_modules.runtime."
CLASSES = ["negative", "positive"]
SIZES = {"vocab_size": 500, "block_size": 48, "classes": CLASSES}
FREEZE = {"class_path": f"{CALLBACKS}freeze.Freeze", "init_args": {"patterns": ["model.encoder.*"]}}
CACHE = {"class_path": f"{CALLBACKS}cached_features.CachedFeatures"}
BAG_OF_WORDS = {"class_path": f"{CALLBACKS}bag_of_words.BagOfWords"}
REPORT = {"class_path": f"{CALLBACKS}classification_report.ClassificationReport"}
PREDICTED = {"class_path": f"{CALLBACKS}predictions.PredictedLabels"}
EXPORT = {"class_path": f"{CALLBACKS}export.ExportModel"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with dropout, and its tokenizer beside it."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("base")
    texts = [review.text for review in FilmReviews(n_train=200).reviews("train")]
    learn_wordpieces(texts, 500, folder / "cache").save_pretrained(folder)
    sizes = {"vocab_size": 500, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, intermediate_size=32, max_position_embeddings=64)).save_pretrained(folder)
    return folder


@pytest.fixture
def bert(tmp_path: Path, base: Path):
    """Writes the YAML of a run that takes a second: 16 steps in two epochs; settings go over it by key path."""

    def write(name: str = "tiny", callbacks: tuple = (), **settings: object) -> Path:
        config = {
            "seed_everything": 5,
            "model": {"class_path": MODULE, "init_args": {"base": str(base)}},
            "data": {
                "class_path": "datamodules.bert_imdb.BertImdbDataModule",
                "init_args": {
                    "reviews": {
                        "class_path": "datamodules.bert_imdb.FilmReviews",
                        "init_args": {"n_train": 64, "n_val": 20, "n_test": 20},
                    },
                    "tokenizer": str(base),
                    "max_tokens": 48,
                    "batch_size": 8,
                },
            },
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
            "trainer": {
                "accelerator": "cpu",
                "max_epochs": 2,
                "log_every_n_steps": 4,
                "callbacks+": list(callbacks),
            },
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(with_settings(config, settings), sort_keys=False))
        return file

    return write


def some_batch(base: Path, n: int = 6) -> dict[str, torch.Tensor]:
    data = BertImdbDataModule(FilmReviews(n_train=20, n_val=4, n_test=4), str(base), 4, max_tokens=48)
    data.setup("fit")
    return data.sides["train"][torch.arange(n)]


# --- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_measures_reports_exports_and_predicts(llm_train, bert, tmp_path):
    from sklearn.metrics import f1_score, roc_auc_score
    from transformers import pipeline

    done = llm_train("fit", "-c", bert(callbacks=(BAG_OF_WORDS, REPORT, PREDICTED, EXPORT)))
    assert done.code == 0, done.err
    assert f"next    llm-train predict -c {RUN}/config.yaml --ckpt_path best --data.text" in done.err

    # The measures are those of the predictions that were written, by another library.
    summary = json.loads((RUN / "summary.json").read_text())
    classes, labels, probabilities = read_predictions(RUN / "predictions_val.csv")
    assert classes == CLASSES
    assert labels.tolist() == [0, 1] * 10
    predicted = probabilities.argmax(1)
    best = {name: read_metric(RUN / "metrics.csv", f"val/{name}") for name in ("loss", "accuracy", "f1", "auroc")}
    at = best["loss"][0].index(summary["best"]["step"])
    found = {name: values[at] for name, (_, values) in best.items()}
    assert found["accuracy"] == pytest.approx((predicted == labels).mean())
    assert found["f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert found["auroc"] == pytest.approx(roc_auc_score(labels, probabilities[:, 1]), abs=1e-4)
    assert found["loss"] == pytest.approx(-np.log(probabilities[range(20), labels]).mean(), abs=1e-4)
    for name in ("accuracy", "f1", "auroc", "calibration_error", "loss"):
        assert len(read_metric(RUN / "metrics.csv", f"val/bag_of_words/{name}")[1]) == 2

    for figure in ("confusion_val", "reliability_val", "learning_curve"):
        assert (RUN / f"figures/{figure}.png").is_file()
    with (RUN / "wrong_val.csv").open(newline="") as file:
        wrong = list(csv.DictReader(file))
    assert len(wrong) == (predicted != labels).sum()
    assert [row["probability"] for row in wrong] == sorted((row["probability"] for row in wrong), reverse=True)
    assert all(row["label"] != row["predicted"] for row in wrong)

    tested = llm_train("test", "-c", RUN / "config.yaml", "--ckpt_path", "best")
    assert tested.code == 0, tested.err
    metrics = json.loads((RUN / "summary_test.json").read_text())["metrics"]
    assert {"test/accuracy", "test/calibration_error", "test/bag_of_words/accuracy"} <= metrics.keys()
    assert (RUN / "figures/reliability_test.png").is_file()

    # The exported model, in Transformers' own pipeline, says what `predict` says.
    texts = [review.text for review in FilmReviews(n_test=6).reviews("test")]
    (tmp_path / "new.csv").write_text("text\n" + "".join('"{}"\n'.format(t.replace('"', '""')) for t in texts))
    asked = llm_train(
        "predict", "-c", RUN / "config.yaml", "--ckpt_path", "best", "--data.file", str(tmp_path / "new.csv")
    )
    assert asked.code == 0, asked.err
    with (RUN / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == texts
    classifier = pipeline("text-classification", str(RUN / "model"), truncation=True)
    for row, line, answer in zip(rows, asked.out.splitlines(), classifier(texts), strict=True):
        assert row["label"] == answer["label"]
        assert float(row["probability"]) == pytest.approx(answer["score"], abs=1e-5)
        assert line.startswith(f"{row['label']}  {float(row['probability']):.4f}  ")
    one = llm_train("predict", "-c", RUN / "config.yaml", "--ckpt_path", "best", "--data.text", texts[0])
    assert one.out.splitlines() == asked.out.splitlines()[:1]


def test_predict_needs_weights_and_a_text(llm_train, bert):
    config = bert(callbacks=(PREDICTED,))
    assert "predict: with which weights? Give --ckpt_path" in llm_train("predict", "-c", config).err
    llm_train("fit", "-c", config, "--trainer.max_epochs", "1")
    for flags, message in (
        ((), 'predict: give either --data.text "a review" or --data.file FILE'),
        (("--data.text", "a", "--data.file", "b"), "give either"),
        (("--data.text", " <br /> "), "data.text: the review is empty"),
        (("--data.file", "gone.csv"), "gone.csv does not exist"),
    ):
        asked = llm_train("predict", "-c", RUN / "config.yaml", "--ckpt_path", "best", *flags)
        assert (asked.code, message in asked.err) == (1, True), asked.err


def test_a_killed_run_resumes_to_the_same_weights_and_measures(llm_train, forked, bert):
    config = bert(callbacks=(REPORT,), model__init_args__pooling="both", trainer__val_check_interval=4)
    llm_train("fit", "-c", config, "--run.name", "whole")
    whole_run, killed = RUN.parent / "whole", RUN.parent / "killed"
    status = forked(
        "fit", "-c", config, "--run.name", "killed",
        prepare=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"),  # its threads are not in the copy
        meanwhile=kill_when((killed / "checkpoints/last.ckpt").is_file),
    )  # fmt: skip
    assert status == -signal.SIGKILL
    resumed = llm_train("fit", "-c", config, "--run.name", "killed", "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert_same_weights(whole_run / "checkpoints/last.ckpt", killed / "checkpoints/last.ckpt")
    for name in ("val/loss", "val/auroc"):
        whole, resumed = (
            dict(zip(*read_metric(run / "metrics.csv", name), strict=True)) for run in (whole_run, killed)
        )
        assert resumed.items() <= whole.items()  # a row that was not yet written when the run was killed may be missing
        assert max(resumed) == 16
    assert (whole_run / "predictions_val.csv").read_text() == (killed / "predictions_val.csv").read_text()


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
    # A checkpoint's module is built where the base is not.
    again = BertImdbModule("gone", pooling, head, **SIZES, architecture=module.hparams["architecture"]).eval()
    again.load_state_dict(module.state_dict())
    with torch.no_grad():
        assert torch.equal(again(batch), logits)


def test_the_head_of_bert_begins_with_the_weights_of_its_pooler(base):
    from transformers import BertModel

    bert = BertModel.from_pretrained(base)
    module = BertImdbModule(str(base), **SIZES)
    assert torch.equal(module.model.head.dense.weight, bert.pooler.dense.weight)
    assert not any("pooler" in name for name in module.state_dict())
    for name, weight in module.model.encoder.state_dict().items():
        assert torch.equal(weight, bert.state_dict()[name])
    assert all(part.training for part in module.modules())


def test_the_parts_of_the_model_are_found(base):
    anatomy = Anatomy(BertImdbModule(str(base), pooling="mean", **SIZES))
    assert [len(layer) for layer in anatomy.layers] == [16, 16]
    assert {name.split(".")[2] for name in anatomy.embeddings} == {"embeddings"}
    assert {name.split(".")[1] for name in anatomy.head} == {"head"}


def test_other_encoders_are_loaded_too(tmp_path, base):
    from transformers import DistilBertConfig, DistilBertModel

    DistilBertModel(DistilBertConfig(vocab_size=500, dim=16, n_layers=1, n_heads=2, hidden_dim=32)).save_pretrained(
        tmp_path / "distil"
    )
    module = BertImdbModule(str(tmp_path / "distil"), pooling="mean", **SIZES)
    assert module(some_batch(base)).shape == (6, 2)


# --- what is trained -------------------------------------------------------------------------------------------------


def test_a_frozen_base_is_left_as_it_was_and_draws_no_random_numbers(llm_train, bert, base):
    done = llm_train("fit", "-c", bert(callbacks=(FREEZE,)))
    assert done.code == 0, done.err
    before = load_pretrained(str(base), "AutoModel").state_dict()
    after = weights(RUN / "checkpoints/last.ckpt")
    for name, weight in after.items():
        if name.startswith("model.encoder."):
            assert torch.equal(weight, before[name.removeprefix("model.encoder.")])
    head = BertImdbModule(str(base), **SIZES).state_dict()
    assert not torch.equal(after["model.head.dense.weight"], head["model.head.dense.weight"])


def test_cached_features_change_nothing_and_the_base_is_asked_once(llm_train, bert, base, monkeypatch):
    """With dropout in the base and in the head: the one is inactive, the other the same."""
    asked = []
    features = BertImdbModule.features

    def counted(self: BertImdbModule, batch: dict) -> torch.Tensor:
        asked.append(self.model.encoder.training)
        return features(self, batch)

    monkeypatch.setattr(BertImdbModule, "features", counted)
    llm_train("fit", "-c", bert(callbacks=(FREEZE, REPORT)), "--run.name", "without")
    assert (len(asked), any(asked)) == (2 * (8 + 3), False)  # batches of two epochs, and of their validations
    asked.clear()
    done = llm_train("fit", "-c", bert(callbacks=(FREEZE, CACHE, REPORT)), "--run.name", "with")
    assert done.code == 0, done.err
    assert (len(asked), any(asked)) == (8 + 3, False)
    one, other = (weights(RUN.parent / name / "checkpoints/last.ckpt") for name in ("without", "with"))
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-5)
    one, other = (read_predictions(RUN.parent / name / "predictions_val.csv")[2] for name in ("without", "with"))
    np.testing.assert_allclose(one, other, atol=1e-5)
    asked.clear()
    llm_train("fit", "-c", bert(callbacks=(FREEZE, CACHE), model__init_args__dropout=0.3), "--run.name", "again")
    assert not asked  # another head, the same features
    refused = llm_train("fit", "-c", bert(callbacks=(CACHE,)))
    assert refused.code == 1
    assert "error: CachedFeatures: the encoder is trained, so its features change" in refused.err


def test_a_digest_of_weights_tells_models_apart(base):
    one, other = (load_pretrained(str(base), "AutoModel") for _ in range(2))
    assert weights_digest(one) == weights_digest(other)
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1e-3
    assert weights_digest(one) != weights_digest(other)


@pytest.mark.parametrize(
    ("arm", "trained"),
    [
        ("head_only", {"head"}),
        ("last_1", {"head", "layer.1"}),
        ("lora", {"head", "layer.0", "layer.1"}),
        ("gradual", {"head", "layer.1"}),
        ("layerwise", {"head", "layer.0", "layer.1", "embeddings"}),
    ],
)
def test_every_way_of_unfreezing_trains_what_it_says(llm_train, bert, base, arm, trained):
    """In two epochs: the third is where gradual unfreezing would come to the rest."""
    file = ROOT / f"experiments/bert_imdb/studies/unfreeze/{arm}.yaml"
    done = llm_train("fit", "-c", bert(callbacks=(EXPORT,) if arm == "lora" else ()), f"--config={file}")
    assert done.code == 0, done.err
    after = weights(RUN / "checkpoints/last.ckpt")
    before = BertImdbModule(str(base), **SIZES).state_dict()
    # Adapters are new; what they stand beside is left as it was.
    changed = {name for name, weight in after.items() if name not in before or not torch.equal(weight, before[name])}
    if arm == "lora":
        assert not any("base_layer" in name and name.replace(".base_layer", "") in changed for name in after)
    parts = {re.search(r"head|layer\.\d|embeddings", name)[0] for name in changed if "base_layer" not in name}
    assert parts == trained
    if arm == "lora":  # what is exported is a plain model again
        assert not any("lora" in name for name in load_pretrained(str(RUN / "model"), "AutoModel").state_dict())


def test_the_studies_name_files_that_are_there():
    studies = ROOT / "experiments/bert_imdb/studies"
    arms = yaml.safe_load((studies / "unfreeze_depth.yaml").read_text())["parameters"]["config"]["values"]
    assert [Path(arm).stem for arm in arms] == ["head_only", "last_1", "last_2", "last_4", "lora", "all"]
    assert all((ROOT / arm).is_file() for arm in arms)
    assert (ROOT / yaml.safe_load((studies / "pooling.yaml").read_text())["parameters"]["config"]["value"]).is_file()


# --- bad input -------------------------------------------------------------------------------------------------------


def test_what_is_no_encoder_is_refused(base, tmp_path):
    from transformers import GPT2Config, GPT2Model

    GPT2Model(GPT2Config(vocab_size=500, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(MisconfigurationException, match="holds a GPT2Model, which is no encoder: give a model such as"):
        BertImdbModule(str(tmp_path / "gpt2"), **SIZES)
    with pytest.raises(MisconfigurationException, match=r"holds no config.json, nor a model/ that does"):
        BertImdbModule(str(tmp_path), **SIZES)
    with pytest.raises(
        MisconfigurationException, match=r"llm-train fit -c experiments/bert_imdb/offline_pretrain.yaml"
    ):
        BertImdbModule("runs/bert_imdb/offline_pretrain", **SIZES)
    with pytest.raises(MisconfigurationException, match="it has 501 tokens, more than the 500 of"):
        BertImdbModule(str(base), **SIZES | {"vocab_size": 501})
    with pytest.raises(MisconfigurationException, match="65 is longer than the context of"):
        BertImdbModule(str(base), **SIZES | {"block_size": 65})
    with pytest.raises(MisconfigurationException, match="vocab_size, block_size and classes are needed"):
        BertImdbModule(str(base))
    with pytest.raises(MisconfigurationException, match=r"model.dropout is 1.0"):
        BertImdbModule(str(base), dropout=1.0, **SIZES)
    with pytest.raises(MisconfigurationException, match="n_head divide n_embd"):
        BertMaskedLMModule(n_head=3, n_embd=16, vocab_size=500, block_size=48)


def test_a_head_of_another_size_is_refused(llm_train, bert, tmp_path):
    llm_train("fit", "-c", bert(), "--trainer.max_epochs", "1")
    wider = llm_train(
        "test", "-c", bert("wide", model__init_args__pooling="both"), "--ckpt_path", RUN / "checkpoints/best.ckpt"
    )
    assert wider.code == 1
    assert re.search(
        r"error: ckpt_path: the checkpoint does not fit the model: model.head.dense.bias is \(16,\) in the checkpoint "
        r"and \(32,\) in the model",
        wider.err,
    )
    rows = [{"text": f"Film {i} was seen.", "label": i % 3} for i in range(90)]
    (tmp_path / "three.jsonl").write_text("\n".join(map(json.dumps, rows)))
    three = {
        "class_path": "datamodules.bert_imdb.ReviewFiles",
        "init_args": {"train": str(tmp_path / "three.jsonl"), "classes": ["bad", "fair", "good"]},
    }
    config = bert("three", callbacks=(REPORT,), data__init_args__reviews=three)
    refused = llm_train("fit", "-c", config, "--ckpt_path", RUN / "checkpoints/best.ckpt")
    assert re.search(r"model.head.out.bias is \(2,\) in the checkpoint and \(3,\) in the model", refused.err)
    done = llm_train("fit", "-c", config, "--trainer.max_epochs", "1", "--run.name", "fresh")
    assert done.code == 0, done.err  # three classes are as good as two
    assert read_predictions(RUN.parent / "fresh/predictions_val.csv")[0] == ["bad", "fair", "good"]


# --- pretraining -----------------------------------------------------------------------------------------------------


def pretraining(batch_size: int = 8) -> MaskedReviewsDataModule:
    data = MaskedReviewsDataModule(
        FilmReviews(n_train=64, n_val=10, n_test=10), "wordpiece", batch_size, 48, mask_fraction=0.3, wordpieces=400
    )
    data.setup("fit")
    return data


def new_bert(data: MaskedReviewsDataModule) -> BertMaskedLMModule:
    return BertMaskedLMModule(
        n_layer=1, n_head=2, n_embd=16, dropout=0.0, vocab_size=data.vocab_size, block_size=48, pad_token_id=0
    )


def test_the_loss_is_that_of_the_masked_tokens_and_halves_of_a_batch_make_up_the_whole():
    data = pretraining()
    module = new_bert(data)
    module.log_train_loss = lambda *_: None
    dataset, positions = data.sides["train"], torch.arange(8)
    batch = dataset[positions]
    logits = module.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum")
    whole = module.training_step(batch, 0)
    torch.testing.assert_close(whole, expected / (8 * dataset.mean_targets))
    parts = [module.training_step(dataset[part], 0) for part in positions.tensor_split(2)]  # as two processes have them
    torch.testing.assert_close(sum(parts) / 2, whole)


def test_pretraining_then_classifying(llm_train, bert, tmp_path):
    from transformers import AutoModelForMaskedLM

    reviews = {
        "class_path": "datamodules.bert_imdb.FilmReviews",
        "init_args": {"n_train": 64, "n_val": 20, "n_test": 20, "n_unlabelled": 64},
    }
    data = {
        "class_path": "datamodules.bert_imdb.MaskedReviewsDataModule",
        "init_args": {
            "reviews": reviews,
            "tokenizer": "wordpiece",
            "wordpieces": 400,
            "max_tokens": 48,
            "batch_size": 8,
        },
    }
    model = {
        "class_path": "lightning_modules.bert_imdb.BertMaskedLMModule",
        "init_args": {"n_layer": 1, "n_head": 2, "n_embd": 16},
    }
    config = bert("pretrain", model=model, data=data, callbacks=(EXPORT,))
    done = llm_train("fit", "-c", config)
    assert done.code == 0, done.err
    run = RUN.parent / "pretrain"
    _, losses = read_metric(run / "metrics.csv", "val/loss")
    assert max(losses) < np.log(400) - 0.3
    assert f"--model.base {run} --data.tokenizer {run}/tokenizer" in done.err
    tested = llm_train("test", "-c", run / "config.yaml", "--ckpt_path", "best")
    assert tested.code == 0, tested.err
    pretrained = AutoModelForMaskedLM.from_pretrained(run / "model")
    assert pretrained.config.max_position_embeddings == 48

    further = llm_train("fit", "-c", config, "--model.base", run, "--run.name", "further", "--trainer.max_steps", "1")
    assert further.code == 0, further.err
    assert (run.parent / "further/model/config.json").is_file()

    classified = llm_train(
        "fit", "-c", bert(model__init_args__base=str(run), data__init_args__tokenizer=str(run / "tokenizer"))
    )
    assert classified.code == 0, classified.err
    assert "has no pooler.dense.bias, pooler.dense.weight: drawn at random" in classified.err
    start = BertImdbModule(str(run), vocab_size=400, block_size=48, classes=CLASSES).state_dict()
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(start[f"model.encoder.{name}"], pretrained.bert.state_dict()[name])


# --- measures --------------------------------------------------------------------------------------------------------


def test_calibration_by_hand():
    """Ten sure predictions of which eight are right, and ten unsure ones of which six are."""
    probabilities = torch.tensor([[0.05, 0.95]] * 10 + [[0.4, 0.6]] * 10)
    labels = torch.tensor([1] * 8 + [0] * 2 + [1] * 6 + [0] * 4)
    measures = ClassificationMeasures(2)
    measures.update(probabilities.log(), labels, torch.arange(20))
    measures.update(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    found = measures.compute()
    assert found["calibration_error"].item() == pytest.approx((0.15 + 0.0) / 2, abs=1e-6)
    assert found["accuracy"].item() == pytest.approx(0.7)
    counts, confidence, accuracy = reliability(labels.numpy(), probabilities.numpy())
    assert counts[[8, 14]].tolist() == [10, 10]
    assert confidence[[8, 14]] == pytest.approx([0.6, 0.95])
    assert accuracy[[8, 14]] == pytest.approx([0.6, 0.8])


def test_predictions_come_back_in_the_order_of_the_positions():
    measures = ClassificationMeasures(2)
    measures.update(torch.tensor([[0.0, 9.0], [9.0, 0.0]]), torch.tensor([1, 0]), torch.tensor([2, 0]))
    measures.update(torch.tensor([[0.0, 1.0]]), torch.tensor([0]), torch.tensor([1]))
    probabilities, labels, positions = measures.predictions()
    assert positions.tolist() == [0, 1, 2]
    assert labels.tolist() == [0, 0, 1]
    nats = torch.tensor([0.0, 1.0, 0.0]) + torch.tensor([9.0, 1.0, 9.0]).neg().exp().log1p()
    torch.testing.assert_close(measures.compute()["loss"], nats.mean())
    assert probabilities.argmax(1).tolist() == [0, 1, 1]
    surest = most_confidently_wrong(np.array([[0.4, 0.6], [0.9, 0.1], [0.2, 0.8]]), np.array([0, 1, 1]))
    assert surest.tolist() == [1, 0]
