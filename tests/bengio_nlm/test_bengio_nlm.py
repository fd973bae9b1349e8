"""Bengio's network compared with a loop over its equations; its text, its results and the files of a run."""

import csv
import json
import math
import random
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import assert_close_weights, assert_same_weights, weights, with_settings
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from shared_runs import own_world, run_command

from datamodules.bengio_nlm.data import (
    PARAGRAPH,
    RARE,
    BengioNLMDataModule,
    BrownCorpus,
    NGramWindows,
    number,
    words_of,
)
from datamodules.sources import ListText
from lightning_modules.bengio_nlm import BengioNLMModule, WordVectors
from lightning_modules.bengio_nlm.network import BengioNLM
from lightning_modules.bengio_nlm.trigram import N_GROUPS, fit_mixture
from lightning_modules.bengio_nlm.word_vectors import nearest, read_word2vec

ROOT = Path(__file__).parents[2]
MODULE = "lightning_modules.bengio_nlm.BengioNLMModule"
RUN = "runs/bengio_nlm/small"


def filled(**sizes: object) -> BengioNLM:
    network = BengioNLM(**sizes)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return network


SHAPES = [{"h": 4, "direct": True}, {"h": 4, "direct": False}, {"h": 0, "direct": True}]


def test_each_dropout_of_the_module_is_that_of_the_network():
    network = BengioNLMModule(vocab_size=9, block_size=3, dropout=0.1, hidden_dropout=0.2, word_dropout=0.3).network
    assert (network.dropout, network.hidden_dropout, network.word_dropout) == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_network_is_the_equation(shape):
    network = filled(vocab_size=7, n=4, m=3, **shape).requires_grad_(False)
    context = [5, 0, 2]  # the nearest word first
    y = network(torch.tensor([context]))[0]
    x = [float(network.C[word, k]) for word in context for k in range(3)]
    for i in range(7):
        score = float(network.b[i])
        if shape["direct"]:
            score += sum(float(network.W[i, k]) * x[k] for k in range(9))
        for j in range(shape["h"]):
            unit = math.tanh(float(network.d[j]) + sum(float(network.H[j, k]) * x[k] for k in range(9)))
            score += float(network.U[i, j]) * unit
        assert float(y[i]) == pytest.approx(score, abs=1e-5)


def gradients(network: BengioNLM, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    network.zero_grad()
    (3 * loss).backward()
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_fast_loss_is_the_cross_entropy_of_the_scores(shape):
    network = filled(vocab_size=40, n=4, m=5, **shape)
    for size in (16, 9):
        context, targets = torch.randint(40, (size, 3)), torch.randint(40, (size,))
        plain, fast = F.cross_entropy(network(context), targets), network.loss(context, targets)
        assert fast.item() == pytest.approx(plain.item(), rel=1e-5)
        expected, found = gradients(network, plain), gradients(network, fast)
        for name in expected:
            assert torch.allclose(found[name], expected[name], atol=1e-6), name
        with torch.autocast("cpu", torch.bfloat16):
            low = network.loss(context, targets)
        assert low.item() == pytest.approx(plain.item(), rel=1e-2)
        for name, gradient in gradients(network, low).items():
            assert gradient.dtype == torch.float32
            assert (gradient - expected[name]).norm() < 0.03 * expected[name].norm(), name


def test_dropout_is_for_training_and_a_dropped_word_loses_all_its_features():
    network = filled(vocab_size=9, n=4, h=4, m=6, dropout=0.0, hidden_dropout=0.5, word_dropout=0.5)
    context = torch.randint(9, (200, 3))
    zeros = (network.features(context).view(200, 3, 6) == 0).float().mean(dim=2)
    assert set(zeros.unique().tolist()) == {0.0, 1.0}
    assert 0.4 < zeros.mean() < 0.6
    x = torch.ones(200, 18)
    assert 0.4 < (network.hidden(x) == 0).float().mean() < 0.6
    network.eval()
    assert (network.features(context) != 0).all()
    assert (network.hidden(x) != 0).all()
    assert torch.equal(network(context), network(context))


def test_words_must_be_connected_to_the_output():
    with pytest.raises(MisconfigurationException, match="model: h is 0 and direct is false: nothing connects"):
        BengioNLMModule(vocab_size=9, block_size=3, h=0, direct=False)


# The text


def test_words_between_spaces_with_each_option():
    document = "The dog didn't bark .\nIt's old .\n\n\nThey'll see .\n"

    def words(**choices: bool) -> str:
        settings = {"lowercase": False, "split_clitics": False, "marks": False} | choices
        return " ".join(words_of([document, "End ."], "spaces", **settings))

    assert words() == "The dog didn't bark . It's old . They'll see . End ."
    assert words(lowercase=True) == "the dog didn't bark . it's old . they'll see . end ."
    assert words(split_clitics=True) == "The dog did n't bark . It 's old . They 'll see . End ."
    assert words(marks=True) == "The dog didn't bark . It's old . <p> They'll see . <p> End . <p>"


def test_words_by_class_of_character():
    assert list(words_of(["a[0] = x+1"], "words", False, False, False)) == list("a[0]=x+1")


def test_ids_follow_frequency_and_rare_words_share_one():
    numbered = number("babcdba", rare=1)
    assert numbered.words == [RARE, "b", "a"]
    assert numbered.ids.tolist() == [1, 2, 1, 0, 0, 1, 2]
    assert numbered.counts.tolist() == [2, 3, 2]
    assert number("bab", rare=0).words == ["b", "a"]
    replaced_before = number([RARE, "a", "b", RARE, "a"], rare=1)
    assert (replaced_before.words, replaced_before.ids.tolist()) == ([RARE, "a"], [0, 1, 0, 0, 1])


def test_windows_have_the_nearest_word_first():
    batch = NGramWindows(np.array([10, 11, 12, 13, 14], np.int32), n=3)[torch.tensor([2, 4])]
    assert batch["context"].tolist() == [[11, 10], [13, 12]]
    assert batch["targets"].tolist() == [12, 14]


def data(words: str = "a b c d " * 25, **settings: object) -> BengioNLMDataModule:
    return BengioNLMDataModule(ListText([words]), **{"batch_size": 10, "rare": 0, "n": 4} | settings)


@pytest.mark.parametrize("cut", [{"train": 0.7, "val": 0.2}, {"train": 70, "val": 20}])
def test_each_word_is_in_one_split_and_predicted_once_except_the_first(cut):
    module = data(" ".join(f"w{i}" for i in range(100)), **cut)
    module.setup("fit")
    module.setup("test")
    place = {module.text.words.index(f"w{i}"): i for i in range(100)}
    seen = {}
    for side, loader in (
        ("train", module.train_dataloader()),
        ("val", module.val_dataloader()),
        ("test", module.test_dataloader()),
    ):
        seen[side] = []
        for batch in loader:
            for context, target in zip(batch["context"].tolist(), batch["targets"].tolist(), strict=True):
                assert [place[word] for word in context] == [place[target] - k for k in (1, 2, 3)]
                seen[side].append(place[target])
    assert set(seen["train"]) <= set(range(3, 70))
    assert len(seen["train"]) == len(set(seen["train"])) == 60  # incomplete batches are left out
    assert sorted(seen["val"]) == list(range(70, 90))  # the first has the end of the training text as its context
    assert sorted(seen["test"]) == list(range(90, 100))


def test_the_fingerprint_of_a_url_is_that_of_its_address():
    assert BrownCorpus("https://a.org/b.zip").fingerprint() == BrownCorpus("https://a.org/b.zip").fingerprint()
    assert BrownCorpus("https://a.org/b.zip").fingerprint() != BrownCorpus("https://a.org/c.zip").fingerprint()


def tagged_zip(folder: Path) -> Path:
    """Write a zip file of two texts with the layout of NLTK; return its path."""
    file = folder / "brown.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("brown/README", "not a text")
        archive.writestr("brown/cats.txt", "cb01 editorial")
        archive.writestr("brown/cb01", "\n\n\tA/at second/od one/cd ./.\n")
        archive.writestr("brown/ca01", "\n\n\tThe/at jury/nn 1/2/cd said/vbd ./.\n\n\n\tYes/rb ./.\n")
    return file


def test_brown_from_a_zip_and_from_a_folder(tmp_path):
    corpus = BrownCorpus(str(tagged_zip(tmp_path)))
    assert [document.split() for document in corpus.documents()] == [
        ["The", "jury", "1/2", "said", ".", "Yes", "."],
        ["A", "second", "one", "."],
    ]
    assert list(words_of(corpus.documents(), "spaces", False, False, True)).count(PARAGRAPH) == 3
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "b_two.txt").write_text("and / or\n")
    (folder / "a_one.txt").write_text("The jury said .\n\nYes .\n")
    (folder / "CONTENTS").write_text("not a text")
    (folder / "more").mkdir()
    plain = BrownCorpus(str(folder))
    assert list(plain.documents()) == ["The jury said .\n\nYes .\n", "and / or\n"]
    before = plain.fingerprint()
    (folder / "a_one.txt").write_text("The jury said no .\n")
    assert plain.fingerprint() != before


def test_a_missing_brown_corpus_is_one_line(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("fsspec.open", refuse)
    (tmp_path / "broken.zip").write_text("nothing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin/ca01").write_bytes("café\n".encode("latin-1"))
    for corpus, message in [
        (BrownCorpus(), r"could not be downloaded.*--data.source.path.*offline\.yaml"),
        (BrownCorpus(str(tmp_path / "nowhere")), "does not exist: give the folder"),
        (BrownCorpus(str(tmp_path / "broken.zip")), "no zip file"),
        (BrownCorpus(str(tmp_path / "empty")), "holds no text"),
        (BrownCorpus(str(tmp_path / "latin")), "ca01 in .* is not UTF-8"),
    ]:
        with pytest.raises(MisconfigurationException, match=message) as caught:
            list(corpus.documents())
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        ("a b", {"train": 2, "val": 1}, "2 words, fewer than one window of data.n 4"),
        ("a b c d e f", {"rare": 1}, "vocabulary of 1"),
        ("", {}, "0 words and a vocabulary of 0"),
        ("a b " * 20, {"train": 40, "val": 5}, "leave nothing of 40 words for the split val"),
        ("a b " * 20, {"train": 30, "val": 10}, "leave nothing of 40 words for the split test"),
        ("a b", {"train": 0.8, "val": 0.3}, "as shares they must add up to 1 at most"),
    ],
)
def test_too_little_text_is_refused_in_one_line(words, settings, message):
    with pytest.raises(MisconfigurationException, match=message) as caught:
        data(words, **settings).setup("test")
    assert "\n" not in str(caught.value)


# Word vectors


def test_nearest_neighbours_by_cosine():
    vectors = torch.tensor([[1.0, 0.0], [9.0, 1.0], [0.0, 1.0], [-1.0, 0.0]])
    (neighbours,) = nearest(vectors, [0], k=2)
    assert [i for i, _ in neighbours] == [1, 2]
    assert neighbours[0][1] == pytest.approx(9 / math.sqrt(82))
    assert len(nearest(vectors, [3], k=10)[0]) == 3


def test_words_that_the_text_does_not_have_are_left_out_and_named(capsys):
    module = SimpleNamespace(data=SimpleNamespace(text=SimpleNamespace(words=["here", "there"])))
    missing = ["were", *"abcdefgh"]
    vectors = WordVectors([*missing, "here", "were"])
    vectors.on_fit_start(None, module)
    assert vectors.words == ["here"]
    said = capsys.readouterr().err
    assert "'were' is not in the vocabulary (similar words: here, there): left out" in said
    assert [line.split("'")[1] for line in said.splitlines()] == missing  # once, in the order given


# Results

TARGETS = torch.tensor([[0.2, 0.5, 0.1, 1], [0.4, 0.1, 0.1, 1], [0.3, 0.6, 0.1, 2]], dtype=torch.float64)


def test_the_mixture_keeps_its_precision_where_the_module_is_cast():
    module = BengioNLMModule(vocab_size=5, block_size=3)
    learned = torch.rand(N_GROUPS, 2, dtype=torch.float64)
    module.mixture.copy_(learned)
    module.bfloat16()  # as `trainer.precision: bf16-true` does
    assert module.network.C.dtype == torch.bfloat16
    assert torch.equal(module.state_dict()["mixture"], learned)
    restored = BengioNLMModule(vocab_size=5, block_size=3)
    restored.load_state_dict(module.state_dict())
    assert torch.equal(restored.mixture, learned)
    assert module.to("meta").mixture.is_meta


def test_the_bias_starts_at_the_frequencies_and_a_trained_one_is_kept():
    text = data()
    text.setup("fit")

    def set_up(module: BengioNLMModule) -> torch.Tensor:
        module.data = text
        module.setup("fit")
        return module.network.b.detach()

    module = BengioNLMModule(vocab_size=text.vocab_size, block_size=3, h=2, m=2)
    assert set_up(module).exp().sum() == pytest.approx(1)
    module.network.b.data += 1  # training
    checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    module.on_save_checkpoint(checkpoint)
    for again in (BengioNLMModule.of_checkpoint(checkpoint), module):
        assert set_up(again).exp().sum() == pytest.approx(math.e)


@pytest.mark.parametrize("mix", ["none", "equal", "learned"])
def test_results_by_hand(mix):
    module = BengioNLMModule(vocab_size=5, block_size=3, mix=mix)
    module.mixture.copy_(torch.tensor([0.9, 0.1]))  # as of a checkpoint whose `mix` is `learned`
    module.val_metrics.bfloat16()  # as `trainer.precision: bf16-true` does; the sums stay in float64
    network, trigram, unigram, group = TARGETS.T
    for part in (slice(0, 2), slice(2, 3)):
        module.val_metrics.update(*(p[part].log() for p in (network, trigram, unigram)), group[part].long())

    def perplexity(p: torch.Tensor) -> float:
        return math.exp(-p.log().mean())

    expected = {"perplexity": network, "perplexity_trigram": trigram, "perplexity_unigram": unigram}
    weights = torch.full((N_GROUPS, 2), 0.5, dtype=torch.float64)
    if mix == "learned":
        weights = torch.from_numpy(fit_mixture(TARGETS[:, :2].numpy(), group.long().numpy(), N_GROUPS))
        assert weights[2].tolist() == pytest.approx([0, 1], abs=1e-3)  # the trigram knows it better
    if mix != "none":
        expected["perplexity_mixed"] = (weights[group.long()] * TARGETS[:, :2]).sum(dim=1)
    found = module.evaluation_results(module.val_metrics, "val")
    assert found.keys() == expected.keys() | {"loss"}
    for name, p in expected.items():
        assert found[name].item() == pytest.approx(perplexity(p), rel=1e-6)
    assert found["loss"].item() == pytest.approx(-network.log().mean().item(), rel=1e-6)

    learned = module.mixture.clone()
    module.evaluation_results(module.val_metrics, "test")  # a test learns no mixture
    assert torch.equal(module.mixture, learned)


def test_results_of_one_word():
    module = BengioNLMModule(vocab_size=5, block_size=3)
    module.val_metrics.update(*(torch.tensor([p]).log() for p in (0.5, 0.25, 0.125)), torch.tensor([1]))
    found = module.evaluation_results(module.val_metrics, "val")
    assert found["perplexity_trigram"].item() == pytest.approx(4)


def test_a_mixture_that_no_validation_has_learned_is_not_tested_as_a_learned_one():
    module = BengioNLMModule(vocab_size=5, block_size=3, mix="learned")
    with pytest.raises(MisconfigurationException, match=r"^model\.mix is learned, but .* --model\.mix equal"):
        module.on_test_start()
    module.mixture.copy_(torch.tensor([0.9, 0.1]))
    module.on_test_start()
    BengioNLMModule(vocab_size=5, block_size=3, mix="equal").on_test_start()


# The command


def two_ways_on(n_words: int) -> str:
    """Return a text of 20 equally frequent words, each followed by one of two others, in paragraphs of ten words."""
    draw, word, words = random.Random(0), 0, []
    for place in range(n_words):
        word = (3 * word + draw.choice((1, 2))) % 20
        words.append(f"w{word}" + ("\n\n" if place % 10 == 9 else ""))
    return " ".join(words)


def write(folder: Path, name: str = "small", **settings: object) -> Path:
    """Write the YAML of a run of a second, and its text; settings replace values by their key path."""
    (folder / "corpus.txt").write_text(two_ways_on(1_600))
    config = {
        "seed_everything": 3,
        "model": {"class_path": MODULE, "init_args": {"h": 8, "m": 6}},
        "data": {
            "class_path": "datamodules.bengio_nlm.BengioNLMDataModule",
            "init_args": {
                "source": {
                    "class_path": "datamodules.sources.TextFiles",
                    "init_args": {"paths": str(folder / "corpus.txt")},
                },
                "n": 4, "batch_size": 64, "tokens": "words", "paragraph_marks": True,
            },
        },
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2, "fused": True}},
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "log_every_n_steps": 5,
            "callbacks+": [
                {
                    "class_path": "lightning_modules.bengio_nlm.WordVectors",
                    "init_args": {"words": ["w3", PARAGRAPH], "n_neighbours": 3, "n_drawn": 15, "skip": 2},
                }
            ],
        },
    }  # fmt: skip
    config = with_settings(config, settings)
    if "callbacks" in config["trainer"]:
        del config["trainer"]["callbacks+"]
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run without dropout, and of a test of it; tests only read it."""
    folder = tmp_path_factory.mktemp("run")
    with own_world(folder):
        for words in (("fit", "-c", write(folder)), ("test", "-c", f"{RUN}/config.yaml", "--ckpt_path", "best")):
            done = run_command(*words)
            assert done.code == 0, done.err
    return folder / RUN


def last_row(file: Path, name: str) -> float:
    with file.open(newline="") as rows:
        return [float(row[name]) for row in csv.DictReader(rows) if row.get(name)][-1]


def test_the_models_find_what_the_text_has(run):
    network, mixed, trigram, unigram = (
        last_row(run / "metrics.csv", f"val/perplexity{name}") for name in ("", "_mixed", "_trigram", "_unigram")
    )
    assert unigram == pytest.approx(20, rel=0.1)
    assert trigram < 3  # two words may follow, and rarely the end of a paragraph
    assert network < 0.6 * unigram
    assert mixed < network
    assert mixed < 1.001 * trigram  # the weights are learned on these very words
    assert math.exp(last_row(run / "metrics.csv", "val/loss")) == pytest.approx(network, rel=1e-5)
    tested = json.loads((run / "summary_test.json").read_text())["metrics"]
    assert tested["test/perplexity_trigram"] == pytest.approx(trigram, rel=0.2)
    assert tested["test/perplexity_mixed"] < 0.3 * tested["test/perplexity_unigram"]


def test_a_run_leaves_word_vectors_neighbours_and_figures(run):
    words, vectors = read_word2vec(run / "word_vectors.txt")
    best = torch.load(run / "checkpoints/best.ckpt", weights_only=True)["state_dict"]["network.C"]
    assert vectors == pytest.approx(best.numpy(), rel=1e-5)
    assert sorted(words) == sorted([PARAGRAPH, *(f"w{i}" for i in range(20))])
    neighbours = (run / "neighbours.md").read_text()
    assert neighbours.count("## Step") == 2
    assert neighbours.count("- **<p>**: ") == 2
    for name in ("word_vectors_pca", "word_vectors_tsne", "learning_curve"):
        assert (run / f"figures/{name}.png").stat().st_size > 5_000


def test_vectors_of_one_number_are_not_drawn(llm_train, tmp_path):
    done = llm_train("fit", "-c", write(tmp_path, model__init_args__m=1))
    assert done.code == 0, done.err
    assert Path(RUN, "word_vectors.txt").is_file()
    assert not Path(RUN, "figures/word_vectors_pca.png").exists()


@pytest.mark.slow
def test_killed_and_resumed_is_the_same_to_the_bit(llm_train, forked, tmp_path):
    callbacks = ("runtime.reproducible.ReproducibleSteps", "bengio_nlm.WordVectors", "runtime.checkpoint.RunCheckpoint")
    settings: dict[str, Any] = {
        "model__init_args__mix": "equal",
        "model__init_args__dropout": 0.1,
        "model__init_args__word_dropout": 0.1,
        "trainer__precision": "bf16-mixed",
        "trainer__val_check_interval": 3,
        "trainer__max_steps": 6,
        "trainer__callbacks": [{"class_path": f"lightning_modules.{name}"} for name in callbacks],
    }
    settings["trainer__callbacks"][1]["init_args"] = {"words": ["w3"], "skip": 99}  # draws nothing
    assert llm_train("fit", "-c", write(tmp_path, "whole", **settings)).code == 0
    cut = write(tmp_path, "cut", **settings)
    last = Path("runs/bengio_nlm/cut/checkpoints/last.ckpt")
    neighbours = [Path(f"runs/bengio_nlm/{name}/neighbours.md") for name in ("cut", "whole")]
    assert forked("fit", "-c", cut, prepare=lambda: forks.die_after_step(3)) != 0
    assert torch.load(last, weights_only=True)["global_step"] == 3
    with neighbours[0].open("a") as file:
        file.write("## Step 6\n\n- of a validation that has no checkpoint\n\n")
    resumed = llm_train("fit", "-c", cut, "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert_same_weights(Path("runs/bengio_nlm/whole/checkpoints/last.ckpt"), last)
    assert (weights(last)["mixture"] == 0.5).all()  # equal weights stay so
    ours, expected = (file.read_text() for file in neighbours)
    assert ours == expected
    assert expected.count("## Step") == 2


@pytest.mark.slow
def test_weights_sharded_over_processes_are_trained_as_on_one(run, tmp_path):
    names = ("runtime.reproducible.ReproducibleSteps", "runtime.checkpoint.RunCheckpoint", "bengio_nlm.WordVectors")
    callbacks: list[dict] = [{"class_path": f"lightning_modules.{name}"} for name in names]
    callbacks[-1]["init_args"] = {"words": ["w3", PARAGRAPH], "n_neighbours": 3, "skip": 99}  # draws nothing
    config = write(tmp_path, "shared", trainer__callbacks=callbacks)
    assert forks.wait(forks.start_ranks(2, "fit", "-c", config, *forks.SHARDED)) == [0, 0]
    shared = Path("runs/bengio_nlm/shared")
    assert_close_weights(shared / "checkpoints/last.ckpt", run / "checkpoints/last.ckpt")
    ours, expected = (read_word2vec(folder / "word_vectors.txt")[1] for folder in (shared, run))
    assert ours == pytest.approx(expected, rel=1e-3, abs=1e-4)
    ours, expected = ((folder / "neighbours.md").read_text() for folder in (shared, run))
    assert ours.count("## Step") == expected.count("## Step") == 2
    ours, expected = ([float(cosine) for cosine in re.findall(r"-?\d\.\d\d", text)] for text in (ours, expected))
    assert ours == pytest.approx(expected, abs=0.02)


def test_an_argument_out_of_range_is_refused_in_one_line(llm_train, tmp_path):
    failed = llm_train("fit", "-c", write(tmp_path, data__init_args__n=2))
    errors = [line for line in failed.err.splitlines() if line.startswith("error: ")]
    assert (failed.code, len(errors)) == (2, 1), failed.err
    assert "2 does not conform to restriction v>=3" in failed.err
    assert "Traceback" not in failed.err


def test_the_rows_of_the_table_of_the_paper():
    sweep = yaml.safe_load((ROOT / "experiments/bengio_nlm/studies/paper_table.yaml").read_text())
    shapes = {}
    for row in sweep["parameters"]["config"]["values"]:
        config = yaml.safe_load((ROOT / row).read_text())
        assert config.keys() <= {"model", "data", "trainer"}  # the optimiser is that of brown.yaml
        shape = config["model"]["init_args"]
        shapes[Path(row).stem] = (config["data"]["init_args"]["n"], shape["h"], shape["m"], shape["direct"])
    assert shapes == {
        "mlp1_mlp2": (5, 50, 60, True),
        "mlp3_mlp4": (5, 0, 60, True),
        "mlp5_mlp6": (5, 50, 30, True),
        "mlp7_mlp8": (3, 50, 30, True),
        "mlp9_mlp10": (5, 100, 30, False),
    }
