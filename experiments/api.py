"""A finished run from Python: its module, its tokenizer, text that it generates, and the classes that it assigns."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.tokenizers import decode_stream, encode, load_tokenizer
from experiments import trust
from experiments.class_paths import import_class
from experiments.yaml_files import read_yaml
from lightning_modules.base import ExperimentModule
from lightning_modules.common import run_files
from lightning_modules.common.makers import similar_path
from lightning_modules.common.messages import say
from lightning_modules.runtime.checkpoint_io import AtomicCheckpointIO

if TYPE_CHECKING:  # imported where used: transformers is slow to import
    from transformers import PreTrainedTokenizerFast

_AT_ONCE = 32  # texts that are classified together


@dataclass(frozen=True)
class Run:
    """A run whose model is in memory; `load_run` returns it.

    Attributes:
        folder: Folder of the run.
        config: Its resolved configuration, the content of `config.yaml`.
        module: Its LightningModule with the weights of a checkpoint, in evaluation mode.
        allow: Packages whose classes the configuration may name.
    """

    folder: Path
    config: dict[str, Any]
    module: ExperimentModule
    allow: Sequence[str] = field(default=(), repr=False)

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer that the run was trained with.

        Raises:
            MisconfigurationException: If the folder holds none.
        """
        folder = self.folder / "tokenizer"
        if not folder.is_dir():  # its name must not become one on the hub
            raise MisconfigurationException(
                f"{self.folder}: there is no tokenizer in it; train with the callback "
                "lightning_modules.runtime.export.ExportModel, which saves it"
            )
        return load_tokenizer(str(folder.resolve()))

    def generate(
        self,
        prompt: str | np.ndarray,
        max_new_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | torch.Generator = 0,
    ) -> str:
        """Return the text that the model writes after a prompt, until its end-of-text token.

        Args:
            prompt: Text to continue, or its token ids, (T,); at least one token.
            max_new_tokens: Largest number of tokens to generate.
            temperature: 0 takes the most probable token; smaller values than 1 sharpen the distribution.
            top_k: Number of the most probable tokens to draw from; `None` means all.
            top_p: Total probability of the most probable tokens to draw from (above 0, at most 1); `None` means all.
            seed: Seed of the random numbers, or a generator on the device of the module.

        Raises:
            MisconfigurationException: If the run has not learned to generate text, or has no tokenizer.
            TypeError: If the prompt is not one text, nor an array of token ids.
            ValueError: If the prompt is empty, or an argument is out of range.
        """
        return "".join(self.stream(prompt, max_new_tokens, temperature, top_k, top_p, seed))

    def stream(
        self,
        prompt: str | np.ndarray,
        max_new_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | torch.Generator = 0,
    ) -> Iterator[str]:
        """Yield the parts of the text of `generate` as they are generated; see there for the arguments and errors."""
        if not isinstance(prompt, str | np.ndarray):
            raise TypeError("prompt: give one text, or the token ids of one in an array of NumPy")
        if not hasattr(self.module, "generate"):
            raise self._cannot("generate text")
        device, tokenizer = self.module.device, self.tokenizer
        ids = encode(tokenizer, [prompt])[0] if isinstance(prompt, str) else prompt
        if not len(ids):
            raise ValueError("prompt: there is no token in it; give at least one to continue")
        generator = torch.Generator(device).manual_seed(seed) if isinstance(seed, int) else seed
        tokens = self.module.generate(
            torch.from_numpy(ids.astype(np.int64))[None].to(device),  # (1, T)
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
            stop_token=tokenizer.eos_token_id,
        )
        new = takewhile(lambda token: token != tokenizer.eos_token_id, map(int, tokens))
        return decode_stream(tokenizer, new, ids.tolist())

    def classify(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """Return the probability of each class for each text, by the name of the class.

        A text is tokenised and shortened as in training.

        Raises:
            MisconfigurationException: If the run has not learned to classify texts, or has no tokenizer.
            TypeError: If `texts` is one text.
        """
        if isinstance(texts, str):  # a sequence of characters
            raise TypeError("classify takes a list of texts; put a single text into a list: classify([text])")
        data = self.data_class
        if not hasattr(self.module, "predict_step") or not hasattr(data, "batch_of_texts"):
            raise self._cannot("classify texts")
        found = []
        for start in range(0, len(texts), _AT_ONCE):
            some = list(texts[start : start + _AT_ONCE])
            batch = data.batch_of_texts(self.tokenizer, self.data_arguments, some)
            batch = {name: tensor.to(self.module.device) for name, tensor in batch.items()}
            with torch.no_grad():
                probabilities = self.module.predict_step(batch, 0)["probabilities"]  # (B, K)
            found += [dict(zip(self.module.hparams["classes"], row, strict=True)) for row in probabilities.tolist()]
        return found

    @cached_property
    def data_class(self) -> Any:
        """Class of the datamodule of the run."""
        return import_class(_section(self.folder, self.config, "data")["class_path"], trust.of_run(self.allow))

    @property
    def data_arguments(self) -> dict[str, Any]:
        """Arguments of the datamodule of the run."""
        return _section(self.folder, self.config, "data")["init_args"]

    def _cannot(self, what: str) -> MisconfigurationException:
        return MisconfigurationException(f"{self.folder}: {type(self.module).__name__} does not {what}")


def load_run(
    folder: str | Path,
    checkpoint: str = "best",
    device: str | torch.device | None = None,
    allow: Sequence[str] = (),
) -> Run:
    """Return a run with its model.

    No code of the run folder is run, so it can be a stranger's: its configuration may name the classes that
    `experiments.trust` lists, and its checkpoint holds tensors and plain values.

    Args:
        folder: Folder of the run, such as `runs/TOPIC/NAME`; it may be an interrupted run.
        checkpoint: `best`, or `last`; `last` if there is no `best`, which a line says.
        device: Device of the model; `None` means a GPU if there is one.
        allow: Packages of your own whose classes the configuration may name.

    Raises:
        MisconfigurationException: If the folder is not that of a run, names other classes, its checkpoint is missing or
            damaged, or there is no such device.
    """
    folder = Path(folder).expanduser()
    file = folder / run_files.CONFIG
    if not file.is_file():
        meant = _meant(folder)
        advice = f"did you mean {meant}?" if meant else "give the folder of a run, such as runs/TOPIC/NAME"
        raise MisconfigurationException(f"{folder}: no {run_files.CONFIG} in it; {advice}")
    config = read_yaml(file)
    module_class: Any = import_class(_section(folder, config, "model")["class_path"], trust.of_run(allow))
    if not issubclass(module_class, ExperimentModule):
        raise MisconfigurationException(f"{file}: model: {module_class.__name__} is no module of a run")
    path = folder / run_files.checkpoint(checkpoint)
    if checkpoint == "best" and not path.is_file():
        path = folder / run_files.checkpoint("last")
        if path.is_file():
            say(f"{folder}: there is no best.ckpt; these are the weights of last.ckpt")
    has_gpu = torch.cuda.is_available()
    try:
        place = torch.device(device or ("cuda" if has_gpu else "cpu"))
    except RuntimeError as error:
        raise MisconfigurationException(f"device {device}: PyTorch has none of this name; give cpu or cuda") from error
    if place.type == "cuda" and not has_gpu:
        raise MisconfigurationException(f"device {device}: PyTorch finds no GPU here")
    module = module_class.of_checkpoint(AtomicCheckpointIO().load_model(path)).to(place).eval()
    return Run(folder, config, module, tuple(allow))


def _section(folder: Path, config: Any, name: str) -> dict[str, Any]:
    """Return a section of the configuration of a run that names a class; `init_args` is there, and may be empty.

    Raises:
        MisconfigurationException: If there is none: another program has written the file.
    """
    section = config.get(name) if isinstance(config, dict) else None
    if not isinstance(section, dict) or not isinstance(section.get("class_path"), str):
        raise MisconfigurationException(
            f"{folder / run_files.CONFIG}: has no section `{name}` with a class_path; give the folder of a run"
        )
    arguments = section.get("init_args")
    return section | {"init_args": arguments if isinstance(arguments, dict) else {}}


def _meant(folder: Path) -> Path | None:
    """Return the run that a path without one may stand for: one around it, below `runs`, or of a similar name."""
    if (inside := run_files.run_around(folder)) is not None:
        return inside
    similar = [place for place in map(similar_path, (folder, "runs" / folder)) if place is not None]
    return next((place for place in similar if (place / run_files.CONFIG).is_file()), None)
