"""What the model is trained on, token by token: which tokens it only reads, and which it learns to say."""

import html
from collections.abc import Sequence
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.common.files import write_text
from lightning_modules.runtime.loggers import WandbRecorder

Spans = list[tuple[str, float]]  # what a token stands for, and its weight in the loss


class ShowRecords(L.Callback):
    """Writes `records.html` before the first step: some training records, coloured by the weight of each token.

    Above them stands what was cut and what was left out to make them; the loggers get the same numbers as
    `data/train/...`. A trial run (`trainer.fast_dev_run`), which leaves no files, prints the records to the terminal.

    Args:
        n_records: How many records, spread over the training data (at least 1).
    """

    def __init__(self, n_records: int = 5) -> None:
        if n_records < 1:
            raise MisconfigurationException(f"ShowRecords: n_records is {n_records}; give at least 1")
        self.n_records = n_records

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes and logs; a resumed run has done so."""
        if trainer.global_step:
            return
        data = pl_module.data
        rows = data.rows["train"]
        step = max(1, len(rows.examples) // self.n_records)
        records = [spans(data.tokenizer, rows, example) for example in rows.examples[::step][: self.n_records]]
        if trainer.fast_dev_run:
            print(*map(as_ansi, records), sep="\n\n")
            return
        counts = {f"data/{side}/{name}": float(n) for side in data.counts for name, n in data.counts[side].items()}
        page = as_html(records, counts)
        write_text(Path(trainer.default_root_dir) / "records.html", page)
        for logger in trainer.loggers:
            logger.log_metrics(counts, step=None)  # no step is done
            if isinstance(logger, WandbRecorder):
                import wandb

                logger.experiment.log({"records": wandb.Html(page)})


def spans(tokenizer: object, rows: object, example: object) -> Spans:
    """The tokens of a record as text, each with its weight in the loss.

    Args:
        tokenizer: A fast tokenizer of transformers.
        rows: The data set that the record is in.
        example: The record.
    """
    ids = [*example.prompt_ids.tolist(), *example.answer_ids.tolist()]
    weights = [0.0, *rows.weights_of(example).tolist()]  # nothing predicts the first token
    return [(tokenizer.decode([token]), weight) for token, weight in zip(ids, weights, strict=True)]


def as_ansi(record: Spans) -> str:
    """A record for a terminal: on green what is learned, on yellow what is learned with less weight."""
    colors = {0.0: "", 1.0: "\x1b[30;42m"}
    return "".join(
        f"{color}{text}\x1b[0m" if (color := colors.get(weight, "\x1b[30;43m")) else text for text, weight in record
    )


def as_html(records: Sequence[Spans], counts: dict[str, float]) -> str:
    """Some records as a page; the stronger a token's green, the more it weighs.

    Args:
        records: Their tokens.
        counts: Numbers to show above them.
    """
    blocks = []
    for record in records:
        tokens = [
            f'<span style="background: rgba(46, 160, 67, {0.75 * weight:.2f})" title="weight {weight:g}">'
            f"{html.escape(text)}</span>"
            for text, weight in record
        ]
        blocks.append(f"<pre>{''.join(tokens)}</pre>")
    lines = [f"<tr><td>{html.escape(name)}</td><td>{value:,.6g}</td></tr>" for name, value in counts.items()]
    return (
        '<!doctype html><meta charset="utf-8"><title>records</title>'
        "<style>body { font: 15px/1.5 sans-serif; margin: 2em; } "
        "pre { white-space: pre-wrap; border: 1px solid #ccc; padding: 1em; } "
        "span { border-right: 1px solid #eee; }</style>\n"
        "<p>Green tokens carry the loss: the model learns to say them, and only reads the others.</p>\n"
        + "\n".join(blocks)
        + f"\n<table>{''.join(lines)}</table>\n"
    )
