"""What word vectors learn: neighbours as training goes, and in the end figures and a file for other programs."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.common.files import write_text
from lightning_modules.runtime.checkpoint_io import AtomicCheckpointIO
from lightning_modules.runtime.drawing import save_figure
from lightning_modules.runtime.stages import validates_a_fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TABLE_ROWS = 1000  # of the W&B table, whose projector is slow with more


class WordVectors(L.Callback):
    """Follows the word vectors of a module with `word_vectors` (V, m), whose data has `text.words` by frequency.

    - `neighbours.md` and a W&B table: the nearest neighbours of given words, after each validation.
    - `word_vectors.txt`: all vectors in word2vec's text format, those of `best.ckpt` where there is one; and the most
      frequent words' as a W&B table, for its projector.
    - `figures/word_vectors_pca.png`, `figures/word_vectors_tsne.png`: frequent words in two dimensions, drawn from that
      file.

    Args:
        words: Words whose neighbours are listed.
        n_neighbours: Neighbours a word, at least 1.
        n_drawn: Words in the figures, at least 3.
        skip: The most frequent words, so many of them, are left out of the figures.
    """

    def __init__(self, words: list[str], n_neighbours: int = 8, n_drawn: int = 250, skip: int = 20) -> None:
        for name, value, least in (("n_neighbours", n_neighbours, 1), ("n_drawn", n_drawn, 3), ("skip", skip, 0)):
            if value < least:
                raise MisconfigurationException(f"WordVectors: {name} is {value}: it must be at least {least}")
        self.words = words
        self.n_neighbours = n_neighbours
        self.n_drawn = n_drawn
        self.skip = skip

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks the words up before time is spent.

        Raises:
            MisconfigurationException: If the vocabulary lacks one.
        """
        known = pl_module.data.text.words
        for word in self.words:
            if word not in known:
                similar = ", ".join(difflib.get_close_matches(word, known, n=3)) or "none"
                raise MisconfigurationException(
                    f"WordVectors: {word!r} is not in the vocabulary (similar words: {similar}); change its `words`"
                )

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lists the neighbours."""
        if not validates_a_fit(trainer) or not self.words:
            return
        known = pl_module.data.text.words
        found = nearest(pl_module.word_vectors, [known.index(word) for word in self.words], self.n_neighbours)
        with (Path(trainer.default_root_dir) / "neighbours.md").open("a", encoding="utf-8") as file:
            file.write(f"## Step {trainer.global_step}\n\n")
            for word, neighbours in zip(self.words, found, strict=True):
                file.write(f"- **{word}**: " + ", ".join(f"{known[i]} {cos:.2f}" for i, cos in neighbours) + "\n")
            file.write("\n")
        rows = [
            [trainer.global_step, word, known[i], cos]
            for word, neighbours in zip(self.words, found, strict=True)
            for i, cos in neighbours
        ]
        for logger in trainer.loggers:
            if hasattr(logger, "log_table"):
                logger.log_table("neighbours", columns=["step", "word", "neighbour", "cosine"], data=rows)

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes and draws."""
        if trainer.fast_dev_run:
            return
        folder = Path(trainer.default_root_dir)
        words, vectors = pl_module.data.text.words, pl_module.word_vectors
        best = folder / "checkpoints" / "best.ckpt"
        if best.is_file():
            state = AtomicCheckpointIO().load_checkpoint(best)["state_dict"]
            vectors = state[next(k for k, p in pl_module.named_parameters() if p is vectors)]
        file = folder / "word_vectors.txt"
        write_text(file, to_word2vec(words, vectors.detach().cpu().numpy()))
        last = min(self.skip + self.n_drawn, len(words))
        figures = {
            method: draw_word_vectors(file, folder / "figures" / f"word_vectors_{method}.png", method, self.skip, last)
            for method in ("pca", "tsne")
            if last - self.skip >= 3
        }
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                for method, figure in figures.items():
                    logger.log_image(f"figures/word_vectors_{method}", [str(figure)])
            if hasattr(logger, "log_table"):
                columns = ["word", *(f"feature {k}" for k in range(vectors.shape[1]))]
                rows = [[w, *v] for w, v in zip(words[:_TABLE_ROWS], vectors[:_TABLE_ROWS].tolist(), strict=True)]
                logger.log_table("word_vectors", columns=columns, data=rows)


@torch.no_grad()
def nearest(vectors: torch.Tensor, words: list[int], k: int) -> list[list[tuple[int, float]]]:
    """The k words with the largest cosine to each word, itself left out.

    Args:
        vectors: All word vectors, (V, m).
        words: Numbers of the words, below V.
        k: Neighbours a word; fewer where the vocabulary is smaller.

    Returns:
        For each word its neighbours, the nearest first: number and cosine.
    """
    unit = torch.nn.functional.normalize(vectors.float(), dim=1)
    cosines = unit[words] @ unit.T  # (W, V)
    cosines[torch.arange(len(words)), words] = -torch.inf
    values, indices = cosines.topk(min(k, len(vectors) - 1), dim=1)
    return [list(zip(i, v, strict=True)) for i, v in zip(indices.tolist(), values.tolist(), strict=True)]


def to_word2vec(words: Iterable[str], vectors: np.ndarray) -> str:
    """Word vectors (V, m) in word2vec's text format: a line with V and m, then a word and its numbers a line."""
    lines = [f"{len(vectors)} {vectors.shape[1]}"]
    lines += [f"{word} " + " ".join(f"{x:.6g}" for x in row) for word, row in zip(words, vectors, strict=True)]
    return "".join(f"{line}\n" for line in lines)


def read_word2vec(file: Path) -> tuple[list[str], np.ndarray]:
    """Reads what `to_word2vec` wrote: the words, and their vectors (V, m)."""
    _, *lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    words, rows = zip(*(line.split(" ", 1) for line in lines), strict=True)
    return list(words), np.array([row.split() for row in rows], np.float32)


def draw_word_vectors(word_vectors_txt: Path, figure: Path, method: str, first: int, last: int) -> Path:
    """Draws words where their vectors are, in two dimensions.

    Args:
        word_vectors_txt: A run's `word_vectors.txt`.
        figure: PNG file to write.
        method: `pca`: the two directions in which the vectors vary most. `tsne`: a map on which neighbours stay
            neighbours and large distances mean little (van der Maaten and Hinton, 2008).
        first: The first word to draw, by frequency.
        last: Where to stop.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    words, vectors = read_word2vec(word_vectors_txt)
    words, vectors = words[first:last], vectors[first:last]
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)  # the length mostly says how frequent a word is
    if method == "pca":
        pca = PCA(2)
        places = pca.fit_transform(vectors)
        title = "principal components, {:.0%} and {:.0%} of the variance".format(*pca.explained_variance_ratio_)
    else:
        perplexity = min(15, (len(words) - 1) / 3)
        places = TSNE(perplexity=perplexity, metric="cosine", init="pca", random_state=0).fit_transform(vectors)
        title = f"t-SNE, perplexity {perplexity:.0f}"
    save_figure(_words_at(words, places, title), figure)
    return figure


def _words_at(words: list[str], places: np.ndarray, title: str) -> "Figure":
    from matplotlib.figure import Figure  # no pyplot: no global state, no window system

    picture = Figure(figsize=(11, 8), layout="constrained")
    axes = picture.add_subplot()
    axes.scatter(*places.T, s=4, color="tab:orange", linewidths=0)
    for word, place in zip(words, places, strict=True):
        axes.annotate(
            word.replace("$", r"\$"), place, fontsize=8, ha="center", textcoords="offset points", xytext=(0, 2)
        )
    axes.set_title(title, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return picture
