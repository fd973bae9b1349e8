"""Files and figures of a run of byte-pair encoding."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.bpe.figures import draw_compression, draw_token_lengths, draw_tokenization
from lightning_modules.bpe.module import BPEModule
from lightning_modules.bpe.textbook import Merge, spell, unspell, vocabulary
from lightning_modules.common.byte_level import is_byte_level
from lightning_modules.common.files import replace_folder, write_csv, write_text
from lightning_modules.runtime.drawing import show_figures, show_table

if TYPE_CHECKING:  # imported where it is used: it is slow to import
    from tokenizers import Tokenizer

# Prose, names, numbers and code, of which some become few tokens and some many.
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
    """Callback that writes the tokenizer, tables and figures to the run folder when the training ends.

    - `tokenizer/`: a folder for `AutoTokenizer.from_pretrained`, and for `data.tokenizer` of other topics.
    - `merges.txt`: the merges in order, in GPT-2's format.
    - `vocabulary.txt`: every token with its count in the training text, and the two parts that were merged.
    - `compression.csv`: bytes per token of the held-out text against the size of the vocabulary.
    - `figures/`: `compression.png`, `token_lengths.png` and `tokenization.png`.

    Args:
        sample: Text whose tokens are drawn; `null` takes a few lines of prose, names, numbers and code.
    """

    def __init__(self, sample: str | None = None) -> None:
        self.sample = sample or SAMPLE

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the files, draw the figures and show them to the loggers."""
        module = cast(BPEModule, pl_module)
        # The merges are learned already, except in a run that was resumed after its last batch: Lightning regards
        # such an epoch as finished, and skips its validation and its end.
        module.learn()
        if not trainer.fast_dev_run:
            self._write(trainer, module)

    @rank_zero_only
    def _write(self, trainer: L.Trainer, module: BPEModule) -> None:
        folder = Path(trainer.default_root_dir)
        figures = folder / "figures"
        replace_folder(folder / "tokenizer", module.save_pretrained)
        write_merges(folder / "merges.txt", module.merges)
        table = folder / "vocabulary.txt"
        write_vocabulary(table, module.merges, module.special_tokens, module.token_counts().tolist())
        files = [draw_token_lengths(table, figures / "token_lengths.png")]
        tokenizers = {"this run": module.rust_tokenizer(module.merges)}
        rows = [("this run", size, value) for size, value in module.compression]
        if module.reference is not None:
            tokenizers[module.reference_name] = module.reference
            if rows:
                value = float(trainer.callback_metrics["val/reference/bytes_per_token"])
                rows.append((module.reference_name, module.reference.get_vocab_size(), value))
        if rows:  # there was a validation
            table = folder / "compression.csv"
            cells = ((name, size, f"{value:.4f}") for name, size, value in rows)
            write_csv(table, ("tokenizer", "vocabulary_size", "bytes_per_token"), cells)
            files.append(draw_compression(table, figures / "compression.png"))
        samples = {name: tokens_of(tokenizer, self.sample) for name, tokenizer in tokenizers.items()}
        files.append(draw_tokenization(self.sample, samples, figures / "tokenization.png"))
        show_figures(trainer, files)
        drawn = [(name, i, readable(token)) for name, tokens in samples.items() for i, token in tokens]
        show_table(trainer, "tokenization", ("tokenizer", "id", "token"), drawn)


def tokens_of(tokenizer: "Tokenizer", text: str) -> list[tuple[int, bytes]]:
    """Return the tokens of a text, each with its id and its bytes."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    if is_byte_level(tokenizer):
        tokens = [unspell(token) for token in encoding.tokens]
    else:
        spans = zip(encoding.tokens, encoding.offsets, strict=True)
        tokens = [_fallback_byte(token) or text[start:end].encode() for token, (start, end) in spans]
    return list(zip(encoding.ids, tokens, strict=True))


def _fallback_byte(token: str) -> bytes | None:
    """Return the byte of a token such as `<0xC3>`, to which some vocabularies fall back, or `None` for another one."""
    found = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
    return bytes.fromhex(found[1]) if found else None


def readable(token: bytes) -> str:
    """Return a token as Python code: a string, or bytes if it ends inside a character."""
    try:
        return repr(token.decode())
    except UnicodeDecodeError:
        return repr(token)


def write_merges(file: Path, merges: Iterable[Merge]) -> None:
    """Write the merges in order, one on each line, in the format of GPT-2's `merges.txt`."""
    lines = [f"{spell(left)} {spell(right)}\n" for left, right in merges]
    write_text(file, "".join(["#version: 0.2\n", *lines]))


def write_vocabulary(file: Path, merges: Sequence[Merge], special_tokens: Sequence[str], counts: Sequence[int]) -> None:
    """Write a table of all tokens in the order of their ids; `counts` has the occurrences of each, by its id."""
    made_of = {spell(left + right): (left, right) for left, right in merges}
    lines = [f"{'id':>7} {'count':>12} {'bytes':>5}  {'token':<28} made of\n"]
    for token, i in vocabulary(merges, special_tokens).items():
        if token in special_tokens:
            length, origin = 0, "special token"
            shown = token if token.isprintable() else repr(token)  # one with a line end too is on one line
        elif token in made_of:
            length, shown = len(token), readable(unspell(token))
            origin = " + ".join(map(readable, made_of[token]))
        else:
            length, shown, origin = 1, readable(unspell(token)), "byte"
        lines.append(f"{i:>7} {counts[i]:>12} {length:>5}  {shown:<28} {origin}\n")
    write_text(file, "".join(lines))
