"""The advice in errors: a mistake prints it, and what it says works when it is followed."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from helpers import RUNS

pytestmark = pytest.mark.slow

# Flags after `fit -c tiny.yaml` that are a mistake, the advice, and the flags that follow it.
FIT = [
    (["--trainer.default_root_dir=x"], "leave it out, and set run.root and run.name", ["--run.root=x", "--run.name=y"]),
    (["--ckpt_path=best", "--auto_resume"], "leave ckpt_path out", ["--auto_resume"]),
    (["--model.vocab_size=9"], "leave it out, it is linked", []),
    (["--trainer.max_steps=-1"], "set trainer.max_steps, or trainer.max_epochs", ["--trainer.max_epochs=1"]),
    (["--model.n_layr=1"], "did you mean 'n_layer'?", ["--model.n_layer=1"]),
    (["--trainer.max_epoch=1"], "'trainer.max_epochs'", ["--trainer.max_epochs=1"]),
    (["--run.name=a/b"], "leave out slashes", ["--run.name=ab"]),
]
SMALL = ["--trainer.limit_train_batches=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"]


@pytest.mark.parametrize(("mistake", "advice", "then"), FIT, ids=lambda value: str(value)[:40])
def test_the_advice_of_fit_can_be_followed(llm_train, tiny, mistake, advice, then):
    wrong = llm_train("fit", "-c", tiny(), *SMALL, *mistake)
    assert wrong.code != 0
    assert advice in wrong.err.splitlines()[-1]
    length = [] if any("max_" in flag for flag in then) else ["--trainer.max_steps=2"]
    followed = llm_train("fit", "-c", tiny(), *SMALL, *length, *then)
    assert followed.code == 0, followed.err


@pytest.mark.parametrize(
    ("mistake", "advice", "then"),
    [
        ("generate --run RUN --prompt=", "give at least one character", "generate --run RUN --prompt=a"),
        ("generate --run RUN --prompt=a --references a", "for --chat: write them", "generate --run RUN --prompt=a.b"),
        ("generate --run RUN --chat", "give --prompt", "generate --run RUN --prompt=a"),
        ("predict -c RUN/config.yaml", "Give --ckpt_path best", "validate -c RUN/config.yaml --ckpt_path best"),
        ("compare STOPPED", "--unfinished counts them all", "compare STOPPED --unfinished"),
        ("compare RUN --metrics val/los", "did you mean 'val/loss'?", "compare RUN --metrics val/loss"),
        ("compare RUN --out= --wandb=a", "give either run folders or --wandb", "compare RUN"),
        ("study sweep.yaml --dry_run", "use --runs N", "study sweep.yaml --dry_run --runs 1"),
        ("validate -c OTHER/config.yaml --ckpt_path best", "--allow gpu", None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_advice_about_runs_can_be_followed(llm_train, tiny, whole, no_pictures, mistake, advice, then):
    places = {name: RUNS / name.lower() for name in ("RUN", "STOPPED", "OTHER")}
    for place in places.values():
        shutil.copytree(whole(), place)
    summary = json.loads((places["STOPPED"] / "summary.json").read_text())
    (places["STOPPED"] / "summary.json").write_text(json.dumps(summary | {"status": "stopped"}))
    config = yaml.safe_load((places["OTHER"] / "config.yaml").read_text())
    config["trainer"]["callbacks"].append({"class_path": "gpu.callbacks.NoSync"})
    (places["OTHER"] / "config.yaml").write_text(yaml.safe_dump(config))
    sweep = {"method": "random", "parameters": {"optimizer.lr": {"min": 0.1, "max": 1.0}}}
    command = ["${env}", "${interpreter}", "-m", "experiments", "fit", "-c", str(tiny()), "${args}"]
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep | {"program": "x.py", "command": command}))

    def run(line: str):
        for name, place in places.items():
            line = line.replace(name, str(place))
        return llm_train(*line.split(), *(["--max_new_tokens=2"] if line.startswith("generate") else []))

    wrong = run(mistake)
    assert wrong.code != 0
    assert advice in wrong.err.splitlines()[-1]
    followed = run(then or f"{mistake} {advice}")
    assert followed.code == 0, followed.err
