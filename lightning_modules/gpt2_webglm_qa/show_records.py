"""A page with training records, in which the colour of a token shows its weight in the loss."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.common.files import write_text
from lightning_modules.common.ranges import PositiveInt
from lightning_modules.runtime.drawing import log_before_training
from lightning_modules.runtime.loggers import WandbRecorder

Spans = list[tuple[str, float]]  # text of a token, and its weight in the loss


class ShowRecords(L.Callback):
    """Callback that writes `records.html` before the first step: training records, coloured by the weights of tokens.

    The page also has the numbers of records that were cut or skipped, which are logged as `data/train/...`. A trial run
    (`trainer.fast_dev_run`) writes no files and prints the records to the terminal.

    The callback reads `tokenizer`, `rows` and `counts` of the data.

    Args:
        n_records: Number of records, spread evenly over the training split, at least 1.
    """

    def __init__(self, n_records: PositiveInt = 5) -> None:
        self.n_records = n_records

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the page and log the numbers, unless the run is resumed."""
        if trainer.global_step:
            return
        data = pl_module.data
        rows = data.rows["train"]
        records = [spans(data.tokenizer, rows, example) for example in rows.spread(self.n_records)]
        if trainer.fast_dev_run:
            print(*map(as_ansi, records), sep="\n\n")
            return
        counts = {f"data/{side}/{name}": float(n) for side in data.counts for name, n in data.counts[side].items()}
        page = as_html(records, counts)
        write_text(Path(trainer.default_root_dir) / "records.html", page)
        log_before_training(trainer, counts)
        for logger in trainer.loggers:
            if isinstance(logger, WandbRecorder):
                import wandb

                logger.experiment.log({"records": wandb.Html(page)})


def spans(tokenizer: Any, rows: Any, example: Any) -> Spans:
    """Return the text of each token of an example, and its weight in the loss."""
    ids = [*example.prompt_ids.tolist(), *example.answer_ids.tolist()]
    weights = [0.0, *rows.weights_of(example).tolist()]  # nothing predicts the first token
    return [(tokenizer.decode([token]), weight) for token, weight in zip(ids, weights, strict=True)]


def as_ansi(record: Spans) -> str:
    """Return a record for a terminal, with weight 1 on green and smaller weights on yellow."""
    colors = {0.0: "", 1.0: "\x1b[30;42m"}
    return "".join(
        f"{color}{text}\x1b[0m" if (color := colors.get(weight, "\x1b[30;43m")) else text for text, weight in record
    )


def as_html(records: Sequence[Spans], counts: dict[str, float]) -> str:
    """Return a page with records, in which the intensity of the green shows the weight of a token, and counts below."""
    span = '<span style="background: rgba(46, 160, 67, {:.2f})" title="weight {:g}">{}</span>'
    tokens = [[span.format(0.75 * weight, weight, html.escape(text)) for text, weight in record] for record in records]
    blocks = [f"<pre>{''.join(row)}</pre>" for row in tokens]
    lines = [f"<tr><td>{html.escape(name)}</td><td>{value:,.6g}</td></tr>" for name, value in counts.items()]
    return (
        '<!doctype html><meta charset="utf-8"><title>records</title>'
        "<style>body { font: 15px/1.5 sans-serif; margin: 2em; } "
        "pre { white-space: pre-wrap; border: 1px solid #ccc; padding: 1em; } "
        "span { border-right: 1px solid #eee; }</style>\n"
        "<p>Green tokens are targets of the loss; the others are only read.</p>\n"
        + "\n".join(blocks)
        + f"\n<table>{''.join(lines)}</table>\n"
    )
