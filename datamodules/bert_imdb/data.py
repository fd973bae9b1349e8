"""Reviews as token ids: with labels for a classifier, or with masked tokens to pretrain an encoder."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import ExperimentDataModule, Order, shuffled
from datamodules.bert_imdb.reviews import (
    AnyReviews,
    HubReviews,
    Review,
    ReviewSource,
    parse_review,
    read_reviews,
    reviews_of,
    without_breaks,
)
from datamodules.bert_imdb.wordpiece import continues_word, learn_wordpieces
from datamodules.cache import cached_array, digest, find_array, read_array
from datamodules.sources import hub_name
from datamodules.splits import SIDES, Side, say_if_few
from datamodules.tokenizers import WithTokenizer, encode, load_tokenizer, vocab_size
from lightning_modules.common.cache import cache_root
from lightning_modules.common.messages import say
from lightning_modules.common.ranges import NonNegativeInt, OpenUnitInterval, PositiveInt, ThreeOrMore
from lightning_modules.common.targets import IGNORED, places_of_targets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Truncation = Literal["head", "tail", "head_tail"]
Batch = dict[str, Tensor]

POOL = 50  # batches whose reviews are sorted by length together
_NAMED = 5  # most classes that a line about missing ones names
_SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}  # by stage


def grouped_by_length(lengths: Sequence[int], batch_size: int, seed: int) -> Order:
    """Return an order in which the reviews of a batch have similar lengths.

    The reviews are shuffled, sorted by length within pools of `POOL` batches, and the batches are shuffled. So a batch
    needs little padding, and nearly any two reviews can share a batch.
    """
    lengths = np.asarray(lengths)

    def order(epoch: int) -> Tensor:
        draw = np.random.default_rng([seed, epoch])
        shuffled = draw.permutation(len(lengths))
        whole = len(shuffled) // batch_size * batch_size
        pools = np.split(shuffled[:whole], range(POOL * batch_size, whole, POOL * batch_size))
        in_pools = [pool[np.argsort(lengths[pool], kind="stable")] for pool in pools]
        batches = np.concatenate(in_pools).reshape(-1, batch_size)
        # An incomplete batch stays at the end, where the loader drops it.
        return torch.from_numpy(np.concatenate([draw.permutation(batches).ravel(), shuffled[whole:]]))

    return order


def truncate(ids: np.ndarray, n: int, how: Truncation) -> np.ndarray:
    """Shorten a review to at most `n` tokens (Sun et al., 2019, https://arxiv.org/abs/1905.05583, section 5.3.1).

    `head` keeps the first tokens, `tail` the last ones, `head_tail` a quarter from the beginning and the rest from the
    end, as in the paper.
    """
    if len(ids) <= n:
        return ids
    first = {"head": n, "tail": 0, "head_tail": (n + 2) // 4}[how]
    return np.concatenate([ids[:first], ids[len(ids) - (n - first) :]])


class TokenizedReviews(Dataset):
    """Reviews as rows of token ids, padded to the longest row of a batch.

    A batch is `{"input_ids": (B, T), "attention_mask": (B, T), "cu_seqlens": (2B + 1,), "n_tokens": (), "labels": (B,),
    "positions": (B,)}`, all integers; `cu_seqlens` is 0 and the ends of each review and its padding in the B T places
    of the batch, one row after another, and `n_tokens` is the number of tokens without padding. If `features` is set,
    a batch has `features`, (B, F) float32, in place of the first four.

    Args:
        rows: Token ids of each review with special tokens, (T,) each.
        labels: Class of each review, or -1 if it is unknown.
        pad_token_id: Token that pads a row.
    """

    features: np.ndarray | None = None  # of each review, by a frozen encoder, (n, F) float32

    def __init__(self, rows: Sequence[np.ndarray], labels: Sequence[int], pad_token_id: int) -> None:
        self.lengths = np.array([len(row) for row in rows], dtype=np.int64)
        self.ids = np.concatenate([np.empty(0, np.int32), *rows]).astype(np.int32)
        self.rows = np.split(self.ids, np.cumsum(self.lengths)[:-1])  # token ids of each review, (T,)
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.pad_token_id = pad_token_id

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def by_length(self) -> Tensor:
        """The positions of the reviews, the shortest first, (n,)."""
        return torch.from_numpy(np.argsort(self.lengths, kind="stable"))

    def fingerprint(self) -> str:
        """Return a hash of all token ids, which depend on the texts, the tokenizer and the truncation."""
        return digest([hashlib.sha256(array).hexdigest() for array in (self.lengths, self.ids)])

    def __getitem__(self, positions: Tensor) -> Batch:
        """Return the batch of the reviews at some positions, (B,)."""
        known = {"labels": self.labels[positions], "positions": positions}
        if self.features is not None:
            return {"features": torch.from_numpy(self.features[positions.numpy()])} | known
        return self.inputs(positions) | known

    def inputs(self, positions: Tensor) -> Batch:
        """Return the token ids and the mask of the reviews at some positions, (B,)."""
        lengths = self.lengths[positions.numpy()]  # (B,)
        input_ids = np.full((len(positions), lengths.max(initial=0)), self.pad_token_id, dtype=np.int64)
        for b, i in enumerate(positions.tolist()):
            input_ids[b, : lengths[b]] = self.rows[i]
        mask = np.arange(input_ids.shape[1]) < lengths[:, None]  # (B, T)
        parts = np.stack([lengths, input_ids.shape[1] - lengths], axis=1)  # (B, 2): review and padding
        cu_seqlens = np.concatenate([[0], parts.cumsum()]).astype(np.int32)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
            "cu_seqlens": torch.from_numpy(cu_seqlens),
            "n_tokens": torch.tensor(int(lengths.sum())),
        }


class MaskedReviews(TokenizedReviews):
    """Reviews with masked tokens, for masked-language-model training (Devlin et al., 2019, section 3.1).

    Of the tokens that are chosen as targets, most are replaced by `[MASK]`, some by a random token, and some stay.
    Position `p` of an epoch of `n` reviews is `epoch * n + p`. The targets of a review depend on this number and the
    seed only, not on the batch or the process.

    A batch is `{"input_ids": (B, T), "attention_mask": (B, T), "cu_seqlens": (2B + 1,), "n_tokens": (), "targets":
    (B, T), "places": (N,), "mean_targets": ()}`. A target is `IGNORED` if its token was not chosen; `places` are those
    of the targets, see `places_of_targets`; `mean_targets` is the mean number of targets of B reviews.

    Args:
        rows: Token ids of each review with special tokens, (T,) each.
        tokenizer: Tokenizer with a padding and a mask token.
        fraction: Fraction of the tokens, or of the words, that are chosen.
        whole_words: Whether all tokens of a word are chosen together.
        seed: Seed of the targets.
    """

    def __init__(
        self,
        rows: Sequence[np.ndarray],
        tokenizer: "PreTrainedTokenizerFast",
        fraction: float,
        whole_words: bool,
        seed: int,
    ) -> None:
        super().__init__(rows, [-1] * len(rows), tokenizer.pad_token_id)
        self.fraction, self.seed = fraction, seed
        self.mask_token_id = tokenizer.mask_token_id
        is_special = np.zeros(vocab_size(tokenizer), dtype=bool)
        is_special[tokenizer.all_special_ids] = True
        self.is_special, self.any_token = is_special, np.flatnonzero(~is_special)
        self.continues = continues_word(tokenizer) if whole_words else np.zeros(vocab_size(tokenizer), dtype=bool)
        self.mean_targets = fraction * float((~is_special[self.ids]).sum()) / max(1, len(self))

    def __getitem__(self, positions: Tensor) -> Batch:
        """Return the batch of the reviews at some positions of the epochs, (B,)."""
        batch = self.inputs(positions % len(self))
        input_ids = batch["input_ids"].numpy()
        targets = np.full_like(input_ids, IGNORED)
        for b, position in enumerate(positions.tolist()):
            n = int(self.lengths[position % len(self)])
            chosen, instead = self._mask(input_ids[b, :n], np.random.default_rng([self.seed, position]))
            targets[b, chosen] = input_ids[b, chosen]
            input_ids[b, chosen] = instead
        mean_targets = torch.tensor(len(positions) * self.mean_targets)
        places = torch.from_numpy(places_of_targets(targets))
        return batch | {"targets": torch.from_numpy(targets), "places": places, "mean_targets": mean_targets}

    def _mask(self, ids: np.ndarray, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Choose the targets of a row (T,): return their places (N,), and the tokens that replace them (N,)."""
        places = np.flatnonzero(~self.is_special[ids])
        if not len(places):
            return places, places
        words = np.cumsum(~self.continues[ids[places]])  # index of the word of each place
        words -= words[0]
        n = int(self.fraction * (words[-1] + 1) + draw.random())  # rounded at random, so that its mean is exact
        is_chosen = np.zeros(words[-1] + 1, dtype=bool)
        is_chosen[draw.permutation(len(is_chosen))[:n]] = True
        chosen = places[is_chosen[words]]
        fate = draw.random(len(chosen))
        instead = np.where(fate < 0.8, self.mask_token_id, draw.choice(self.any_token, len(chosen)))
        return chosen, np.where(fate < 0.9, instead, ids[chosen])


def framed(
    tokenizer: "PreTrainedTokenizerFast",
    texts: Sequence[str],
    max_tokens: int,
    parts_of: Callable[[np.ndarray, int], list[np.ndarray]],
) -> list[np.ndarray]:
    """Return the token ids of each part of each text, (T,), between `[CLS]` and `[SEP]` as in BERT.

    Args:
        tokenizer: Tokenizer of an encoder.
        texts: Texts to tokenise.
        max_tokens: Largest number of tokens of a part, with special tokens.
        parts_of: Function from the ids of a text and a length to parts that have at most this length.
    """
    plain = encode(tokenizer, ["a"])[0].tolist()
    frame = tokenizer("a")["input_ids"]  # with the tokens that the tokenizer adds before and after a text
    begin = next(i for i in range(len(frame)) if frame[i : i + len(plain)] == plain)
    before, after = np.array(frame[:begin], np.int32), np.array(frame[begin + len(plain) :], np.int32)
    n = max_tokens - len(before) - len(after)
    return [np.concatenate([before, part, after]) for row in encode(tokenizer, texts) for part in parts_of(row, n)]


class ReviewsDataModule(WithTokenizer, ExperimentDataModule):
    """Base of both datamodules: a source of reviews, a tokenizer, and batches of similar lengths.

    Args:
        reviews: The reviews: a source, or with labels files of rows or `hub:OWNER/NAME`, and without labels any text;
            see `reviews_of`.
        tokenizer: Tokenizer of the encoder, mostly under its name: see `datamodules.tokenizers.load_tokenizer`.
        batch_size: Number of rows in a batch, over all processes.
        max_tokens: Number of tokens in the longest row, with special tokens; at least 3.
        group_by_length: Whether the rows of a batch have similar lengths, which saves padding.
        num_workers: Number of processes that load ahead; 0 loads in the training process.
        seed: Seed of the order of the rows.
    """

    needs_labels = True

    def __init__(
        self,
        reviews: AnyReviews,
        tokenizer: str,
        batch_size: PositiveInt,
        max_tokens: ThreeOrMore = 512,
        group_by_length: bool = True,
        num_workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.given_reviews = reviews
        self.source = reviews_of(reviews, self.needs_labels)
        self.tokenizer_name = tokenizer
        self.max_tokens = self.block_size = max_tokens
        self.group_by_length = group_by_length
        self.datasets: dict[str, TokenizedReviews] = {}

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer; its longest row is that of the data.

        Raises:
            MisconfigurationException: If it has no padding token.
        """
        tokenizer = self.load_tokenizer()
        if tokenizer.pad_token_id is None:
            raise MisconfigurationException(
                f"data.tokenizer: {self.tokenizer_name} has no padding token; give the tokenizer of an encoder such "
                "as BERT"
            )
        tokenizer.model_max_length = self.max_tokens
        return tokenizer

    def load_tokenizer(self) -> "PreTrainedTokenizerFast":
        """Return the tokenizer of the argument."""
        return load_tokenizer(self.tokenizer_name)

    def prepare_data(self) -> None:
        """Download the reviews, on one process of each machine."""
        self.source.prepare()

    def setup(self, stage: str) -> None:
        """Read and tokenise the splits of a stage."""
        for split in _SPLITS[stage]:
            if split not in self.datasets:
                self.datasets[split] = self.read(split)
        if stage == "fit":
            say(f"data    {self.describe()}")
        for side in (split for split in SIDES if split in _SPLITS[stage]):
            say_if_few(side, len(self.datasets[side]), "rows")

    def describe(self) -> str:
        """Return a line about the reviews of a fit."""
        train, val = (len(self.datasets[split]) for split in ("train", "val"))
        test = self.source.n_held_out_for_test()
        return f"{train:,} rows train, {val:,} validate{f'; reviews for the test: {test:,}' if test else ''}"

    def read(self, split: Any) -> TokenizedReviews:
        """Return the dataset of a split: `train`, `val`, `test` or `predict`."""
        raise NotImplementedError

    def training_order(self) -> Order:
        """Return the order of the training rows."""
        lengths = self.datasets["train"].lengths
        if self.group_by_length:
            return grouped_by_length(lengths, self.batch_size, self.seed)
        return shuffled(len(lengths), self.seed)

    def train_dataloader(self) -> DataLoader:
        """Return the loader of the training split, in the order of the epoch."""
        return self.training_loader(self.datasets["train"], len(self.datasets["train"]), self.training_order())

    def val_dataloader(self) -> DataLoader:
        """Return the loader of the validation split, the shortest rows first."""
        return self.evaluation_loader(self.datasets["val"], self.datasets["val"].by_length)

    def test_dataloader(self) -> DataLoader:
        """Return the loader of the test split, the shortest rows first."""
        return self.evaluation_loader(self.datasets["test"], self.datasets["test"].by_length)

    def rows_of(
        self, reviews: list[Review], parts_of: Callable[[np.ndarray, int], list[np.ndarray]]
    ) -> list[np.ndarray]:
        """Return the token ids of each part of each review, (T,), see `framed`."""
        return framed(self.tokenizer, [review.text for review in reviews], self.max_tokens, parts_of)


class BertImdbDataModule(ReviewsDataModule):
    """Reviews with labels; see `TokenizedReviews` for the batches.

    Args:
        *args: Arguments of `ReviewsDataModule`. A review that is longer than `max_tokens` is truncated.
        truncation: Part of a longer review to keep: its `head`, its `tail`, or `head_tail`, a quarter of the tokens
            from its beginning and the rest from its end.
        text: A review to classify, for `predict`.
        file: File of reviews to classify, for `predict`: JSON lines, a table (`.csv`, `.tsv`) or Parquet with the field
            `text`, or another one that a colon and its name after the file give; labels are ignored, and an empty text
            has no prediction.
        **kwargs: Arguments of `ReviewsDataModule`.
    """

    def __init__(
        self,
        *args: Any,
        truncation: Truncation = "head",
        text: str | None = None,
        file: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.truncation = truncation
        self.text = text
        self.file = file
        self.texts: dict[str, list[Review]] = {}  # reviews of each split, by position in the dataset
        self.rows_to_predict: list[dict[str, Any]] = []  # what the file has of each review to classify, by position
        self.n_truncated: Counter[str] = Counter()  # reviews of each split

    def load_tokenizer(self) -> "PreTrainedTokenizerFast":
        """Return the tokenizer of the argument; in other programs, it keeps the end of a text if this class does."""
        tokenizer = super().load_tokenizer()
        if self.truncation == "tail":
            tokenizer.truncation_side = tokenizer.init_kwargs["truncation_side"] = "left"
        return tokenizer

    @property
    def classes(self) -> list[str]:
        """Names of the classes; a label is an index into them."""
        return list(self.source.classes)

    @staticmethod
    def batch_of_texts(
        tokenizer: "PreTrainedTokenizerFast", arguments: Mapping[str, Any], texts: Sequence[str]
    ) -> Batch:
        """Return the batch of texts to classify with a finished run, from its tokenizer and constructor arguments."""
        how = arguments.get("truncation", "head")
        texts = [without_breaks(text) for text in texts]
        rows = framed(tokenizer, texts, arguments["max_tokens"], lambda ids, n: [truncate(ids, n, how)])
        return TokenizedReviews(rows, [-1] * len(rows), tokenizer.pad_token_id)[torch.arange(len(rows))]

    def labelled(self, split: Side) -> list[Review]:
        """Return the reviews of a split.

        Raises:
            MisconfigurationException: If there are none, or those of one class only.
        """
        if split in self.texts:
            return self.texts[split]
        reviews = list(self.source.reviews(split))
        present = {review.label for review in reviews}
        if len(present) < 2:
            missing = ", ".join(name for label, name in enumerate(self.classes) if label not in present)
            flags = self.source.flags_to_hold_out(split, isinstance(self.given_reviews, ReviewSource))
            raise MisconfigurationException(
                f"data.reviews: the {split} reviews need two classes, and none is of class {missing}; give both, or a "
                f"larger part for {split}{f' when you train: {flags}' if flags else ''}"
            )
        self.texts[split] = reviews
        return reviews

    def read(self, split: Any) -> TokenizedReviews:
        """Return the dataset of a split; `predict` has the reviews to classify."""

        def parts_of(ids: np.ndarray, n: int) -> list[np.ndarray]:
            self.n_truncated[split] += len(ids) > n
            return [truncate(ids, n, self.truncation)]

        self.texts[split] = reviews = self._to_predict() if split == "predict" else self.labelled(split)
        rows = self.rows_of(reviews, parts_of)
        labels = [-1 if review.label is None else review.label for review in reviews]
        return TokenizedReviews(rows, labels, self.tokenizer.pad_token_id)

    def setup(self, stage: str) -> None:
        """Read and tokenise the splits of a stage, and say which of them lack a class or have truncated reviews."""
        super().setup(stage)
        if stage != "fit" and (truncated := self._truncated(*_SPLITS[stage])):
            say(f"data    {truncated}")
        for side in (split for split in SIDES if split in _SPLITS[stage]):
            if missing := self._missing_classes(side):
                effect = "the model cannot learn it" if side == "train" else "the scores say nothing of it"
                say(f"{side}: no row of {missing}; {effect}")

    def _missing_classes(self, side: Side) -> str:
        """Return the classes of which a split has no row, and how many rows the training split has; empty for none."""
        n_train = Counter(review.label for review in self.texts.get("train", ()))
        present = {review.label for review in self.texts[side]}
        missing = [
            f"{name} (train has {n_train[label]:,})" if n_train[label] else name
            for label, name in enumerate(self.classes)
            if label not in present
        ]
        more = [f"{len(missing) - _NAMED:,} more classes"] if len(missing) > _NAMED else []
        return ", ".join([*missing[:_NAMED], *more])

    def describe(self) -> str:
        """Return a line about the reviews of a fit, and their classes."""
        parts = (super().describe(), self._truncated("train", "val"), f"classes: {', '.join(self.classes)}")
        return "; ".join(filter(None, parts))

    def _truncated(self, *splits: str) -> str:
        """Return how many reviews of some splits are truncated; empty if none is."""
        n, n_all = sum(self.n_truncated[s] for s in splits), sum(len(self.texts[s]) for s in splits)
        return (
            f"{n:,} of {n_all:,} texts {'is' if n == 1 else 'are'} cut to {self.max_tokens} tokens (--data.max_tokens)"
            if n
            else ""
        )

    def keep_features(
        self,
        split: Side,
        model: Any,
        features_of: Callable[[Batch], Tensor],
        gathered: Callable[[Any], list[Any]] = lambda value: [value],
    ) -> None:
        """Replace the tokens in the batches of a split by features, computed once and kept in the cache.

        The processes of a run compute a batch each at a time, so that none waits for the work of another: a wait has a
        timeout. The first process of each machine keeps them all and writes the file.

        Args:
            split: `train`, `val` or `test`.
            model: Identity of the encoder, any value that JSON can represent.
            features_of: Function from a batch to its features, (B, F).
            gathered: Function from a value of this process to those of all processes, ordered by rank.
        """
        dataset = self.datasets[split]
        file = cache_root() / "features" / f"{digest([model, dataset.fingerprint()])}.npy"
        if any(gathered(find_array(file, "r") is None)):
            rank, n = self._rank_and_world_size
            writes = self.trainer is None or self.trainer.local_rank == 0
            batches = dataset.by_length.split(self.batch_size)
            parts: list[Tensor] = []
            for first in range(0, len(batches), n):
                own = batches[first + rank : first + rank + 1]  # none, if the last round has fewer than n batches
                of_all = gathered([features_of(dataset.inputs(positions)) for positions in own])
                if writes:
                    parts += chain.from_iterable(of_all)
            if writes:
                cached_array(file, lambda: torch.cat(parts)[dataset.by_length.argsort()].numpy(), "r")
            gathered(None)  # wait until the file is there
        dataset.features = read_array(file, "r")

    def predict_dataloader(self) -> DataLoader:
        """Return the loader of the reviews to classify, in the order given, without those that are empty."""
        positions = [position for position, review in enumerate(self.texts["predict"]) if review.text]
        return self.evaluation_loader(self.datasets["predict"], torch.tensor(positions))

    def _to_predict(self) -> list[Review]:
        if (self.text is None) == (self.file is None):
            raise MisconfigurationException(
                'predict: give either --data.text "a review" or --data.file FILE, of JSON lines or a table (.csv, .tsv)'
            )
        if self.file is None:
            self.rows_to_predict = [{"text": self.text}]
            return [parse_review(self.rows_to_predict[0], "data.text", None)]
        read = list(read_reviews(self.file, None, may_be_empty=True))
        reviews = [review for review, _ in read]
        empty = [review.place for review in reviews if not review.text]
        if len(empty) == len(reviews):
            raise MisconfigurationException(f"data.file: {self.file} holds no review")
        if empty:
            more = f" and {len(empty) - 1:,} more" if len(empty) > 1 else ""
            say(f"predict: no prediction of {empty[0]}{more}, where the text is empty")
        self.rows_to_predict = [row for _, row in read]
        return reviews


class MaskedReviewsDataModule(ReviewsDataModule):
    """Reviews with masked tokens; see `MaskedReviews` for the batches. Labels are ignored.

    The training split has the training reviews and the unlabelled ones. A review that is longer than `max_tokens` is
    split into several rows; no token is dropped.

    Args:
        *args: Arguments of `ReviewsDataModule`. The tokenizer `wordpiece` is learned from the reviews.
        mask_fraction: Fraction of the tokens that are predicted, in (0, 1).
        whole_words: Whether the tokens of a word are masked together; needs a WordPiece tokenizer.
        wordpieces: Number of tokens to learn, for the tokenizer `wordpiece`.
        **kwargs: Arguments of `ReviewsDataModule`.
    """

    needs_labels = False

    def __init__(
        self,
        *args: Any,
        mask_fraction: OpenUnitInterval = 0.15,
        whole_words: bool = False,
        wordpieces: PositiveInt = 8192,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.mask_fraction = mask_fraction
        self.whole_words = whole_words
        self.wordpieces = wordpieces

    @property
    def have_labels(self) -> bool:
        """Whether a classifier can read the same reviews, with labels; `hub:` is not looked up."""
        if not isinstance(self.given_reviews, ReviewSource) and hub_name(self.given_reviews, "data.reviews"):
            return True
        try:
            first = next(reviews_of(self.given_reviews).reviews("train"), None)
        except MisconfigurationException:
            return False
        return first is not None and first.label is not None

    @property
    def tuned_by(self) -> str:
        """Experiment that trains a classifier on an encoder that was trained before it read these reviews."""
        if not isinstance(self.given_reviews, ReviewSource):
            return "classify"
        return "full" if isinstance(self.given_reviews, HubReviews) else "offline"

    @cached_property
    def pretraining_reviews(self) -> list[Review]:
        """The reviews that the encoder and the tokenizer learn from: the training reviews and the unlabelled ones."""
        return [*self.source.reviews("train"), *self.source.unlabelled()]

    def load_tokenizer(self) -> "PreTrainedTokenizerFast":
        """Return the tokenizer of the argument; `wordpiece` is learned from the reviews."""
        if self.tokenizer_name == "wordpiece":
            return learn_wordpieces([review.text for review in self.pretraining_reviews], self.wordpieces)
        return super().load_tokenizer()

    def read(self, split: Any) -> MaskedReviews:
        """Return the dataset of a split.

        Raises:
            MisconfigurationException: If there are no reviews, the tokenizer cannot mask, or the split is `predict`.
        """
        if split == "predict":
            raise MisconfigurationException("predict: masked reviews have no classes; give a run of BertImdbModule")
        if self.tokenizer.mask_token_id is None:
            raise MisconfigurationException(f"data.tokenizer: {self.tokenizer_name} has no mask token")
        if self.whole_words and not continues_word(self.tokenizer).any():
            raise MisconfigurationException(
                f"data.whole_words: {self.tokenizer_name} does not mark the tokens within words by ##; leave it out"
            )
        reviews = self.pretraining_reviews if split == "train" else list(self.source.reviews(split))
        if not reviews:
            raise MisconfigurationException(f"data.reviews: there are no {split} reviews")
        rows = self.rows_of(reviews, _parts)
        return MaskedReviews(rows, self.tokenizer, self.mask_fraction, self.whole_words, self.seed)

    def training_order(self) -> Order:
        """Return the order of the training rows; each epoch has other positions, and therefore other targets."""
        n, order = len(self.datasets["train"]), super().training_order()
        return lambda epoch: order(epoch) + epoch * n


def _parts(ids: np.ndarray, n: int) -> list[np.ndarray]:
    """Split a review into the fewest parts of at most `n` tokens, of nearly equal length."""
    return np.array_split(ids, max(1, -(-len(ids) // n)))
