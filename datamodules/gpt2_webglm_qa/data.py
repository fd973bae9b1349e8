"""Rows of tokens from records; only the tokens of the answers are targets of the loss."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import ExperimentDataModule
from datamodules.gpt2_webglm_qa.chat_format import as_chat_template
from datamodules.gpt2_webglm_qa.cited_answers import AnyRecords, Citations, Order, Record, arrange, records_of
from datamodules.gpt2_webglm_qa.packing import best_fit
from datamodules.gpt2_webglm_qa.prompts import TEMPLATE, Example, MissingCitations, PromptEncoder, in_chat_template
from datamodules.splits import Side, say_if_few
from datamodules.tokenizers import WithTokenizer, load_tokenizer, token_byte_lengths
from lightning_modules.common.messages import say
from lightning_modules.common.ranges import ClosedUnitInterval, NonNegativeInt, PositiveInt
from lightning_modules.common.targets import IGNORED, places_of_targets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


_DONE = {"keep": "marks kept", "strip": "marks stripped", "drop": "records skipped"}
_SUMMARY = (
    "{side}: {records:,} records in {rows:,} rows, {fill:.1%} full; "
    "references shortened {references_shortened:,}, removed {references_removed:,} of {references:,}; answers that "
    "cite a reference that was cut {answers_citing_cut:,} ({done}), with a number in brackets above those of the "
    "references {answers_citing_missing:,} (kept as text)"
)


class GPT2WebGLMQADataModule(WithTokenizer, ExperimentDataModule):
    """Questions with references and answers that cite them, for instruction tuning.

    A batch has rows of `block_size` positions, with one record in each row or several packed records (see `Rows`).

    Args:
        records: The records: a source, files of rows with the fields `question`, `answer` and `references`, or
            `hub:OWNER/NAME`; see `records_of`.
        block_size: Positions in a row, at least 1: the context length in training.
        batch_size: Rows in a batch, over all processes, at least 1.
        tokenizer: Tokenizer of the base, mostly under its name: see `datamodules.tokenizers.load_tokenizer`.
        template: Text of a record, with `{references}`, `{question}` and `{answer}`, each once and the answer last. A
            reference is written as `[1] its text`, on a line of its own.
        chat_template: Whether to write a record as the chat template of the tokenizer says, which is that of an
            instruct model: `template` before `{answer}` is the message of the user, the answer that of the assistant,
            and the token that ends a message ends the answer.
        system_message: Message of the system in a chat template; `null` leaves it to the template.
        references: Order of the references: `given` as in the record; `shuffled`, drawn from the question and, for the
            training split, the seed; `none` removes them. The citation marks follow their references.
        citations: Treatment of the citation marks: `keep` keeps them, `strip` removes them, and `renumber` moves the
            cited references to the front, in the order of their first citation.
        missing_citations: Treatment of citation marks whose reference was cut or removed: `keep` keeps the mark,
            `strip` removes it, and `drop` skips the record. They are counted. A number in brackets that no reference
            ever had, such as `[2019]`, is text and stays.
        prompt_loss_weight: Weight of a token of the prompt in the training loss, 0 to 1; a token of the answer has 1.
        packing: Whether to put several records into a row. If not, a row is one record and padding.
        max_record_tokens: Largest number of positions of a record, at most and by default `block_size`. A longer record
            loses references, the last ones first; a question or an answer is never cut.
        max_answer_tokens: Largest number of tokens of a generated answer, at least 1 and less than `block_size`. The
            prompt is cut to leave room for them.
        num_workers: Processes that load ahead; 0 loads in the training process.
        seed: Seed of the order of the rows and of `shuffled`, 0 or greater.

    Attributes:
        rows: Data set of each split that `setup` has prepared.
        counts: For each split, numbers of records, references and rows, and of what was cut or skipped.

    Raises:
        MisconfigurationException: If an argument does not fit `block_size`, or the template lacks a placeholder.
    """

    def __init__(
        self,
        records: AnyRecords,
        block_size: PositiveInt,
        batch_size: PositiveInt,
        tokenizer: str,
        template: str = TEMPLATE,
        references: Order = "given",
        citations: Citations = "keep",
        missing_citations: MissingCitations = "strip",
        prompt_loss_weight: ClosedUnitInterval = 0.0,
        packing: bool = True,
        max_record_tokens: PositiveInt | None = None,
        max_answer_tokens: PositiveInt = 256,
        num_workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
        chat_template: bool = False,
        system_message: str | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        max_record_tokens = block_size if max_record_tokens is None else max_record_tokens
        if max_record_tokens > block_size:
            raise MisconfigurationException(
                f"data.max_record_tokens is {max_record_tokens}: it must be at most data.block_size {block_size}"
            )
        if max_answer_tokens >= block_size:
            raise MisconfigurationException(
                f"data.max_answer_tokens is {max_answer_tokens}: it must be less than data.block_size {block_size}"
            )
        self.source, self.tokenizer_name, self.template = records_of(records), tokenizer, template
        self.chat_template, self.system_message = chat_template, system_message
        self.references, self.citations, self.missing_citations = references, citations, missing_citations
        self.block_size, self.packing, self.prompt_loss_weight = block_size, packing, prompt_loss_weight
        self.max_record_tokens, self.max_answer_tokens = max_record_tokens, max_answer_tokens
        self.rows: dict[Side, Rows] = {}
        self.counts: dict[Side, dict[str, float]] = {}
        self.encoder(max_record_tokens)  # checks the template before the records are loaded

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer; its end-of-text token is the one that ends an answer."""
        tokenizer = load_tokenizer(self.tokenizer_name)
        if self.chat_template:
            tokenizer.eos_token = in_chat_template(tokenizer, self.template, self.system_message)[1]
        return tokenizer

    @property
    def exported_chat_template(self) -> str:
        """Chat template with which other programs write the prompts."""
        if not self.chat_template:
            return as_chat_template(self.template)
        return as_chat_template(in_chat_template(self.tokenizer, self.template, self.system_message)[0], in_chat=True)

    @staticmethod
    def prompts(tokenizer: "PreTrainedTokenizerFast", arguments: dict[str, Any]) -> PromptEncoder:
        """Return the encoder of the prompts of a finished run, from its tokenizer and its constructor arguments."""
        return PromptEncoder(
            tokenizer,
            arguments["template"],
            arguments["block_size"],
            chat_template=arguments.get("chat_template", False),  # older runs have neither
            system_message=arguments.get("system_message"),
        )

    def encoder(self, max_tokens: int) -> PromptEncoder:
        """Return an encoder for the template of this datamodule, for examples of at most `max_tokens` positions."""
        return PromptEncoder(
            self.tokenizer,
            self.template,
            max_tokens,
            self.missing_citations,
            chat_template=self.chat_template,
            system_message=self.system_message,
        )

    def prepare_data(self) -> None:
        """Download or make the records, on one process of each machine."""
        self.source.prepare()

    def setup(self, stage: str) -> None:
        """Read, tokenise and pack the records, and print the numbers of those that were cut or skipped."""
        sides: dict[str, tuple[Side, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        for side in sides.get(stage, ()):
            if side not in self.rows:
                self.rows[side] = self._prepare(side, needed=(stage, side) != ("fit", "val"))

    def train_dataloader(self) -> DataLoader:
        """Return the loader of the training rows, shuffled in each epoch. The records of a row stay the same."""
        return self.training_loader(self.rows["train"], len(self.rows["train"]))

    def val_dataloader(self) -> DataLoader | list:
        """Return the loader of all validation rows, or `[]` if there are none."""
        rows = self.rows["val"]
        return self.evaluation_loader(rows, torch.arange(len(rows))) if len(rows) else []

    def test_dataloader(self) -> DataLoader:
        """Return the loader of all test rows."""
        return self.evaluation_loader(self.rows["test"], torch.arange(len(self.rows["test"])))

    def questions(self, side: Side, n: int) -> list[Example]:
        """Return at most `n` examples, spread evenly over a split, whose prompts leave room for `max_answer_tokens`."""
        found = self.encoder(self.block_size).examples(self._arranged(side), self.max_answer_tokens)
        return _spread(found, n)

    def _arranged(self, side: Side) -> Iterator[Record]:
        seed = self.seed if side == "train" else 0  # the held-out records are the same for all seeds
        return (arrange(record, self.references, self.citations, seed) for record in self.source.records(side))

    def _prepare(self, side: Side, needed: bool) -> "Rows":
        encoder = self.encoder(self.max_record_tokens)
        examples = encoder.examples(self._arranged(side))
        for reason, places in encoder.skipped.items():
            more = f" and {len(places) - 1:,} more" if len(places) > 1 else ""
            say(f"{side}: skipped {places[0]}{more}, {reason}")
        if not examples and needed:
            flags = self.source.flags_to_hold_out(side)
            advice = f"; hold some out when you train: {flags}" if flags and not encoder.skipped else ""
            raise MisconfigurationException(f"data.records: there are no {side} records that can be used{advice}")
        sizes = [example.n_places for example in examples]
        packed = best_fit(sizes, self.block_size) if self.packing else [[number] for number in range(len(examples))]
        weight = self.prompt_loss_weight if side == "train" else 0.0
        padding = self.tokenizer.eos_token_id if self.pad_token_id is None else self.pad_token_id
        rows = Rows(examples, packed, self.block_size, weight, token_byte_lengths(self.tokenizer), padding)
        fill = sum(sizes) / max(1, len(rows) * self.block_size)
        self.counts[side] = {**encoder.counts, "rows": len(rows), "fill": fill}
        if examples:
            say(_SUMMARY.format(side=side, done=_DONE[self.missing_citations], **self.counts[side]))
        say_if_few(side, len(examples), "records")
        return rows


@dataclass(eq=False)
class Rows(Dataset):
    """Rows of inputs, with one record in each row or several that do not attend to each other.

    A record of n tokens takes n - 1 positions: the last token is a target only. The position ids of each record start
    at 0. That separates the records of a row: the models of Transformers attend only within a sequence of increasing
    position ids (`masking_utils.find_packed_sequence_indices`). On a GPU, `cu_seqlens` separates them. The padding
    follows the last record and continues its position ids; as attention is causal, no record attends to it.

    A batch is:

    - `input_ids`, `position_ids`: (B, T) int64;
    - `cu_seqlens`: (N,) int32, 0 and the ends of the records and paddings in the B T positions of the batch, one row
      after another; the last is repeated, so that N is the same for all batches of B rows;
    - `targets`: (B, T) int64, the next token, or `IGNORED` if it carries no loss;
    - `places`: (N,) int64, the places of the targets in the B T positions, see `places_of_targets`;
    - `loss_weights`: (B, T) float32, the weight of each target in the loss, or 0 without a target;
    - `mean_weight`: (), B times the mean weight of a row over the split;
    - `target_bytes`: (), the number of UTF-8 bytes of the targets;
    - `n_tokens`: (), the number of tokens without padding.
    """

    examples: Sequence[Example]
    rows: Sequence[Sequence[int]]  # numbers of the examples in each row, which must fit into it
    block_size: int
    prompt_loss_weight: float
    byte_lengths: np.ndarray  # of each token, (vocab,)
    pad_token_id: int  # input after the last record of a row

    def spread(self, n: int) -> list[Example]:
        """Return at most `n` examples, spread evenly over all."""
        return _spread(self.examples, n)

    def __post_init__(self) -> None:
        total = sum(self.weights_of(example).sum() for example in self.examples)
        self.weight_of_a_row = total / max(1, len(self.rows))
        self.most_records = max(map(len, self.rows), default=0)  # in a row

    def __len__(self) -> int:
        return len(self.rows)

    def weights_of(self, example: Example) -> np.ndarray:
        """Return the weight in the loss of each token of a record except the first, (T - 1,) float32."""
        n_prompt, n_answer = len(example.prompt_ids) - 1, len(example.answer_ids)
        return np.repeat(np.float32([self.prompt_loss_weight, 1.0]), [n_prompt, n_answer])

    def __getitem__(self, positions: Tensor) -> dict[str, Tensor]:
        """Return a batch of the rows with these numbers, (B,) int64."""
        shape = (len(positions), self.block_size)
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        position_ids = np.zeros(shape, dtype=np.int64)
        targets = np.full(shape, IGNORED, dtype=np.int64)
        loss_weights = np.zeros(shape, dtype=np.float32)
        n_tokens, ends = 0, [0]
        for b, row in enumerate(positions.tolist()):
            begin = 0
            for example in (self.examples[number] for number in self.rows[row]):
                ids = np.concatenate([example.prompt_ids, example.answer_ids]).astype(np.int64)
                place = np.s_[b, begin : begin + example.n_places]
                input_ids[place], targets[place] = ids[:-1], ids[1:]
                loss_weights[place] = self.weights_of(example)
                position_ids[b, begin:] = np.arange(self.block_size - begin)
                begin += example.n_places
                ends.append(b * self.block_size + begin)
            n_tokens += begin
            ends.append((b + 1) * self.block_size)
        targets[loss_weights == 0] = IGNORED
        cu_seqlens = np.full(1 + len(positions) * (self.most_records + 1), input_ids.size, dtype=np.int32)
        cu_seqlens[: len(ends)] = ends
        return {
            "input_ids": torch.from_numpy(input_ids),
            "position_ids": torch.from_numpy(position_ids),
            "cu_seqlens": torch.from_numpy(cu_seqlens),
            "targets": torch.from_numpy(targets),
            "places": torch.from_numpy(places_of_targets(targets)),
            "loss_weights": torch.from_numpy(loss_weights),
            "mean_weight": torch.tensor(len(positions) * self.weight_of_a_row, dtype=torch.float32),
            "target_bytes": torch.tensor(int(self.byte_lengths[targets[targets >= 0]].sum())),
            "n_tokens": torch.tensor(n_tokens),
        }


def _spread(examples: Sequence[Example], n: int) -> list[Example]:
    n = min(n, len(examples))
    return [examples[number * len(examples) // n] for number in range(n)]
