"""Two processes against one, same global batch, every topic: training losses, validations, tests and weights.

    python tests/benchmarks/two_processes.py [EXPERIMENT ...]

Two processes have a copy of the model each (DistributedDataParallel), and then its weights shared out (FSDP2). Both
are killed at half-time and go on by `--auto_resume`. Each topic's offline experiment, shortened, without dropout (whose
random numbers are a function of the process too). The last batch of a validation is incomplete, so that the processes'
shares of it differ.
"""

import csv
import os
import signal
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import forks

ROOT = Path(__file__).parents[2]
HALF = 20
SHORT = (
    f"--trainer.max_steps={2 * HALF}",
    f"--trainer.val_check_interval={HALF}",
    "--trainer.check_val_every_n_epoch=null",
)
EVERY = ("--trainer.log_every_n_steps=5",)
LAYOUTS = {"ddp": forks.TWO_PROCESSES, "fsdp": forks.SHARDED}
TOPICS = {
    "bpe/offline": ("--data.source.kinds=[topics]", "--model.vocabulary_size=2000", "--model.count_workers=0"),
    "decoder_pretrain/offline": SHORT,
    "attention_recall/offline": (*SHORT, "--data.val_examples=255"),
    "position_probe/offline": SHORT,
    "bengio_nlm/offline": (*SHORT, "--model.dropout=0", "--model.hidden_dropout=0", "--model.word_dropout=0"),
    "gpt_neo_style/offline": SHORT,
    "bert_imdb/offline_pretrain": (*SHORT, "--data.reviews.n_train=1201"),
    "bert_imdb/offline": (*SHORT, "--data.reviews.n_train=1201", "--model.dropout=0"),
    "gpt2_webglm_qa/offline": SHORT,
}


def ranks(layout: str, *command: str | Path, output: Path, dies: bool = False) -> list[int]:
    """The exit codes of a command on one process or in a layout of two, which may die at half-time."""
    if not layout:
        return forks.wait([forks.start(*command, output=output)], 600)
    prepare = (lambda _: forks.die_after_step(HALF)) if dies else bool
    return forks.wait(forks.start_ranks(2, *command, *LAYOUTS[layout], prepare=prepare, output=output), 600)


def fit(experiment: str, layout: str, *flags: str) -> Path:
    """Trains, and tests where there is something to test on; returns the run's folder."""
    topic, name = experiment.split("/")
    # What other topics start from is the run of one process, under its own name.
    name = f"{name}_{layout}" if layout else name
    output, run = Path(f"{topic}_{name}.log"), Path("runs") / topic / name
    command = ("fit", "-c", ROOT / f"experiments/{experiment}.yaml", *flags, "--run.name", name, "--auto_resume")
    if layout and topic != "bpe":  # which counts words and takes no steps
        killed = ranks(layout, *command, output=output, dies=True)
        if -signal.SIGKILL not in killed:
            sys.exit(f"{experiment} {layout} was not killed")
    codes = ranks(layout, *command, output=output)
    if any(codes):
        sys.exit(f"{experiment} {layout} ended with {codes}:\n{output.read_text()[-3000:]}")
    tested = Path("test.log")
    if any(ranks(layout, "test", "-c", run / "config.yaml", "--ckpt_path=last", output=tested)):
        last = tested.read_text().strip().splitlines()[-1]
        if "error: " not in last:
            sys.exit(tested.read_text()[-3000:])
        print(f"{experiment} {layout}: {last}", file=sys.stderr)
    return run


def metrics(run: Path) -> dict[tuple[str, str], float]:
    """The metrics of a run and of its test by name and step, but for those of speed."""
    rows: list[dict[str, str]] = []
    for file in run.glob("metrics*.csv"):
        with file.open(newline="") as text:
            rows += csv.DictReader(text)
    return {
        (name, row["step"]): float(value)
        for row in rows
        for name, value in row.items()
        if value and "/" in name and not name.startswith("perf/")
    }


def difference(one: dict[tuple[str, str], float], two: dict[tuple[str, str], float], kind: str) -> str:
    """The largest relative difference among the metrics of a kind, and whose it is."""
    names = {key for key in one.keys() | two.keys() if key[0].startswith(kind)}
    if not names:
        return "none"
    gaps = {key: abs(one[key] - two[key]) / max(abs(one[key]), 1e-12) for key in names}
    worst = max(gaps, key=gaps.get)
    return f"{gaps[worst]:.1e}" + (f" ({worst[0]}, step {worst[1]})" if gaps[worst] else "")


def gap_of_weights(one: Path, two: Path) -> str:
    """The largest difference between the last weights of two runs; of a tokenizer, whether it is the same."""
    if (one / "merges.txt").is_file():
        same = (one / "merges.txt").read_bytes() == (two / "merges.txt").read_bytes()
        return "the same merges" if same else "OTHER MERGES"
    ours, theirs = (torch.load(r / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for r in (one, two))
    return f"{max((ours[name].double() - theirs[name].double()).abs().max() for name in ours):.1e}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ |= {"WANDB_MODE": "disabled"}
    wanted = sys.argv[1:] or list(TOPICS)
    sys.argv = ["llm-train"]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        print("| experiment | layout | losses of training | validation | test | weights |\n|---|---|---|---|---|---|")
        for experiment in TOPICS:
            one = fit(experiment, "", *TOPICS[experiment], *EVERY)
            for layout in LAYOUTS if experiment in wanted else ():
                two = fit(experiment, layout, *TOPICS[experiment], *EVERY)
                of_metrics = [difference(metrics(one), metrics(two), kind) for kind in ("train/loss", "val/", "test/")]
                cells = (f"`{experiment}`", layout, *of_metrics, gap_of_weights(one, two))
                print(f"| {' | '.join(cells)} |", flush=True)
