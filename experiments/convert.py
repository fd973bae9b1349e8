"""`llm-train convert RUN`: one whole file of each checkpoint of a run that was saved in shards."""

from collections.abc import Sequence
from pathlib import Path

from experiments.errors import CommandParser, UserError


def main(args: Sequence[str]) -> None:
    """Convert the checkpoints of a run.

    Args:
        args: Command line, `convert` first.
    """
    parser = CommandParser(
        prog="llm-train convert",
        description="Make one whole file of each checkpoint of a run that was saved in shards. The memory of this "
        "machine must hold a whole checkpoint.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run, such as runs/TOPIC/NAME")
    for line in convert(parser.parse_args(args[1:]).run):
        print(line)


def convert(run: Path) -> list[str]:
    """Convert the checkpoints of a run, and return lines about them.

    Args:
        run: Folder of the run.

    Raises:
        UserError: If it has no checkpoint.
        MisconfigurationException: If it is training, a link leads out of it, or a checkpoint is damaged.
    """
    from experiments.run.run_folder import Lock, check_links
    from lightning_modules.common import run_files
    from lightning_modules.common.files import link_or_copy
    from lightning_modules.runtime.checkpoint_io import AtomicCheckpointIO

    files = run_files.checkpoints_in(run)
    if not files:
        raise UserError(f"convert: {run} has no checkpoint; give the folder of a run, such as runs/TOPIC/NAME")
    check_links(run)
    lock = Lock(run)
    checkpoints, lines = AtomicCheckpointIO(), []
    try:
        converted: dict[Path, Path] = {}  # by the folder of the shards
        for file in files:
            folder = checkpoints.shards_of(file)
            if folder is None:
                lines.append(f"whole   {file}")
            elif folder in converted:
                link_or_copy(converted[folder], file)
                lines.append(f"wrote   {file}, the same")
            else:
                checkpoints.save_checkpoint(checkpoints.load_checkpoint(file), file)
                converted[folder] = file
                lines.append(f"wrote   {file}")
        checkpoints.remove_unused_shards(run / run_files.CHECKPOINTS)
    finally:
        lock.release()
    return lines
