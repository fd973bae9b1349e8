"""What to do about a run folder, or a file in one, that does not exist: for messages."""

import difflib
import re
from pathlib import Path

_SHIPPED = Path(__file__).parents[2] / "experiments"
_IN_RUN = re.compile(r"(?P<topic>.*\bruns/(?P<name>[^/]+))/(?P<run>[^/]+)(?P<rest>/.*)?")
_MOST_NAMED = 3  # other runs
_SIMILAR = 0.8  # least similarity of two names (0 to 1, see `difflib`); that of tokeniser and tokenizer is 0.89


def maker_of(path: Path) -> str:
    """Return advice on a path that does not exist in a run folder; empty if there is none.

    It is a path with a similar name if there is one, else the command that makes the run, and runs that have the same.
    """
    parts = _IN_RUN.fullmatch(path.as_posix())
    if parts is None:
        return ""
    if (similar := similar_path(path)) is not None and similar != path:
        return f"did you mean {similar.as_posix()}?"
    topic, run, rest = parts["name"], parts["run"], parts["rest"] or ""
    advice = []
    if (_SHIPPED / topic / f"{run}.yaml").is_file():
        advice.append(f"`llm-train fit -c {topic}/{run}` makes one")
    elif (_SHIPPED / topic / "offline.yaml").is_file():
        advice.append(f"`llm-train fit -c {topic}/offline --run.name {run}` makes one")
    found = [f"{folder.as_posix()}{rest}" for folder in sorted(Path(parts["topic"]).glob("*"))]
    if others := [other for other in found if other != path.as_posix() and Path(other).exists()]:
        advice.append(f"there {'is' if len(others) == 1 else 'are'} {', '.join(others[:_MOST_NAMED])}")
    return "; ".join(advice)


def similar_path(path: Path) -> Path | None:
    """Return the existing path whose names are those of a path or similar to them, or `None` if there is none."""
    found = Path(path.anchor)
    for part in path.relative_to(found).parts:
        if not (found / part).exists():
            names = [entry.name for entry in found.iterdir()] if found.is_dir() else []
            close = difflib.get_close_matches(part, names, n=1, cutoff=_SIMILAR)
            if not close:
                return None
            part = close[0]
        found /= part
    return found
