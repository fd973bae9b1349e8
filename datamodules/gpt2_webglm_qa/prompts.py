"""Records as token ids: a prompt, made with a template, then the answer and the token that ends it.

The template is text of the user's, or that text within the chat template of an instruct model. Such a template has
special tokens, which the tokenizer knows by their characters. Only those of the template become special tokens: the
same characters in a question or a reference are text, so no record can end a message or begin another.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.gpt2_webglm_qa.chat_format import FIRST_LINE, parts_of
from datamodules.gpt2_webglm_qa.cited_answers import Record
from datamodules.tokenizers import encode, without_prefix
from lightning_modules.common.citation_marks import cited, renumber
from lightning_modules.common.messages import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPLATE = "{references}\nQuestion: {question}\nAnswer: {answer}"
_PLACEHOLDERS = ("{references}", "{question}", "{answer}")
MissingCitations = Literal["keep", "strip", "drop"]


class Prompt(NamedTuple):
    """Token ids of a question with references, (T,); the references in it; 1 if the last of them was cut, else 0."""

    ids: np.ndarray
    references: tuple[str, ...]
    n_cut: int


class _Piece(NamedTuple):
    """A piece of a template, and the tokenizer of the text there."""

    text: str
    tokenizer: "PreTrainedTokenizerFast"

    def ids(self, question: str = "") -> np.ndarray:
        """Return the token ids with a question in its place, (T,)."""
        return encode(self.tokenizer, [self.text.replace("{question}", question)])[0]


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

    A record that is too long loses references, the last ones first. A question or an answer is never cut. The pieces
    of a prompt are encoded one by one: no token is of two pieces.

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
        chat_template: bool = False,
        system_message: str | None = None,
    ) -> None:
        check_template(template)
        if chat_template:
            template, _ = in_chat_template(tokenizer, template, system_message)
        elif system_message is not None:
            raise MisconfigurationException(
                "data.system_message is for the chat template of an instruct model: set data.chat_template to true"
            )
        if tokenizer.eos_token_id is None:
            raise MisconfigurationException(
                "data.tokenizer has no end-of-text token to end an answer with: choose one that has"
            )
        self.tokenizer, self.block_size, self.missing_citations = tokenizer, block_size, missing_citations
        self.counts: Counter[str] = Counter()
        self.skipped: defaultdict[str, list[str]] = defaultdict(list)
        before, after, self._answer_start = parts_of(template, chat_template)
        self._special = _special_tokens(tokenizer) if chat_template else {}
        self._within = without_prefix(tokenizer)
        self._before, self._without_references = self._parts(before), self._parts(after, before)
        self._after = self._parts(after, "\n")
        self._of_first_mark, self._of_answer = map(self._tokenizer_after, (before, before + after))
        (self._line_end,) = encode(self._within, ["\n"])

    def _tokenizer_after(self, text: str) -> "PreTrainedTokenizerFast":
        """Return the tokenizer of a piece of text that follows another one, a special token, or nothing."""
        if not text:
            return self.tokenizer
        special = next((token for token in self._special if text.endswith(token)), None)
        if special is None or self._within is self.tokenizer:
            return self._within
        _, *ids = self.tokenizer(f"{special}a", add_special_tokens=False)["input_ids"]
        return self.tokenizer if ids == encode(self.tokenizer, ["a"])[0].tolist() else self._within

    def _parts(self, text: str, before: str = "") -> list[_Piece | np.ndarray]:
        """Return the pieces of a text that follows another one; those that are special tokens stand alone.

        Only the piece with `{question}` stays text; the others are the same in each record, and become token ids, (T,).
        """
        longest_first = sorted(self._special, key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if self._special else [text]
        befores = accumulate(pieces, initial=before)
        return [self._part(piece, before) for piece, before in zip(pieces, befores, strict=False) if piece]

    def _part(self, text: str, before: str) -> _Piece | np.ndarray:
        if text in self._special:
            return np.array([self._special[text]], dtype=np.uint32)
        piece = _Piece(text, self._tokenizer_after(before))
        return piece if "{question}" in text else piece.ids()

    def _ids_of(self, parts: Sequence[_Piece | np.ndarray], question: str) -> np.ndarray:
        """Return the token ids of pieces of the template with a question in its place, (T,)."""
        ids = [part.ids(question) if isinstance(part, _Piece) else part for part in parts]
        return np.concatenate([np.empty(0, dtype=np.uint32), *ids])

    def prompt(self, question: str, references: Sequence[str], answer_places: int) -> Prompt | None:
        """Return a prompt with room for `answer_places`, or `None` if the question is too long without references."""
        after = self._after if references else self._without_references
        before_ids, after_ids = (self._ids_of(parts, question) for parts in (self._before, after))
        marks = [f"[{number}]" for number in range(1, len(references) + 1)]
        texts = [" " + " ".join(reference.split()) for reference in references]
        ids = encode(self._within, [*marks, *texts])
        if marks and self._of_first_mark is not self._within:
            ids[:1] = encode(self._of_first_mark, marks[:1])
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
        if references and not kept:
            return self.prompt(question, (), answer_places)
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
        (ids,) = encode(self._of_answer, [self._answer_start + answer.strip()])
        return np.append(ids, np.uint32(self.tokenizer.eos_token_id))

    def _skip(self, reason: str, record: Record) -> None:
        self.counts["records_left_out"] += 1
        self.skipped[reason].append(record.place)


def check_template(template: str) -> None:
    """Check that a template has each placeholder once, and `{answer}` at its end.

    Raises:
        MisconfigurationException: If it has not.
    """
    for placeholder in _PLACEHOLDERS:
        if (times := template.count(placeholder)) != 1:
            raise MisconfigurationException(
                f"data.template {template!r} has {placeholder} {times} times: give each placeholder once"
            )
    if not template.endswith("{answer}"):
        raise MisconfigurationException(
            f"data.template {template!r} has text after {{answer}}: end it there, the end-of-text token follows"
        )


def in_chat_template(
    tokenizer: "PreTrainedTokenizerFast", template: str, system_message: str | None = None
) -> tuple[str, str]:
    """Return a template within the chat template of a tokenizer, and the token that ends an answer there.

    The text before `{answer}` becomes the message of the user, and `{answer}` that of the assistant.

    Args:
        tokenizer: Tokenizer of an instruct model.
        template: Text with `{references}`, `{question}` and, at its end, `{answer}`.
        system_message: Message of the system; `None` leaves it to the chat template.

    Raises:
        MisconfigurationException: If the template lacks a placeholder, if there is no chat template or an exported one,
            if it refuses the messages or has no place for a part of them, or if no special token ends an answer.
    """
    check_template(template)
    if not tokenizer.chat_template:
        raise MisconfigurationException(
            "data.chat_template: the tokenizer has no chat template; give that of an instruct model, or set it to false"
        )
    if str(tokenizer.chat_template).startswith(FIRST_LINE):
        raise MisconfigurationException(
            "data.chat_template: the chat template of the tokenizer is that of an exported model, which has a "
            "data.template in it; give the tokenizer of its base, or the folder of its run"
        )
    messages = [] if system_message is None else [{"role": "system", "content": system_message}]
    messages += [
        {"role": "user", "content": template.removesuffix("{answer}").strip()},
        {"role": "assistant", "content": "{answer}"},
    ]
    try:
        chat = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates are programs, and raise errors of their own
        raise MisconfigurationException(
            f"data.chat_template: the chat template of the tokenizer refuses the messages ({first_line(error)})"
        ) from error
    if missing := [placeholder for placeholder in _PLACEHOLDERS if chat.count(placeholder) != 1]:
        raise MisconfigurationException(
            f"data.chat_template: the chat template of the tokenizer has no place for {', '.join(missing)}; set it to "
            "false, or give the tokenizer of another instruct model"
        )
    before, _, after = chat.partition("{answer}")
    end = next((token for token in _special_tokens(tokenizer) if after.lstrip().startswith(token)), None)
    if end is None:
        raise MisconfigurationException(
            "data.chat_template: no special token follows an answer in the chat template of the tokenizer, so the "
            "model could not learn to stop; set it to false"
        )
    return f"{before}{{answer}}", end


def _special_tokens(tokenizer: "PreTrainedTokenizerFast") -> dict[str, int]:
    """Return the ids of the special tokens of a tokenizer by their characters."""
    return {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
