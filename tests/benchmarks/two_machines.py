"""Two machines, simulated by two network namespaces: torchrun joins them, one is killed and starts again.

Needs root and iproute2. Each machine has its own address and reaches the other through a pair of virtual network
cards. The first prepares a text of several parts, which both then read. An offline experiment trains on both. After its
third validation, all processes of the second machine are killed, and the machine is started again. The job must end
with the steps and weights of one process.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import RUNS

from datamodules.sources import PART_SIZE, PythonText

ROOT = Path(__file__).parents[2]
MACHINES = {"machine0": "10.77.0.1", "machine1": "10.77.0.2"}
STEPS, EVERY = 200, 25
EXPERIMENT = [
    "-c", str(ROOT / "experiments" / RUNS.name / "offline.yaml"),
    "--data.tokenizer=byte", "--data.source=text.txt", "--data.split=tail", "--model.n_layer=2",
]  # fmt: skip
FIT = [
    "-m", "experiments", "fit", *EXPERIMENT,
    f"--trainer.max_steps={STEPS}", f"--trainer.val_check_interval={EVERY}", "--trainer.limit_val_batches=8",
]  # fmt: skip
ON_BOTH = [
    "-c", str(ROOT / "experiments/trainer/multi_node.yaml"), "--trainer.accelerator=cpu", "--trainer.devices=1",
    "--trainer.num_nodes=2", "--auto_resume", "--run.name=two",
]  # fmt: skip


def ip(*words: str) -> str:
    """Run `ip`, and return its output."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def connect() -> None:
    """Create the two machines and the network between them."""
    for name in MACHINES:
        ip("netns", "add", name)
    ip("link", "add", "card0", "netns", "machine0", "type", "veth", "peer", "name", "card1", "netns", "machine1")
    for number, (name, address) in enumerate(MACHINES.items()):
        ip("-n", name, "address", "add", f"{address}/24", "dev", f"card{number}")
        for card in (f"card{number}", "lo"):
            ip("-n", name, "link", "set", card, "up")


def write_text(size: int) -> None:
    """Write a text of at least this many bytes."""
    text = "\n".join(PythonText(["topics"]).documents())
    Path("text.txt").write_text(text * (1 + size // len(text)), encoding="utf-8")


def prepare(name: str) -> str:
    """Prepare the text on a machine, and return what that says."""
    command = [sys.executable, "-m", "experiments", "prepare", *EXPERIMENT, "--processes=2"]
    done = subprocess.run(["ip", "netns", "exec", name, *command], check=True, capture_output=True, text=True)
    return next(line.split(" in /")[0] for line in done.stderr.splitlines() if line.startswith("preparing"))


def start(name: str) -> subprocess.Popen:
    """Start torchrun on a machine."""
    # torchrun compares the host name of the endpoint with its own; these two machines share one.
    is_host = f"--rdzv_conf=is_host={int(name == 'machine0')}"
    rendezvous = ["--rdzv_backend=c10d", f"--rdzv_endpoint={MACHINES['machine0']}:29400", "--rdzv_id=job", is_host]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max_restarts=3"]
    command = [*torchrun, *rendezvous, f"--local_addr={MACHINES[name]}", *FIT, *ON_BOTH]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": name.replace("machine", "card")}
    # Without this, a new machine does not learn the address of rank 0 (torch 2.13).
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with open(f"{name}.log", "a") as log:
        return subprocess.Popen(["ip", "netns", "exec", name, *command], env=environment, stdout=log, stderr=log)


def kill_all(name: str) -> None:
    """Kill every process of a machine at once."""
    for pid in map(int, ip("netns", "pids", name).split()):
        os.kill(pid, signal.SIGKILL)


def wait_for_step(step: int) -> None:
    """Wait until the metrics of a validation at a step are written, after which its checkpoint is saved."""
    file = RUNS / "two/metrics.csv"
    deadline = time.monotonic() + 300
    while not (file.is_file() and f"\n{step}," in file.read_text()):
        if time.monotonic() > deadline:
            sys.exit(f"no step {step}:\n{Path('machine0.log').read_text()[-3000:]}")
        time.sleep(0.05)


def last(run: str) -> dict:
    """Return the last checkpoint of a run."""
    return torch.load(RUNS / run / "checkpoints/last.ckpt", weights_only=True)


if __name__ == "__main__":
    if os.geteuid() != 0 or not shutil.which("ip"):
        print("skipped: network namespaces need root, and the command ip")
        sys.exit()
    os.environ |= {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["LLM_TRAIN_CACHE"] = f"{folder}/cache"
        write_text(3 * PART_SIZE)
        try:
            connect()
            prepared = prepare("machine0")
            subprocess.run([sys.executable, *FIT, "--run.name=one"], check=True, capture_output=True)
            first, second = (start(name) for name in MACHINES)
            wait_for_step(3 * EVERY)
            kill_all("machine1")
            killed = time.monotonic()
            time.sleep(5)
            second = start("machine1")
            codes = [machine.wait(600) for machine in (first, second)]
        finally:
            for name in filter(lambda name: name in ip("netns", "list"), MACHINES):
                kill_all(name)
                ip("netns", "delete", name)
        seconds = time.monotonic() - killed
        logs = [line for name in MACHINES for line in Path(f"{name}.log").read_text().splitlines()]
        said = [line for line in logs if "resuming from" in line]
        again = sum("prepar" in line for line in logs)
        one, two = last("one"), last("two")
        gap = max((one["state_dict"][name] - two["state_dict"][name]).abs().max() for name in one["state_dict"])
    print("| what | figure |\n|---|---|")
    print(f"| on the first machine | {prepared} |")
    print(f"| texts prepared again by the job | {again} |")
    print(f"| exit codes | {codes} |")
    print(f"| after the kill | {'; '.join(said)} |")
    print(f"| from the kill to the end | {seconds:.0f} s |")
    print(f"| steps, one process and two machines | {one['global_step']}, {two['global_step']} |")
    print(f"| weights, largest difference | {gap:.1e} |")
