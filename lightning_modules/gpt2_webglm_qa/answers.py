"""What the model answers to held-out questions: measured, written down, and put beside what is easily said."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.common.files import write_text
from lightning_modules.gpt2_webglm_qa import citations

# Who answers, and how the tables call it.
SYSTEMS = {
    "tuned": "this model",
    "untuned": "its base, untuned",
    "lead": "lead of the first reference",
    "best_reference": "lead of the reference nearest to the question",
}
Interval = tuple[float, float, float]  # a mean, and the ends of its interval


@dataclass
class Answer:
    """One answer of a model, or of a rule.

    Args:
        text: With its citation marks.
        ended: Whether an end-of-text token ended it; `None` for a rule.
        nats: What the gold answer costs the model, end-of-text token included; `None` for a rule.
        n_tokens: Tokens of the gold answer.
    """

    text: str
    ended: bool | None = None
    nats: float | None = None
    n_tokens: int = 0


class AnswerQuestions(L.Callback):
    """Lets the model answer held-out questions after each validation, and its base before the first step.

    Two rules answer too: the first sentences of the first reference, and those of the reference that shares most words
    with the question. The measures are those of `citations.py`, the share of answers that an end-of-text token ends,
    and the perplexity of the gold answers, all with 95 % bootstrap intervals over the questions. They are logged as
    `val/rougeL` and so on, those of the others as `val/untuned/rougeL`, `val/lead/rougeL`, `val/best_reference/rougeL`.

    `answers.md` in the run's folder has the table of the last validation and some of the questions with all answers,
    `answers.json` all of them. Weights & Biases gets a table of questions, references, gold and generated answers.

    Args:
        n_questions: How many questions, spread over the held-out records (at least 1).
        batch_size: Questions answered at a time (at least 1).
        lead_sentences: Length of the two rules' answers: about that of a gold answer (at least 1).
        n_shown: Questions in `answers.md` and in the table of W&B (0 or more).
    """

    def __init__(
        self, n_questions: int = 100, batch_size: int = 16, lead_sentences: int = 3, n_shown: int = 20
    ) -> None:
        if min(n_questions, batch_size, lead_sentences) < 1 or n_shown < 0:
            raise MisconfigurationException(
                "AnswerQuestions: n_questions, batch_size and lead_sentences must be at least 1, n_shown at least 0; "
                f"got {n_questions}, {batch_size}, {lead_sentences}, {n_shown}"
            )
        self.n_questions = n_questions
        self.batch_size = batch_size
        self.lead_sentences = lead_sentences
        self.n_shown = n_shown
        self._examples: Sequence[Any] | None = None
        self._answers: dict[str, list[Answer]] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Makes Lightning's sanity check a whole validation of the untuned base; a resumed run has none."""
        if stage == "fit" and not trainer.fast_dev_run:
            trainer.num_sanity_val_steps = math.inf

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Asks, measures and logs; before the first step it is the base that answers."""
        self._ask(trainer, pl_module, "val", trainer.limit_val_batches)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Asks, measures and logs, under `test/`."""
        self._ask(trainer, pl_module, "test", trainer.limit_test_batches)

    @rank_zero_only
    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs once what does not change: the measures of the base, and those of the rules."""
        metrics = {f"val/untuned/{name}": float(value) for name, value in _losses(trainer)}
        for system in self._answers:
            metrics |= _means(f"val/{system}/", self.measures(system))
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=None)  # no step is done
        if self._answers:
            self._write(trainer)

    def _ask(self, trainer: L.Trainer, pl_module: L.LightningModule, side: str, limit: int | float) -> None:
        if self._examples is None:
            # A run that is cut short by a limit on its batches has as few batches of questions.
            n = min(self.n_questions, limit * self.batch_size) if isinstance(limit, int) else self.n_questions
            self._examples = pl_module.data.questions(side, n)
            if self._examples:
                self._answers = trainer.strategy.broadcast(self._remembered(trainer)) | self._by_rule()
        if not self._examples:
            return
        self._answers["untuned" if trainer.sanity_checking else "tuned"] = self._answer(trainer, pl_module)
        if trainer.sanity_checking:
            return
        metrics = {}
        for system in ("tuned",) if trainer.state.fn == TrainerFn.FITTING else self._answers:
            metrics |= _means(f"{side}/" if system == "tuned" else f"{side}/{system}/", self.measures(system))
        # Of all ranks already; sync_dist only tells Lightning that they are the same everywhere.
        pl_module.log_dict(metrics, sync_dist=True)
        if not trainer.fast_dev_run:
            self._write(trainer)

    def _by_rule(self) -> dict[str, list[Answer]]:
        leads, best = [], []
        for example in self._examples:
            references = example.record.references
            leads.append(Answer(citations.lead(references, self.lead_sentences)))
            number = citations.best_reference(example.record.question, references)
            best.append(Answer(citations.lead(references, self.lead_sentences, number)))
        return {"lead": leads, "best_reference": best}

    def _answer(self, trainer: L.Trainer, pl_module: L.LightningModule) -> list[Answer]:
        """The model's answers to all questions; each process gives those of its share, and gets those of all."""
        rank, world_size = trainer.global_rank, trainer.world_size
        numbers = range(len(self._examples))[rank::world_size]
        # Questions of like length together, so that there is little padding.
        numbers = sorted(numbers, key=lambda number: len(self._examples[number].prompt_ids))
        mine: dict[int, Answer] = {}
        with trainer.precision_plugin.forward_context():
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                mine |= zip(batch, self._answer_batch(trainer, pl_module, batch), strict=True)
        if world_size > 1:
            shares: list[Any] = [None] * world_size
            torch.distributed.all_gather_object(shares, mine)
            mine = {number: answer for share in shares for number, answer in share.items()}
        return [mine[number] for number in range(len(self._examples))]

    def _answer_batch(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Sequence[int]) -> list[Answer]:
        tokenizer = pl_module.data.tokenizer
        end = tokenizer.eos_token_id
        examples = [self._examples[number] for number in batch]
        prompts, gold = [e.prompt_ids for e in examples], [e.answer_ids for e in examples]
        generated = pl_module.answer(prompts, pl_module.data.max_answer_tokens, end)
        nats = pl_module.answer_nats(prompts, gold).tolist()
        return [
            Answer(tokenizer.decode([t for t in tokens if t != end]).strip(), tokens[-1:] == [end], cost, len(right))
            for tokens, cost, right in zip(generated, nats, gold, strict=True)
        ]

    def measures(self, system: str) -> dict[str, Interval]:
        """The measures of a system, each with its interval.

        Args:
            system: One of `SYSTEMS`.
        """
        answers = self._answers[system]
        scores = [
            citations.score(answer.text, example.record.answer, example.record.references)
            for answer, example in zip(answers, self._examples, strict=True)
        ]
        columns = np.array(scores).T  # (measures, questions)
        found = {
            name: citations.bootstrap(column) for name, column in zip(citations.Scores._fields, columns, strict=True)
        }
        if answers[0].ended is not None:
            found["ends_with_eos"] = citations.bootstrap(np.array([float(answer.ended) for answer in answers]))
            nats, n_tokens = np.array([[answer.nats, answer.n_tokens] for answer in answers]).T
            mean, low, high = np.exp(citations.bootstrap(nats, n_tokens)).tolist()
            found["gold_perplexity"] = (mean, low, high)
        return found

    @rank_zero_only
    def _write(self, trainer: L.Trainer) -> None:
        table = {system: self.measures(system) for system in SYSTEMS if system in self._answers}
        questions = [
            {
                "question": example.record.question,
                "references": example.record.references,
                "gold": example.record.answer,
                "answers": {system: vars(self._answers[system][number]) for system in table},
            }
            for number, example in enumerate(self._examples)
        ]
        shown = questions[: self.n_shown]
        # Lightning counts no steps where it does not train: a test is of the checkpoint that it was given.
        step = trainer.global_step if trainer.state.fn == TrainerFn.FITTING else None
        content = {"step": step, "measures": table, "questions": questions}
        file = self._file(trainer)
        write_text(file, json.dumps(content, indent=1) + "\n")
        write_text(file.with_suffix(".md"), as_markdown(step, table, shown))
        columns = ["step", "question", "references", "gold", *table]
        rows = []
        for row in shown:
            texts = [answer["text"] for answer in row["answers"].values()]
            rows.append([step, row["question"], "\n".join(row["references"]), row["gold"], *texts])
        for logger in trainer.loggers:
            if hasattr(logger, "log_table"):
                logger.log_table("answers", columns=columns, data=rows)

    def _file(self, trainer: L.Trainer) -> Path:
        name = "answers" if trainer.state.fn == TrainerFn.FITTING else f"answers_{trainer.state.fn.value}"
        return Path(trainer.default_root_dir) / f"{name}.json"

    def _remembered(self, trainer: L.Trainer) -> dict[str, list[Answer]]:
        """The base's answers, as the fit of this run wrote them down, if they are to the same questions."""
        file = Path(trainer.default_root_dir) / "answers.json"
        if trainer.sanity_checking or not file.is_file():
            return {}
        saved = json.loads(file.read_text(encoding="utf-8"))["questions"]
        asked = [(example.record.question, list(example.record.references)) for example in self._examples]
        if [(row["question"], row["references"]) for row in saved] != asked or "untuned" not in saved[0]["answers"]:
            return {}
        return {"untuned": [Answer(**row["answers"]["untuned"]) for row in saved]}


def _losses(trainer: L.Trainer) -> list[tuple[str, Any]]:
    names = ("loss", "perplexity", "bits_per_byte")
    return [
        (name, trainer.callback_metrics[f"val/{name}"]) for name in names if f"val/{name}" in trainer.callback_metrics
    ]


def _means(prefix: str, measures: dict[str, Interval]) -> dict[str, float]:
    return {f"{prefix}{name}": mean for name, (mean, _, _) in measures.items()}


def as_markdown(step: int | None, table: dict[str, dict[str, Interval]], questions: Sequence[dict[str, Any]]) -> str:
    """The measures as a table, and questions with all that was answered.

    Args:
        step: Optimiser steps that the model had done, where it was asked in training.
        table: Measures by system.
        questions: As `answers.json` has them.
    """
    names = list(dict.fromkeys(name for measures in table.values() for name in measures))
    heading = "# Answers" if step is None else f"# Answers at step {step}"
    lines = [heading, "", "Means over the questions, with 95 % intervals by the bootstrap.", ""]
    lines += [f"| measure | {' | '.join(SYSTEMS[system] for system in table)} |", "|---" * (len(table) + 1) + "|"]
    for name in names:
        cells = [
            "{:.3f} ({:.3f} to {:.3f})".format(*measures[name]) if name in measures else ""
            for measures in table.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for row in questions:
        said = {"gold": row["gold"]} | {SYSTEMS[system]: row["answers"][system]["text"] for system in table}
        lines += ["", f"## {_in_a_line(row['question'])}", ""]
        lines += [f"[{number}] {_in_a_line(text)}\n" for number, text in enumerate(row["references"], start=1)]
        lines += [f"- {who}: {_in_a_line(text)}" for who, text in said.items()]
    return "\n".join(lines) + "\n"


def _in_a_line(text: str) -> str:
    return " ".join(text.split())
