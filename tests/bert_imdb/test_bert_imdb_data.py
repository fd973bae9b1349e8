"""Reviews from anywhere, cut, batched and masked."""

import gzip
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.base import GlobalBatches
from datamodules.bert_imdb import data as bert_imdb
from datamodules.bert_imdb import film_reviews
from datamodules.bert_imdb.data import (
    BertImdbDataModule,
    MaskedReviews,
    MaskedReviewsDataModule,
    TokenizedReviews,
    grouped_by_length,
    truncate,
)
from datamodules.bert_imdb.film_reviews import FilmReviews
from datamodules.bert_imdb.reviews import AclImdb, HubReviews, ReviewFiles, ReviewSource, without_breaks
from datamodules.bert_imdb.wordpiece import continues_word, learn_wordpieces
from lightning_modules.bert_imdb.bag_of_words import measures_of_word_counts

# --- the grammar -----------------------------------------------------------------------------------------------------


def test_made_up_reviews_are_distinct_balanced_and_a_function_of_the_seed():
    source = FilmReviews(n_train=300, n_val=40, n_test=40, n_unlabelled=60)
    sides = {side: list(source.reviews(side)) for side in ("train", "val", "test")}
    sides["unlabelled"] = list(source.unlabelled())
    assert {side: len(found) for side, found in sides.items()} == {
        "train": 300,
        "val": 40,
        "test": 40,
        "unlabelled": 60,
    }
    assert sum(review.label for review in sides["train"]) == 150
    assert {review.label for review in sides["unlabelled"]} == {None}
    assert len({review.text for review in sides["train"]}) == 300
    films = {side: {review.film for review in found} for side, found in sides.items()}
    assert not films["train"] & films["val"]
    assert not films["train"] & films["test"]
    assert not films["val"] & films["test"]
    assert not films["unlabelled"] & (films["val"] | films["test"])
    assert list(FilmReviews(n_train=300).reviews("train")) == sides["train"]
    assert list(FilmReviews(n_train=100).reviews("train")) == sides["train"][:100]
    assert list(FilmReviews(n_train=100, seed=1).reviews("train")) != sides["train"][:100]


def test_the_label_is_in_the_order_of_the_words_more_than_in_the_words():
    source = FilmReviews(n_train=1000, n_test=600)
    train, test = list(source.reviews("train")), list(source.reviews("test"))
    words, pairs = (measures_of_word_counts(train, test, 2, ngrams)["accuracy"] for ngrams in (1, 2))
    assert words < 0.68
    assert pairs > words + 0.05


def test_every_pair_is_two_opposite_sentences_of_the_same_words():
    for against, in_favour, pattern in film_reviews._PAIRS:
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


def sides_of(source: ReviewSource) -> dict[str, list]:
    return {side: list(source.reviews(side)) for side in ("train", "val", "test")}


def test_files_of_any_form_give_the_same_reviews_cut_by_film(tmp_path):
    (tmp_path / "r.jsonl").write_text(as_json(ROWS))
    (tmp_path / "r.csv").write_text(as_csv(ROWS))
    with gzip.open(tmp_path / "r.jsonl.gz", "wt") as file:
        file.write(as_json([row | {"label": ["negative", "positive"][row["label"]]} for row in ROWS]))
    fractions = {"val_fraction": 0.2, "test_fraction": 0.2, "film_field": "movie"}
    found = [sides_of(ReviewFiles(str(tmp_path / name), **fractions)) for name in ("r.jsonl", "r.csv", "r.jsonl.gz")]
    texts = [[[(r.text, r.label, r.film) for r in side] for side in sides.values()] for sides in found]
    assert texts[0] == texts[1] == texts[2]
    films = [{r.film for r in side} for side in found[0].values()]
    assert sum(map(len, films)) == 40  # each film is on one side
    assert sum(len(side) for side in found[0].values()) == 160
    assert all(films)
    assert found[0]["train"][0].text.endswith(". It goes on.")
    assert found[1]["val"][0].place.startswith(f"{tmp_path / 'r.csv'}, line ")


def test_separate_files_are_taken_whole(tmp_path):
    for name, rows in (("train", ROWS[:80]), ("test", ROWS[80:120]), ("more", ROWS[120:])):
        (tmp_path / f"{name}.jsonl").write_text(as_json(rows))
    source = ReviewFiles(
        str(tmp_path / "train.jsonl"), test=str(tmp_path / "test.jsonl"), unlabelled_file=str(tmp_path / "more.jsonl")
    )
    sides = sides_of(source)
    assert len(sides["test"]) == 40
    assert len(sides["train"]) + len(sides["val"]) == 80
    assert {review.label for review in source.unlabelled()} == {None}


def test_the_original_folder(tmp_path):
    for part in ("train", "test"):
        for name in ("neg", "pos"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(30):
                (folder / f"{i}_{2 if name == 'neg' else 9}.txt").write_text(f"{part} {name} {i}<br />end")
            (tmp_path / part / f"urls_{name}.txt").write_text("".join(f"http://x/tt{i // 3}/u\n" for i in range(30)))
    (tmp_path / "train/unsup").mkdir()
    (tmp_path / "train/unsup/0_0.txt").write_text("who knows")
    source = AclImdb(str(tmp_path), val_fraction=0.3)
    sides = sides_of(source)
    assert len(sides["test"]) == 60
    assert len(sides["train"]) + len(sides["val"]) == 60
    assert {review.film for review in sides["train"]}.isdisjoint(review.film for review in sides["val"])
    first = sides["test"][0]
    assert (first.text, first.label, first.film) == ("test neg 0 end", 0, "http://x/tt0/u")
    assert sides["test"][-1].label == 1
    assert [review.text for review in source.unlabelled()] == ["who knows"]


def test_the_hub(monkeypatch):
    import datasets

    asked = []

    def load(name: str, config: None, *, split: str, revision: str | None, streaming: bool) -> list:
        asked.append((name, split, revision))
        return [row | {"label": -1} for row in ROWS] if split == "unsupervised" else ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("datamodules.hub_datasets.hub_answers", lambda: True)
    sides = sides_of(HubReviews(revision="v1"))
    assert len(sides["train"]) + len(sides["val"]) == 160
    assert 5 < len(sides["val"]) < 40
    assert len(sides["test"]) == 160
    assert {review.label for review in HubReviews().unlabelled()} == {None}
    assert asked[0] == ("stanfordnlp/imdb", "train", "v1")


def test_a_hub_that_cannot_be_reached_is_one_line():
    with pytest.raises(MisconfigurationException, match=r"stanfordnlp/imdb \(split train\) could not be read"):
        list(HubReviews().reviews("train"))


@given(st.lists(st.sampled_from(["a", "<br />", "<br>", "<BR/>", " ", "b\n"])))
def test_no_line_break_of_html_is_left(parts):
    text = without_breaks("".join(parts))
    assert "<" not in text
    assert text == text.strip()
    assert re.sub(r"\s", "", text) == re.sub(r"\s|<[^>]*>", "", "".join(parts))


BAD_JSON = {
    '{"label": 1}': "the review has no 'text', only 'label'",
    '{"text": "fine"}': "the review has no 'label', only 'text'",
    '{"text": "fine", "label": 2}': "the label is 2, and must be 0 to 1 or one of negative, positive",
    '{"text": "fine", "label": true}': "the label is True",
    '{"text": "fine", "label": "good"}': "the label is 'good'",
    '{"text": " <br /> ", "label": 1}': "the review is empty",
    '{"text": 7, "label": 1}': "'text' is int, and must be text",
    '["fine", 1]': "a review is an object",
    '{"text": "fine"': "is no JSON object on one line",
}


@pytest.mark.parametrize("line", BAD_JSON, ids=range(len(BAD_JSON)))
def test_a_bad_line_is_named_by_its_number(tmp_path, line):
    (tmp_path / "bad.jsonl").write_text(f"{as_json(ROWS[:2])}\n\n{line}\n")
    with pytest.raises(MisconfigurationException, match=re.escape(f"bad.jsonl, line 4: {BAD_JSON[line]}")):
        sides_of(ReviewFiles(str(tmp_path / "bad.jsonl")))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("fine, and more,1,2", "line 4: 4 columns, where the first line names 3; put text with commas in quotation"),
        ("fine,1", "line 4: 2 columns, where the first line names 3"),
        (",1,2", "line 4: the review is empty"),
        ("fine,,2", "line 4: the label is ''"),
    ],
)
def test_a_bad_line_of_a_table_is_named_by_the_number_of_its_beginning(tmp_path, line, message):
    (tmp_path / "bad.csv").write_text(f'text,label,movie\n"over two\nlines",1,2\n{line}\n')
    with pytest.raises(MisconfigurationException, match=re.escape(message)):
        sides_of(ReviewFiles(str(tmp_path / "bad.csv")))


def test_other_bad_files_are_one_line(tmp_path):
    (tmp_path / "latin.csv").write_bytes("text,label\ncaf\xe9,1\n".encode("latin-1"))
    (tmp_path / "plain.jsonl.gz").write_text("{}")
    (tmp_path / "columns.csv").write_text("review,sentiment\nfine,1\n")
    for name, message in {
        "latin.csv": "could not be read",
        "plain.jsonl.gz": "could not be read",
        "columns.csv": "line 2: the review has no 'text', only 'review', 'sentiment'; give the names of the fields",
        "gone.csv": "does not exist",
    }.items():
        with pytest.raises(MisconfigurationException, match=message):
            sides_of(ReviewFiles(str(tmp_path / name)))
    with pytest.raises(MisconfigurationException, match="give the folder aclImdb"):
        list(AclImdb(str(tmp_path)).reviews("train"))
    with pytest.raises(MisconfigurationException, match="leave something to train on"):
        ReviewFiles("a", val_fraction=0.5, test_fraction=0.5)
    with pytest.raises(MisconfigurationException, match="two or more names"):
        ReviewFiles("a", classes=["only"])


def test_one_class_only_is_refused(tmp_path, tokenizer_folder):
    (tmp_path / "good.jsonl").write_text(as_json([row | {"label": 1} for row in ROWS]))
    data = BertImdbDataModule(ReviewFiles(str(tmp_path / "good.jsonl")), tokenizer_folder, 4, 16)
    with pytest.raises(MisconfigurationException, match="the train reviews need two classes, and there is no negative"):
        data.setup("fit")


# --- tokens ----------------------------------------------------------------------------------------------------------

TEXTS = [review.text for review in FilmReviews(n_train=200).reviews("train")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return learn_wordpieces(TEXTS, 400, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer_folder(tokenizer, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_learned_wordpieces_are_a_function_of_the_texts(tokenizer, tmp_path):
    again = learn_wordpieces(TEXTS, 400, tmp_path)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert learn_wordpieces(TEXTS, 400, tmp_path).get_vocab() == again.get_vocab()  # from the cache
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
def test_truncation_keeps_the_ends_asked_for(length, n, how):
    ids = np.arange(length)
    kept = truncate(ids, n, how).tolist()
    assert len(kept) == min(length, n)
    if length > n:
        n_first = {"head": n, "tail": 0, "head_tail": round(n / 4 + 1e-9)}[how]
        assert kept == [*range(n_first), *range(length - (n - n_first), length)]


def test_truncation_as_in_the_paper():
    assert truncate(np.arange(2000), 510, "head_tail").tolist() == [*range(128), *range(2000 - 382, 2000)]


def test_rows_are_those_of_the_tokenizer(tokenizer, tokenizer_folder):
    data = BertImdbDataModule(FilmReviews(n_train=20, n_val=10, n_test=10), tokenizer_folder, 4, max_tokens=40)
    data.setup("fit")
    positions = torch.tensor([3, 0, 7, 11])
    batch = data.sides["train"][positions]
    texts = [data.texts["train"][i].text for i in positions]
    expected = tokenizer(texts, truncation=True, max_length=40, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert batch["labels"].tolist() == [1, 0, 1, 1]
    assert batch["positions"].tolist() == [3, 0, 7, 11]
    empty = data.sides["train"][torch.tensor([], dtype=torch.int64)]
    assert empty["input_ids"].shape == (0, 0)


def test_special_tokens_in_a_text_are_text(tokenizer, tokenizer_folder):
    data = BertImdbDataModule(FilmReviews(), tokenizer_folder, 4, text="good [SEP] [MASK] bad")
    data.setup("predict")
    row = data.sides["predict"].row(0).tolist()
    assert row.count(tokenizer.sep_token_id) == 1
    assert tokenizer.mask_token_id not in row


def test_settings_that_cannot_be_are_refused(tokenizer_folder):
    source = FilmReviews(n_train=10, n_val=4, n_test=4)
    for settings, message in (
        ({"max_tokens": 2}, "data.max_tokens is 2"),
        ({"max_tokens": 9, "mask_fraction": 1.0}, r"data.mask_fraction is 1.0: it must be in \(0, 1\)"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            MaskedReviewsDataModule(source, tokenizer_folder, 2, **settings)
    with pytest.raises(MisconfigurationException, match="byte has no padding token"):
        _ = BertImdbDataModule(source, "byte", 2).tokenizer
    with pytest.raises(MisconfigurationException, match="n_val is 1"):
        FilmReviews(n_val=1)


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


def test_grouped_batches_need_little_padding_and_come_in_any_order():
    lengths = np.random.default_rng(0).integers(5, 500, 4000)
    batches = lengths[grouped_by_length(lengths, 8, seed=0)(0).numpy()].reshape(-1, 8)
    random = np.random.default_rng(1).permutation(lengths).reshape(-1, 8)
    waste, waste_at_random = (1 - b.sum() / (b.max(1).sum() * 8) for b in (batches, random))
    assert waste < 0.02
    assert waste_at_random > 0.3
    longest = batches.max(1)
    assert np.abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < 0.15
    both = [set(map(tuple, grouped_by_length(lengths, 8, 0)(e).reshape(-1, 8).tolist())) for e in (0, 1)]
    assert len(both[0] & both[1]) < 5  # other reviews meet in the next epoch


# --- masks -----------------------------------------------------------------------------------------------------------


def masked(tokenizer, n: int = 200, fraction: float = 0.2, whole_words: bool = False) -> MaskedReviews:
    rows = [np.array(tokenizer(text)["input_ids"], np.int32) for text in TEXTS[:n]]
    return MaskedReviews(rows, tokenizer, fraction, whole_words, seed=5)


def test_a_mask_follows_from_seed_epoch_and_review_alone(tokenizer):
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


def test_as_many_tokens_are_hidden_as_was_asked_for_and_in_berts_proportions(tokenizer):
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


def test_whole_words_are_hidden_together(tokenizer):
    continues = torch.from_numpy(continues_word(tokenizer))
    batch = masked(tokenizer, whole_words=True)[torch.arange(200)]
    hidden = batch["targets"] >= 0
    ids = torch.where(hidden, batch["targets"], batch["input_ids"])
    within = continues[ids[:, 1:]]  # a token, and the one before it, are of one word
    assert within.any()
    assert torch.equal(hidden[:, 1:][within], hidden[:, :-1][within])
    assert hidden.sum().item() == pytest.approx(float(batch["mean_targets"]), rel=0.1)


def test_long_reviews_become_several_rows_and_nothing_is_lost(tokenizer, tokenizer_folder):
    data = MaskedReviewsDataModule(FilmReviews(n_train=20, n_val=4, n_test=4, n_unlabelled=5), tokenizer_folder, 2, 20)
    data.setup("fit")
    rows = data.sides["train"]
    assert rows.lengths.max() == 20
    assert len(rows) > 25
    inside = [i for row in range(len(rows)) for i in rows.row(row).tolist() if i not in tokenizer.all_special_ids]
    expected = [i for r in data.pretraining_reviews for i in tokenizer(r.text, add_special_tokens=False)["input_ids"]]
    assert inside == [i for i in expected if i not in tokenizer.all_special_ids]
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, GlobalBatches)
    first, second = (loader.sampler.order(epoch) for epoch in (0, 1))
    assert sorted((second - len(rows)).tolist()) == sorted(first.tolist()) == list(range(len(rows)))


def test_features_take_the_place_of_tokens_and_are_computed_once(tokenizer_folder):
    calls = []

    def features_of(batch: dict) -> torch.Tensor:
        calls.append(len(batch["input_ids"]))
        return batch["attention_mask"].sum(1, keepdim=True).float()

    for _ in range(2):
        data = BertImdbDataModule(FilmReviews(n_train=20, n_val=4, n_test=4), tokenizer_folder, 8, 40)
        data.setup("fit")
        data.keep_features("train", "a model", features_of)
        batch = data.sides["train"][torch.tensor([5, 2])]
        assert batch.keys() == {"features", "labels", "positions"}
        assert batch["features"][:, 0].tolist() == data.sides["train"].lengths[[5, 2]].tolist()
    assert calls == [8, 8, 4]
    shorter = BertImdbDataModule(FilmReviews(n_train=20, n_val=4, n_test=4), tokenizer_folder, 8, 30)
    shorter.setup("fit")
    shorter.keep_features("train", "a model", features_of)
    shorter.keep_features("train", "another model", features_of)
    assert len(calls) == 9


def test_the_same_rows_have_the_same_fingerprint():
    one = TokenizedReviews([np.array([1, 2]), np.array([3])], [0, 1], 0)
    other = TokenizedReviews([np.array([1]), np.array([2, 3])], [0, 1], 0)
    assert one.fingerprint() != other.fingerprint()
    assert one.fingerprint() == TokenizedReviews([np.array([1, 2]), np.array([3])], [1, 1], 0).fingerprint()
    assert bert_imdb.IGNORED == -100  # what torch's cross entropy leaves out
