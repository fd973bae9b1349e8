"""Speed and exactness of the project on one GPU, beside what a user would take instead.

    make bench-gpu                                     all rows: minutes on one GPU, under a minute on a CPU
    make bench-gpu ARGS="--rows a,b --nanogpt FOLDER"  rows a and b, also with the model of a clone of nanoGPT
    make bench-gpu ARGS="--rows a,b --kernels"         also the kernels in which their steps spend the time
    make bench-gpu ARGS="--rows a --variants --seconds 480"   also changes that could make its step faster

All data are random and no network is needed. The variants of a row run in turn in one process, and the rows one after
the other in a process each. Times are medians over windows of steps after a warm-up; compilation is reported apart.
On a CPU, or with `--short`, the same code runs with tiny sizes, whose figures mean nothing.
"""

import os

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # looks for a GPU without starting CUDA, before the forks

import argparse
import contextlib
import importlib
import json
import multiprocessing
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu.runs import Line, Row, Settings

TESTS = Path(__file__).parents[1]
SECONDS_OF_A_ROW = 110  # one that takes longer is stopped, unless its share of the time for all rows is more
SECONDS_OF_VARIANTS = 370  # more, as the step is compiled anew for each
SECONDS_TO_END = 10  # of the process of a row that is done: what it has started may not end


def rows() -> dict[str, Row]:
    """Return the rows by name, from the files `gpu_rows.py` of the topics."""
    modules = (importlib.import_module(f"{file.parent.name}.gpu_rows") for file in TESTS.glob("*/gpu_rows.py"))
    return dict(sorted((name, row) for module in modules for name, row in module.ROWS.items()))


ROWS = rows()


def processes() -> Any:
    """Return how to start the process of a row: a copy of this one, which has all imports, if it can use the GPU."""
    for module in ("experiments.cli", "transformers", "transformers.trainer", "transformers.models.gpt2.modeling_gpt2"):
        importlib.import_module(module)
    if torch.cuda.is_available():
        probe = multiprocessing.get_context("fork").Process(target=torch.zeros, args=(1,), kwargs={"device": "cuda"})
        probe.start()
        probe.join()
        if probe.exitcode:  # an import has started CUDA
            return multiprocessing.get_context("spawn")
    return multiprocessing.get_context("fork")


def run_row(
    name: str, settings: Settings, folder: Path, log: Path, seconds: float, start: Any = multiprocessing
) -> dict[str, Any]:
    """Run a row in a process of its own; return its lines, or the error, and its time."""
    parent, child = start.Pipe(duplex=False)
    process = start.Process(target=_in_child, args=(name, settings, folder, log, child))
    began = time.perf_counter()
    process.start()
    child.close()
    report: dict[str, Any] = {"lines": [], "error": None}
    try:
        while parent.poll(max(0.0, seconds - (time.perf_counter() - began))):
            line, report["error"] = parent.recv()
            if line is None:
                break
            report["lines"].append(line)
        else:
            report["error"] = f"stopped after {seconds:.0f} s"
    except (EOFError, OSError):  # between two lines, or within one
        report["error"] = "its process died"
    finally:
        took = time.perf_counter() - began
        _end(process, 0 if report["error"] else SECONDS_TO_END)
    return report | {"seconds": round(took, 1)}


def _end(process: Any, seconds: float) -> None:
    """End a process if it does not do so within some seconds, and what it has started, which would use the GPU on."""
    process.join(seconds)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # none is left
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _in_child(name: str, settings: Settings, folder: Path, log: Path, pipe: Any) -> None:
    os.setpgid(0, 0)  # a group of its own, with all that it starts
    with log.open("a", buffering=1) as output, _printing_to(output):
        print(f"## row {name}")
        folder.mkdir()
        os.chdir(folder)
        os.environ |= {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "LLM_TRAIN_CACHE": str(folder / "cache")}
        error = None
        try:
            for line in ROWS[name].measure(settings):
                pipe.send((line, None))
        except BaseException as failure:
            traceback.print_exc()
            error = f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
        pipe.send((None, error))


@contextlib.contextmanager
def _printing_to(output: Any) -> Iterator[None]:
    """Send everything that this process and its children print to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        yield


def table(lines: Sequence[Line]) -> str:
    """Return the lines of a row as a Markdown table."""
    names = list(dict.fromkeys(name for line in lines for name in line.figures))
    rows = [["", *names], ["---", *["---:"] * len(names)]]
    rows += [[line.who, *(_shown(line.figures.get(name, "")) for name in names)] for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def main(args: Sequence[str] | None = None) -> int:
    """Measure the rows, print their tables, write the JSON, and return the number of rows that failed."""
    parser = argparse.ArgumentParser(description="Benchmarks on one GPU.")
    parser.add_argument("--rows", help=f"rows to measure, by default all: {','.join(ROWS)}")
    parser.add_argument("--short", action="store_true", help="tiny sizes; always on a CPU")
    parser.add_argument("--nanogpt", type=Path, metavar="FOLDER", help="a clone of nanoGPT to compare with")
    parser.add_argument("--kernels", action="store_true", help="rows a and b: the time of each kernel")
    parser.add_argument("--variants", action="store_true", help="rows a and b: the step with changes, one at a time")
    parser.add_argument("--out", type=Path, default=Path("bench_gpu.json"), help="file for the figures (JSON)")
    parser.add_argument("--seconds", type=float, default=300, help="time for all rows together (default: 300)")
    options = parser.parse_args(args)
    wanted = options.rows.split(",") if options.rows else list(ROWS)
    if unknown := [name for name in wanted if name not in ROWS]:
        parser.error(f"--rows: no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    on_gpu = torch.cuda.is_available()
    nanogpt = options.nanogpt and options.nanogpt.resolve()
    settings = Settings(options.short or not on_gpu, nanogpt, options.kernels, options.variants)
    out = options.out.resolve()
    log = out.with_suffix(".log")
    log.unlink(missing_ok=True)
    memory_disk = Path("/dev/shm")
    reports: dict[str, Any] = {}
    start = processes()
    ends = time.perf_counter() + options.seconds
    with tempfile.TemporaryDirectory(dir=memory_disk if memory_disk.is_dir() else None, prefix="bench") as folder:
        for number, name in enumerate(wanted):
            left = ends - time.perf_counter()
            most = max(SECONDS_OF_A_ROW + options.variants * SECONDS_OF_VARIANTS, left / (len(wanted) - number))
            if left < 5:
                reports[name] = {"lines": [], "error": "not run: the time was used up", "seconds": 0.0}
            else:
                reports[name] = run_row(name, settings, Path(folder, name), log, min(left, most), start)
            report = reports[name]
            print(f"\n## {name}: {ROWS[name].title} ({report['seconds']:.0f} s)\n", flush=True)
            if report["lines"]:
                print(table(report["lines"]), flush=True)
            if report["error"]:
                print(f"\nfailed: {report['error']} (see {log})", flush=True)
            _write(out, settings, reports)
    return sum(bool(report["error"]) for report in reports.values())


def _write(out: Path, settings: Settings, reports: dict[str, Any]) -> None:
    written = {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "short": settings.short,
        "devices": sorted({line.device for report in reports.values() for line in report["lines"]}),
        "rows": {
            name: {
                "title": ROWS[name].title,
                "seconds": report["seconds"],
                "error": report["error"],
                "lines": [{"who": line.who, **line.figures} for line in report["lines"]],
            }
            for name, report in reports.items()
        },
    }
    out.write_text(json.dumps(written, indent=2, default=str) + "\n")


if __name__ == "__main__":
    sys.exit(main())
