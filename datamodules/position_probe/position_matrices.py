"""Position matrices: read from the files of a model without its other weights, read from an array, or computed."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.cache import cached_array, digest, read_array
from lightning_modules.common.cache import cache_root
from lightning_modules.common.hub import hub_answers, is_path
from lightning_modules.common.makers import maker_of
from lightning_modules.common.pretrained import found_folder

# Standard deviation of new embeddings of GPT-2, GPT-Neo, BERT and RoBERTa in Transformers. OpenAI's code of GPT-2 draws
# the tokens with 0.02 and the positions with 0.01.
INITIAL_STD = 0.02

# For each type of model, the endings of the names of its position embeddings and of its token embeddings.
_GPT = ("wpe.weight", "wte.weight")
_BERT = ("embeddings.position_embeddings.weight", "embeddings.word_embeddings.weight")
_TENSORS = {"gpt2": _GPT, "gpt_neo": _GPT, "bert": _BERT, "roberta": _BERT}
_LARGEST_HEADER = 100_000_000  # bytes, the limit of the format
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class PositionMatrix:
    """A position matrix, and the properties of its model if it has one."""

    rows: np.ndarray  # (T, d) float64, one row a position, in order
    tokens: np.ndarray | None = None  # the token embeddings, (V, d) float32
    initial_std: float = INITIAL_STD  # of the rows before training
    model: str | None = None  # folder or hub name, as `from_pretrained` takes it
    model_type: str | None = None  # such as `gpt2`


def load_positions(source: str, n_positions: int | None = None, n_embd: int = 128, seed: int = 0) -> PositionMatrix:
    """Return the position matrix of a source, checked; see `PositionProbeDataModule` for the arguments."""
    if source in ("sinusoids", "gaussian"):
        if n_positions is None:
            raise MisconfigurationException(f"data.n_positions is needed for data.source {source}: give a number")
        drawn = np.random.default_rng([seed, 0]).normal(0, INITIAL_STD, (n_positions, n_embd))
        matrix = PositionMatrix(drawn if source == "gaussian" else sinusoids(n_positions, n_embd))
    elif source.endswith(".npy"):
        matrix = PositionMatrix(_read_array(Path(source).expanduser()))
    else:
        matrix = _read_model(source)
    rows = matrix.rows
    if rows.shape[1] < 3:
        raise _unusable(f"the rows of {source} have {rows.shape[1]} components, the figures need 3: give wider rows")
    if not np.isfinite(rows).all():
        bad = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
        raise _unusable(f"row {bad} of {source} has values that are not finite")
    if n_positions is not None and n_positions > len(rows):
        raise MisconfigurationException(
            f"data.n_positions is {n_positions}, but {source} has {len(rows)} positions: give no more, or null"
        )
    rows = rows[:n_positions]
    if np.all(rows == rows[0]):
        raise _unusable(f"all rows of {source} are the same; give a matrix whose rows differ")
    return replace(matrix, rows=rows)


def _unusable(reason: str) -> MisconfigurationException:
    return MisconfigurationException(f"data.source: {reason}")


def sinusoids(n_positions: int, n_embd: int) -> np.ndarray:
    """Return the sinusoids of Vaswani et al. (2017), (T, d): sine and cosine in turn.

    The wavelengths are from 2π to 10,000^(1 - 2/d) times 2π.
    """
    angles = np.arange(n_positions)[:, None] * 10_000.0 ** (-np.arange(0, n_embd, 2) / n_embd)  # (T, d / 2)
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(n_positions, -1)[:, :n_embd]


def controls(matrix: PositionMatrix, seed: int) -> dict[str, np.ndarray]:
    """Return the controls of a matrix by name: tables of the same shape (T, d), for comparison.

    - `shuffled`: the rows of the matrix in random order.
    - `gaussian`: independent normal numbers, each component with its mean and standard deviation in the matrix.
    - `sinusoids`: those of Vaswani et al. (2017), in which probes are known to find the position.
    - `initialization`: normal numbers with the standard deviation of the weights before training.
    """
    rows, rng = matrix.rows, np.random.default_rng([seed, 1])
    return {
        "shuffled": rows[rng.permutation(len(rows))],
        "gaussian": rows.mean(axis=0) + rows.std(axis=0) * rng.standard_normal(rows.shape),
        "sinusoids": sinusoids(*rows.shape),
        "initialization": rng.normal(0, matrix.initial_std, rows.shape),
    }


def _read_array(path: Path) -> np.ndarray:
    if not path.is_file():
        raise _unusable(f"{path} does not exist (working folder: {Path.cwd()})")
    try:
        array = read_array(path)
    except (ValueError, OSError) as error:
        raise _unusable(f"{path} could not be read as an array of numbers ({error}): use numpy.save") from error
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
        raise _unusable(
            f"{path} holds {array.dtype} of the shape {array.shape}: a position matrix has floating-point numbers of "
            "the shape (positions, components)"
        )
    return array.astype(np.float64)


def _read_model(source: str) -> PositionMatrix:
    folder = _folder_of(source)
    config_file = _locate(source, folder, "config.json")
    if config_file is None:
        raise _unusable(
            f"{source} is no folder and no .npy file, and the Hugging Face hub gave no model of that name: "
            "check the name and the network, or give sinusoids, which needs neither"
        )
    config = _read_json(config_file)
    model_type = _entry(config, config_file, "model_type", str | None)
    if model_type not in _TENSORS or config.get("position_embedding_type", "absolute") != "absolute":
        raise _unusable(
            f"{source}, a {model_type} model, has no table of absolute positions that can be read "
            f"(rotary, ALiBi and relative positions have none): give a {' or '.join(_TENSORS)} model, or a .npy"
        )
    positions, tokens = (_find_tensor(source, folder, ending) for ending in _TENSORS[model_type])
    # RoBERTa counts positions from the id of its padding token + 1: the rows before belong to no position.
    first = _entry(config, config_file, "pad_token_id", int, 1) + 1 if model_type == "roberta" else 0
    initial_std = _entry(config, config_file, "initializer_range", int | float, INITIAL_STD)
    return PositionMatrix(positions[first:].astype(np.float64), tokens, initial_std, str(folder or source), model_type)


def _folder_of(source: str) -> Path | None:
    """Return the folder of a model, see `found_folder`; `None` for a name on the hub."""
    try:
        folder = found_folder(source)
    except ValueError as error:
        raise _unusable(str(error)) from error
    if folder is not None:
        return folder
    path = Path(source).expanduser()
    if path.is_dir():
        raise _unusable(f"{source} holds neither a config.json nor a model/ with one: give a model, or a finished run")
    advice = maker_of(path) or "give the folder of a model, a .npy, or a name on the hub"
    if path.is_file():
        raise _unusable(f"{source} is a file: {advice}")
    if is_path(source):
        raise _unusable(f"{source} does not exist (working folder: {Path.cwd()}): {advice}")
    return None


def _locate(source: str, folder: Path | None, name: str) -> str | None:
    """Return the path or URL of a file of a model; `None` where the model has no such file."""
    if folder is not None:
        return str(folder / name) if (folder / name).is_file() else None
    from huggingface_hub import errors, file_exists, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(source, name)
    except errors.HFValidationError:  # not a valid name on the hub
        return None
    if isinstance(cached, str):
        return cached
    return f"hf://{source}/{name}" if hub_answers() and file_exists(source, name) else None


def _read_json(file: str) -> dict[str, Any]:
    """Return the content of a JSON file or its URL."""
    with fsspec.open(file, "rb") as opened:
        text = opened.read()
    try:
        content = json.loads(text)
    except ValueError as error:
        raise _unusable(f"{file} is damaged ({error}): make or download it again") from error
    if not isinstance(content, dict):
        raise _unusable(f"{file} is damaged (it holds no dict): make or download it again")
    return content


def _entry(content: dict[str, Any], file: str, name: str, kind: Any, default: Any = None) -> Any:
    """Return an entry of a JSON file, or the default if it is absent."""
    value = content.get(name, default)
    if not isinstance(value, kind):
        raise _unusable(f"{file} is damaged ({name} is {value!r}): make or download it again")
    return value


def _find_tensor(source: str, folder: Path | None, ending: str) -> np.ndarray:
    """Return the tensor of a model whose name has this ending, without reading the others."""
    file = _locate(source, folder, "model.safetensors")
    if file is None and (index := _locate(source, folder, "model.safetensors.index.json")):
        shards = _entry(_read_json(index), index, "weight_map", dict, {})
        name = next((name for name in shards if _ends(name, ending)), None)
        file = None if name is None else _locate(source, folder, _entry(shards, index, name, str))
    if file is None:
        raise _unusable(f"{source} has no model.safetensors with {ending}: save the model with save_pretrained")
    if "://" not in file:
        return read_tensor(file, ending)
    cached = cache_root() / "tensors" / f"{digest([file, ending])}.npy"
    return cached_array(cached, lambda: read_tensor(file, ending))


def read_tensor(file: str, ending: str) -> np.ndarray:
    """Return the tensor with this ending of a safetensors file or its URL as float32, without reading the others.

    The file begins with the length of its header in eight bytes, and the header, which has the offsets of each tensor
    (https://huggingface.co/docs/safetensors).
    """
    try:
        with fsspec.open(file, "rb") as opened:
            header_size = int.from_bytes(opened.read(8), "little")
            if header_size > _LARGEST_HEADER:
                raise ValueError(f"its header would have {header_size:,} bytes")
            header = json.loads(opened.read(header_size))
            found = next((entry for name, entry in header.items() if _ends(name, ending)), None)
            if found is None:
                raise _unusable(f"{file} has no tensor {ending}; give a model of this type")
            start, end = found["data_offsets"]
            opened.seek(8 + header_size + start)
            data = bytearray(opened.read(end - start))
        tensor = torch.frombuffer(data, dtype=_DTYPES[found["dtype"]]).reshape(found["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise _unusable(f"{file} is damaged or no safetensors file ({error}): make or download it again") from error
    return tensor.float().numpy()


def _ends(name: str, ending: str) -> bool:
    return f".{name}".endswith(f".{ending}")
