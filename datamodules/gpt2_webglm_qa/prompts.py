"""A record as the model reads it: the prompt by a template, then the answer, then the end-of-text token."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.gpt2_webglm_qa.cited_answers import Record, citations, renumber
from datamodules.tokenizers import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPLATE = "{references}\nQuestion: {question}\nAnswer: {answer}"
MissingCitations = Literal["keep", "strip", "drop"]


class Prompt(NamedTuple):
    """A question with its references, ready for the model to answer.

    Args:
        ids: Its tokens, (T,).
        references: Those that it holds, the last one perhaps cut.
        n_cut: 1 where it is, else 0.
    """

    ids: np.ndarray
    references: tuple[str, ...]
    n_cut: int


@dataclass(frozen=True)
class Example:
    """A record in tokens.

    Args:
        record: As the model sees it: with the references that are left, and the answer as it is learned.
        prompt_ids: The prompt, (T,).
        answer_ids: The answer and the end-of-text token, (N,).
    """

    record: Record
    prompt_ids: np.ndarray
    answer_ids: np.ndarray

    @property
    def n_places(self) -> int:
        """Places that it takes in a row of inputs: its last token is only predicted, and never read."""
        return len(self.prompt_ids) + len(self.answer_ids) - 1


class PromptEncoder:
    """Makes prompts and examples of bounded length, and counts what that costs.

    What is too long loses references, the last ones first; question and answer stay whole.

    Attributes:
        counts: What was cut and what was left out, over all examples so far.
        left_out: Where the records stand that were left out, by the reason.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        template: str = TEMPLATE,
        block_size: int = 1024,
        missing_citations: MissingCitations = "strip",
    ) -> None:
        """Reads the template.

        Args:
            tokenizer: Its end-of-text token ends an answer.
            template: Text with `{references}`, `{question}` and `{answer}`, each once and the answer last. A reference
                stands there as `[1] its text`, on a line of its own.
            block_size: Places that an example may take.
            missing_citations: What becomes of a mark that points at no reference, be it that there never was one or
                that it was cut: `keep`; `strip` removes the mark; `drop` leaves the record out.

        Raises:
            MisconfigurationException: If the template lacks a placeholder, or the tokenizer an end-of-text token.
        """
        for placeholder in ("{references}", "{question}", "{answer}"):
            if (times := template.count(placeholder)) != 1:
                raise MisconfigurationException(
                    f"data.template {template!r} has {placeholder} {times} times: give {{references}}, {{question}} "
                    "and {answer} once each"
                )
        if not template.endswith("{answer}"):
            raise MisconfigurationException(
                f"data.template {template!r} goes on after {{answer}}: end it there, what follows an answer is the "
                "end-of-text token"
            )
        if tokenizer.eos_token_id is None:
            raise MisconfigurationException(
                "data.tokenizer has no end-of-text token to end an answer with: choose one that has"
            )
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.missing_citations = missing_citations
        self.counts: Counter[str] = Counter()
        self.left_out: defaultdict[str, list[str]] = defaultdict(list)
        self._before, after = template.removesuffix("{answer}").split("{references}")
        # In GPT-2's vocabulary a word's token begins with the space before it: so that space is the answer's.
        self._after = after.rstrip()
        self._answer_start = after[len(self._after) :]
        (self._line_end,) = encode(tokenizer, ["\n"])

    def prompt(self, question: str, references: Sequence[str], answer_places: int) -> Prompt | None:
        """Makes a prompt that leaves so many places to the answer; `None` where the question alone is too long."""
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
        """Makes the examples of records, but of those that have to be left out.

        Args:
            records: See `datamodules.gpt2_webglm_qa.cited_answers`.
            answer_places: Places that the prompt leaves to an answer, at least; it always leaves those that the
                record's own needs.
        """
        return [example for record in records if (example := self._example(record, answer_places)) is not None]

    def _example(self, record: Record, answer_places: int) -> Example | None:
        answer_ids = self._answer_ids(record.answer)
        if not record.question.strip() or not record.answer.strip():
            return self._leave_out("without a question or an answer", record)
        prompt = self.prompt(record.question, record.references, max(answer_places, len(answer_ids) - 1))
        if prompt is None:
            return self._leave_out(f"whose question and answer are longer than {self.block_size} tokens", record)
        answer, cited, n_kept = record.answer, citations(record.answer), len(prompt.references)
        was_cut = any(n_kept < number <= len(record.references) for number in cited)
        never_was = any(not 0 < number <= len(record.references) for number in cited)
        self.counts["answers_citing_missing"] += never_was
        self.counts["answers_citing_cut"] += was_cut
        if (never_was or was_cut) and self.missing_citations != "keep":
            answer = renumber(answer, lambda number: number if 0 < number <= n_kept else None)
            if self.missing_citations == "drop" or not answer.strip():
                return self._leave_out("whose answer cites a reference that is not there", record)
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

    def _leave_out(self, reason: str, record: Record) -> None:
        self.counts["records_left_out"] += 1
        self.left_out[reason].append(record.place)
