"""Figures drawn without pyplot, for commands that import neither torch nor Lightning."""

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_modules.common.files import atomic_file

if TYPE_CHECKING:  # matplotlib is imported where it is used: it is slow to import
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of a size in inches, without the window and the global state of pyplot."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["text.parse_math"] = False  # a dollar in a name is a dollar
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", file: Path) -> Path:
    """Create or replace a PNG file with a figure, and return the file."""
    with atomic_file(file) as target:
        figure.savefig(target, format="png", dpi=120)
    return file
