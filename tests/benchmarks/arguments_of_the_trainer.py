"""Every argument of Lightning's Trainer over every topic: each run ends with finite losses, or is refused in one line.

python tests/benchmarks/arguments_of_the_trainer.py [TOPIC ...] [--arguments NAME ...]
"""

import argparse
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import forks
from shared_runs import temporary_world
from shortened import offline_experiments, run_of, shortened
from trainer_flags import CASES, FLAGS, fault, flags_of

import experiments.cli  # noqa: F401 - once, for all copies of this process

SECONDS = 120  # a run that takes longer hangs


def fit(experiment: Path, *flags: str) -> tuple[int, str]:
    """Return the exit code and the output of a short fit, in a copy of this process."""
    output = Path("output.log")
    output.unlink(missing_ok=True)
    command = ("fit", "-c", experiment, *shortened(experiment), *flags)
    code = forks.wait([forks.start(*command, output=output)], SECONDS)[0]
    return code, output.read_text() if output.is_file() else ""


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("topics", nargs="*", metavar="TOPIC", help="topics (default: all)")
    parser.add_argument("--arguments", nargs="+", default=list(FLAGS), help="arguments of the trainer (default: all)")
    chosen = parser.parse_args()
    cases = [(name, value) for name, value in CASES if name in chosen.arguments]
    counts: dict[str, Counter[str]] = {name: Counter() for name in chosen.arguments}
    faults = []
    with temporary_world():
        paths = offline_experiments()
        for experiment in paths:  # some of them read the runs of others
            code, printed = fit(experiment)
            if code:
                sys.exit(f"{experiment} failed:\n{printed[-3000:]}")
        named = [e for e in paths if e.stem == "offline" and e.parent.name in (chosen.topics or [e.parent.name])]
        for experiment in named:
            run = run_of(experiment).with_name("flag")
            for name, value in cases:
                flags, _ = flags_of(name, value)
                code, printed = fit(experiment, "--run.name=flag", *flags)
                if wrong := fault(code, printed, run):
                    faults.append(f"{experiment.parent.name} --trainer.{name}={value}: {wrong}")
                    print(faults[-1], flush=True)
                counts[name]["wrong" if wrong else "one line" if code else "runs"] += 1
                shutil.rmtree(run, ignore_errors=True)
    print(f"{len(cases)} values of {len(counts)} arguments over {len(named)} topics\n")
    print("| argument | runs | one line |\n|---|---|---|")
    for name, found in counts.items():
        print(f"| `{name}` | {found['runs']} | {found['one line']} |")
    sys.exit(f"{len(faults)} faults" if faults else 0)
