"""Figures that are drawn without pyplot, for commands that import neither torch nor Lightning."""

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_modules.common.files import atomic_file

if TYPE_CHECKING:  # matplotlib is imported where it is used: it is slow to import
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure that belongs to no window and to no global state, as `pyplot`'s figures do.

    Args:
        width: Width in inches.
        height: Height in inches.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", file: Path) -> Path:
    """Write a figure as PNG and return its file.

    Args:
        figure: The figure.
        file: PNG file to create or replace.
    """
    with atomic_file(file) as target:
        figure.savefig(target, format="png", dpi=120)
    return file
