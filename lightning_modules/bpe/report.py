"""What a run of byte-pair encoding leaves: a tokenizer for other programs, and files and figures for people."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.bpe import figures as tokenizer_figures
from lightning_modules.bpe.byte_pair_encoding import Merge, spell, unspell, vocabulary
from lightning_modules.common.files import replace_folder, write_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Prose, names, numbers and code: what a tokenizer knows well, and what it takes apart.
SAMPLE = '''\
It isn't the longest words that cost the most tokens, but the rarest:
"information" may be one, Ångström and Übermut are several.
Numbers: 7, 42, 1984, 3.14159265. Ελληνικά, русский, naïve café.

def mean(values: list[float]) -> float:
    """Return the average of the values; raise ValueError without any."""
    if not values:
        raise ValueError("mean() needs at least one value")
    return sum(values) / len(values)
'''


class TokenizerReport(L.Callback):
    """Writes what was learned into the run folder when the training ends.

    - `tokenizer/`: what `AutoTokenizer.from_pretrained` loads, and other topics take as `data.tokenizer`.
    - `merges.txt`: the merges in order, in GPT-2's format.
    - `vocabulary.txt`: every token with its count in the text that was learned from, and what it was made of.
    - `compression.csv`: bytes per token of the held-out text against the size of the vocabulary.
    - `figures/`: `compression.png`, `token_lengths.png` and `tokenization.png`, drawn from these files.

    Args:
        sample: Text whose tokens are drawn; `null` takes a few lines of prose, names, numbers and code.
    """

    def __init__(self, sample: str | None = None) -> None:
        self.sample = sample or SAMPLE

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes and draws, and shows the figures to the loggers that take pictures."""
        # Learned already, but in a run that was resumed from just after its last batch: Lightning holds such an epoch
        # for finished, without its validation and its end.
        pl_module.learn()
        if not trainer.fast_dev_run:
            self._write(trainer, pl_module)

    @rank_zero_only
    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        figures = folder / "figures"
        replace_folder(folder / "tokenizer", pl_module.save_pretrained)
        write_merges(folder / "merges.txt", pl_module.merges)
        write_vocabulary(
            folder / "vocabulary.txt", pl_module.merges, pl_module.special_tokens, pl_module.token_counts().tolist()
        )
        drawn = [tokenizer_figures.draw_token_lengths(folder / "vocabulary.txt", figures / "token_lengths.png")]
        if pl_module.compression:  # there was a validation
            rows = [("this run", size, value) for size, value in pl_module.compression]
            if pl_module.reference is not None:
                value = float(trainer.callback_metrics["val/reference/bytes_per_token"])
                rows.append((pl_module.reference_name, pl_module.reference.get_vocab_size(), value))
            write_compression(folder / "compression.csv", rows)
            drawn.append(tokenizer_figures.draw_compression(folder / "compression.csv", figures / "compression.png"))
        tokenizers = {"this run": pl_module.rust_tokenizer(pl_module.merges)}
        if pl_module.reference is not None:
            tokenizers[pl_module.reference_name] = pl_module.reference
        pieces = {name: tokens_of(tokenizer, self.sample) for name, tokenizer in tokenizers.items()}
        drawn.append(tokenizer_figures.draw_tokenization(pieces, figures / "tokenization.png"))
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                for figure in drawn:
                    logger.log_image(f"figures/{figure.stem}", [str(figure)])
            if hasattr(logger, "log_table"):
                rows = [[name, i, readable(token)] for name, tokens in pieces.items() for i, token in tokens]
                logger.log_table("tokenization", columns=["tokenizer", "id", "token"], data=rows)


def tokens_of(tokenizer: "Tokenizer", text: str) -> list[tuple[int, bytes]]:
    """The tokens of a text: their ids and the bytes they stand for."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return list(zip(encoding.ids, map(_bytes_of, encoding.tokens), strict=True))


def _bytes_of(token: str) -> bytes:
    try:
        return unspell(token)
    except KeyError:  # a vocabulary that is not byte-level
        return token.encode()


def readable(token: bytes) -> str:
    """The token as Python writes it: text where it is text, bytes where it is part of a character."""
    try:
        return repr(token.decode())
    except UnicodeDecodeError:
        return repr(token)


def write_merges(file: Path, merges: Iterable[Merge]) -> None:
    """Writes the merges in order, a line each, as GPT-2's `merges.txt`.

    Args:
        file: File to write.
        merges: The merges.
    """
    write_text(file, _lines(["#version: 0.2", *(f"{spell(left)} {spell(right)}" for left, right in merges)]))


def write_vocabulary(file: Path, merges: Sequence[Merge], special_tokens: Sequence[str], counts: Sequence[int]) -> None:
    """Writes a table of all tokens in the order of their ids.

    Args:
        file: File to write.
        merges: The merges.
        special_tokens: They come first.
        counts: Occurrences of each token, by its id.
    """
    made_of = {spell(left + right): (left, right) for left, right in merges}
    lines = [f"{'id':>7} {'count':>12} {'bytes':>5}  {'token':<28} made of"]
    for token, i in vocabulary(merges, special_tokens).items():
        if token in special_tokens:
            length, shown, origin = 0, token, "special token"
        elif token in made_of:
            length, shown = len(token), readable(unspell(token))
            origin = " + ".join(map(readable, made_of[token]))
        else:
            length, shown, origin = 1, readable(unspell(token)), "byte"
        lines.append(f"{i:>7} {counts[i]:>12} {length:>5}  {shown:<28} {origin}")
    write_text(file, _lines(lines))


def write_compression(file: Path, rows: Iterable[tuple[str, int, float]]) -> None:
    """Writes bytes per token against the size of the vocabulary.

    Args:
        file: CSV file to write.
        rows: Name of the tokenizer, size of its vocabulary, bytes per token.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["tokenizer", "vocabulary_size", "bytes_per_token"])
    writer.writerows((name, size, f"{value:.4f}") for name, size, value in rows)
    write_text(file, text.getvalue())


def _lines(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
