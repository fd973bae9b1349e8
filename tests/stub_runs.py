"""Runs of a study that take no time: the program that stands for a run, and what it leaves."""

import json
from pathlib import Path

import optuna
from optuna.storages.journal import JournalFileBackend, JournalStorage

STUDY = Path("runs/toy/sweep")
STUB = '''
"""Stands for a run: leaves the files of one, and does what the flag --act tells it."""
import json, os, signal, sys
from pathlib import Path

signal.alarm(60)  # a stub that waits in vain ends
given = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:] if "=" in word)
for word in sys.argv[1:]:
    if word.endswith(".json"):
        given |= json.loads(Path(word).read_text())
if os.environ.get("SLURM_PROCID", "0") != "0":  # the first process of a run writes its files
    sys.exit(print("hello"))
folder = Path(given["run.root"], given["run.topic"], given["run.study"], given["run.name"])
if "--auto_resume" in sys.argv and (folder / "checkpoints/last.ckpt").exists():
    given["ckpt_path"] = "last"
(folder / "checkpoints").mkdir(parents=True, exist_ok="ckpt_path" in given)
seen = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "WANDB_PROJECT")
seen += ("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH")
about = {"environment": {name: os.environ.get(name) for name in seen}, "pid": os.getpid()}
with (folder / "starts").open("a") as starts:
    print(os.getpid(), file=starts)
(folder / "given.json").write_text(json.dumps(given | about))
print("hello", flush=True)
acts = float(given.get("lr", 1)) > 0.2 and "ckpt_path" not in given and not Path("go").exists()
act = given.get("act") if acts else None

def on_sigterm(number, frame):
    if act == "stubborn":
        os.kill(os.getppid(), signal.SIGINT)
        return
    (folder / "checkpoints/last.ckpt").touch()
    sys.exit(128 + number)

signal.signal(signal.SIGTERM, on_sigterm)
values = [float(given.get("lr", 1)) * rate for rate in (1, 0.5, 0.75)]
with (folder / "metrics.csv").open("w") as metrics:
    print("step,val/loss", file=metrics)
    for step, value in enumerate(values, start=1):
        print(f"{step},{value}", file=metrics, flush=True)
if act == "save_and_meet":
    (folder / "checkpoints/last.ckpt").touch()
if act in ("meet", "save_and_meet", "kill"):  # two runs wait for each other at a pipe
    open("pipe", "wb" if act == "save_and_meet" or given.get("seed_everything") == "1" else "rb").close()
if act == "kill":
    os.kill(os.getppid(), signal.SIGKILL)
if act == "stubborn":
    held = open("pipe", "wb")  # until this process and the one that it starts have ended
    if not os.fork():
        signal.alarm(60)
        signal.pause()
if act in ("SIGINT", "SIGTERM", "SIGHUP", "stubborn"):
    os.kill(os.getppid(), signal.SIGINT if act == "stubborn" else signal.Signals[act])
while act not in (None, "meet", "SIGHUP"):
    signal.pause()
if given.get("end") == "fails":
    sys.exit("Traceback\\nerror: it was told to fail")
(folder / "summary.json").write_text(json.dumps({"status": "finished"}))
'''
GRID = {"lr": {"values": [0.3, 0.1]}, "seed_everything": {"values": [1, 2]}, "end": {"value": "well"}}
OF_ANOTHER_RUN = ("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH")


def trials() -> list[optuna.trial.FrozenTrial]:
    """Return the trials in the journal."""
    storage = JournalStorage(JournalFileBackend(str(STUDY / "journal.log")))
    return optuna.load_study(study_name="study", storage=storage).trials


def given(arm: str) -> dict[str, str]:
    return json.loads((STUDY / arm / "given.json").read_text())


def assert_wandb_is_its_own(arm: str) -> None:
    """Check what a run got in a shell of another run, with a project of the user, as `in_a_run_of_wandb` sets them."""
    environment = given(arm)["environment"]
    assert [environment[name] for name in (*OF_ANOTHER_RUN, "WANDB_PROJECT")] == [None, None, None, "mine"]
