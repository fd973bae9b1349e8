"""Answers of the model to held-out questions: metrics, files, and a comparison with simple baselines."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.common.files import write_text
from lightning_modules.common.ranges import NonNegativeInt, PositiveInt
from lightning_modules.gpt2_webglm_qa import citations
from lightning_modules.runtime.drawing import log_before_training, show_table
from lightning_modules.runtime.processes import from_first, gathered
from lightning_modules.runtime.sharded import whole_model

# The systems that answer the questions, and their names in the tables.
SYSTEMS = {
    "tuned": "this model",
    "untuned": "its base, untuned",
    "lead": "lead of the first reference",
    "best_reference": "lead of the reference nearest to the question",
}
LOSSES = ("loss", "perplexity", "bits_per_byte")
Interval = tuple[float, float, float]  # a mean and the two ends of its interval


@dataclass
class Answer:
    """An answer and the cross entropy of the gold answer; the defaults are for answers of a rule."""

    text: str  # with citation marks
    ended: bool | None = None  # with the end-of-text token
    nats: float | None = None  # cross entropy of the gold answer and its end-of-text token
    n_tokens: int = 0  # of the gold answer


class AnswerQuestions(L.Callback):
    """Callback that asks the model held-out questions after each validation, and its base before the first step.

    Two rules answer too: the first sentences of the first reference, and those of the reference that shares the most
    words with the question. The metrics are those of `citations.py`, the share of answers that end with the end-of-text
    token, and the perplexity of the gold answers, with 95 % bootstrap intervals over the questions. They are logged as
    `val/rougeL` etc., and for the others as `val/untuned/rougeL`, `val/lead/rougeL`, `val/best_reference/rougeL`.

    In the run folder, `answers.md` has the table of the last validation and some questions with all answers, and
    `answers.json` has all questions. Weights & Biases gets a table of questions, references, gold answers and answers.

    The callback reads `questions(split, n)`, `tokenizer` and `max_answer_tokens` of the data.

    Args:
        n_questions: Number of questions, spread evenly over the split, at least 1.
        batch_size: Questions answered at a time, at least 1.
        lead_sentences: Number of sentences in an answer of the two rules, at least 1; gold answers have about as many.
        n_shown: Questions in `answers.md` and in the table of Weights & Biases, 0 or more.
    """

    def __init__(
        self,
        n_questions: PositiveInt = 100,
        batch_size: PositiveInt = 16,
        lead_sentences: PositiveInt = 3,
        n_shown: NonNegativeInt = 20,
    ) -> None:
        self.n_questions, self.batch_size = n_questions, batch_size
        self.lead_sentences, self.n_shown = lead_sentences, n_shown
        self._examples: Sequence[Any] = ()
        self._answers: dict[str, list[Answer]] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget the questions of an earlier stage, and let Lightning's sanity check be a whole validation of the base.

        A resumed run skips the sanity check.
        """
        self._examples, self._answers = (), {}
        if stage == "fit" and not trainer.fast_dev_run:
            trainer.num_sanity_val_steps = math.inf

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Answer the questions and log the metrics; before the first step, the model is the untuned base."""
        self._ask(trainer, pl_module, "val", trainer.limit_val_batches)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Answer the questions of the test split, and log the metrics as `test/...`."""
        self._ask(trainer, pl_module, "test", trainer.limit_test_batches)

    @rank_zero_only
    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the metrics that do not change during the run: those of the base and of the rules."""
        logged = trainer.callback_metrics
        metrics = {f"val/untuned/{n}": float(logged[f"val/{n}"]) for n in LOSSES if f"val/{n}" in logged}
        for system in self._answers:
            metrics |= self._means(system, f"val/{system}/")
        log_before_training(trainer, metrics)
        if self._answers:
            self._write(trainer)

    def _ask(self, trainer: L.Trainer, pl_module: L.LightningModule, side: str, limit: int | float) -> None:
        with whole_model(trainer, type(self).__name__) as usable:
            if usable:
                self._ask_whole(trainer, pl_module, side, limit)

    def _ask_whole(self, trainer: L.Trainer, pl_module: L.LightningModule, side: str, limit: int | float) -> None:
        if not self._examples:
            # A limit on the number of batches is a limit on the batches of questions too.
            n = min(self.n_questions, limit * self.batch_size) if isinstance(limit, int) else self.n_questions
            self._examples = pl_module.data.questions(side, n)
            if not self._examples:
                return
            self._answers = from_first(trainer, lambda: self._remembered(trainer)) | self._by_rule()
        self._answers["untuned" if trainer.sanity_checking else "tuned"] = self._answer(trainer, pl_module)
        if trainer.sanity_checking:
            return
        for system in ("tuned",) if trainer.state.fn == TrainerFn.FITTING else self._answers:
            # The answers are those of all ranks; sync_dist tells Lightning that the metrics are equal on all ranks.
            prefix = f"{side}/" if system == "tuned" else f"{side}/{system}/"
            pl_module.log_dict(self._means(system, prefix), sync_dist=True)
        if not trainer.fast_dev_run:
            self._write(trainer)

    def _by_rule(self) -> dict[str, list[Answer]]:
        answers: dict[str, list[Answer]] = {"lead": [], "best_reference": []}
        for record in (example.record for example in self._examples):
            best = citations.best_reference(record.question, record.references)
            for system, number in (("lead", 1), ("best_reference", best)):
                answers[system].append(Answer(citations.lead(record.references, self.lead_sentences, number)))
        return answers

    def _answer(self, trainer: L.Trainer, pl_module: L.LightningModule) -> list[Answer]:
        """Return the answers of the model to all questions; each process answers a share of them."""
        rank, world_size = trainer.global_rank, trainer.world_size
        share = range(len(self._examples))[rank::world_size]
        # Sorted by length, so that there is little padding.
        numbers = sorted(share, key=lambda number: len(self._examples[number].prompt_ids))
        mine: dict[int, Answer] = {}
        with trainer.precision_plugin.forward_context():
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                mine |= zip(batch, self._answer_batch(trainer, pl_module, batch), strict=True)
        answers = {number: answer for part in gathered(trainer, mine) for number, answer in part.items()}
        return [answers[number] for number in range(len(self._examples))]

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
        """Return the metrics of one of the `SYSTEMS`, with their intervals."""
        answers = self._answers[system]
        scores = [
            citations.score(answer.text, example.record.answer, example.record.references)
            for answer, example in zip(answers, self._examples, strict=True)
        ]
        columns = zip(citations.Scores._fields, np.array(scores).T, strict=True)
        found = {name: citations.bootstrap(column) for name, column in columns}
        if answers[0].ended is not None:
            found["ends_with_eos"] = citations.bootstrap(np.array([float(bool(answer.ended)) for answer in answers]))
            nats, n_tokens = np.array([[answer.nats, answer.n_tokens] for answer in answers]).T
            mean, low, high = np.exp(citations.bootstrap(nats, n_tokens)).tolist()
            found["gold_perplexity"] = (mean, low, high)
        return found

    def _means(self, system: str, prefix: str) -> dict[str, float]:
        return {f"{prefix}{name}": mean for name, (mean, _, _) in self.measures(system).items()}

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
        # Without training, `global_step` is 0 and not the step of the checkpoint.
        step = trainer.global_step if trainer.state.fn == TrainerFn.FITTING else None
        content = {"step": step, "measures": table, "questions": questions}
        name = "answers" if trainer.state.fn == TrainerFn.FITTING else f"answers_{trainer.state.fn.value}"
        file = Path(trainer.default_root_dir) / f"{name}.json"
        write_text(file, json.dumps(content, indent=1) + "\n")
        write_text(file.with_suffix(".md"), as_markdown(step, table, shown))
        rows = [
            [step, q["question"], "\n".join(q["references"]), q["gold"], *(a["text"] for a in q["answers"].values())]
            for q in shown
        ]
        show_table(trainer, "answers", ["step", "question", "references", "gold", *table], rows)

    def _remembered(self, trainer: L.Trainer) -> dict[str, list[Answer]]:
        """Return the answers of the base that an earlier fit of this run saved, if the questions are the same."""
        file = Path(trainer.default_root_dir) / "answers.json"
        if trainer.sanity_checking or not file.is_file():
            return {}
        saved = json.loads(file.read_text(encoding="utf-8"))["questions"]
        asked = [(example.record.question, list(example.record.references)) for example in self._examples]
        if [(row["question"], row["references"]) for row in saved] != asked or "untuned" not in saved[0]["answers"]:
            return {}
        return {"untuned": [Answer(**row["answers"]["untuned"]) for row in saved]}


def as_markdown(step: int | None, table: dict[str, dict[str, Interval]], questions: Sequence[dict[str, Any]]) -> str:
    """Return a page with a table of the metrics by system, and with questions and all their answers."""
    names = dict.fromkeys(name for measures in table.values() for name in measures)
    heading = "# Answers" if step is None else f"# Answers at step {step}"
    lines = [heading, "", "Means over the questions, with 95 % intervals by the bootstrap.", ""]
    lines += [f"| measure | {' | '.join(SYSTEMS[system] for system in table)} |", "|---" * (len(table) + 1) + "|"]
    for name in names:
        intervals = (column.get(name) for column in table.values())
        cells = ["{:.3f} ({:.3f} to {:.3f})".format(*interval) if interval else "" for interval in intervals]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for row in questions:
        answers = {"gold": row["gold"]} | {SYSTEMS[system]: row["answers"][system]["text"] for system in table}
        lines += ["", f"## {_in_a_line(row['question'])}", ""]
        lines += [f"[{number}] {_in_a_line(text)}\n" for number, text in enumerate(row["references"], start=1)]
        lines += [f"- {system}: {_in_a_line(text)}" for system, text in answers.items()]
    return "\n".join(lines) + "\n"


def _in_a_line(text: str) -> str:
    return " ".join(text.split())
