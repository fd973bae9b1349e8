"""Records of question, references and cited answer, as rows of tokens in which only the answers are learned."""

import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import ExperimentDataModule
from datamodules.gpt2_webglm_qa.cited_answers import Citations, Order, Record, RecordSource, Side, arrange
from datamodules.gpt2_webglm_qa.packing import best_fit
from datamodules.gpt2_webglm_qa.prompts import TEMPLATE, Example, MissingCitations, PromptEncoder
from datamodules.tokenizers import WithTokenizer, load_tokenizer, token_byte_lengths
from lightning_modules.common.targets import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class GPT2WebGLMQADataModule(WithTokenizer, ExperimentDataModule):
    """Questions with references and answers that cite them, for instruction tuning.

    A batch has rows of `block_size` places, with one record in each or several one after the other (see `Rows`).
    """

    def __init__(
        self,
        records: RecordSource,
        block_size: int,
        batch_size: int,
        tokenizer: str,
        template: str = TEMPLATE,
        references: Order = "given",
        citations: Citations = "keep",
        missing_citations: MissingCitations = "strip",
        prompt_loss_weight: float = 0.0,
        packing: bool = True,
        max_record_tokens: int | None = None,
        max_answer_tokens: int = 256,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Choose the records and how the model reads them.

        Args:
            records: where they come from.
            block_size: places in a row, at least 1: the context that the model trains on.
            batch_size: rows in a batch, over all processes, at least 1.
            tokenizer: that of the base: a folder with a tokenizer.json, such a file, or a name on the hub.
            template: the prompt, with `{references}`, `{question}` and `{answer}` in it, each once and the answer last.
                A reference stands there as `[1] its text`, on a line of its own.
            references: their order: `given`, as the records have it; `shuffled`, by the question and, of records to
                train on, the seed; `none` leaves them out. The citation marks follow.
            citations: what becomes of the marks: `keep`; `strip` removes them; `renumber` moves the cited references to
                the front, in the order in which the answer cites them.
            missing_citations: what becomes of a mark that points at no reference, be it that there never was one or
                that it was cut: `keep`; `strip` removes the mark; `drop` leaves the record out. They are counted.
            prompt_loss_weight: weight of a prompt's token in the loss, 0 to 1; a token of the answer has 1.
            packing: whether a row holds several records, kept apart, or one and padding.
            max_record_tokens: places that a record may take, at most and by default `block_size`. A longer one loses
                references, the last ones first; a question and an answer are never cut.
            max_answer_tokens: tokens of a generated answer, at least 1; the prompt is cut to leave them room.
            num_workers: processes that load ahead; 0 loads in the training process.
            seed: of the order of the rows and the shuffling of references, 0 or greater.
        """
        super().__init__(batch_size, num_workers, seed)
        if block_size < 1:
            raise MisconfigurationException(f"data.block_size is {block_size}: it must be at least 1")
        if not 0 <= prompt_loss_weight <= 1:
            raise MisconfigurationException(f"data.prompt_loss_weight is {prompt_loss_weight}: it must be in [0, 1]")
        max_record_tokens = block_size if max_record_tokens is None else max_record_tokens
        if not 1 <= max_record_tokens <= block_size:
            raise MisconfigurationException(
                f"data.max_record_tokens is {max_record_tokens}: it must be between 1 and data.block_size {block_size}"
            )
        if not 1 <= max_answer_tokens < block_size:
            raise MisconfigurationException(
                f"data.max_answer_tokens is {max_answer_tokens}: it must be at least 1, and leave room for a prompt in "
                f"data.block_size {block_size}"
            )
        self.source = records
        self.block_size = block_size
        self.tokenizer_name = tokenizer
        self.template = template
        self.references = references
        self.citations = citations
        self.missing_citations = missing_citations
        self.prompt_loss_weight = prompt_loss_weight
        self.packing = packing
        self.max_record_tokens = max_record_tokens
        self.max_answer_tokens = max_answer_tokens
        self.rows: dict[Side, Rows] = {}
        self.counts: dict[Side, dict[str, float]] = {}  # what was cut and left out, see `PromptEncoder`
        self.encoder(max_record_tokens)  # a template without its placeholders is found before anything is loaded

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer."""
        return load_tokenizer(self.tokenizer_name)

    @staticmethod
    def prompts(tokenizer: "PreTrainedTokenizerFast", arguments: dict[str, Any]) -> PromptEncoder:
        """Return what makes the prompts of a run that is over.

        Args:
            tokenizer: the run's own.
            arguments: the arguments of its datamodule.
        """
        return PromptEncoder(tokenizer, arguments["template"], arguments["block_size"])

    def encoder(self, max_tokens: int) -> PromptEncoder:
        """Return what makes prompts of at most so many tokens."""
        return PromptEncoder(self.tokenizer, self.template, max_tokens, self.missing_citations)

    def prepare_data(self) -> None:
        """Download or make the records, on one process a machine."""
        self.source.prepare()

    def setup(self, stage: str) -> None:
        """Read, tokenise and pack the records, and say what was cut.

        Raises:
            MisconfigurationException: a side that this stage needs has no records.
        """
        for side in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ()):
            if side not in self.rows:
                self.rows[side] = self._prepare(side, needed=(stage, side) != ("fit", "val"))

    def train_dataloader(self) -> DataLoader:
        """Return the rows to train on, shuffled in each epoch; what shares a row is the same in all."""
        return self.training_loader(self.rows["train"], len(self.rows["train"]))

    def val_dataloader(self) -> DataLoader | list:
        """Return the rows to validate on; nothing where there are none."""
        return self._all("val")

    def test_dataloader(self) -> DataLoader | list:
        """Return the rows to test on."""
        return self._all("test")

    def questions(self, side: Side, n: int) -> list[Example]:
        """Return up to `n` questions, spread over a side, whose prompts leave room for `max_answer_tokens`."""
        found = self.encoder(self.block_size).examples(self._arranged(side), self.max_answer_tokens)
        return [found[number * len(found) // n] for number in range(n)] if len(found) > n else found

    def _arranged(self, side: Side) -> Iterator[Record]:
        seed = self.seed if side == "train" else 0  # what is held out is the same for all seeds
        return (arrange(record, self.references, self.citations, seed) for record in self.source.records(side))

    def _prepare(self, side: Side, needed: bool) -> "Rows":
        encoder = self.encoder(self.max_record_tokens)
        examples = encoder.examples(self._arranged(side))
        for reason, places in encoder.left_out.items():
            more = f" and {len(places) - 1:,} more" if len(places) > 1 else ""
            say(f"{side}: left out {places[0]}{more}, {reason}")
        if not examples and needed:
            raise MisconfigurationException(f"data.records: there are no {side} records that can be used")
        sizes = [example.n_places for example in examples]
        packed = best_fit(sizes, self.block_size) if self.packing else [[number] for number in range(len(examples))]
        rows = Rows(
            examples,
            packed,
            self.block_size,
            self.prompt_loss_weight if side == "train" else 0.0,
            token_byte_lengths(self.tokenizer),
            self.tokenizer.eos_token_id if self.pad_token_id is None else self.pad_token_id,
        )
        self.counts[side] = {
            **encoder.counts,
            "rows": len(rows),
            "fill": sum(sizes) / max(1, len(rows) * self.block_size),
        }
        if examples:
            say(f"{side}: {_in_words(self.counts[side], self.missing_citations)}")
        return rows

    def _all(self, side: Side) -> DataLoader | list:
        rows = self.rows[side]
        return self.evaluation_loader(rows, torch.arange(len(rows))) if len(rows) else []


@rank_zero_only
def say(line: str) -> None:
    """Tell the user something."""
    print(line, file=sys.stderr)


def _in_words(counts: dict[str, float], missing_citations: MissingCitations) -> str:
    become = {"keep": "kept", "strip": "marks stripped", "drop": "left out"}[missing_citations]
    return (
        "{records:,} records in {rows:,} rows, {fill:.1%} full; "
        "references shortened {references_shortened:,}, removed {references_removed:,} of {references:,}; "
        "answers that cite a reference that never was {answers_citing_missing:,}, that was cut {answers_citing_cut:,} "
    ).format(**counts) + f"({become})"


class Rows(Dataset):
    """Rows of inputs with one record each, or several that do not see each other.

    A record of n tokens takes n - 1 places: each token but the last is read, and at its place the next is predicted.
    The positions of a record start at 0. In a row of several, that is how Transformers' models tell them apart: they
    attend within a stretch of growing positions alone (`masking_utils.find_packed_sequence_indices`). Padding comes
    last, and counts on, as if it belonged to the last record: nothing that is predicted before it ever sees it.

    A batch is:

    - `input_ids`, `position_ids`: (B, T) int64;
    - `targets`: (B, T) int64, the next token; -100 where it carries no loss;
    - `loss_weights`: (B, T), the weight of each target in the loss; 0 where there is none;
    - `mean_weight`: (), the sum of the weights that so many rows have on average;
    - `target_bytes`: (), the UTF-8 bytes of the targets.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        rows: Sequence[Sequence[int]],
        block_size: int,
        prompt_loss_weight: float,
        byte_lengths: np.ndarray,
        pad_token_id: int,
    ) -> None:
        """Lay out the rows.

        Args:
            examples: the records.
            rows: numbers of the records in each row; they fit.
            block_size: places in a row.
            prompt_loss_weight: weight of a prompt's token in the loss, 0 to 1.
            byte_lengths: (vocab,), UTF-8 bytes that each token stands for.
            pad_token_id: the input where a row has ended.
        """
        self.examples, self.rows, self.block_size = examples, rows, block_size
        self.prompt_loss_weight, self.byte_lengths, self.pad_token_id = prompt_loss_weight, byte_lengths, pad_token_id
        total = sum(self.weights_of(example).sum() for example in examples)
        self.weight_of_a_row = total / max(1, len(rows))

    def __len__(self) -> int:
        return len(self.rows)

    def weights_of(self, example: Example) -> np.ndarray:
        """Return the weight in the loss of each token of a record but the first, which nothing predicts."""
        n_prompt, n_answer = len(example.prompt_ids) - 1, len(example.answer_ids)
        return np.repeat(np.float32([self.prompt_loss_weight, 1.0]), [n_prompt, n_answer])

    def __getitem__(self, positions: Tensor) -> dict[str, Tensor]:
        """Return the rows of these numbers (B,)."""
        shape = (len(positions), self.block_size)
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        position_ids = np.zeros(shape, dtype=np.int64)
        targets = np.full(shape, IGNORED, dtype=np.int64)
        loss_weights = np.zeros(shape, dtype=np.float32)
        for b, row in enumerate(positions.tolist()):
            begin = 0
            for example in (self.examples[number] for number in self.rows[row]):
                ids = np.concatenate([example.prompt_ids, example.answer_ids]).astype(np.int64)
                place = np.s_[b, begin : begin + example.n_places]
                input_ids[place], targets[place] = ids[:-1], ids[1:]
                loss_weights[place] = self.weights_of(example)
                position_ids[b, begin:] = np.arange(self.block_size - begin)
                begin += example.n_places
        targets[loss_weights == 0] = IGNORED
        return {
            "input_ids": torch.from_numpy(input_ids),
            "position_ids": torch.from_numpy(position_ids),
            "targets": torch.from_numpy(targets),
            "loss_weights": torch.from_numpy(loss_weights),
            "mean_weight": torch.tensor(len(positions) * self.weight_of_a_row, dtype=torch.float32),
            "target_bytes": torch.tensor(int(self.byte_lengths[targets[targets >= 0]].sum())),
        }
