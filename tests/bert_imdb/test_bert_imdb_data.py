"""Sources of reviews, and their datasets: truncated, batched and masked."""

import gzip
import json
import math
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.base import GlobalBatches, shuffled
from datamodules.bert_imdb import film_reviews, reviews
from datamodules.bert_imdb.data import (
    BertImdbDataModule,
    MaskedReviews,
    MaskedReviewsDataModule,
    TokenizedReviews,
    grouped_by_length,
    truncate,
)
from datamodules.bert_imdb.film_reviews import FilmReviews
from datamodules.bert_imdb.reviews import (
    AclImdb,
    HubReviews,
    ReviewFiles,
    ReviewSource,
    TextReviews,
    reviews_of,
    without_breaks,
)
from datamodules.bert_imdb.wordpiece import continues_word, learn_wordpieces
from datamodules.rows import rows_of
from datamodules.sources import ListText
from datamodules.splits import SIDES
from lightning_modules.bert_imdb.bag_of_words import evaluate_bag_of_words
from lightning_modules.bert_imdb.predictions import PredictedLabels
from lightning_modules.common.targets import IGNORED

# --- files of one's own ----------------------------------------------------------------------------------------------

RECIPES = [(f"take {n} eggs and stir", ("soup", "cake", "bread")[n % 3]) for n in range(90)]


@pytest.mark.parametrize("name", ["mine.csv", "mine.tsv", "mine.jsonl", "mine.jsonl.gz", "mine.parquet"])
def test_a_file_of_rows_is_a_source_whose_classes_are_found_in_it(name):
    from pyarrow import Table, parquet

    lines = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in RECIPES)
    separator = "\t" if name == "mine.tsv" else ","
    table = "".join(f"{text}{separator}{label}\n" for text, label in [("text", "label"), *RECIPES])
    if name == "mine.parquet":
        parquet.write_table(Table.from_pylist([{"text": text, "label": label} for text, label in RECIPES]), name)
    elif name.endswith(".gz"):
        Path(name).write_bytes(gzip.compress(lines.encode()))
    else:
        Path(name).write_text(lines if name == "mine.jsonl" else table)
    source = reviews_of(name)
    assert source.classes == ["bread", "cake", "soup"]
    found = [review for split in SIDES for review in source.reviews(split)]
    assert sorted((review.text, source.classes[review.label]) for review in found) == sorted(RECIPES)
    assert_same_texts(reviews_of(name, labelled=False), source)


def assert_same_texts(unlabelled: ReviewSource, labelled: ReviewSource) -> None:
    """Assert that an encoder is pretrained on no text that a classifier of the same reviews holds out."""
    for split in SIDES:
        texts = [review.text for review in unlabelled.reviews(split)]
        assert texts == [review.text for review in labelled.reviews(split)]


@pytest.mark.parametrize("reviews", ["mine.csv:message", "m*.csv:message", ["mine.csv:message"]])
def test_a_column_after_a_colon_has_the_texts_with_labels_and_without(reviews):
    rows = "".join(f"{n},{text},{label}\n" for n, (text, label) in enumerate(RECIPES))
    Path("mine.csv").write_text("id,message,label\n" + rows)
    labelled = reviews_of(reviews)
    assert labelled.classes == ["bread", "cake", "soup"]
    assert sum(len(list(labelled.reviews(split))) for split in SIDES) == len(RECIPES)
    assert_same_texts(reviews_of(reviews, labelled=False), labelled)


def test_a_dataset_of_the_hub_has_the_texts_in_a_column_after_a_colon(monkeypatch):
    rows = [{"body": text, "label": label} for text, label in RECIPES]
    monkeypatch.setattr("datamodules.bert_imdb.reviews.load_hub_dataset", lambda *_, **__: rows)
    source = reviews_of("hub:me/recipes:body")
    assert (source.dataset, source.classes) == ("me/recipes", ["bread", "cake", "soup"])
    assert [review.text for review in source.reviews("test")] == [text for text, _ in RECIPES]


@pytest.mark.parametrize(
    ("reviews", "have_labels"),
    [
        ("mine.csv:message", True),
        ("mine.csv:label", True),
        ("mine.csv", False),  # no column `text`
        ("plain.txt", False),
        (["mine.csv:message", "plain.txt"], False),
        ("hub:nobody/nothing", True),
        (FilmReviews(n_train=4), True),
        (TextReviews(ListText(["a text"])), False),
        (ReviewFiles("mine.csv", text_field="message", classes=None), True),
        (ReviewFiles("mine.csv", text_field="message", label_field="id"), False),
    ],
)
def test_reviews_to_pretrain_on_have_labels_if_a_classifier_can_read_them(tokenizer_folder, reviews, have_labels):
    Path("mine.csv").write_text(
        "id,message,label\n" + "".join(f"n{n},{t},{label}\n" for n, (t, label) in enumerate(RECIPES))
    )
    Path("plain.txt").write_text("text")
    data = MaskedReviewsDataModule(reviews, tokenizer_folder, 2)
    assert data.have_labels == have_labels


def test_an_encoder_does_not_see_what_is_held_out_of_few_reviews():
    for group in range(20):  # in some, a draw would give a split no text
        rows = "".join(f"review {number} of {group},{number % 2}\n" for number in range(25))
        Path("few.csv").write_text("text,label\n" + rows)
        assert_same_texts(reviews_of("few.csv", labelled=False), reviews_of("few.csv"))


def test_a_file_is_read_once_for_its_classes_and_once_for_all_splits(monkeypatch):
    Path("mine.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in RECIPES))
    read = []
    monkeypatch.setattr(reviews, "rows_of", lambda path, **kwargs: read.append(str(path)) or rows_of(path, **kwargs))
    source = reviews_of("mine.csv")
    n_train, n_val, n_test = (len(list(source.reviews(split))) for split in SIDES)
    assert n_train + n_val + n_test == len(RECIPES)
    assert source.n_held_out_for_test() == n_test == 9
    assert read == ["mine.csv"] * 2


@pytest.mark.parametrize(
    ("labels", "classes"),
    [(["2", "10", "0"], ["0", "2", "10"]), (["1", "0", "1"], ["0", "1"]), (["b", "a10", "a9"], ["a10", "a9", "b"])],
)
def test_classes_that_are_numbers_are_in_their_order(labels, classes):
    Path("a.csv").write_text("text,label\n" + "".join(f"text,{label}\n" for label in labels))
    assert reviews_of("a.csv").classes == classes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\na,1\nb,1\n", "the column 'label' of a.csv has the label 1; a classifier needs 2 to 100 classes"),
        (
            "text,class\na,1\n",
            "a.csv has no column 'label', only 'text', 'class'; name the column with the labels .* and classes null",
        ),
        ("text,label\n" + "".join(f"a,{n}\n" for n in range(101)), "101 different labels; .*label_field.*classes null"),
    ],
)
def test_a_column_that_holds_no_classes_is_refused(content, message):
    Path("a.csv").write_text(content)
    with pytest.raises(MisconfigurationException, match=message):
        _ = reviews_of("a.csv").classes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("hub:", "data.reviews: 'hub:' names no dataset; give hub:OWNER/NAME"),
        ("https://x.org/a.csv", "data.reviews: https://x.org/a.csv is a URL; download it"),
        (["a.csv", "hub:nobody/nothing"], "data.reviews: hub:nobody/nothing is in a list"),
        ([], "data.reviews is empty"),
    ],
)
def test_a_setting_that_names_no_files_of_this_machine_is_refused(given, message):
    with pytest.raises(MisconfigurationException, match=f"^{message}"):
        reviews_of(given)


def test_plain_text_has_no_labels():
    Path("a.txt").write_text("text")
    with pytest.raises(MisconfigurationException, match=r"data.reviews: a.txt has no labels; give a file of rows"):
        reviews_of("a.txt")


def test_one_text_is_reviews_to_pretrain_on():
    text = "".join(f"line {number}\n" for number in range(1000))
    source = TextReviews(ListText([text]), val_fraction=0.1, test_fraction=0.0)
    (train,), (val,), () = (list(source.reviews(split)) for split in SIDES)
    assert (source.n_held_out_for_test(), TextReviews(ListText([text])).n_held_out_for_test()) == (0, 1)
    assert f"{train.text}\n{val.text}\n" == text
    assert (train.label, val.text[:8]) == (None, "line 901")


@pytest.mark.parametrize("n_documents", [2, 30])
def test_a_text_is_read_once_for_all_splits(n_documents, monkeypatch):
    texts = [f"text {number}\nof {n_documents} documents\n" * 9 for number in range(n_documents)]
    reads = []
    pieces = ListText.pieces
    text = ListText([*texts, texts[0]])
    monkeypatch.setattr(ListText, "pieces", lambda self: (reads.append(self is text), pieces(self))[1])
    source = TextReviews(text)
    splits = splits_of(source)
    assert all(splits.values())
    assert source.n_held_out_for_test() == len(splits["test"])
    assert sum(reads) == 1


@pytest.mark.parametrize("fractions", [(0.1, 0.1), (0.1, 0.0), (0.4, 0.3)])
def test_each_of_few_texts_has_a_review_in_each_split(fractions, monkeypatch):
    """Also where neighbours have one side only, and where the cut is the end of a piece."""
    monkeypatch.setattr("datamodules.sources.PIECE_SIZE", 10)
    texts = ["a", "b", "0123456789" * 10, "c <br /> d", "  ", "ef"]
    splits = splits_of(TextReviews(ListText(texts), *fractions))
    n_long = {"train": round(100 - 100 * sum(fractions)), "test": round(100 * fractions[1])}
    long = [review.text for split in SIDES for review in splits[split] if review.text[0].isdigit()]
    assert "".join(long) == texts[2]
    assert (len(long[0]), len(long)) == (n_long["train"], 2 + bool(fractions[1]))
    others = [review.text for split in SIDES for review in splits[split] if not review.text[0].isdigit()]
    assert {"a", "b"} <= set(others)
    assert all(len(text) <= 5 for text in others)


# --- the grammar -----------------------------------------------------------------------------------------------------


def test_generated_reviews_are_distinct_balanced_and_a_function_of_the_seed():
    source = FilmReviews(n_train=300, n_val=40, n_test=40, n_unlabelled=60)
    splits = splits_of(source) | {"unlabelled": list(source.unlabelled())}
    assert {split: len(reviews) for split, reviews in splits.items()} == {
        "train": 300,
        "val": 40,
        "test": 40,
        "unlabelled": 60,
    }
    assert sum(review.label for review in splits["train"]) == 150
    assert {review.label for review in splits["unlabelled"]} == {None}
    assert len({review.text for review in splits["train"]}) == 300
    films = {split: {review.film for review in reviews} for split, reviews in splits.items()}
    assert not films["train"] & films["val"]
    assert not films["train"] & films["test"]
    assert not films["val"] & films["test"]
    assert not films["unlabelled"] & (films["val"] | films["test"])
    assert list(FilmReviews(n_train=100).reviews("train")) == splits["train"][:100]
    assert list(FilmReviews(n_train=100, seed=1).reviews("train")) != splits["train"][:100]
    first = splits["train"][0]
    assert (first.label, first.place) == (0, "FilmReviews, train, review 1")


def test_the_label_depends_on_the_order_of_the_words_more_than_on_the_words():
    source = FilmReviews(n_train=800, n_test=400)
    train, test = list(source.reviews("train")), list(source.reviews("test"))
    words, pairs = (evaluate_bag_of_words(train, test, 2, ngrams)["accuracy"] for ngrams in (1, 2))
    assert words < 0.68
    assert pairs > words + 0.05


def test_reviews_without_a_word_have_no_bag_of_words():
    reviews = [SimpleNamespace(text=sign, label=label) for label, sign in enumerate("!?")]
    with pytest.raises(MisconfigurationException, match="BagOfWords: no training review has a word of two or more"):
        evaluate_bag_of_words(reviews, reviews, 2, 1)


def test_a_bag_of_words_of_few_reviews_of_many_classes_warns_of_nothing(recwarn):
    reviews = [SimpleNamespace(text="fine film", label=label) for label in range(40)]
    evaluate_bag_of_words(reviews, reviews, 40, 1)
    assert not list(recwarn)


def test_every_pair_is_two_opposite_sentences_of_the_same_words():
    for against, in_favour, pattern in film_reviews.WORDS["pairs"]:
        one, other = pattern.format(against, in_favour), pattern.format(in_favour, against)
        assert sorted(re.findall(r"\w+", one)) == sorted(re.findall(r"\w+", other))
        assert one != other


# --- where reviews come from -----------------------------------------------------------------------------------------

ROWS = [
    {"text": f"Review {i} of film {i // 4}.<br /><br>It goes on.", "label": i % 2, "movie": i // 4} for i in range(160)
]


def as_json(rows: list) -> str:
    return "\n".join(map(json.dumps, rows))


def as_csv(rows: list) -> str:
    return "text,label,movie\n" + "".join(f'"{r["text"]}",{r["label"]},{r["movie"]}\n' for r in rows)


def splits_of(source: ReviewSource) -> dict[str, list]:
    return {split: list(source.reviews(split)) for split in SIDES}


def test_files_of_any_format_give_the_same_reviews_split_by_film(tmp_path):
    (tmp_path / "r.jsonl").write_text(as_json(ROWS))
    (tmp_path / "r.csv").write_text(as_csv(ROWS))
    with gzip.open(tmp_path / "r.jsonl.gz", "wt") as file:
        file.write(as_json([row | {"label": ["negative", "positive"][row["label"]]} for row in ROWS]))
    fractions = {"val_fraction": 0.2, "test_fraction": 0.2, "film_field": "movie"}
    lines, table, compressed = (
        splits_of(ReviewFiles(str(tmp_path / name), **fractions)) for name in ("r.jsonl", "r.csv", "r.jsonl.gz")
    )
    texts = [
        [[(r.text, r.label, r.film) for r in reviews] for reviews in splits.values()]
        for splits in (lines, table, compressed)
    ]
    assert texts[0] == texts[1] == texts[2]
    films = [{r.film for r in reviews} for reviews in lines.values()]
    assert sum(map(len, films)) == 40  # each film is in one split
    assert sum(map(len, lines.values())) == 160
    assert all(films)
    assert lines["train"][0].text.endswith(". It goes on.")
    assert table["val"][0].place.startswith(f"{tmp_path / 'r.csv'}, line ")


def test_separate_files_are_read_whole(tmp_path):
    for name, rows in (("train", ROWS[:80]), ("test", ROWS[80:120]), ("more", ROWS[120:])):
        (tmp_path / f"{name}.jsonl").write_text(as_json(rows))
    source = ReviewFiles(
        str(tmp_path / "train.jsonl"), test=str(tmp_path / "test.jsonl"), unlabelled_file=str(tmp_path / "more.jsonl")
    )
    splits = splits_of(source)
    assert len(splits["test"]) == 40
    assert source.n_held_out_for_test() == 0
    assert len(splits["train"]) + len(splits["val"]) == 80
    assert {review.label for review in source.unlabelled()} == {None}
    assert not list(ReviewFiles("train.jsonl").unlabelled())


def test_the_original_folder(tmp_path):
    for part in ("train", "test"):
        for name in ("neg", "pos"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(30):
                (folder / f"{i}_{2 if name == 'neg' else 9}.txt").write_text(f"{part} {name} {i}<br />end")
            (tmp_path / part / f"urls_{name}.txt").write_text("".join(f"http://x/tt{i // 3}/u\n" for i in range(30)))
    (tmp_path / "train/unsup").mkdir()
    (tmp_path / "train/unsup/0_0.txt").write_text("no label")
    source = AclImdb(str(tmp_path), val_fraction=0.3)
    splits = splits_of(source)
    assert len(splits["test"]) == 60
    assert len(splits["train"]) + len(splits["val"]) == 60
    assert {review.film for review in splits["train"]}.isdisjoint(review.film for review in splits["val"])
    first = splits["test"][0]
    assert (first.text, first.label, first.film) == ("test neg 0 end", 0, "http://x/tt0/u")
    assert splits["test"][-1].label == 1
    assert [review.text for review in source.unlabelled()] == ["no label"]
    assert_same_texts(source.without_labels(), source)


def test_the_original_folder_with_other_files_and_without_some(tmp_path):
    folder = tmp_path / "train/neg"
    for name in ("train/neg", "train/pos"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("10_1", "2_3", "notes_1", "0_x"):
        (folder / f"{name}.txt").write_text(name)
    (folder / "1_2.txt").write_bytes(b"fine \xe9")
    (tmp_path / "train/urls_neg.txt").write_text("".join(f"film {i}\n" if i != 1 else "\n" for i in range(11)))
    source = AclImdb(str(tmp_path), val_fraction=0)
    with pytest.raises(MisconfigurationException, match=r"1_2.txt is not UTF-8: byte 5 cannot be decoded"):
        list(source.reviews("train"))
    (folder / "1_2.txt").write_text("1_2")
    found = [(review.text, review.film) for review in source.reviews("train")]
    assert found == [("1_2", None), ("2_3", "film 2"), ("10_1", "film 10")]


@pytest.mark.parametrize("film", [None, math.nan, "", " "])
def test_reviews_whose_film_is_missing_are_split_by_their_texts(tmp_path, film):
    rows = [row | {"movie": film} for row in ROWS]
    (tmp_path / "a.jsonl").write_text(as_json(rows))
    splits = splits_of(ReviewFiles(str(tmp_path / "a.jsonl"), film_field="movie"))
    assert {review.film for reviews in splits.values() for review in reviews} == {None}
    assert all(splits.values())


def test_reviews_to_mask_need_no_labels(tmp_path, tokenizer_folder, capsys):
    files = {}
    for name, field in (("train", "text"), ("val", "text"), ("labels", "label")):
        files[name] = str(tmp_path / f"{name}.csv")
        lines = [f"review {number} of {name},{number % 2}" for number in range(40)]
        Path(files[name]).write_text("\n".join([f"text,{'about' if field == 'text' else field}", *lines]))
    source = ReviewFiles(files["train"], val=files["val"], test_fraction=0.3, unlabelled_file=files["labels"])
    data = MaskedReviewsDataModule(source, tokenizer_folder, 2)
    data.setup("fit")
    assert {review.label for review in [*data.source.reviews("train"), *data.source.reviews("val")]} == {None}
    assert "40 validate" in capsys.readouterr().err
    with pytest.raises(MisconfigurationException, match="the review has no 'label'"):
        list(source.reviews("train"))


def test_the_hub(monkeypatch):
    loaded = []

    def load(dataset: str, split: str, revision: str | None, advice: str) -> list:
        loaded.append((dataset, split, revision, advice))
        return [row | {"label": -1} for row in ROWS] if split == "unsupervised" else ROWS

    monkeypatch.setattr("datamodules.bert_imdb.reviews.load_hub_dataset", load)
    source = HubReviews(revision="v1")
    source.prepare()
    advice = "datamodules.bert_imdb.ReviewFiles and experiments/bert_imdb/offline.yaml need no network"
    assert loaded == [("stanfordnlp/imdb", "train", "v1", advice)]
    splits = splits_of(source)
    assert len(splits["train"]) + len(splits["val"]) == 160
    assert 5 < len(splits["val"]) < 40
    assert len(splits["test"]) == 160
    assert {review.label for review in source.unlabelled()} == {None}
    assert not list(HubReviews(unlabelled_split=None).unlabelled())
    assert len(splits_of(HubReviews(val="test"))["train"]) == 160  # nothing is held out


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    settings = SimpleNamespace(HF_HUB_OFFLINE=False)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(config=settings, load_dataset=None))  # slow to import
    monkeypatch.setattr("datamodules.hub_datasets.hub_answers", lambda: False)
    with pytest.raises(MisconfigurationException, match=r"stanfordnlp/imdb \(split train\) could not be read"):
        list(HubReviews().reviews("train"))


@given(st.lists(st.sampled_from(["a", "<br />", "<br>", "<BR/>", " ", "b\n"])))
def test_no_line_break_of_html_is_left(parts):
    text = without_breaks("".join(parts))
    assert "<" not in text
    assert text == text.strip()
    assert re.sub(r"\s", "", text) == re.sub(r"\s|<[^>]*>", "", "".join(parts))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"label": 1}', "the review has no 'text', only 'label'; give the column with the text as FILE:COLUMN"),
        (
            '{"text": "fine", "label": 2}',
            "the label is 2, and must be 0 to 1 or one of negative, positive; --data.reviews.classes null finds",
        ),
        ('{"text": "fine", "label": true}', "the label is True"),
        ('{"text": "fine", "label": null}', "'label' is empty; complete it, or remove the row"),
        ('{"text": "fine", "label": NaN}', "'label' is empty"),
        ('{"text": null, "label": 1}', "'text' is empty"),
        ('{"text": " <br /> ", "label": 1}', "the review is empty"),
        ('{"text": 7, "label": 1}', "'text' is int, and must be text"),
        ('["fine", 1]', "a review is an object"),
        ('{"text": "fine"', "is no JSON object on one line"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, message):
    (tmp_path / "bad.jsonl").write_text(f"{as_json(ROWS[:2])}\n\n{line}\n")
    with pytest.raises(MisconfigurationException, match=re.escape(f"bad.jsonl, line 4: {message}")):
        splits_of(ReviewFiles(str(tmp_path / "bad.jsonl")))


@pytest.mark.parametrize(
    ("classes", "labels", "found"),
    [
        (["1", "0"], ["0", "1"], [1, 0]),  # names
        (["0", "1"], ["0", "1"], [0, 1]),
        (["no", "yes"], ["0", "yes", "1"], [0, 1, 1]),
        (["10", "20"], ["20", "0"], [1, 0]),
        (["1", "2"], ["1", "0"], "the label is .?0.?, and must be one of 1, 2"),  # 1 is a name, so 0 is no index
        (["1", "2"], ["2", "1"], [1, 0]),
    ],
)
def test_a_label_means_the_same_in_json_and_in_a_table(tmp_path, classes, labels, found):
    numbers = [int(label) if label.isdigit() else label for label in labels]
    (tmp_path / "a.jsonl").write_text(as_json([{"text": f"{n} so", "label": label} for n, label in enumerate(numbers)]))
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"{n} so,{label}\n" for n, label in enumerate(labels)))
    for name in ("a.jsonl", "a.csv"):
        source = ReviewFiles(str(tmp_path / name), val_fraction=0, test_fraction=0, classes=classes)
        if isinstance(found, list):
            assert [review.label for review in source.reviews("train")] == found
        else:
            with pytest.raises(MisconfigurationException, match=f"{name}, line [23]: {found}"):
                list(source.reviews("train"))


@pytest.mark.parametrize(("label", "other"), [(True, False), (0.5, 1.0)])
def test_classes_that_are_found_may_be_truth_values_and_numbers(tmp_path, label, other):
    (tmp_path / "a.jsonl").write_text(as_json([{"text": f"{n} so", "label": (label, other)[n % 2]} for n in range(4)]))
    source = ReviewFiles(str(tmp_path / "a.jsonl"), val_fraction=0, test_fraction=0, classes=None)
    assert source.classes == sorted(map(str, (label, other)))
    assert [source.classes[review.label] for review in source.reviews("train")] == [str(label), str(other)] * 2


@pytest.mark.parametrize("label", [[1], math.nan])
def test_lists_and_missing_numbers_are_no_classes(tmp_path, label):
    (tmp_path / "a.jsonl").write_text(as_json([{"text": "so", "label": label}]))
    with pytest.raises(MisconfigurationException, match="holds no label; a classifier needs 2"):
        list(ReviewFiles(str(tmp_path / "a.jsonl"), classes=None).reviews("train"))


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_label_of_a_table_is_no_class(tmp_path, empty):
    lines = [f"take {n} eggs,{('soup', 'cake ', ' cake', empty)[n % 4]}\n" for n in range(4)]
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(lines[:3]))
    source = ReviewFiles(str(tmp_path / "a.csv"), val_fraction=0, test_fraction=0, classes=None)
    assert source.classes == ["cake", "soup"]  # the spaces around a label do not count
    assert [review.label for review in source.reviews("train")] == [1, 0, 0]
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(lines))
    source = ReviewFiles(str(tmp_path / "a.csv"), classes=None)
    assert source.classes == ["cake", "soup"]
    with pytest.raises(MisconfigurationException, match=r"line 5: 'label' is empty; complete it, or remove the row$"):
        list(source.reviews("train"))


def test_a_bad_line_of_a_table_is_named_by_its_first_line(tmp_path):
    (tmp_path / "bad.csv").write_text('text,label,movie\n"over two\nlines",1,2\nfine, and more,1,2\n')
    message = "line 4: 4 columns, where the first line names 3; put text with commas in quotation"
    with pytest.raises(MisconfigurationException, match=message):
        splits_of(ReviewFiles(str(tmp_path / "bad.csv")))


def test_other_bad_files_are_one_line(tmp_path):
    (tmp_path / "latin.csv").write_bytes("text,label\ncaf\xe9,1\n".encode("latin-1"))
    (tmp_path / "plain.jsonl.gz").write_text("{}")
    for name, message in {
        "latin.csv": "latin.csv, line 2: is not UTF-8",
        "plain.jsonl.gz": "could not be read",
        "gone.csv": "does not exist",
    }.items():
        with pytest.raises(MisconfigurationException, match=message):
            splits_of(ReviewFiles(str(tmp_path / name)))
    with pytest.raises(MisconfigurationException, match="give the folder aclImdb"):
        list(AclImdb(str(tmp_path)).reviews("train"))
    with pytest.raises(MisconfigurationException, match="leave something to train on"):
        ReviewFiles("a", val_fraction=0.5, test_fraction=0.5)
    with pytest.raises(MisconfigurationException, match="two or more names"):
        ReviewFiles("a", classes=["only"])


def test_one_class_only_is_refused(tmp_path, tokenizer_folder):
    (tmp_path / "good.jsonl").write_text(as_json([row | {"label": 1} for row in ROWS]))
    data = BertImdbDataModule(ReviewFiles(str(tmp_path / "good.jsonl")), tokenizer_folder, 4, 16)
    with pytest.raises(MisconfigurationException, match="the train reviews need two classes, and none is of class neg"):
        data.setup("fit")


@pytest.mark.parametrize("named", [True, False])
def test_a_held_out_part_with_one_class_is_refused_with_the_flags_of_a_larger_one(tokenizer_folder, llm_train, named):
    rows = [f"take {n} eggs,{('soup', 'cake')[n % 8 == 0]}" for n in range(40)]
    Path("my recipes.csv").write_text("\n".join(["text,label", *rows]))
    given = ReviewFiles("my recipes.csv", classes=None) if named else "my recipes.csv"
    data = BertImdbDataModule(given, tokenizer_folder, 4, 16)
    data.source._of_train["val"] = [review for review in data.source.reviews("train") if review.label == 1][:2]
    with pytest.raises(MisconfigurationException, match="or a larger part for val when you train: --data") as caught:
        data.setup("validate")
    flags = shlex.split(str(caught.value).rpartition(": ")[2])
    before = ["--data.reviews=ReviewFiles", "--data.reviews.train=my recipes.csv"] if named else []
    done = llm_train("fit", "-c", "bert_imdb/classify", *before, *flags, "--print_config")
    assert done.code == 0, done.err
    reviews = yaml.safe_load(done.out)["data"]["init_args"]["reviews"]["init_args"]
    assert (reviews["train"], reviews["val_fraction"]) == ("my recipes.csv", 0.3)
    assert ReviewFiles("a", val="b").flags_to_hold_out("val", named) is None


# --- tokens ----------------------------------------------------------------------------------------------------------

TEXTS = [review.text for review in FilmReviews(n_train=200).reviews("train")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_TRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        return learn_wordpieces(TEXTS, 400)


@pytest.fixture(scope="module")
def tokenizer_folder(tokenizer, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_line_about_the_data_has_the_test_reviews_and_those_that_are_cut(tokenizer_folder, tmp_path, capsys):
    (tmp_path / "r.jsonl").write_text(as_json(ROWS))
    files = ReviewFiles(str(tmp_path / "r.jsonl"), val_fraction=0.2, test_fraction=0.2, film_field="movie")
    BertImdbDataModule(files, tokenizer_folder, 4, 64).setup("fit")
    train, val, test = (len(reviews) for reviews in splits_of(files).values())
    said = f"data    {train} rows train, {val} validate; reviews for the test: {test}"
    assert f"{said}; classes: " in capsys.readouterr().err
    Path("long.csv").write_text("text\nfine\n" + "a b c d e f g h i\n" * 2)
    data = BertImdbDataModule(files, tokenizer_folder, 4, max_tokens=6, file="long.csv")
    data.setup("fit")
    cut = f"; {train + val} of {train + val} texts are cut to 6 tokens (--data.max_tokens); classes: "
    assert said + cut in capsys.readouterr().err
    data.setup("predict")
    assert capsys.readouterr().err == "data    2 of 3 texts are cut to 6 tokens (--data.max_tokens)\n"
    unlabelled = TextReviews(ListText([row["text"] for row in ROWS]), val_fraction=0.2, test_fraction=0.2)
    MaskedReviewsDataModule(unlabelled, tokenizer_folder, 4, 16).setup("fit")
    assert f"reviews for the test: {len(list(unlabelled.reviews('test')))}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("split", "effect"),
    [
        ("val", "no row of odd (train has 2), rare (train has 1); the scores say nothing of it"),
        ("train", "no row of rare; the model cannot learn it"),
    ],
)
def test_a_split_without_a_class_is_one_line(tokenizer_folder, capsys, split, effect):
    rows = ["text,label", *(f"text {n},{n % 2}" for n in range(40))]
    more = ["one,odd", "two,odd", "three,rare"]
    Path("all.csv").write_text("\n".join(rows + more))
    Path("some.csv").write_text("\n".join(rows + more[:2] * (split == "train")))
    files = {"train": "all.csv", "val": "all.csv"} | {split: "some.csv"}
    source = ReviewFiles(**files, test_fraction=0.0, classes=["0", "1", "odd", "rare"])
    BertImdbDataModule(source, tokenizer_folder, 4, 16).setup("fit")
    said = [line for line in capsys.readouterr().err.splitlines() if "no row" in line]
    assert said == [f"{split}: {effect}"]


def test_learned_wordpieces_are_a_function_of_the_texts(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_TRAIN_CACHE", str(tmp_path))
    again = learn_wordpieces(TEXTS, 400)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert learn_wordpieces(TEXTS, 400).get_vocab() == again.get_vocab()  # from the cache
    assert len(tokenizer) == 400
    assert [tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.mask_token_id] == [0, 2, 4]
    text = "The acting is gripping, unbelievably so."
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    assert tokens[:3] == ["[CLS]", "the", "acting"]
    assert tokens[-1] == "[SEP]"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text.lower()
    continues = continues_word(tokenizer)[tokenizer(text)["input_ids"]]
    assert continues.tolist() == [token.startswith("##") for token in tokens]
    assert continues.any()


@given(st.integers(1, 600), st.integers(1, 520), st.sampled_from(["head", "tail", "head_tail"]))
def test_truncation_keeps_the_chosen_ends(length, n, how):
    ids = np.arange(length)
    kept = truncate(ids, n, how).tolist()
    assert len(kept) == min(length, n)
    if length > n:
        n_first = {"head": n, "tail": 0, "head_tail": round(n / 4 + 1e-9)}[how]
        assert kept == [*range(n_first), *range(length - (n - n_first), length)]


def test_truncation_as_in_the_paper():
    assert truncate(np.arange(2000), 510, "head_tail").tolist() == [*range(128), *range(2000 - 382, 2000)]


def test_rows_are_those_of_the_tokenizer(tokenizer, tokenizer_folder, capsys):
    data = BertImdbDataModule(FilmReviews(n_train=20, n_val=10, n_test=10), tokenizer_folder, 4, max_tokens=40)
    data.setup("fit")
    (said,) = (line for line in capsys.readouterr().err.splitlines() if "vary" in line)
    assert said == "val: only 10 rows; scores of so few vary much by chance"
    positions = torch.tensor([3, 0, 7, 11])
    batch = data.datasets["train"][positions]
    texts = [data.texts["train"][i].text for i in positions]
    expected = tokenizer(texts, truncation=True, max_length=40, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert batch["labels"].tolist() == [1, 0, 1, 1]
    assert batch["positions"].tolist() == [3, 0, 7, 11]
    empty = data.datasets["train"][torch.tensor([], dtype=torch.int64)]
    assert empty["input_ids"].shape == (0, 0)


def test_special_tokens_in_a_text_are_text(tokenizer, tokenizer_folder):
    data = BertImdbDataModule(FilmReviews(), tokenizer_folder, 4, text="good [SEP] [MASK] bad")
    data.setup("predict")
    row = data.datasets["predict"].rows[0].tolist()
    assert row.count(tokenizer.sep_token_id) == 1
    assert tokenizer.mask_token_id not in row
    assert [batch["labels"].tolist() for batch in data.predict_dataloader()] == [[-1]]


def test_a_file_to_predict_may_name_the_column_of_the_text(tokenizer_folder):
    Path("new.csv").write_text("id,message\n1,fine\n2,dull\n")
    data = BertImdbDataModule(FilmReviews(), tokenizer_folder, 4, file="new.csv:message")
    data.setup("predict")
    assert [review.text for review in data.texts["predict"]] == ["fine", "dull"]


def test_empty_texts_of_a_file_to_predict_are_counted_and_have_no_prediction(tokenizer_folder, tmp_path, capsys):
    Path("new.jsonl").write_text(
        as_json([{"text": text, "id": n} for n, text in enumerate(["", "fine", None, "<br />"])])
    )
    data = BertImdbDataModule(FilmReviews(), tokenizer_folder, 4, file="new.jsonl")
    data.setup("predict")
    said = "predict: no prediction of new.jsonl, line 1 and 2 more, where the text is empty"
    assert capsys.readouterr().err == f"{said}\n"
    (batch,) = data.predict_dataloader()
    assert batch["positions"].tolist() == [1]
    module, callback = SimpleNamespace(data=data, result_files=[]), PredictedLabels()
    trainer = SimpleNamespace(world_size=1, is_global_zero=True, fast_dev_run=False, default_root_dir=tmp_path)
    outputs = {"positions": batch["positions"], "probabilities": torch.tensor([[0.25, 0.75]])}
    callback.on_predict_batch_end(trainer, module, outputs)
    callback.on_predict_end(trainer, module)
    assert capsys.readouterr().out == "positive  0.7500  fine\n"
    assert (tmp_path / "predictions.csv").read_text().splitlines() == [
        "text,id,predicted,probability,negative,positive",
        ",0,,,,",
        "fine,1,positive,0.750000,0.250000,0.750000",
        ",2,,,,",
        "<br />,3,,,,",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, 'predict: give either --data.text "a review" or --data.file FILE'),
        ({"text": "a", "file": "b"}, "give either"),
        ({"text": " <br /> "}, "data.text: the review is empty"),
        ({"file": "gone.csv"}, "gone.csv does not exist"),
        ({"file": "empty.csv"}, "empty.csv holds no review"),
    ],
)
def test_predict_needs_a_text(tokenizer_folder, settings, message):
    Path("empty.csv").write_text("text\n")
    with pytest.raises(MisconfigurationException, match=message):
        BertImdbDataModule(FilmReviews(), tokenizer_folder, 4, **settings).setup("predict")


def test_a_tokenizer_that_does_not_fit_is_refused(tokenizer_folder, monkeypatch):
    source = FilmReviews(n_train=10, n_val=4, n_test=4)
    with pytest.raises(MisconfigurationException, match="byte has no padding token"):
        _ = BertImdbDataModule(source, "byte", 2).tokenizer
    masked = MaskedReviewsDataModule(source, tokenizer_folder, 2, whole_words=True)
    monkeypatch.setattr("datamodules.bert_imdb.data.continues_word", lambda tokenizer: np.zeros(3, dtype=bool))
    with pytest.raises(MisconfigurationException, match="does not mark the tokens within words by ##"):
        masked.setup("fit")
    masked.tokenizer.mask_token = None
    with pytest.raises(MisconfigurationException, match="has no mask token"):
        masked.setup("fit")


def test_a_split_without_reviews_is_refused(tokenizer_folder, monkeypatch):
    data = MaskedReviewsDataModule(FilmReviews(), tokenizer_folder, 2)
    monkeypatch.setattr(data.source, "reviews", lambda split: iter(()))
    for stage, message in (("test", "there are no test reviews"), ("predict", "give a run of BertImdbModule")):
        with pytest.raises(MisconfigurationException, match=message):
            data.setup(stage)


def test_batches_of_any_length_are_shuffled(tokenizer_folder):
    data = BertImdbDataModule(FilmReviews(n_train=20, n_val=4, n_test=4), tokenizer_folder, 4, group_by_length=False)
    data.setup("fit")
    assert torch.equal(data.training_order()(1), shuffled(20, 0)(1))


# --- the order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch_size"), [(1000, 8), (1003, 8), (7, 8), (16, 8)])
def test_grouped_batches_are_a_permutation_and_a_function_of_seed_and_epoch(n, batch_size):
    lengths = np.random.default_rng(0).integers(5, 500, n)
    order = grouped_by_length(lengths, batch_size, seed=3)
    assert sorted(order(0).tolist()) == list(range(n))
    assert torch.equal(order(1), grouped_by_length(lengths, batch_size, seed=3)(1))
    if n > batch_size:
        assert not torch.equal(order(0), order(1))
        assert not torch.equal(order(0), grouped_by_length(lengths, batch_size, seed=4)(0))


def test_grouped_batches_need_little_padding_and_are_not_sorted():
    lengths = np.random.default_rng(0).integers(5, 500, 4000)
    batches = lengths[grouped_by_length(lengths, 8, seed=0)(0).numpy()].reshape(-1, 8)
    random = np.random.default_rng(1).permutation(lengths).reshape(-1, 8)
    waste, waste_at_random = (1 - b.sum() / (b.max(1).sum() * 8) for b in (batches, random))
    assert waste < 0.02
    assert waste_at_random > 0.3
    longest = batches.max(1)
    assert np.abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < 0.15
    both = [set(map(tuple, grouped_by_length(lengths, 8, 0)(e).reshape(-1, 8).tolist())) for e in (0, 1)]
    assert len(both[0] & both[1]) < 5  # batches of the next epoch hold other reviews


# --- masks -----------------------------------------------------------------------------------------------------------


def masked(tokenizer, n: int = 200, fraction: float = 0.2, whole_words: bool = False) -> MaskedReviews:
    rows = [np.array(tokenizer(text)["input_ids"], np.int32) for text in TEXTS[:n]]
    return MaskedReviews(rows, tokenizer, fraction, whole_words, seed=5)


def test_targets_depend_on_seed_epoch_and_review_only(tokenizer):
    reviews = masked(tokenizer)
    together, apart = reviews[torch.tensor([3, 8, 5])], reviews[torch.tensor([8])]
    n = apart["input_ids"].shape[1]
    assert torch.equal(together["input_ids"][1, :n], apart["input_ids"][0])
    assert torch.equal(together["targets"][1, :n], apart["targets"][0])
    next_epoch = reviews[torch.tensor([208])]
    assert torch.equal(next_epoch["attention_mask"], apart["attention_mask"])
    assert not torch.equal(next_epoch["targets"], apart["targets"])
    restored = torch.where(apart["targets"] >= 0, apart["targets"], apart["input_ids"])[0]
    assert restored.tolist() == tokenizer(TEXTS[8])["input_ids"]


def test_the_chosen_fraction_is_masked_in_the_proportions_of_bert(tokenizer):
    reviews = masked(tokenizer)
    batches = [reviews[torch.arange(200) + 200 * epoch] for epoch in range(4)]
    n_targets = [int((batch["targets"] >= 0).sum()) for batch in batches]
    assert np.mean(n_targets) == pytest.approx(float(batches[0]["mean_targets"]), rel=0.02)
    n_tokens = sum(len(tokenizer(text)["input_ids"]) - 2 for text in TEXTS)
    assert np.mean(n_targets) / n_tokens == pytest.approx(0.2, rel=0.02)
    chosen = [batch["targets"] >= 0 for batch in batches]
    read = torch.cat([batch["input_ids"][c] for batch, c in zip(batches, chosen, strict=True)])
    targets = torch.cat([batch["targets"][c] for batch, c in zip(batches, chosen, strict=True)])
    assert (read == tokenizer.mask_token_id).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (read == targets).float().mean().item() == pytest.approx(0.1, abs=0.02)
    special = torch.tensor(tokenizer.all_special_ids)
    assert not torch.isin(targets, special).any()
    assert not torch.isin(read[read != tokenizer.mask_token_id], special).any()


def test_whole_words_are_masked_together(tokenizer):
    continues = torch.from_numpy(continues_word(tokenizer))
    batch = masked(tokenizer, whole_words=True)[torch.arange(200)]
    hidden = batch["targets"] >= 0
    ids = torch.where(hidden, batch["targets"], batch["input_ids"])
    within = continues[ids[:, 1:]]  # a token and the one before it belong to one word
    assert within.any()
    assert torch.equal(hidden[:, 1:][within], hidden[:, :-1][within])
    assert hidden.sum().item() == pytest.approx(float(batch["mean_targets"]), rel=0.1)


def test_long_reviews_are_split_into_rows_and_no_token_is_lost(tokenizer, tokenizer_folder):
    data = MaskedReviewsDataModule(FilmReviews(n_train=20, n_val=4, n_test=4, n_unlabelled=5), tokenizer_folder, 2, 20)
    data.setup("fit")
    rows = data.datasets["train"]
    assert rows.lengths.max() == 20
    assert len(rows) > 25
    inside = [i for row in rows.rows for i in row.tolist() if i not in tokenizer.all_special_ids]
    expected = [i for r in data.pretraining_reviews for i in tokenizer(r.text, add_special_tokens=False)["input_ids"]]
    assert inside == [i for i in expected if i not in tokenizer.all_special_ids]
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, GlobalBatches)
    first, second = (loader.sampler.order(epoch) for epoch in (0, 1))
    assert sorted((second - len(rows)).tolist()) == sorted(first.tolist()) == list(range(len(rows)))


def test_features_replace_tokens_and_are_computed_once(tokenizer_folder):
    calls = []

    def features_of(batch: dict) -> torch.Tensor:
        calls.append(len(batch["input_ids"]))
        return batch["attention_mask"].sum(1, keepdim=True).float()

    for _ in range(2):
        data = BertImdbDataModule(FilmReviews(n_train=20, n_val=4, n_test=4), tokenizer_folder, 8, 40)
        data.setup("fit")
        data.keep_features("train", "a model", features_of)
        batch = data.datasets["train"][torch.tensor([5, 2])]
        assert batch.keys() == {"features", "labels", "positions"}
        assert batch["features"][:, 0].tolist() == data.datasets["train"].lengths[[5, 2]].tolist()
    assert calls == [8, 8, 4]
    shorter = BertImdbDataModule(FilmReviews(n_train=20, n_val=4, n_test=4), tokenizer_folder, 8, 30)
    shorter.setup("fit")
    shorter.keep_features("train", "a model", features_of)
    shorter.keep_features("train", "another model", features_of)
    assert len(calls) == 9


def test_padding_is_no_token():
    batch = TokenizedReviews([np.arange(3), np.arange(9)], [0, 1], pad_token_id=0)[torch.tensor([0, 1])]
    assert (batch["input_ids"].shape, batch["n_tokens"]) == ((2, 9), 12)


def test_the_same_rows_have_the_same_fingerprint():
    one = TokenizedReviews([np.array([1, 2]), np.array([3])], [0, 1], 0)
    other = TokenizedReviews([np.array([1]), np.array([2, 3])], [0, 1], 0)
    assert one.fingerprint() != other.fingerprint()
    assert one.fingerprint() == TokenizedReviews([np.array([1, 2]), np.array([3])], [1, 1], 0).fingerprint()
    assert IGNORED == -100  # the ignore_index of torch's cross entropy


def test_classes_that_are_found_in_the_rows_by_a_flag(llm_train):
    flags = ("--data.reviews=datamodules.bert_imdb.ReviewFiles", "--data.reviews.train=x.csv", "--data.reviews.classes")
    done = llm_train("fit", "-c", "bert_imdb/offline_pretrain", *flags, "null", "--print_config")
    assert done.code == 0, done.err
    assert yaml.safe_load(done.out)["data"]["init_args"]["reviews"]["init_args"]["classes"] is None
