"""Metrics of style on samples of the model, and a report that compares them before and after training."""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.common import run_files
from lightning_modules.common.figures import annotate, new_figure, save_figure
from lightning_modules.common.files import write_csv, write_text
from lightning_modules.common.ranges import PositiveInt
from lightning_modules.gpt_neo_style.style import BookStyle
from lightning_modules.runtime.drawing import DrawsAtTheEnd, log_before_training, show_table
from lightning_modules.runtime.learning_curve import read_metric
from lightning_modules.runtime.samples import SampleText

PERPLEXITIES = {
    "val/perplexity": "perplexity, held-out passages of the book",
    "val/other/perplexity": "perplexity, another book",
    "val/base/perplexity": "perplexity, the base's own text",
}
STYLE_METRICS = {
    "distinct_1": "distinct words, of 50",
    "distinct_2": "distinct pairs of words, of 50",
    "layout": "lines in the book's layout",
    "vocabulary_overlap": "vocabulary that is the book's",
    "sentence_length": "words in a sentence",
    "longest_copy": "longest passage copied from the training text, words",
}
COLUMNS = ("measure", "before", "after", "the book")

Row = tuple[str, float | None, float | None, float | None]


class StyleSamples(SampleText):
    """Callback that continues prompts at each validation, and compares the style of the continuations with the book.

    It logs `samples/distinct_1`, `samples/distinct_2`, `samples/layout`, `samples/vocabulary_overlap`,
    `samples/sentence_length` and `samples/longest_copy` of the continuations without their prompts, and once, at step
    0, the same metrics of the held-out passages of the book as `book/...`.

    The callback reads `book_passages` of the data, the passages of the books by split.

    Args:
        samples_per_prompt: Continuations of each prompt to evaluate, at least 1; the first is shown.
        max_new_tokens: Length of a continuation, in tokens (at least 1).
        **kwargs: Arguments of `SampleText`: `prompts`, `temperature`, `top_k`, `top_p` and `seed`.
    """

    def __init__(self, samples_per_prompt: PositiveInt = 4, max_new_tokens: PositiveInt = 120, **kwargs: Any) -> None:
        super().__init__(max_new_tokens=max_new_tokens, **kwargs)
        self.samples_per_prompt = samples_per_prompt
        self.copied: list[str] = []
        self._book: BookStyle | None = None

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the metrics of the held-out passages, for comparison."""
        held_out = pl_module.data.book_passages["val"]
        if trainer.global_step == 0 and held_out:
            results = self._book_style(pl_module).evaluate(held_out)
            log_before_training(trainer, {f"book/{name}": value for name, value in results.items()})

    def _book_style(self, pl_module: L.LightningModule) -> BookStyle:
        if self._book is None:
            self._book = BookStyle("\n".join(pl_module.data.book_passages["train"]))
        return self._book

    def draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> list[str]:
        """Draw several continuations of each prompt, measure them, and return the first of each prompt."""
        drawn = [self.continue_prompt(trainer, pl_module, prompt, self.samples_per_prompt) for prompt in self.prompts]
        texts = [whole_lines(text, prompt) for prompt, some in zip(self.prompts, drawn, strict=True) for text in some]
        book = self._book_style(pl_module)
        self.copied = book.longest_copy(texts)
        measures = book.evaluate(texts).items()
        self.metrics = {f"samples/{name}": value for name, value in measures if math.isfinite(value)}
        return [some[0] for some in drawn]

    def remark(self) -> str:
        """Return the longest passage that the newest samples share with the training text."""
        return (
            f"The longest passage of the last samples that stands in the training text: {len(self.copied)} words, "
            f"“{' '.join(self.copied)}”.\n"
        )


def whole_lines(continuation: str, prompt: str) -> str:
    """Return a continuation without the line that the prompt began and the last line, if other lines remain."""
    lines = continuation.split("\n")
    begun = 0 if prompt.endswith("\n") else 1
    return "\n".join(lines[begun:-1]) if any(line.strip() for line in lines[begun:-1]) else continuation


class StyleReport(DrawsAtTheEnd):
    """Callback that writes `style.md` and `style.csv` and draws `figures/style.png` when the training ends.

    Both tables compare the metrics before training, at step 0 (see `LossBeforeTraining`), with those at the best
    validation. They are made from `metrics.csv`, also after a failure.
    """

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the tables, draw the figure, and show the figure and a table to the loggers."""
        super().on_train_end(trainer, pl_module)
        if rows := report(Path(trainer.default_root_dir) / run_files.METRICS):
            show_table(trainer, "style", COLUMNS, rows)

    def draw(self, run: Path) -> list[Path]:
        """Write the tables, draw the perplexities of the three texts, and return the file of the figure."""
        rows = report(run / run_files.METRICS)
        if not rows:
            return []
        write_csv(run / "style.csv", COLUMNS, rows)
        write_text(run / "style.md", as_markdown(rows))
        return [draw_perplexities(run / run_files.METRICS, run / "figures" / "style.png")]


def report(metrics_csv: Path) -> list[Row]:
    """Return the rows of the report: label, value before training, value after it, and value of the book itself."""
    metric = cache(lambda name: dict(zip(*read_metric(metrics_csv, name), strict=True)))  # value by step
    trained = {step: loss for step, loss in metric("val/loss").items() if step}
    if not trained:
        return []
    best = min(trained, key=trained.__getitem__)
    rows: list[Row] = [
        (label, metric(name).get(0), metric(name).get(best), None) for name, label in PERPLEXITIES.items()
    ]
    for name, label in STYLE_METRICS.items():
        samples, book = metric(f"samples/{name}"), metric(f"book/{name}")
        rows.append((label, samples.get(0), samples.get(best), book.get(0)))
    return [row for row in rows if row[2] is not None]


def as_markdown(rows: Sequence[Row]) -> str:
    """Return the report as a Markdown table."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {label} | {' | '.join(map(_shown, values))} |" for label, *values in rows]
    return "\n".join([*lines, ""])


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if abs(value) < 1 else f"{value:,.1f}"


def draw_perplexities(metrics_csv: Path, file: Path) -> Path:
    """Draw the perplexities of the three texts by step, to show learning and forgetting, and return the file."""
    from matplotlib.ticker import LogLocator, NullLocator

    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    for (name, label), color in zip(PERPLEXITIES.items(), ("tab:orange", "tab:blue", "tab:gray"), strict=True):
        steps, values = read_metric(metrics_csv, name)
        if steps:
            axes.plot(steps, values, color=color, marker="o", markersize=4, label=label.removeprefix("perplexity, "))
            annotate(axes, f"{values[-1]:,.0f}", (steps[-1], values[-1]), offset=(4, 6))
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.1, y=0.1)
    axes.set(xlabel="optimiser step", ylabel="perplexity")
    axes.grid(alpha=0.3)
    axes.legend()
    return save_figure(figure, file)
