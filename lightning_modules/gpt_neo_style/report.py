"""How a model writes, beside the book that it learned from: measured on samples, and before against after."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.common.files import write_text
from lightning_modules.gpt_neo_style.style import BookStyle
from lightning_modules.runtime.drawing import DrawsAtTheEnd, save_figure
from lightning_modules.runtime.learning_curve import read_metric
from lightning_modules.runtime.samples import SampleText

PERPLEXITIES = {
    "val/perplexity": "perplexity, held-out passages of the book",
    "val/other/perplexity": "perplexity, another book",
    "val/base/perplexity": "perplexity, the base's own text",
}
MEASURES = {
    "distinct_1": "distinct words, of 50",
    "distinct_2": "distinct pairs of words, of 50",
    "layout": "lines in the book's layout",
    "vocabulary_overlap": "vocabulary that is the book's",
    "sentence_length": "words in a sentence",
    "longest_copy": "longest passage copied from the training text, words",
}


class StyleSamples(SampleText):
    """Samples whose style is measured beside the book: see `lightning_modules/style.py`.

    Logs `samples/distinct_1`, `samples/distinct_2`, `samples/layout`, `samples/vocabulary_overlap`,
    `samples/sentence_length` and `samples/longest_copy` at each validation, of the continuations without their prompts;
    and once, at step 0, the same of the held-out passages of the book as `book/...`.

    Args:
        prompts: Texts to continue.
        samples_per_prompt: Continuations of each prompt that are measured; the first is shown (at least 1).
        max_new_tokens: Length of a continuation, in tokens (at least 1).
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_k: Draw from this many likeliest tokens only; `null` for all.
        top_p: Draw from the fewest tokens that have this much probability together (0 to 1); `null` for all.
        seed: Seed of the draws.

    Raises:
        MisconfigurationException: If there is no prompt, or no sample of one.
    """

    def __init__(
        self,
        prompts: list[str],
        samples_per_prompt: int = 4,
        max_new_tokens: int = 120,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(prompts, max_new_tokens, temperature, top_k, top_p, seed)
        if samples_per_prompt < 1:
            raise MisconfigurationException(
                f"StyleSamples: samples_per_prompt must be at least 1, got {samples_per_prompt}"
            )
        self.samples_per_prompt = samples_per_prompt
        self.copied: list[str] = []
        self._book: BookStyle | None = None

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures what the book itself has, on passages that are not part of the yardstick."""
        held_out = pl_module.data.book_passages["val"]
        if trainer.global_step == 0 and held_out:
            measures = {f"book/{name}": value for name, value in self._style_of(pl_module).measure(held_out).items()}
            for logger in trainer.loggers:
                logger.log_metrics(measures, step=None)  # no step is done

    def _style_of(self, pl_module: L.LightningModule) -> BookStyle:
        if self._book is None:
            self._book = BookStyle.of("\n".join(pl_module.data.book_passages["train"]))
        return self._book

    def draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> list[str]:
        """Several continuations of each prompt, measured; the first of each is kept."""
        drawn = [self.continue_prompt(trainer, pl_module, prompt, self.samples_per_prompt) for prompt in self.prompts]
        texts = [whole_lines(text, prompt) for prompt, some in zip(self.prompts, drawn, strict=True) for text in some]
        book = self._style_of(pl_module)
        self.copied = book.longest_copy(texts)
        measures = {f"samples/{name}": value for name, value in book.measure(texts).items()}
        pl_module.log_dict(
            {name: value for name, value in measures.items() if math.isfinite(value)}, rank_zero_only=True
        )
        return [some[0] for some in drawn]

    def remark(self) -> str:
        """The longest passage that the newest samples have in common with the training text."""
        return (
            f"The longest passage of the last samples that stands in the training text: {len(self.copied)} words, "
            f"“{' '.join(self.copied)}”.\n"
        )


def whole_lines(continuation: str, prompt: str) -> str:
    """A continuation without the line that the prompt began and the line that the end cut off, if others are left.

    Args:
        continuation: What was written after the prompt.
        prompt: The prompt.
    """
    lines = continuation.split("\n")
    begun = 0 if prompt.endswith("\n") else 1
    return "\n".join(lines[begun:-1]) if any(line.strip() for line in lines[begun:-1]) else continuation


class StyleReport(DrawsAtTheEnd):
    """Writes `style.md` and `style.csv`, before against after, and draws `figures/style.png`, when the training ends.

    All of it is made from `metrics.csv`: before is step 0 (see `LossBeforeTraining`), after the best validation.
    """

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes and draws, and shows both to W&B."""
        super().on_train_end(trainer, pl_module)
        rows = report(Path(trainer.default_root_dir) / "metrics.csv")
        for logger in trainer.loggers:
            if rows and hasattr(logger, "log_table"):
                logger.log_table("style", columns=["measure", "before", "after", "the book"], data=rows)

    def draw(self, run: Path) -> list[Path]:
        """Writes the tables and draws the perplexities of the three texts.

        Args:
            run: The run's folder.
        """
        rows = report(run / "metrics.csv")
        if not rows:
            return []
        write_text(run / "style.csv", as_csv(rows))
        write_text(run / "style.md", as_markdown(rows))
        figure = run / "figures" / "style.png"
        draw_perplexities(run / "metrics.csv", figure)
        return [figure]


Row = tuple[str, float | None, float | None, float | None]


def report(metrics_csv: Path) -> list[Row]:
    """The measures of a run: name, before, after, and of the book itself.

    Args:
        metrics_csv: A run's `metrics.csv`.
    """
    steps, losses = read_metric(metrics_csv, "val/loss")
    trained = [(loss, step) for step, loss in zip(steps, losses, strict=True) if step]
    if not trained:
        return []
    best = min(trained)[1]

    def at(name: str, step: int) -> float | None:
        return dict(zip(*read_metric(metrics_csv, name), strict=True)).get(step)

    rows = [(label, at(name, 0), at(name, best), None) for name, label in PERPLEXITIES.items()]
    rows += [
        (label, at(f"samples/{name}", 0), at(f"samples/{name}", best), at(f"book/{name}", 0))
        for name, label in MEASURES.items()
    ]
    return [row for row in rows if row[2] is not None]


def as_csv(rows: Sequence[Row]) -> str:
    """The report as a CSV file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["measure", "before", "after", "the book"])
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(rows: Sequence[Row]) -> str:
    """The report as a Markdown table."""
    head = ["| measure | before | after | the book |", "|---|---|---|---|"]
    return "\n".join([*head, *(f"| {row[0]} | {' | '.join(map(_shown, row[1:]))} |" for row in rows), ""])


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if abs(value) < 1 else f"{value:,.1f}"


def draw_perplexities(metrics_csv: Path, figure: Path) -> None:
    """Draws how the perplexities of the three texts go with the step: what is learned, and what is forgotten.

    Args:
        metrics_csv: A run's `metrics.csv`.
        figure: PNG file to write.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no window system
    from matplotlib.ticker import LogLocator, NullLocator

    picture = Figure(figsize=(7, 4), layout="constrained")
    axes = picture.add_subplot()
    for (name, label), color in zip(PERPLEXITIES.items(), ("tab:orange", "tab:blue", "tab:gray"), strict=True):
        steps, values = read_metric(metrics_csv, name)
        if steps:
            axes.plot(steps, values, color=color, marker="o", markersize=4, label=label.removeprefix("perplexity, "))
            axes.annotate(f"{values[-1]:,.0f}", (steps[-1], values[-1]), textcoords="offset points", xytext=(4, 4))
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.1)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("perplexity")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(picture, figure)
