"""Checkpoints of every offline experiment, cut off or with flipped bytes at random places.

A run of each is killed at half of its steps. Its last checkpoint is damaged, and the run is resumed twice from the same
folder: by `--ckpt_path last`, which must refuse in one line, and by `--auto_resume`, which may take the earlier
checkpoint. A resume that succeeds must end with the weights of the run that was not killed, bit for bit.
"""

import itertools
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import forks
from shared_runs import temporary_world
from shortened import length, offline_experiments, run_of, shortened

STEPS, EVERY = 6, 2  # optimiser steps of a run, and between two validations
PLACES = 100


def fit(experiment: Path, name: str, *flags: str, stop_after: int | None = None) -> tuple[int, str]:
    """Return the exit code and the output of a fit; it is killed when its `last.ckpt` of a step has been written."""
    output = Path(f"{name}.log")
    output.unlink(missing_ok=True)
    prepare = (lambda: forks.die_after_step(stop_after)) if stop_after else bool
    command = (
        "fit",
        "-c",
        experiment,
        *shortened(experiment),
        *length(experiment, STEPS, EVERY),
        "--run.name",
        name,
        *flags,
    )
    code = forks.wait([forks.start(*command, prepare=prepare, output=output)])[0]
    return code, output.read_text()


def damage(checkpoint: Path, draw: random.Random) -> str:
    """Cut a file off at a random byte, or flip up to eight bytes in a row; return which."""
    content = bytearray(checkpoint.read_bytes())
    place = draw.randrange(len(content))
    if draw.random() < 0.5:
        del content[place:]
        how = "cut off"
    else:
        for i in range(place, min(len(content), place + draw.randint(1, 8))):
            content[i] ^= draw.randint(1, 255)
        how = "flipped"
    checkpoint.write_bytes(content)
    return how


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Return the last weights of a run."""
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def outcome(run: Path, code: int, printed: str, right: dict[str, torch.Tensor]) -> str:
    """Return what a user sees, and whether the model is the right one."""
    last_line = printed.strip().splitlines()[-1]
    if code == 1 and last_line.startswith("error: ") and "Traceback" not in printed:
        return "refused in one line"
    if code == 0:
        same = all(torch.equal(tensor, right[key]) for key, tensor in weights(run).items())
        return ("resumed, same weights" if same else "A WRONG MODEL") + (
            " (from the earlier checkpoint, with a line that says so)" if "best.ckpt, step" in printed else ""
        )
    return f"ENDED WITH {code}: {last_line}"


if __name__ == "__main__":
    draw = random.Random(0)
    counts: dict[str, Counter[str]] = {"--ckpt_path last": Counter(), "--auto_resume": Counter()}
    with temporary_world():
        experiments, right = offline_experiments(), {}
        for experiment in experiments:
            run = run_of(experiment)
            if fit(experiment, run.name)[0]:  # under the name by which others read it
                sys.exit(f"{run} failed:\n{Path(f'{run.name}.log').read_text()[-3000:]}")
            right[experiment] = weights(run)
            fit(experiment, "killed", stop_after=2 * EVERY)
            run.with_name("killed").rename(run.with_name("kept"))
        for _, experiment in zip(range(PLACES), itertools.cycle(experiments), strict=False):
            state, killed = draw.getstate(), run_of(experiment).with_name("killed")
            for flags in counts:
                shutil.copytree(killed.with_name("kept"), killed)
                draw.setstate(state)
                how = damage(killed / "checkpoints/last.ckpt", draw)
                code, printed = fit(experiment, "killed", *flags.split())
                counts[flags][f"{how} | {outcome(killed, code, printed, right[experiment])}"] += 1
                shutil.rmtree(killed)
    print(f"{PLACES} random places in the checkpoints of {len(experiments)} experiments\n")
    print("| resumed by | damage | outcome | times |\n|---|---|---|---|")
    for flags, found in counts.items():
        for how, times in sorted(found.items()):
            print(f"| `{flags}` | {how} | {times} |")
