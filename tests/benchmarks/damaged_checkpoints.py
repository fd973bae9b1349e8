"""What becomes of a checkpoint that was cut off, or had bytes flipped, at random places.

A run is killed half-way. Its last checkpoint is damaged, and the run is resumed twice from the same folder: by
`--ckpt_path last`, which must refuse in one line, and by `--auto_resume`, which may take the earlier checkpoint. A
resume that succeeds must end with the weights of the run that was not killed, bit for bit.
"""

import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import forks

CONFIG = Path(__file__).parents[2] / "experiments/attention_recall/offline.yaml"
SHORT = ("--trainer.max_steps=30", "--trainer.val_check_interval=10", "--data.val_examples=32", "--model.n_embd=16")
RUNS = Path("runs/attention_recall")
PLACES = 100


def fit(name: str, *flags: str, stop_after: int | None = None) -> tuple[int, str]:
    """Exit code and last line of a fit; it is killed when its `last.ckpt` of that step has been written."""
    output = Path(f"{name}.log")
    output.unlink(missing_ok=True)
    prepare = (lambda: forks.die_after_step(stop_after)) if stop_after else bool
    command = ("fit", "-c", CONFIG, *SHORT, "--run.name", name, *flags)
    code = forks.wait([forks.start(*command, prepare=prepare, output=output)])[0]
    return code, output.read_text()


def damage(checkpoint: Path, draw: random.Random) -> str:
    """Cuts a file off at a random byte, or flips up to eight bytes in a row; says which."""
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


def weights(name: str) -> dict[str, torch.Tensor]:
    """The last weights of a run."""
    return torch.load(RUNS / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def outcome(name: str, code: int, printed: str, right: dict[str, torch.Tensor]) -> str:
    """What a user sees, and whether the model is the right one."""
    last_line = printed.strip().splitlines()[-1]
    if code == 1 and last_line.startswith("error: ") and "Traceback" not in printed:
        return "refused in one line"
    if code == 0:
        same = all(torch.equal(tensor, right[key]) for key, tensor in weights(name).items())
        return ("resumed, same weights" if same else "A WRONG MODEL") + (
            " (earlier checkpoint, which is said)" if "best.ckpt, step" in printed else ""
        )
    return f"ENDED WITH {code}: {last_line}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ |= {"WANDB_MODE": "disabled"}
    draw = random.Random(0)
    counts: dict[str, Counter[str]] = {"--ckpt_path last": Counter(), "--auto_resume": Counter()}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        fit("whole")
        right = weights("whole")
        fit("killed", stop_after=20)
        (RUNS / "killed").rename("kept")
        size = Path("kept/checkpoints/last.ckpt").stat().st_size
        for _ in range(PLACES):
            state = draw.getstate()
            for flags in counts:
                shutil.copytree("kept", RUNS / "killed")
                draw.setstate(state)
                how = damage(RUNS / "killed/checkpoints/last.ckpt", draw)
                code, printed = fit("killed", *flags.split())
                counts[flags][f"{how} | {outcome('killed', code, printed, right)}"] += 1
                shutil.rmtree(RUNS / "killed")
    print(f"{PLACES} random places in a checkpoint of {size:,} bytes\n")
    print("| resumed by | damage | outcome | times |\n|---|---|---|---|")
    for flags, found in counts.items():
        for how, times in sorted(found.items()):
            print(f"| `{flags}` | {how} | {times} |")
