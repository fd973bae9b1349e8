"""The command that makes a run folder, for messages about one that does not exist."""

import re
from pathlib import Path

_SHIPPED = Path(__file__).parents[2] / "experiments"
_IN_RUN = re.compile(r"(?P<topic>.*\bruns/(?P<name>[^/]+))/(?P<run>[^/]+)(?P<rest>/.*)?")
_MOST_NAMED = 3  # other runs


def maker_of(path: Path) -> str:
    """Return the command that makes the run a path lies in, and runs that have the same; empty if there is neither."""
    parts = _IN_RUN.fullmatch(path.as_posix())
    if parts is None:
        return ""
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
