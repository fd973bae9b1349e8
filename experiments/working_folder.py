"""Classes of the user in the working folder, without PYTHONPATH."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path


@contextlib.contextmanager
def importable(class_paths: Iterable[str]) -> Iterator[None]:
    """Let modules of the working folder be imported, if the user names a class of one that is not installed.

    The folder is searched last, so that its files hide neither the standard library nor an installed package. As long
    as no flag and no YAML of the user names one of its modules, nothing of it is imported: the folder may be a
    stranger's.

    Args:
        class_paths: Class paths and packages that the user has named, not those of a run folder.
    """
    folder = str(Path.cwd())
    needed = folder not in sys.path and any(map(_is_of_the_folder, {path.split(".")[0] for path in class_paths}))
    if needed:
        sys.path.append(folder)
    try:
        yield
    finally:
        if needed:
            sys.path.remove(folder)


def _is_of_the_folder(name: str) -> bool:
    """Return whether a module or package lies in the working folder and is not installed."""
    if name in sys.modules or not (Path(f"{name}.py").is_file() or Path(name).is_dir()):
        return False
    return importlib.util.find_spec(name) is None  # of a name without a dot, this imports nothing
