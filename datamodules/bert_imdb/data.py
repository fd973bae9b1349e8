"""Reviews as token ids: with their labels to learn a classifier, or with words masked to pretrain an encoder."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import ExperimentDataModule, Order
from datamodules.bert_imdb.reviews import Review, ReviewSource, Side, parse_review, read_reviews
from datamodules.bert_imdb.wordpiece import continues_word, learn_wordpieces
from datamodules.cache import cache_root, cached_array, digest
from datamodules.tokenizers import WithTokenizer, encode, load_tokenizer, vocab_size
from lightning_modules.common.targets import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Truncation = Literal["head", "tail", "head_tail"]
Batch = dict[str, Tensor]

POOL = 50  # batches whose reviews are sorted by length together


def grouped_by_length(lengths: Sequence[int], batch_size: int, seed: int) -> Order:
    """Return an order in which the reviews of a batch are about as long as each other.

    The reviews are shuffled, sorted by length within pools of 50 batches, and the batches are shuffled. So a batch
    needs little padding, and nearly any two reviews may meet in one.

    Args:
        lengths: tokens of each review, (n,).
        batch_size: reviews in a batch.
        seed: of the shuffling.
    """
    lengths = np.asarray(lengths)

    def order(epoch: int) -> Tensor:
        draw = np.random.default_rng([seed, epoch])
        shuffled = draw.permutation(len(lengths))
        whole = len(shuffled) // batch_size * batch_size
        pools = np.split(shuffled[:whole], range(POOL * batch_size, whole, POOL * batch_size))
        in_pools = [pool[np.argsort(lengths[pool], kind="stable")] for pool in pools]
        batches = np.concatenate(in_pools).reshape(-1, batch_size)
        # What makes no whole batch stays at the end, where the loader leaves it out.
        return torch.from_numpy(np.concatenate([draw.permutation(batches).ravel(), shuffled[whole:]]))

    return order


def truncate(ids: np.ndarray, n: int, how: Truncation) -> np.ndarray:
    """Shorten a review to at most `n` tokens (Sun et al., 2019, https://arxiv.org/abs/1905.05583, section 5.3.1).

    `head` keeps the first tokens, `tail` the last ones, `head_tail` a quarter from the beginning and the rest from the
    end, which are the 128 and 382 tokens of the paper where n is 510.

    Args:
        ids: token ids, (T,).
        n: tokens to keep, at least 1.
        how: which ones.
    """
    if len(ids) <= n:
        return ids
    first = {"head": n, "tail": 0, "head_tail": (n + 2) // 4}[how]
    return np.concatenate([ids[:first], ids[len(ids) - (n - first) :]])


class TokenizedReviews(Dataset):
    """Reviews as rows of token ids, padded to the longest of a batch.

    A batch is `{"input_ids": (B, T), "attention_mask": (B, T), "labels": (B,), "positions": (B,)}`, all int64. Once
    somebody has set `features`, it has `features`, (B, F) float32, in place of the first two.

    Attributes:
        features: what a frozen encoder makes of each review, (n, F) float32, or nothing.
    """

    features: np.ndarray | None = None

    def __init__(self, rows: Sequence[np.ndarray], labels: Sequence[int], pad_token_id: int) -> None:
        """Keep the rows in one array.

        Args:
            rows: token ids of each review, special tokens included, (T,) each.
            labels: number of its class, or -1 where that is not known.
            pad_token_id: what follows a row that is shorter than others.
        """
        self.lengths = np.array([len(row) for row in rows], dtype=np.int64)
        self.ends = np.cumsum(self.lengths)
        self.ids = np.concatenate([np.empty(0, np.int32), *rows]).astype(np.int32)
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.pad_token_id = pad_token_id

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, i: int) -> np.ndarray:
        """Return the token ids of a review: (T,)."""
        return self.ids[self.ends[i] - self.lengths[i] : self.ends[i]]

    def fingerprint(self) -> str:
        """Return a hash of what the encoder reads: of texts, tokenizer and truncation."""
        return digest([self.lengths.tolist(), self.ids.tolist()])

    def __getitem__(self, positions: Tensor) -> Batch:
        """Return the reviews of these numbers (B,)."""
        known = {"labels": self.labels[positions], "positions": positions}
        if self.features is not None:
            return {"features": torch.from_numpy(self.features[positions.numpy()])} | known
        return self.inputs(positions) | known

    def inputs(self, positions: Tensor) -> Batch:
        """Return what the encoder reads of the reviews of these numbers (B,)."""
        lengths = self.lengths[positions.numpy()]  # (B,)
        input_ids = np.full((len(positions), lengths.max(initial=0)), self.pad_token_id, dtype=np.int64)
        for b, i in enumerate(positions.tolist()):
            input_ids[b, : lengths[b]] = self.row(i)
        mask = np.arange(input_ids.shape[1]) < lengths[:, None]  # (B, T)
        return {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}


class MaskedReviews(TokenizedReviews):
    """Reviews in which some tokens are hidden, for masked-language-model training (Devlin et al., 2019, section 3.1).

    Of the chosen tokens, eight of ten become `[MASK]`, one of ten any token, one stays. Position `p` of an epoch of `n`
    reviews is `epoch * n + p`: what is hidden follows from it and the seed, whoever asks for it, and in what batch.

    A batch is `{"input_ids": (B, T), "attention_mask": (B, T), "targets": (B, T), "mean_targets": ()}`. Targets are
    -100 where nothing was chosen; `mean_targets` is how many so many reviews have on average.
    """

    def __init__(
        self,
        rows: Sequence[np.ndarray],
        tokenizer: "PreTrainedTokenizerFast",
        fraction: float,
        whole_words: bool,
        seed: int,
    ) -> None:
        """Keep the rows.

        Args:
            rows: token ids of each review, special tokens included, (T,) each.
            tokenizer: whose tokens they are.
            fraction: part of the tokens, or of the words, that is chosen.
            whole_words: whether all tokens of a word are chosen together.
            seed: of what is hidden.
        """
        super().__init__(rows, [-1] * len(rows), tokenizer.pad_token_id)
        self.fraction, self.seed = fraction, seed
        self.mask_token_id = tokenizer.mask_token_id
        is_special = np.zeros(vocab_size(tokenizer), dtype=bool)
        is_special[tokenizer.all_special_ids] = True
        self.is_special, self.any_token = is_special, np.flatnonzero(~is_special)
        self.continues = continues_word(tokenizer) if whole_words else np.zeros(vocab_size(tokenizer), dtype=bool)
        self.mean_targets = fraction * float((~is_special[self.ids]).sum()) / max(1, len(self))

    def __getitem__(self, positions: Tensor) -> Batch:
        """Return the reviews of these positions (B,)."""
        batch = self.inputs(positions % len(self))
        input_ids = batch["input_ids"].numpy()
        targets = np.full_like(input_ids, IGNORED)
        for b, position in enumerate(positions.tolist()):
            n = int(self.lengths[position % len(self)])
            chosen, instead = self._hide(input_ids[b, :n], np.random.default_rng([self.seed, position]))
            targets[b, chosen] = input_ids[b, chosen]
            input_ids[b, chosen] = instead
        mean_targets = torch.tensor(len(positions) * self.mean_targets)
        return batch | {"targets": torch.from_numpy(targets), "mean_targets": mean_targets}

    def _hide(self, ids: np.ndarray, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Choose places in a row (T,), and what is read there instead."""
        places = np.flatnonzero(~self.is_special[ids])
        if not len(places):
            return places, places
        words = np.cumsum(~self.continues[ids[places]])  # (places,): the number of the word that each belongs to
        words -= words[0]
        n = int(self.fraction * (words[-1] + 1) + draw.random())  # rounded up or down, so that the mean is right
        is_chosen = np.zeros(words[-1] + 1, dtype=bool)
        is_chosen[draw.permutation(len(is_chosen))[:n]] = True
        chosen = places[is_chosen[words]]
        fate = draw.random(len(chosen))
        instead = np.where(fate < 0.8, self.mask_token_id, draw.choice(self.any_token, len(chosen)))
        return chosen, np.where(fate < 0.9, instead, ids[chosen])


class ReviewsDataModule(WithTokenizer, ExperimentDataModule):
    """What both datamodules share: a source of reviews, a tokenizer, and batches of about equal length."""

    def __init__(
        self,
        reviews: ReviewSource,
        tokenizer: str,
        batch_size: int,
        max_tokens: int,
        wordpieces: int,
        group_by_length: bool,
        num_workers: int,
        seed: int,
    ) -> None:
        """See the classes that derive from it."""
        super().__init__(batch_size, num_workers, seed)
        if max_tokens < 3:
            raise MisconfigurationException(f"data.max_tokens is {max_tokens}: it must be at least 3")
        self.source = reviews
        self.tokenizer_name = tokenizer
        self.max_tokens = max_tokens
        self.wordpieces = wordpieces
        self.group_by_length = group_by_length
        self.sides: dict[str, TokenizedReviews] = {}

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer, which knows how long a row may be.

        Raises:
            MisconfigurationException: it has no token for padding.
        """
        if self.tokenizer_name == "wordpiece":
            tokenizer = learn_wordpieces([review.text for review in self.pretraining_reviews], self.wordpieces)
        else:
            tokenizer = load_tokenizer(self.tokenizer_name)
        if tokenizer.pad_token_id is None:
            raise MisconfigurationException(
                f"data.tokenizer: {self.tokenizer_name} has no padding token, so it is none of an encoder; give that "
                "of a BERT, or `wordpiece` to learn one"
            )
        tokenizer.model_max_length = self.max_tokens
        return tokenizer

    @property
    def block_size(self) -> int:
        """Tokens in the longest row."""
        return self.max_tokens

    @cached_property
    def pretraining_reviews(self) -> list[Review]:
        """The reviews that an encoder and a tokenizer may learn from: the training ones, and the unlabelled."""
        return [*self.source.reviews("train"), *self.source.unlabelled()]

    def prepare_data(self) -> None:
        """Download, on one process a machine."""
        self.source.prepare()

    def train_dataloader(self) -> DataLoader:
        """Return the training reviews in the order of the epoch."""
        dataset = self.sides["train"]
        order = grouped_by_length(dataset.lengths, self.batch_size, self.seed) if self.group_by_length else None
        return self.training_loader(dataset, len(dataset), order)

    def val_dataloader(self) -> DataLoader:
        """Return the reviews to validate on."""
        return self.all_of(self.sides["val"])

    def test_dataloader(self) -> DataLoader:
        """Return the reviews to test on."""
        return self.all_of(self.sides["test"])

    def all_of(self, dataset: TokenizedReviews) -> DataLoader:
        """Return the loader of all reviews of a dataset, the shortest first."""
        return self.evaluation_loader(dataset, torch.from_numpy(np.argsort(dataset.lengths, kind="stable")))

    @cached_property
    def _frame(self) -> tuple[np.ndarray, np.ndarray]:
        """What the tokenizer puts before a text and after it: `[CLS]` and `[SEP]`."""
        plain = encode(self.tokenizer, ["a"])[0].tolist()
        framed = self.tokenizer("a")["input_ids"]
        begin = next(i for i in range(len(framed)) if framed[i : i + len(plain)] == plain)
        return np.array(framed[:begin], np.int32), np.array(framed[begin + len(plain) :], np.int32)

    def _framed(self, ids: np.ndarray) -> np.ndarray:
        before, after = self._frame
        return np.concatenate([before, ids.astype(np.int32), after])

    @property
    def _room(self) -> int:
        return self.max_tokens - sum(map(len, self._frame))


class BertImdbDataModule(ReviewsDataModule):
    """Reviews and their labels, see `TokenizedReviews` for the batches.

    Attributes:
        texts: the reviews of each side, in the order of the dataset's positions.
    """

    def __init__(
        self,
        reviews: ReviewSource,
        tokenizer: str,
        batch_size: int,
        max_tokens: int = 512,
        truncation: Truncation = "head",
        group_by_length: bool = True,
        text: str | None = None,
        file: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Choose the reviews and how they are cut.

        Args:
            reviews: where they come from.
            tokenizer: that of the base: a folder with a tokenizer.json, such a file, or a name on the hub.
            batch_size: reviews in a batch, over all processes, at least 1.
            max_tokens: tokens of the longest row, special ones included, at least 3; a longer review is cut.
            truncation: what is kept of a longer one: its `head`, its `tail`, or `head_tail`, a quarter of the tokens
                from its beginning and the rest from its end.
            group_by_length: whether a batch has reviews of about equal length, rather than any, and so less padding.
            text: for `predict`: a review.
            file: for `predict`: JSON lines or a table (`.csv`) with reviews in `text`; labels are not looked at.
            num_workers: processes that load ahead; 0 loads in the training process.
            seed: of the order of the reviews, 0 or greater.
        """
        super().__init__(reviews, tokenizer, batch_size, max_tokens, 0, group_by_length, num_workers, seed)
        self.truncation = truncation
        self.text = text
        self.file = file
        self.texts: dict[str, list[Review]] = {}

    @property
    def classes(self) -> list[str]:
        """Names of the classes; a label is the place of one among them."""
        return list(self.source.classes)

    def setup(self, stage: str) -> None:
        """Read and tokenise what the stage needs.

        Raises:
            MisconfigurationException: a side has no reviews, or those of one class only.
        """
        for side in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}[stage]:
            if side not in self.sides:
                if side == "predict":
                    self.texts[side] = self._to_predict()
                self.sides[side] = self.tokenized(self.texts.get(side) or self.labelled(side))

    def labelled(self, side: Side) -> list[Review]:
        """Return the reviews of a side.

        Raises:
            MisconfigurationException: there are none, or those of one class only.
        """
        if side in self.texts:
            return self.texts[side]
        found = list(self.source.reviews(side))
        present = {review.label for review in found}
        if len(present) < 2:
            missing = ", ".join(name for label, name in enumerate(self.classes) if label not in present)
            where = f" ({found[0].place}, and the other {len(found) - 1:,})" if len(found) > 1 else ""
            raise MisconfigurationException(
                f"data.reviews: the {side} reviews need two classes, and there is no {missing} one{where}; give both, "
                f"or a larger part for {side}"
            )
        self.texts[side] = found
        return found

    def keep_features(self, side: Side, model: Any, features_of: Callable[[Batch], Tensor]) -> None:
        """Let a side's batches have features in place of tokens, computed once and kept in the cache.

        Args:
            side: whose.
            model: what identifies the encoder; anything JSON can hold.
            features_of: the features of a batch, (B, F).
        """
        dataset = self.sides[side]
        file = cache_root() / "features" / f"{digest([model, dataset.fingerprint()])}.npy"

        def features() -> np.ndarray:
            by_length = torch.from_numpy(np.argsort(dataset.lengths, kind="stable"))
            parts = [features_of(dataset.inputs(positions)) for positions in by_length.split(self.batch_size)]
            return torch.cat(parts)[by_length.argsort()].numpy()

        dataset.features = cached_array(file, features, mmap_mode="r")

    def tokenized(self, reviews: Sequence[Review]) -> TokenizedReviews:
        """Return reviews as rows of token ids, cut to `max_tokens`."""
        ids = encode(self.tokenizer, [review.text for review in reviews])
        rows = [self._framed(truncate(row, self._room, self.truncation)) for row in ids]
        return TokenizedReviews(rows, [-1 if r.label is None else r.label for r in reviews], self.pad_token_id)

    def predict_dataloader(self) -> DataLoader:
        """Return the reviews to predict, in the order given."""
        dataset = self.sides["predict"]
        return self.evaluation_loader(dataset, torch.arange(len(dataset)))

    def _to_predict(self) -> list[Review]:
        if (self.text is None) == (self.file is None):
            raise MisconfigurationException(
                'predict: give either --data.text "a review" or --data.file FILE, of JSON lines or a table (.csv)'
            )
        if self.text is not None:
            return [parse_review({"text": self.text}, "data.text", None)]
        found = list(read_reviews(Path(self.file).expanduser(), None))
        if not found:
            raise MisconfigurationException(f"data.file: {self.file} holds no review")
        return found


class MaskedReviewsDataModule(ReviewsDataModule):
    """Reviews with words masked, see `MaskedReviews`. Labels are not looked at.

    What it trains on are the training reviews and those without labels. One that is longer than a row becomes several
    rows; nothing is cut off.
    """

    def __init__(
        self,
        reviews: ReviewSource,
        tokenizer: str,
        batch_size: int,
        max_tokens: int = 512,
        mask_fraction: float = 0.15,
        whole_words: bool = False,
        wordpieces: int = 8192,
        group_by_length: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Choose the reviews and what is masked.

        Args:
            reviews: where they come from.
            tokenizer: that of the base: a folder with a tokenizer.json, such a file, or a name on the hub; `wordpiece`
                learns one from the reviews.
            batch_size: rows in a batch, over all processes, at least 1.
            max_tokens: tokens of the longest row, special ones included, at least 3.
            mask_fraction: part of the tokens that is to be predicted, more than 0 to less than 1.
            whole_words: whether the tokens of a word are masked together; needs WordPiece.
            wordpieces: tokens to learn, for the tokenizer `wordpiece`.
            group_by_length: whether a batch has rows of about equal length, rather than any, and so less padding.
            num_workers: processes that load ahead; 0 loads in the training process.
            seed: of the order of the rows and of what is masked, 0 or greater.
        """
        super().__init__(reviews, tokenizer, batch_size, max_tokens, wordpieces, group_by_length, num_workers, seed)
        if not 0 < mask_fraction < 1:
            raise MisconfigurationException(f"data.mask_fraction is {mask_fraction}: it must be in (0, 1)")
        self.mask_fraction = mask_fraction
        self.whole_words = whole_words

    def setup(self, stage: str) -> None:
        """Read and tokenise what the stage needs.

        Raises:
            MisconfigurationException: there are no reviews, or the tokenizer cannot mask.
        """
        if self.tokenizer.mask_token_id is None:
            raise MisconfigurationException(f"data.tokenizer: {self.tokenizer_name} has no token to mask with")
        if self.whole_words and not continues_word(self.tokenizer).any():
            raise MisconfigurationException(
                f"data.whole_words: {self.tokenizer_name} does not mark the tokens within words by ##; leave it out"
            )
        for side in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]:
            if side not in self.sides:
                found = self.pretraining_reviews if side == "train" else list(self.source.reviews(side))
                self.sides[side] = self._masked(found, side)

    def train_dataloader(self) -> DataLoader:
        """Return the training rows; other tokens are masked in each epoch."""
        loader = super().train_dataloader()
        n, order = len(self.sides["train"]), loader.sampler.order
        loader.sampler.order = lambda epoch: order(epoch) + epoch * n
        return loader

    def _masked(self, reviews: Sequence[Review], side: Side) -> MaskedReviews:
        if not reviews:
            raise MisconfigurationException(f"data.reviews: there are no {side} reviews")
        ids = encode(self.tokenizer, [review.text for review in reviews])
        rows = [self._framed(part) for row in ids for part in _cut(row, self._room)]
        return MaskedReviews(rows, self.tokenizer, self.mask_fraction, self.whole_words, self.seed)


def _cut(ids: np.ndarray, n: int) -> list[np.ndarray]:
    """Cut a review into as few parts of at most `n` tokens as it takes, about equally long."""
    return np.array_split(ids, max(1, -(-len(ids) // n)))
