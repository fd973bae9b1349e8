"""Byte-pair encoding as an experiment: a training step counts words, and merges are learned from the counts."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from tqdm import tqdm

from lightning_modules.base import GradientFreeModule
from lightning_modules.bpe.learner import learn_merges
from lightning_modules.bpe.metrics import TokenizerMetrics
from lightning_modules.bpe.rust_tokenizers import load_reference, rust_tokenizer
from lightning_modules.bpe.textbook import GPT2_PATTERN, GPT4_PATTERN, Merge, vocabulary, word_finder
from lightning_modules.bpe.tokenizer import to_tokenizer_json
from lightning_modules.bpe.word_counter import WordCounter
from lightning_modules.common.messages import say
from lightning_modules.common.ranges import NonNegativeInt, PositiveInt
from lightning_modules.common.tokenizer_threads import use_threads
from lightning_modules.runtime.processes import from_first
from lightning_modules.runtime.stages import validates_a_fit

if TYPE_CHECKING:  # imported where it is used: it is slow to import
    from tokenizers import Tokenizer

use_threads()  # before a loader or a counter starts its processes

PATTERNS = {"gpt2": GPT2_PATTERN, "gpt4": GPT4_PATTERN}


class BPEModule(GradientFreeModule):
    """A byte-level tokenizer (Radford et al., 2019), learned as `textbook.py` and `learner.py` describe.

    A training step adds the words of a batch, a list of texts, to the words counted so far. The merges are learned from
    the counts of all processes, before a validation and at the end of the training. Before that the vocabulary consists
    of the special tokens and the bytes.

    A validation and a test log `bytes_per_token` and the other metrics of `TokenizerMetrics`, and those of the
    reference as `reference/...`.

    Args:
        vocabulary_size: Tokens of the vocabulary, bytes and special tokens included: at least 256 + special tokens.
        pattern: Pattern of words; no token crosses the border of a word. `gpt2`, `gpt4`, or a regular expression of the
            `regex` module without capturing groups, whose matches joined must give back the text.
        special_tokens: Texts that are tokens as a whole and get the first ids. The first of them ends a text.
        model_max_length: Context of the models that will use the tokenizer, in tokens; written to its folder.
        reference: A tokenizer to compare with: a folder with `tokenizer.json` or with GPT-2's `vocab.json` and
            `merges.txt`, a `tokenizer.json`, or a name on the Hugging Face hub. `null` for none.
        count_workers: Processes that count words in place of this one; 0 counts in this one.
    """

    settings_of_next = ("data.source", "data.split", "data.val_fraction", "data.test_fraction")

    def __init__(
        self,
        vocabulary_size: PositiveInt = 8192,
        pattern: str = "gpt2",
        special_tokens: tuple[str, ...] = ("<|endoftext|>",),
        model_max_length: PositiveInt = 1024,
        reference: str | None = None,
        count_workers: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.pattern = PATTERNS.get(pattern, pattern)
        self.special_tokens = tuple(special_tokens)
        self.merges: list[Merge] = []
        if vocabulary_size < self.least_size:
            raise MisconfigurationException(
                f"model.vocabulary_size is {vocabulary_size}: 256 bytes and {len(special_tokens)} special tokens need "
                f"at least {self.least_size}"
            )
        with _error_in("model.special_tokens"):
            vocabulary(special_tokens=self.special_tokens)
        with _error_in("model.pattern"):
            word_finder(self.pattern)
        with _error_in("model.pattern: the tokenizers library", Exception):  # it raises nothing narrower
            self.rust_tokenizer([])
        self.counter = WordCounter(self.pattern, self.special_tokens, count_workers)
        self.compression: list[tuple[int, float]] = []  # vocabulary size, bytes per token of the last validation
        self.reference = load_reference(reference) if reference else None
        self.reference_name = (reference or "").rstrip("/").rsplit("/")[-1]
        self._words_learned_from = 0

    def on_fit_start(self) -> None:
        """Refuse to read the corpus more than once.

        Raises:
            MisconfigurationException: If `trainer.max_epochs` is not 1.
        """
        if self.trainer.max_epochs != 1:
            raise MisconfigurationException(
                f"trainer.max_epochs is {self.trainer.max_epochs}: give 1, since a second pass would count the "
                "same words again"
            )

    def training_step(self, texts: list[str], batch_idx: int) -> None:
        """Count the words of this process's share of a batch."""
        with _error_in("model.pattern"):
            self.counter.add(texts)
        if self.logging_is_due:
            self.log("train/bytes_seen", float(self.counter.n_bytes), sync_dist=True, reduce_fx="sum")
        self.count_step()

    def on_train_epoch_end(self) -> None:
        """Learn the merges, unless a validation after the last batch did."""
        self.learn()
        self.counter.close()

    def learn(self) -> None:
        """Learn the merges from the counts of all processes on the first process, and give them to all."""
        self._gather_counts()
        self.merges = from_first(self.trainer, self._learned)

    def _learned(self) -> list[Merge]:
        """Return the merges of the words of this process; they are learned again if words have been added."""
        if self.counter.words.total() != self._words_learned_from:
            self._words_learned_from = self.counter.words.total()
            size = self.hparams.vocabulary_size
            wanted = size - self.least_size
            with tqdm(desc="learning merges", total=wanted, unit="merge", disable=None) as bar, _error_in("data"):
                self.merges = learn_merges(
                    self.counter.words, size, self.special_tokens, progress=lambda learned: bar.update(learned - bar.n)
                )
            if self.vocabulary_size < size:
                say(
                    f"the corpus ran out of pairs: learned {len(self.merges)} of {wanted} merges, so the vocabulary "
                    f"has {self.vocabulary_size} tokens, not {size}; give more text"
                )
        return self.merges

    def _gather_counts(self) -> None:
        """Move the counts of all processes to the first one, which keeps their sum."""
        with _error_in("model.pattern"):
            self.counter.wait()
        if self.trainer.world_size == 1:
            return
        gathered: list[Any] | None = [None] * self.trainer.world_size if self.global_rank == 0 else None
        torch.distributed.gather_object((self.counter.words, self.counter.n_bytes), gathered)
        self.counter.words, self.counter.n_bytes = Counter(), 0
        for words, n_bytes in gathered or ():
            self.counter.words.update(words)
            self.counter.n_bytes += n_bytes

    def on_validation_start(self) -> None:
        """Choose the tokenizers to evaluate; in a fit, learn first and add smaller vocabularies."""
        sizes: list[int] = []
        if validates_a_fit(self.trainer):
            self.learn()
            sizes = self.smaller_sizes()
        self.val_metrics = self._metrics(sizes)

    def on_test_start(self) -> None:
        """Choose the tokenizers to evaluate."""
        self.test_metrics = self._metrics()

    def _metrics(self, sizes: Iterable[int] = ()) -> TokenizerMetrics:
        tokenizers = {str(size): self.rust_tokenizer(self.merges[: size - self.least_size]) for size in sizes}
        tokenizers[""] = self.rust_tokenizer(self.merges)
        if self.reference is not None:
            tokenizers["reference/"] = self.reference
        return TokenizerMetrics(tokenizers, self.pattern).to(self.device)

    def evaluation_step(self, texts: list[str], metrics: TokenizerMetrics) -> None:
        """Update the metrics with this process's share of a batch."""
        with _error_in("model.pattern"):  # it may lose nothing of the training texts
            metrics.update(texts)

    def evaluation_results(self, metrics: TokenizerMetrics, split: str) -> Mapping[str, Tensor]:
        """Return the results of the tokenizer and of the reference; keep the compression of the smaller ones."""
        results = metrics.compute()
        by_size = {int(name): results.pop(name) for name in list(results) if name.isdecimal()}
        if validates_a_fit(self.trainer):
            by_size[self.vocabulary_size] = results[""]
            self.compression = [(size, float(result["bytes_per_token"])) for size, result in by_size.items()]
        return {prefix + name: value for prefix, result in results.items() for name, value in result.items()}

    def smaller_sizes(self) -> list[int]:
        """Return the size without merges, then the powers of two between it and the size of the vocabulary."""
        powers = (2**power for power in range(self.vocabulary_size.bit_length()))
        return [self.least_size, *(size for size in powers if self.least_size < size < self.vocabulary_size)]

    @property
    def least_size(self) -> int:
        """Size of the vocabulary without merges."""
        return 256 + len(self.special_tokens)

    @property
    def vocabulary_size(self) -> int:
        """Number of special tokens, bytes and results of the merges learned so far."""
        return len(vocabulary(self.merges, self.special_tokens))

    def rust_tokenizer(self, merges: Sequence[Merge]) -> "Tokenizer":
        """Return the tokenizer of some merges, run by the `tokenizers` library."""
        return rust_tokenizer(to_tokenizer_json(merges, self.special_tokens, self.pattern))

    def token_counts(self) -> np.ndarray:
        """Return how often each token occurs in the text that was counted, (V,) int64; on the first process."""
        content = to_tokenizer_json(self.merges, self.special_tokens, self.pattern)
        content["pre_tokenizer"] = content["pre_tokenizer"]["pretokenizers"][1]  # the words are not split again
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
        """Write the folder of the tokenizer for `AutoTokenizer.from_pretrained`.

        The first special token is the begin, the end and the unknown token, as in GPT-2.
        """
        from transformers import PreTrainedTokenizerFast

        roles = dict.fromkeys(("bos_token", "eos_token", "unk_token"), next(iter(self.special_tokens), None))
        PreTrainedTokenizerFast(
            tokenizer_object=self.rust_tokenizer(self.merges), model_max_length=self.hparams.model_max_length, **roles
        ).save_pretrained(folder)

    def next_command(self, run: str) -> str:
        """Return the command that pretrains a decoder with the tokenizer."""
        return f"llm-train fit -c decoder_pretrain/offline --data.tokenizer {run}/tokenizer"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counts of all processes and the merges, as tensors."""
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
        """Restore the merges, and the counts on the first process; refuse another pattern or special tokens."""
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


@contextmanager
def _error_in(what: str, kind: type[Exception] = ValueError) -> Iterator[None]:
    """Raise an error in the block as a `MisconfigurationException` that names the setting `what`."""
    try:
        yield
    except kind as error:
        raise MisconfigurationException(f"{what}: {error}") from error


def _pack(strings: Iterable[bytes]) -> dict[str, Tensor]:
    """Return byte strings as two tensors, which a checkpoint may hold: all bytes, and the length of each string."""
    strings = list(strings)
    return {
        "bytes": torch.from_numpy(np.frombuffer(b"".join(strings), np.uint8).copy()),
        "lengths": torch.tensor([len(string) for string in strings], dtype=torch.int64),
    }


def _unpack(packed: dict[str, Tensor]) -> list[bytes]:
    """Return the strings that `_pack` was given."""
    joined = packed["bytes"].numpy().tobytes()
    ends = accumulate(packed["lengths"].tolist(), initial=0)
    return [joined[start:end] for start, end in pairwise(ends)]
