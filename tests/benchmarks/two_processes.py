"""Two processes against one, same global batch, every topic: training losses, validations and weights.

    python tests/benchmarks/two_processes.py [EXPERIMENT ...]

Two processes have a copy of the model each (DistributedDataParallel), and then its weights shared out (FSDP2). Each
topic's offline experiment, shortened, without dropout (whose random numbers are a function of the process too). The
last batch of a validation is incomplete, so that the processes' shares of it differ.
"""

import csv
import os
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import forks

ROOT = Path(__file__).parents[2]
SHORT = ("--trainer.max_steps=40", "--trainer.val_check_interval=20", "--trainer.check_val_every_n_epoch=null")
EVERY = ("--trainer.log_every_n_steps=5",)
LAYOUTS = {"ddp": (), "fsdp": ("--trainer.precision=32-true",)}
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


def fit(experiment: str, layout: str, *flags: str) -> Path:
    """Runs an experiment, on one process or in a layout of two; returns the run's folder."""
    topic, name = experiment.split("/")
    # What other topics start from is the run of one process, under its own name.
    name = f"{name}_{layout}" if layout else name
    command = ["fit", "-c", ROOT / f"experiments/{experiment}.yaml", *flags, "--run.name", name]
    output = Path(f"{topic}_{name}.log")
    if layout:
        preset = ("-c", ROOT / f"experiments/trainer/{layout}.yaml", *LAYOUTS[layout])
        on_cpu = ("--trainer.accelerator=cpu", "--trainer.devices=2")
        codes = forks.wait(forks.start_ranks(2, *command, *preset, *on_cpu, output=output), 600)
    else:
        codes = forks.wait([forks.start(*command, output=output)], 600)
    if any(codes):
        sys.exit(f"{experiment} {layout} ended with {codes}:\n{output.read_text()[-3000:]}")
    return Path("runs") / topic / name


def metrics(run: Path) -> dict[tuple[str, str], float]:
    """The metrics of a run by name and step, but for those of speed."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
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
        print("| experiment | layout | losses of training | validation | weights |\n|---|---|---|---|---|")
        for experiment in TOPICS:
            one = fit(experiment, "", *TOPICS[experiment], *EVERY)
            for layout in LAYOUTS if experiment in wanted else ():
                two = fit(experiment, layout, *TOPICS[experiment], *EVERY)
                of_metrics = [difference(metrics(one), metrics(two), kind) for kind in ("train/loss", "val/")]
                cells = (f"`{experiment}`", layout, *of_metrics, gap_of_weights(one, two))
                print(f"| {' | '.join(cells)} |", flush=True)
