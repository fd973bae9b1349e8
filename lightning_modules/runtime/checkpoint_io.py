"""Checkpoint files that are complete or absent, and are read without running code from them."""

import os
import pickle
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import copy
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.common.files import atomic_file
from lightning_modules.runtime import shards

_FOLDER = 0x10  # among the attributes of a member of a zip archive
_HANDED_BACK = ".temp.ckpt"  # the weights alone, from a process of the strategies ddp_fork and ddp_spawn


class _Recorded:
    """A file that keeps the error of a write, in place of which torch raises a `RuntimeError` without a reason."""

    def __init__(self, file: BinaryIO) -> None:
        self._write, self.flush = file.write, file.flush
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write bytes."""
        try:
            return self._write(data)
        except OSError as error:
            self.error = error
            raise


@contextmanager
def _errors_of(file: BinaryIO) -> Iterator[Any]:
    """Yield the file for `torch.save`, and raise the error of the file if one of its writes fails."""
    recorded = _Recorded(file)
    try:
        yield recorded
    except Exception:
        if recorded.error is not None:
            raise recorded.error from None
        raise


def _copy_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint whose tensors are copies on the CPU, which the next step does not change."""
    copies: dict[tuple, torch.Tensor] = {}  # equal views, such as tied weights, share memory in the copy too

    def copied(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            place = value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride(), value.dtype
            if place not in copies:
                copies[place] = value.detach().to("cpu", copy=True)
            return copies[place].detach()
        if isinstance(value, dict):
            same = copy(value)  # with its attributes, as the state of a module has
            same.update((key, copied(part)) for key, part in value.items())
            return same
        return type(value)(map(copied, value)) if isinstance(value, list | tuple) else value

    return copied(checkpoint)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint files, written under a temporary name and renamed; only tensors and plain types are read.

    Args:
        background: Whether the training goes on while a checkpoint is written from a copy of its tensors, which takes
            as much memory as the file. The next checkpoint, whoever reads one, and the end of the run wait for it.
    """

    _thread: ClassVar[ThreadPoolExecutor | None] = None  # of this process, while it has something to write
    _tasks: ClassVar[list[Future]] = []  # of the thread, in order

    def __init__(self, background: bool = False) -> None:
        super().__init__()
        self.background = background

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint; a file of that name is replaced only when the new one is complete.

        Raises:
            OSError: If the disk is full or the folder cannot be written; an earlier file is untouched. The error of
                a write in the background is raised when the run next waits for it.
        """
        self.wait()
        if self.background:
            self._submit(self._write, _copy_of(checkpoint), path)
        else:
            self._write(checkpoint, path)

    @classmethod
    def then(cls, function: Callable[[], None]) -> None:
        """Call a function when the checkpoint that was saved last is complete; not if its write fails."""
        if not cls._tasks:
            function()
            return
        before = cls._tasks[-1]

        def call() -> None:
            if before.exception() is None:
                function()

        cls._submit(call)

    @classmethod
    def wait(cls) -> None:
        """Wait until what this process writes in the background is complete.

        Raises:
            OSError: As in `save_checkpoint`.
        """
        while cls._tasks:
            error = cls._tasks[0].exception()  # after the end of the task
            cls._tasks.pop(0)
            if error is not None:
                raise error

    def teardown(self) -> None:
        """Wait for the last write."""
        try:
            self.wait()
        finally:
            if (thread := self._thread) is not None:
                thread.shutdown()
                AtomicCheckpointIO._thread = None

    @classmethod
    def _submit(cls, function: Callable[..., None], *args: Any) -> None:
        thread = AtomicCheckpointIO._thread = cls._thread or ThreadPoolExecutor(max_workers=1)
        cls._tasks.append(thread.submit(function, *args))

    def _write(self, checkpoint: dict[str, Any], path: str | Path) -> None:
        try:
            with atomic_file(Path(path)) as file, _errors_of(file) as recorded:
                torch.save(checkpoint, recorded)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            earlier = "; the earlier one is whole" if Path(path).is_file() else ""
            reason = f"{error.strerror}: the checkpoint was not written{earlier}"
            raise OSError(error.errno, reason, str(path)) from error

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None) -> dict:
        """Load a checkpoint, also one in shards, without running code from it; `weights_only` is ignored.

        Raises:
            MisconfigurationException: If the file is missing, damaged, not a checkpoint, or holds pickled code.
        """
        rest, files = self.load_parts(path, map_location=map_location)
        return shards.put_together(rest, shards.whole(files)) if files else rest

    def load_model(self, path: str | Path) -> dict[str, Any]:
        """Load a checkpoint for inference: without the states of its optimisers, which are most of it.

        The weights are on the CPU and mapped from the file, so what is not used takes no memory.

        Raises:
            MisconfigurationException: As in `load_checkpoint`.
        """
        rest, files = self.load_parts(path, map_location="cpu", mmap=True)
        if files:
            files = [{place: t for place, t in file.items() if place.startswith("state_dict/")} for file in files]
            rest = shards.put_together(rest, shards.whole(files))
        return {name: part for name, part in rest.items() if name != "optimizer_states"}

    def load_parts(
        self, path: str | Path, rank: int = 0, n_ranks: int = 1, **options: Any
    ) -> tuple[dict[str, Any], list[shards.Tensors]]:
        """Return a checkpoint, and the files of its shards: none if it is whole.

        Args:
            path: Path of the file.
            rank: Rank of the process, if several load the checkpoint and share the work of checking the shards.
            n_ranks: Number of these processes; each compares the checksums of one of so many shards.
            **options: Arguments of `torch.load`.

        Raises:
            MisconfigurationException: As in `load_checkpoint`.
        """
        checkpoint = self._load(Path(path), **options)
        if shards.SHARDS not in checkpoint:
            return checkpoint, []
        folder = shards.folder_of(Path(path), checkpoint)
        numbers = range(checkpoint[shards.SHARDS]["n"])
        loaded = [self._load(folder / f"{i}.ckpt", check=i % n_ranks == rank, **options) for i in numbers]
        return checkpoint, [share["state_dict"] for share in loaded]

    def shards_of(self, path: Path, check: bool = True) -> Path | None:
        """Return the folder of the shards of a checkpoint; `None` if it is whole.

        Args:
            path: Path of the file.
            check: Whether to read the file to its end, and compare its checksums.

        Raises:
            MisconfigurationException: As in `load_checkpoint`.
        """
        checkpoint = self._load(path, check, map_location="meta", mmap=True)
        return shards.folder_of(path, checkpoint) if shards.SHARDS in checkpoint else None

    def remove_unused_shards(self, folder: Path) -> None:
        """Remove the shards in a folder of checkpoints that belong to none of them."""
        used = set()
        for path in folder.glob("*.ckpt"):
            with suppress(MisconfigurationException):  # a damaged one cannot be resumed from
                used.add(self.shards_of(path, check=False))
        for unused in shards.folders_in(folder) - used:
            shutil.rmtree(unused)

    def _load(self, path: Path, check: bool = True, **options: Any) -> dict[str, Any]:
        self.wait()
        if not path.is_file():
            raise MisconfigurationException(f"{path}: no such checkpoint")
        try:
            with zipfile.ZipFile(path) as archive:
                # torch.load does not compare the checksums. It reads a member that is marked as a folder as empty
                # memory, and maps a compressed member as it is.
                odd = (e.filename for e in archive.infolist() if e.external_attr & _FOLDER or e.compress_type)
                damaged = next(odd, None) or (archive.testzip() if check else None)
            if damaged:
                raise MisconfigurationException(f"{path}: the checkpoint is damaged (checksum of {damaged} is wrong)")
            checkpoint = torch.load(path, weights_only=True, **options)
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL (\S+)", str(error))
            code = named[1] if named else "not plain tensors"
            reason = f"the checkpoint holds pickled code ({code}); it was refused and nothing of it was run"
            raise MisconfigurationException(f"{path}: {reason}") from error
        except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError, ValueError) as error:
            raise MisconfigurationException(f"{path}: the checkpoint is truncated, or not a checkpoint") from error
        if not isinstance(checkpoint, dict) or ("state_dict" not in checkpoint and path.name != _HANDED_BACK):
            raise MisconfigurationException(f"{path}: holds no training state; a checkpoint of a run was expected")
        return checkpoint
