"""Records as token ids: a prompt, made with a template, then the answer and the end-of-text token."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.gpt2_webglm_qa.cited_answers import Record
from datamodules.tokenizers import encode
from lightning_modules.common.citation_marks import cited, renumber

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPLATE = "{references}\nQuestion: {question}\nAnswer: {answer}"
MissingCitations = Literal["keep", "strip", "drop"]


class Prompt(NamedTuple):
    """Token ids of a question with references, (T,); the references in it; 1 if the last of them was cut, else 0."""

    ids: np.ndarray
    references: tuple[str, ...]
    n_cut: int


@dataclass(frozen=True)
class Example:
    """A record as token ids: its prompt, (T,), and its answer with the end-of-text token, (N,).

    The record has the references in the prompt and the citation marks that are kept.
    """

    record: Record
    prompt_ids: np.ndarray
    answer_ids: np.ndarray

    @property
    def n_places(self) -> int:
        """Number of positions in a row of inputs. The last token is a target only."""
        return len(self.prompt_ids) + len(self.answer_ids) - 1


class PromptEncoder:
    """Converts records to prompts and examples of at most `block_size` positions; see `GPT2WebGLMQADataModule`.

    A record that is too long loses references, the last ones first. A question or an answer is never cut.

    Attributes:
        counts: Numbers of records and references, and of those that were cut or skipped.
        skipped: Places of the skipped records by reason.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        template: str = TEMPLATE,
        block_size: int = 1024,
        missing_citations: MissingCitations = "strip",
    ) -> None:
        for placeholder in ("{references}", "{question}", "{answer}"):
            if (times := template.count(placeholder)) != 1:
                raise MisconfigurationException(
                    f"data.template {template!r} has {placeholder} {times} times: give each placeholder once"
                )
        if not template.endswith("{answer}"):
            raise MisconfigurationException(
                f"data.template {template!r} has text after {{answer}}: end it there, the end-of-text token follows"
            )
        if tokenizer.eos_token_id is None:
            raise MisconfigurationException(
                "data.tokenizer has no end-of-text token to end an answer with: choose one that has"
            )
        self.tokenizer, self.block_size, self.missing_citations = tokenizer, block_size, missing_citations
        self.counts: Counter[str] = Counter()
        self.skipped: defaultdict[str, list[str]] = defaultdict(list)
        self._before, after = template.removesuffix("{answer}").split("{references}")
        # In GPT-2's vocabulary the token of a word contains the space before it, so that space is part of the answer.
        self._after = after.rstrip()
        self._answer_start = after[len(self._after) :]
        (self._line_end,) = encode(tokenizer, ["\n"])

    def prompt(self, question: str, references: Sequence[str], answer_places: int) -> Prompt | None:
        """Return a prompt with room for `answer_places`, or `None` if the question is too long without references."""
        before, after = (part.replace("{question}", question) for part in (self._before, self._after))
        marks = [f"[{number}]" for number in range(1, len(references) + 1)]
        texts = [" " + " ".join(reference.split()) for reference in references]
        before_ids, after_ids, *ids = encode(self.tokenizer, [before, after, *marks, *texts])
        room = self.block_size - answer_places - len(before_ids) - len(after_ids)
        if room < 0:
            return None
        parts, kept, n_cut = [before_ids], [], 0
        for mark_ids, text_ids, text in zip(ids[: len(marks)], ids[len(marks) :], texts, strict=True):
            room -= len(mark_ids) + len(self._line_end)
            if room < len(text_ids):
                text_ids = text_ids[: max(0, room)]
                text = self.tokenizer.decode(text_ids).rstrip("\N{REPLACEMENT CHARACTER}")
                if not text.strip():
                    break
                n_cut = 1
            room -= len(text_ids)
            parts += [mark_ids, text_ids, self._line_end]
            kept.append(text.strip())
        return Prompt(np.concatenate([*parts, after_ids]), tuple(kept), n_cut)

    def examples(self, records: Iterable[Record], answer_places: int = 0) -> list[Example]:
        """Return the examples of all records that fit, with room for `answer_places` or the gold answer."""
        return [example for record in records if (example := self._example(record, answer_places)) is not None]

    def _example(self, record: Record, answer_places: int) -> Example | None:
        answer_ids = self._answer_ids(record.answer)
        if not record.question.strip() or not record.answer.strip():
            self._skip("without a question or an answer", record)
            return None
        prompt = self.prompt(record.question, record.references, max(answer_places, len(answer_ids) - 1))
        if prompt is None:
            self._skip(f"whose question and answer are longer than {self.block_size} tokens", record)
            return None
        answer, numbers, n_kept = record.answer, cited(record.answer), len(prompt.references)
        gone = {number for number in numbers if n_kept < number <= record.n_numbered}
        self.counts["answers_citing_missing"] += any(number > record.n_numbered for number in numbers)
        self.counts["answers_citing_cut"] += bool(gone)
        if gone and self.missing_citations != "keep":
            answer = renumber(answer, lambda number: None if number in gone else number)
            if self.missing_citations == "drop" or not answer.strip():
                self._skip("whose answer cites a reference that is not there", record)
                return None
            answer_ids = self._answer_ids(answer)
        self.counts["records"] += 1
        self.counts["records_cut"] += prompt.n_cut or n_kept < len(record.references)
        self.counts["references"] += len(record.references)
        self.counts["references_shortened"] += prompt.n_cut
        self.counts["references_removed"] += len(record.references) - n_kept
        return Example(replace(record, answer=answer, references=prompt.references), prompt.ids, answer_ids)

    def _answer_ids(self, answer: str) -> np.ndarray:
        (ids,) = encode(self.tokenizer, [self._answer_start + answer.strip()])
        return np.append(ids, np.uint32(self.tokenizer.eos_token_id))

    def _skip(self, reason: str, record: Record) -> None:
        self.counts["records_left_out"] += 1
        self.skipped[reason].append(record.place)
