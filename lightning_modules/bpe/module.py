"""Byte-pair encoding as an experiment: a training step counts words, and merges are learned from the counts."""

import json
import multiprocessing.pool
import os
import signal
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import Metric
from tqdm import tqdm

from lightning_modules.base import ExperimentModule
from lightning_modules.bpe import byte_pair_encoding as bpe
from lightning_modules.common.messages import say
from lightning_modules.runtime.stages import validates_a_fit

if TYPE_CHECKING:  # imported where used: the command starts sooner
    from tokenizers import Tokenizer

# Set, it keeps the Rust library from warning of the fork whenever a loader or a pool starts its processes.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

PATTERNS = {"gpt2": bpe.GPT2_PATTERN, "gpt4": bpe.GPT4_PATTERN}


class BPEModule(ExperimentModule):
    """A byte-level tokenizer (Radford et al., 2019), learned as in `models/byte_pair_encoding.py`.

    A training step adds the words of a batch to those counted so far; it has no loss and no gradient. The merges are
    learned, from all counts of all processes, when something needs them: a validation, or the end of the training.
    Before that the vocabulary is the bytes alone.

    Args:
        vocabulary_size: Tokens to have in the end, bytes and special tokens included: at least 256 + special tokens.
        pattern: How text is cut into words, which no token crosses: `gpt2`, `gpt4`, or a regular expression of the
            `regex` module without capturing groups, whose matches joined give back the text.
        special_tokens: Tokens that stand for themselves and take the first ids. The first of them ends a text.
        model_max_length: Context of the models that the tokenizer is for, in tokens; written beside it.
        reference: A tokenizer to measure beside ours: a folder with `tokenizer.json` or with GPT-2's `vocab.json` and
            `merges.txt`, a `tokenizer.json`, or a name on the Hugging Face hub. `null` for none.
        count_workers: Processes that count words beside this one; 0 counts here.

    Raises:
        MisconfigurationException: If one of these cannot be, or the reference is not there.
    """

    def __init__(
        self,
        vocabulary_size: int = 8192,
        pattern: str = "gpt2",
        special_tokens: tuple[str, ...] = ("<|endoftext|>",),
        model_max_length: int = 1024,
        reference: str | None = None,
        count_workers: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        # Lightning counts steps by its optimiser, and saves, logs and resumes by that count. So there is one, over
        # a parameter that nothing depends on.
        self.unused = nn.Parameter(torch.zeros(1))
        self.pattern = PATTERNS.get(pattern, pattern)
        self.special_tokens = tuple(special_tokens)
        self._check_arguments()
        self.counter = WordCounter(self.pattern, self.special_tokens, count_workers)
        self.merges: list[bpe.Merge] = []
        self.compression: list[tuple[int, float]] = []  # vocabulary size, bytes per token of the last validation
        self.reference = load_reference(reference) if reference else None
        self.reference_name = reference and reference.rstrip("/").rsplit("/")[-1]
        self._words_learned_from = 0

    def _check_arguments(self) -> None:
        named = self.hparams
        if named.model_max_length < 1:
            raise MisconfigurationException(f"model.model_max_length is {named.model_max_length}: give at least 1")
        if named.count_workers < 0:
            raise MisconfigurationException(f"model.count_workers is {named.count_workers}: give 0 or more")
        least = 256 + len(self.special_tokens)
        if named.vocabulary_size < least:
            raise MisconfigurationException(
                f"model.vocabulary_size is {named.vocabulary_size}: 256 bytes and {len(self.special_tokens)} special "
                f"tokens need at least {least}"
            )
        with _one_line_about("model.special_tokens"):
            bpe.vocabulary(special_tokens=self.special_tokens)
        with _one_line_about("model.pattern"):
            bpe.count_words([], self.pattern)
        with _one_line_about("model.pattern: the tokenizers library", Exception):  # it raises nothing narrower
            self.rust_tokenizer([])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser that only counts steps; the YAML's `optimizer:` has nothing to do here."""
        return torch.optim.SGD([self.unused], lr=0.0)

    def on_fit_start(self) -> None:
        """Refuses to count a corpus more than once.

        Raises:
            MisconfigurationException: If the run is to have another number of epochs than one.
        """
        if self.trainer.max_epochs != 1:
            raise MisconfigurationException(
                f"trainer.max_epochs is {self.trainer.max_epochs}: give 1, since a second pass would count the "
                "same words again"
            )

    def training_step(self, texts: list[str], batch_idx: int) -> None:
        """Counts the words of this process's share of a batch."""
        with _one_line_about("model.pattern"):
            self.counter.add(texts)
        if self.logging_is_due:
            self.log("train/bytes_seen", float(self.counter.n_bytes), sync_dist=True, reduce_fx="sum")
        self.optimizers().step()

    def on_train_epoch_end(self) -> None:
        """Learns, unless a validation after the last batch has done so."""
        self.learn()
        self.counter.close()

    def learn(self) -> None:
        """Learns the merges from what all processes have counted; the first process does, and tells the others.

        Raises:
            MisconfigurationException: If there were no words.
        """
        self._gather_counts()
        if self.global_rank == 0 and self.counter.words.total() != self._words_learned_from:
            self._words_learned_from = self.counter.words.total()
            wanted = self.hparams.vocabulary_size - 256 - len(self.special_tokens)
            with tqdm(desc="learning merges", total=wanted, unit="merge", disable=None) as bar, _one_line_about("data"):
                self.merges = bpe.learn_merges(
                    self.counter.words,
                    self.hparams.vocabulary_size,
                    self.special_tokens,
                    progress=lambda learned: bar.update(learned - bar.n),
                )
            if self.vocabulary_size < self.hparams.vocabulary_size:
                say(
                    f"the corpus ran out of pairs: learned {len(self.merges)} of {wanted} merges, so the vocabulary "
                    f"has {self.vocabulary_size} tokens, not {self.hparams.vocabulary_size}; give more text"
                )
        self.merges = self.trainer.strategy.broadcast(self.merges)

    def _gather_counts(self) -> None:
        """Moves all counts to the first process, which has the sum then, and keeps it."""
        with _one_line_about("model.pattern"):
            self.counter.wait()
        if self.trainer.world_size == 1:
            return
        mine = (self.counter.words, self.counter.n_bytes)
        gathered = [None] * self.trainer.world_size if self.global_rank == 0 else None
        torch.distributed.gather_object(mine, gathered)
        self.counter.words, self.counter.n_bytes = Counter(), 0
        for words, n_bytes in gathered or ():
            self.counter.words.update(words)
            self.counter.n_bytes += n_bytes

    def on_validation_start(self) -> None:
        """Learns from what has been counted, and measures vocabularies of all sizes up to the one asked for."""
        if validates_a_fit(self.trainer):
            self.learn()
        self._start_measuring(sizes=self.smaller_sizes() if validates_a_fit(self.trainer) else [])

    def validation_step(self, texts: list[str], batch_idx: int) -> None:
        """Adds this process's share of a batch to the measures of the validation text."""
        self._measure(texts)

    def on_validation_epoch_end(self) -> None:
        """Logs `val/bytes_per_token`, `val/tokens_per_word`, `val/vocabulary_use`, `val/single_byte_tokens`."""
        by_size = {size: measures.compute()["bytes_per_token"] for size, (_, measures) in self._by_size.items()}
        ours = self._log_measures("val")
        if validates_a_fit(self.trainer):
            by_size[self.vocabulary_size] = ours["bytes_per_token"]
            self.compression = [(size, float(value)) for size, value in by_size.items()]

    def on_test_start(self) -> None:
        """Measures the tokenizer of the checkpoint."""
        self._start_measuring(sizes=[])

    def test_step(self, texts: list[str], batch_idx: int) -> None:
        """Adds this process's share of a batch to the measures of the test text."""
        self._measure(texts)

    def on_test_epoch_end(self) -> None:
        """Logs the same measures as a validation, under `test/`."""
        self._log_measures("test")

    def smaller_sizes(self) -> list[int]:
        """The bytes with the special tokens alone, then the powers of two that lie below the vocabulary's size."""
        least, most = 256 + len(self.special_tokens), self.vocabulary_size
        powers = (2**power for power in range(most.bit_length()))
        return [size for size in (least, *(power for power in powers if power > least)) if size < most]

    def _start_measuring(self, sizes: list[int]) -> None:
        least = 256 + len(self.special_tokens)
        self._by_size = {size: self._measured(self.rust_tokenizer(self.merges[: size - least])) for size in sizes}
        self._by_name = {"": self._measured(self.rust_tokenizer(self.merges))}
        if self.reference is not None:
            self._by_name["reference/"] = self._measured(self.reference)

    def _measured(self, tokenizer: "Tokenizer") -> "tuple[Tokenizer, TokenizerMeasures]":
        return tokenizer, TokenizerMeasures(_single_bytes(tokenizer)).to(self.device)

    def _measure(self, texts: list[str]) -> None:
        n_bytes = sum(len(text.encode()) for text in texts)
        n_words = bpe.count_words(texts, self.pattern).total()
        for tokenizer, measures in (*self._by_size.values(), *self._by_name.values()):
            ids = [i for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False) for i in encoding.ids]
            measures.update(torch.tensor(ids, dtype=torch.int64, device=self.device), n_bytes, n_words)

    def _log_measures(self, split: str) -> dict[str, Tensor]:
        results = {name: measures.compute() for name, (_, measures) in self._by_name.items()}
        for name, result in results.items():
            # These are of all ranks already; sync_dist only tells Lightning that they are the same everywhere.
            self.log_dict({f"{split}/{name}{measure}": value for measure, value in result.items()}, sync_dist=True)
        return results[""]

    @property
    def vocabulary_size(self) -> int:
        """Tokens that there are: special tokens, bytes, and what the merges make."""
        return len(bpe.vocabulary(self.merges, self.special_tokens))

    def rust_tokenizer(self, merges: Sequence[bpe.Merge]) -> "Tokenizer":
        """The tokenizer of some merges, as the `tokenizers` library runs it."""
        return rust_tokenizer(bpe.to_tokenizer_json(merges, self.special_tokens, self.pattern))

    def token_counts(self) -> np.ndarray:
        """How often each token occurs in the text that was counted: (V,), on the first process."""
        content = bpe.to_tokenizer_json(self.merges, self.special_tokens, self.pattern)
        content["pre_tokenizer"] = content["pre_tokenizer"]["pretokenizers"][1]  # these are words: not to be cut again
        tokenizer = rust_tokenizer(content)
        total = np.zeros(self.vocabulary_size, np.int64)
        words = list(self.counter.words.items())
        for start in range(0, len(words), 2**16):  # an encoding takes far more memory than its word
            some = words[start : start + 2**16]
            encodings = tokenizer.encode_batch_fast([word.decode() for word, _ in some], add_special_tokens=False)
            ids = np.concatenate([encoding.ids for encoding in encodings])
            weights = np.repeat([count for _, count in some], [len(encoding) for encoding in encodings])
            total += np.bincount(ids, weights, minlength=len(total)).astype(np.int64)
        return total

    def save_pretrained(self, folder: Path) -> None:
        """Writes the tokenizer as `AutoTokenizer.from_pretrained` loads it.

        The first special token begins a text, ends it and stands for the unknown, as GPT-2's only one does.

        Args:
            folder: Folder to make.
        """
        from transformers import PreTrainedTokenizerFast

        roles = dict.fromkeys(("bos_token", "eos_token", "unk_token"), next(iter(self.special_tokens), None))
        PreTrainedTokenizerFast(
            tokenizer_object=self.rust_tokenizer(self.merges), model_max_length=self.hparams.model_max_length, **roles
        ).save_pretrained(folder)

    def next_command(self, run: str) -> str:
        """Pretrain on the tokenizer."""
        return f"llm-train fit -c experiments/decoder_pretrain/offline.yaml --data.tokenizer {run}/tokenizer"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the counts of all processes, and the merges, as plain tensors."""
        super().on_save_checkpoint(checkpoint)
        self._gather_counts()
        checkpoint["byte_pair_encoding"] = {
            "pattern": self.pattern,
            "special_tokens": self.special_tokens,
            "words": _pack(self.counter.words),
            "counts": torch.tensor(list(self.counter.words.values()), dtype=torch.int64),
            "n_bytes": self.counter.n_bytes,
            "merges": _pack([token for merge in self.merges for token in merge]),
            "words_learned_from": self._words_learned_from,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up the counts, on the first process, and the merges.

        Raises:
            MisconfigurationException: If the checkpoint's words were found in another way than this run's.
        """
        checkpoint["state_dict"]["unused"] = torch.zeros(1)  # older checkpoints have it without a dimension
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint["byte_pair_encoding"]
        for name in ("pattern", "special_tokens"):
            if saved[name] != getattr(self, name):
                raise MisconfigurationException(
                    f"ckpt_path: the checkpoint was made with model.{name} {saved[name]!r}, this run has "
                    f"{getattr(self, name)!r}; give the run's own config.yaml"
                )
        self.merges = list(zip(*[iter(_unpack(saved["merges"]))] * 2, strict=True))
        self._words_learned_from = saved["words_learned_from"]
        if self.global_rank == 0:
            self.counter.words = Counter(dict(zip(_unpack(saved["words"]), saved["counts"].tolist(), strict=True)))
            self.counter.n_bytes = saved["n_bytes"]


class WordCounter:
    """Counts the words of texts, in processes of its own if asked to.

    Attributes:
        words: How often each word occurs in the texts added; complete after `wait()`.
        n_bytes: UTF-8 bytes of the texts added.
    """

    def __init__(self, pattern: str, special_tokens: Sequence[str], workers: int) -> None:
        self.words: Counter[bytes] = Counter()
        self.n_bytes = 0
        self._count = partial(bpe.count_words, pattern=pattern, special_tokens=special_tokens)
        self._workers = workers
        self._pool: multiprocessing.pool.Pool | None = None
        self._pending: deque[multiprocessing.pool.AsyncResult] = deque()

    def add(self, texts: list[str]) -> None:
        """Counts some texts, now or soon."""
        self.n_bytes += sum(len(text.encode()) for text in texts)
        if self._workers == 0:
            self.words.update(self._count(texts))
            return
        if self._pool is None:
            self._pool = multiprocessing.Pool(self._workers, initializer=_leave_signals_to_the_parent)
        self._pending.append(self._pool.apply_async(self._count, (texts,)))
        self.wait(for_all_but=self._workers + 1)  # enough to keep all busy, and no queue that holds the corpus

    def wait(self, for_all_but: int = 0) -> None:
        """Waits for the counts of all texts but the last few."""
        while len(self._pending) > for_all_but:
            self.words.update(self._pending.popleft().get())

    def close(self) -> None:
        """Ends the processes: they leave by themselves unless something is left to count."""
        if self._pool is not None:
            if self._pending:
                self._pool.terminate()
            else:  # one that has just begun may not heed a signal yet
                self._pool.close()
            self._pool.join()
            self._pool = None


def _leave_signals_to_the_parent() -> None:
    """Ctrl-C goes to all processes of a terminal, but what to do is for the parent to say, who ends us by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class TokenizerMeasures(Metric):
    """How well a tokenizer does on all text seen, on all processes.

    - `bytes_per_token`: the compression; a byte alone has 1.
    - `tokens_per_word`: into how many tokens a word falls (its fertility); words are those of our pattern.
    - `vocabulary_use`: share of the vocabulary that occurs at all.
    - `single_byte_tokens`: share of the tokens that are single bytes, for which nothing was learned.

    Args:
        is_single_byte: Which tokens are, (V,) bool.
    """

    full_state_update = False

    def __init__(self, is_single_byte: Tensor) -> None:
        super().__init__()
        self.register_buffer("is_single_byte", is_single_byte)
        for name, shape in (("occurrences", is_single_byte.shape), ("bytes", ()), ("words", ())):
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, ids: Tensor, n_bytes: int, n_words: int) -> None:
        """Adds a text.

        Args:
            ids: Its tokens, (N,).
            n_bytes: Its length in UTF-8.
            n_words: Its words.
        """
        self.occurrences += torch.bincount(ids, minlength=len(self.occurrences))
        self.bytes += n_bytes
        self.words += n_words

    def compute(self) -> dict[str, Tensor]:
        """The measures by name."""
        tokens = self.occurrences.sum()
        return {
            "bytes_per_token": self.bytes / tokens,
            "tokens_per_word": tokens / self.words,
            "vocabulary_use": (self.occurrences > 0).float().mean(),
            "single_byte_tokens": self.occurrences[self.is_single_byte].sum() / tokens,
        }


def load_reference(name: str) -> "Tokenizer":
    """Loads a tokenizer to compare with.

    Args:
        name: See `BPEModule`.

    Raises:
        MisconfigurationException: If there is none, or its files are incomplete.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = Path(name).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    gpt2_files = [path / "vocab.json", path / "merges.txt"]
    try:
        if file.is_file():
            tokenizer = Tokenizer.from_file(str(file))
        elif all(part.is_file() for part in gpt2_files):
            tokenizer = Tokenizer(models.BPE.from_file(*map(str, gpt2_files)))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        elif path.is_dir():
            raise OSError("the folder holds neither tokenizer.json nor vocab.json and merges.txt")
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(name).backend_tokenizer
    except Exception as error:  # the two libraries raise nothing narrower
        raise MisconfigurationException(
            f"model.reference: {name!r} could not be loaded ({str(error).splitlines()[0]}); give a folder with "
            "tokenizer.json, or with GPT-2's vocab.json and merges.txt, or null"
        ) from error
    return _for_text_alone(tokenizer)


def rust_tokenizer(content: dict[str, object]) -> "Tokenizer":
    """Builds the `tokenizers` library's tokenizer from the content of a `tokenizer.json`."""
    from tokenizers import Tokenizer

    return _for_text_alone(Tokenizer.from_str(json.dumps(content)))


def _for_text_alone(tokenizer: "Tokenizer") -> "Tokenizer":
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _single_bytes(tokenizer: "Tokenizer") -> Tensor:
    """Which tokens are single bytes, as byte-level vocabularies spell them: (V,) bool."""
    ids = tokenizer.get_vocab()
    single = torch.zeros(max(ids.values()) + 1, dtype=torch.bool)
    single[[i for token, i in ids.items() if len(token) == 1]] = True
    return single


@contextmanager
def _one_line_about(what: str, kind: type[Exception] = ValueError) -> Iterator[None]:
    """Turns an error of the mathematics into a user's mistake that says where it was made."""
    try:
        yield
    except kind as error:
        raise MisconfigurationException(f"{what}: {error}") from error


def _pack(strings: Iterable[bytes]) -> dict[str, Tensor]:
    """Strings as two tensors, the bytes of all and the length of each: what a checkpoint may hold."""
    strings = list(strings)
    return {
        "bytes": torch.from_numpy(np.frombuffer(b"".join(strings), np.uint8).copy()),
        "lengths": torch.tensor([len(string) for string in strings], dtype=torch.int64),
    }


def _unpack(packed: dict[str, Tensor]) -> list[bytes]:
    """The strings that `_pack` was given."""
    joined = packed["bytes"].numpy().tobytes()
    ends = accumulate(packed["lengths"].tolist(), initial=0)
    return [joined[start:end] for start, end in pairwise(ends)]
