"""Reports on word vectors: nearest neighbours during the training; a file for other programs and figures after it."""

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.common import run_files
from lightning_modules.common.figures import new_figure, save_figure
from lightning_modules.common.files import write_text
from lightning_modules.common.messages import say
from lightning_modules.common.ranges import NonNegativeInt, PositiveInt, ThreeOrMore
from lightning_modules.runtime.checkpoint_io import AtomicCheckpointIO
from lightning_modules.runtime.drawing import show_figures, show_table
from lightning_modules.runtime.sharded import whole_model
from lightning_modules.runtime.stages import validates_a_fit

_SIZE = (11, 8)  # of the figure, inches
_FONT, _MARGIN = 8, 24  # points: size of the words, and space around all
_TABLE_ROWS = 1000  # of the table for the projector of W&B, which is slow with more


class WordVectors(L.Callback):
    """Callback that writes neighbours, files and figures of the word vectors of a module.

    - `neighbours.md` and the table `neighbours`: the nearest neighbours of given words, after each validation.
    - `word_vectors.txt`: all vectors in the text format of word2vec, those of `best.ckpt` where there is one; those of
      the most frequent words also as the table `word_vectors`, for the projector of W&B.
    - `figures/word_vectors_pca.png`, `figures/word_vectors_tsne.png`: frequent words in two dimensions, drawn from that
      file.

    The callback reads `word_vectors` (V, m) of the module, and `text.words` of the data, the V words by frequency.

    Args:
        words: Words whose neighbours are listed; those that are not in the vocabulary are left out.
        n_neighbours: Neighbours of a word.
        n_drawn: Words in a figure.
        skip: Number of the most frequent words that are left out of the figures.
    """

    def __init__(
        self, words: list[str], n_neighbours: PositiveInt = 8, n_drawn: ThreeOrMore = 250, skip: NonNegativeInt = 20
    ) -> None:
        self.words, self.n_neighbours, self.n_drawn, self.skip = words, n_neighbours, n_drawn, skip

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave out the words that are not in the vocabulary, and say so."""
        known = pl_module.data.text.words
        unknown = set(self.words).difference(known)
        for word in dict.fromkeys(word for word in self.words if word in unknown):
            similar = ", ".join(difflib.get_close_matches(word, known, n=3)) or "none"
            say(f"WordVectors: {word!r} is not in the vocabulary (similar words: {similar}): left out")
        self.words = [word for word in self.words if word not in unknown]

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the neighbours to `neighbours.md` and show them to the loggers."""
        if not validates_a_fit(trainer) or not self.words:
            return
        known = pl_module.data.text.words
        found = nearest(pl_module.word_vectors, [known.index(word) for word in self.words], self.n_neighbours)
        lines, rows = [], []
        for word, neighbours in zip(self.words, found, strict=True):
            lines.append(f"- **{word}**: " + ", ".join(f"{known[i]} {cosine:.2f}" for i, cosine in neighbours) + "\n")
            rows += [[trainer.global_step, word, known[i], cosine] for i, cosine in neighbours]
        file = Path(trainer.default_root_dir) / "neighbours.md"
        earlier = sections_before(trainer.global_step, file.read_text(encoding="utf-8") if file.is_file() else "")
        write_text(file, f"{earlier}## Step {trainer.global_step}\n\n{''.join(lines)}\n")
        show_table(trainer, "neighbours", ["step", "word", "neighbour", "cosine"], rows)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the word vectors, and draw them."""
        if trainer.fast_dev_run:
            return
        with whole_model(trainer, type(self).__name__) as usable:
            if usable:
                self._write(trainer, pl_module)

    @rank_zero_only
    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        words, vectors = pl_module.data.text.words, pl_module.word_vectors
        AtomicCheckpointIO.wait()
        best = folder / run_files.checkpoint("best")
        if best.is_file():
            state = AtomicCheckpointIO().load_model(best)["state_dict"]
            vectors = state[next(k for k, p in pl_module.named_parameters() if p is vectors)]
        file = folder / "word_vectors.txt"
        write_text(file, to_word2vec(words, vectors.detach().float().cpu().numpy()))
        last = min(self.skip + self.n_drawn, len(words))
        for method in ("pca", "tsne") if last - self.skip >= 3 and vectors.shape[1] > 1 else ():
            figure = folder / "figures" / f"word_vectors_{method}.png"
            show_figures(trainer, [draw_word_vectors(file, figure, method, self.skip, last)])
        rows = ([w, *v] for w, v in zip(words[:_TABLE_ROWS], vectors[:_TABLE_ROWS].tolist(), strict=True))
        show_table(trainer, "word_vectors", ["word", *(f"feature {k}" for k in range(vectors.shape[1]))], rows)


def sections_before(step: int, neighbours_md: str) -> str:
    """Return the sections of earlier steps; a run that was killed before its checkpoint repeats the later ones."""
    for head in re.finditer(r"^## Step (\d+)$", neighbours_md, re.MULTILINE):
        if int(head[1]) >= step:
            return neighbours_md[: head.start()]
    return neighbours_md


@torch.no_grad()
def nearest(vectors: torch.Tensor, words: list[int], k: int) -> list[list[tuple[int, float]]]:
    """Return index and cosine of the k vectors of (V, m) with the largest cosine to each word, the nearest first."""
    unit = torch.nn.functional.normalize(vectors.float(), dim=1)
    cosines = unit[words] @ unit.T  # (W, V)
    cosines[torch.arange(len(words)), words] = -torch.inf
    values, indices = cosines.topk(min(k, len(vectors) - 1), dim=1)
    return [list(zip(i, v, strict=True)) for i, v in zip(indices.tolist(), values.tolist(), strict=True)]


def to_word2vec(words: Iterable[str], vectors: np.ndarray) -> str:
    """Return vectors (V, m) in the text format of word2vec: a line with V and m, then a line for each word."""
    lines = [f"{len(vectors)} {vectors.shape[1]}"]
    lines += [f"{word} " + " ".join(f"{x:.6g}" for x in row) for word, row in zip(words, vectors, strict=True)]
    return "".join(f"{line}\n" for line in lines)


def read_word2vec(file: Path) -> tuple[list[str], np.ndarray]:
    """Return the words and their vectors (V, m) of a file in the text format of word2vec."""
    _, *lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    words, rows = zip(*(line.split(" ", 1) for line in lines), strict=True)
    return list(words), np.array([row.split() for row in rows], np.float32)


def draw_word_vectors(word_vectors_txt: Path, figure: Path, method: str, first: int, last: int) -> Path:
    """Draw the words from `first` to before `last`, by frequency, in two dimensions, and return the file.

    The method `pca` shows the two directions in which the vectors vary most. `tsne` keeps neighbours together, and its
    large distances mean little (van der Maaten and Hinton, 2008).
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    words, vectors = read_word2vec(word_vectors_txt)
    words, vectors = words[first:last], vectors[first:last]
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)  # the length mostly depends on frequency
    if method == "pca":
        pca = PCA(2)
        places = pca.fit_transform(vectors)
        title = "principal components, {:.0%} and {:.0%} of the variance".format(*pca.explained_variance_ratio_)
    else:
        perplexity = min(15, (len(words) - 1) / 3)
        places = TSNE(perplexity=perplexity, metric="cosine", init="pca", random_state=0).fit_transform(vectors)
        title = f"t-SNE, perplexity {perplexity:.0f}"
    drawing = new_figure(*_SIZE)
    drawing.set_layout_engine("none")
    axes = drawing.add_axes((0, 0, 1, 0.96), xlim=(0, 72 * _SIZE[0]), ylim=(0, 72 * 0.96 * _SIZE[1]))  # in points
    axes.set_axis_off()
    spread = (places - places.min(0)) / np.maximum(np.ptp(places, axis=0), 1e-12)
    points = spread * (np.array([axes.get_xlim()[1], axes.get_ylim()[1]]) - 2 * _MARGIN) + _MARGIN
    axes.scatter(points[:, 0], points[:, 1], s=4, color="tab:orange", linewidths=0)
    names = places_of_words(words, points, (axes.get_xlim()[1], axes.get_ylim()[1]))
    for word, (x, y) in names.items():
        axes.text(x, y, word, fontsize=_FONT, ha="left", va="bottom")
    named = "" if len(names) == len(words) else f"; {len(names)} of {len(words)} words have room for their names"
    axes.set_title(title + named, fontsize=10)
    return save_figure(drawing, figure)


def places_of_words(
    words: Sequence[str], points: np.ndarray, size: tuple[float, float]
) -> dict[str, tuple[float, float]]:
    """Return the lower left corners of the names of words, so that none is on another; a word without room has none.

    Args:
        words: The words, those to prefer first.
        points: Where the words are, (n, 2), in points of 1/72 inch.
        size: Width and height of the figure, in points.
    """
    from matplotlib.textpath import TextPath

    corners = np.zeros((0, 4))  # left, bottom, right, top of the names so far
    found = {}
    for word, (x, y) in zip(words, points, strict=True):
        width, height = TextPath((0, 0), word, size=_FONT).get_extents().width + 2, _FONT
        beside = ((-width / 2, 2), (-width / 2, -height - 2), (3, -height / 2), (-width - 3, -height / 2))
        aslant = ((2, 2), (-width - 2, 2), (2, -height - 2), (-width - 2, -height - 2))
        above = ((-width / 2, height), (-width / 2, -2 * height))
        for right, up in (*beside, *aslant, *above):
            box = np.array([x + right, y + up, x + right + width, y + up + height])
            apart = (box[2] <= corners[:, 0]) | (corners[:, 2] <= box[0])
            apart |= (box[3] <= corners[:, 1]) | (corners[:, 3] <= box[1])
            if apart.all() and (box >= 0).all() and box[2] <= size[0] and box[3] <= size[1]:
                corners = np.vstack([corners, box])
                found[word] = (x + right + 1, y + up)
                break
    return found
