"""What the rows of the benchmark share: runs of the command with a clock, and loops to compare them with."""

import contextlib
import csv
import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from gpu.clock import Clock, Times, synchronize, timed
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from experiments.__main__ import main as llm_train
from lightning_modules.base import ExperimentModule
from lightning_modules.optim import weight_decay_groups
from lightning_modules.runtime.peak_flops import peak_flops
from lightning_modules.runtime.tf32 import TF32

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"


@dataclass(frozen=True)
class Settings:
    """Settings of all rows.

    Args:
        short: Whether to take tiny sizes, whose figures mean nothing.
        nanogpt: Folder of a clone of nanoGPT, or `None`.
        kernels: Whether rows a and b also say in which kernels their steps spend the time.
        variants: Whether rows a and b also time changes to their compiled steps.
    """

    short: bool = False
    nanogpt: Path | None = None
    kernels: bool = False
    variants: bool = False

    def choose(self, real: Any, short: Any) -> Any:
        """Return the real value, or the one for the short form."""
        return short if self.short else real

    def compiler(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which the short form compiles nothing: the compiler of a CPU takes a minute."""
        return mock.patch.object(ExperimentModule, "compile_backend", self.choose("inductor", "eager"))

    @property
    def device(self) -> str:
        """`cuda` where there is a GPU."""
        return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Line:
    """Line of a row: whose figures they are, and the figures by name."""

    who: str
    figures: dict[str, Any]
    device: str = field(default_factory=lambda: torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Row:
    """Row of the benchmark: a title, and the function that measures it."""

    title: str
    measure: Callable[[Settings], Iterator[Line]]


# --- runs of the project ----------------------------------------------------------------------------------------------


def fit(settings: Settings, experiment: str, steps: int, every: int, **overlay: Any) -> Clock:
    """Run an experiment with the default loggers and callbacks and a clock; return the clock.

    Args:
        settings: Settings of the benchmark.
        experiment: YAML below `experiments/`.
        steps: Optimiser steps.
        every: Steps between two entries of the log, and in a window of the clock.
        **overlay: Sections of YAML to go over the experiment; `callbacks` are added to the default ones.
    """
    defaults = yaml.safe_load((EXPERIMENTS / "trainer/defaults.yaml").read_text())["trainer"]["callbacks"]
    # Without a checkpoint at the end, which takes ten seconds for 124 million weights and is not timed.
    defaults = [callback for callback in defaults if "RunCheckpoint" not in callback["class_path"]]
    clock = {"class_path": "gpu.clock.Clock", "init_args": {"every": every}}
    tf32 = {"class_path": "lightning_modules.runtime.tf32.TF32"}
    trainer = {
        "accelerator": "gpu" if settings.device == "cuda" else "cpu",
        "devices": 1,
        "precision": "bf16-mixed",
        "max_steps": steps,
        "max_epochs": -1,
        "check_val_every_n_epoch": None,
        "val_check_interval": steps,
        "enable_checkpointing": False,
        "limit_val_batches": 0,
        "accumulate_grad_batches": 1,
        "log_every_n_steps": every,
        "callbacks": [*defaults, tf32, *overlay.pop("callbacks", []), clock],
    }
    overlay["trainer"] = trainer | overlay.get("trainer", {})
    file = Path(f"overlay_{len(list(Path().glob('overlay_*')))}.yaml")
    file.write_text(yaml.safe_dump(overlay, sort_keys=False))
    with settings.compiler():
        llm_train(["fit", "-c", str(EXPERIMENTS / experiment), "-c", str(file), "--run.name", file.stem])
    return Clock.last


def logged(clock: Clock, **names: str) -> dict[str, float]:
    """Return the last values of the metrics `perf/...` of a run under new names, without those that it has not."""
    with (Path(clock.trainer.default_root_dir) / "metrics.csv").open() as file:
        last = {name: float(value) for row in csv.DictReader(file) for name, value in row.items() if value}
    return {new: last[f"perf/{name}"] for name, new in names.items() if f"perf/{name}" in last}


@contextlib.contextmanager
def bare_step(clock: Clock) -> Iterator[Callable[[int], None]]:
    """Yield the step of a finished run, in plain PyTorch: its loss, clipping and optimiser.

    The compiled loss of the run is used again. The batches are those of its loader, moved to the device before.
    """
    module, trainer = clock.module, clock.trainer
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module.to(device).train()
    loader = iter(trainer.datamodule.train_dataloader())
    batches = [moved(next(loader), device) for _ in range(4)]
    optimizer = torch.optim.AdamW(weight_decay_groups(module, {}), lr=1e-4, betas=(0.9, 0.95), fused=True)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def step(number: int) -> None:
        with trainer.precision_plugin.forward_context():  # other settings of autocast would compile the loss again
            loss = module.training_step(batches[number % len(batches)], number)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    tf32 = TF32()
    tf32.setup(trainer, module, "fit")  # as in the run: another precision would compile the loss again
    try:
        with mock.patch.object(ExperimentModule, "logging_is_due", False):
            yield step
    finally:
        tf32.teardown(trainer, module, "fit")


def bare_loop(clock: Clock, n_steps: int, every: int) -> Times:
    """Time a loop of plain PyTorch over the step of a finished run."""
    with bare_step(clock) as step:
        return timed(step, n_steps, every)


def kernels(clock: Clock, n_steps: int, most: int = 15) -> Iterator[Line]:
    """Yield a line for each of the kernels in which the step of a finished run spends most of its time."""
    activity = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
    with bare_step(clock) as step:
        step(0)
        synchronize()
        with profile(activities=[activity]) as profiler:
            for number in range(n_steps):
                step(number)
            synchronize()
    yield from _longest(profiler.key_averages(), activity is ProfilerActivity.CUDA, n_steps, most)


def _longest(events: Iterable[Any], on_gpu: bool, n_steps: int, most: int) -> Iterator[Line]:
    """Yield a line for each of the events that take most of the time of a device.

    With the kernels of a GPU, the profiler records the calls of the host that start them and wait for them, such as
    `cudaLaunchKernel` and `cudaDeviceSynchronize`. They take no time of the GPU, and are left out. So are the ranges
    that code names, such as the step of the optimiser, whose kernels are there themselves.
    """
    if on_gpu:
        found = {event.key: (event.self_device_time_total, event.count) for event in events if _is_of_gpu(event)}
    else:
        found = {event.key: (event.self_cpu_time_total, event.count) for event in events}
    total = sum(microseconds for microseconds, _ in found.values())
    for name, (microseconds, count) in sorted(found.items(), key=lambda item: -item[1][0])[:most]:
        figures = {"ms a step": microseconds / n_steps / 1e3, "share": microseconds / total, "calls": count / n_steps}
        yield Line(name[:60], figures)


def _is_of_gpu(event: Any) -> bool:
    is_kernel = event.device_type != DeviceType.CPU and not event.is_user_annotation
    return is_kernel and event.self_device_time_total > 0


def moved(batch: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: part.to(device) if isinstance(part, Tensor) else part for name, part in batch.items()}


def free(*clocks: Clock) -> None:
    """Free the memory of finished runs, and of compiled code."""
    for clock in clocks:
        clock.__dict__.clear()
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def speed(times: Times, tokens_a_step: int, flops_per_token: float = 0.0) -> dict[str, Any]:
    """Return the figures of a decoder's training."""
    rate = tokens_a_step / times.seconds
    peak = peak_flops(torch.cuda.get_device_name(), "bfloat16") if torch.cuda.is_available() else None
    return {
        "tokens/s": rate,
        **({"MFU": rate * flops_per_token / peak} if peak else {}),
        "ms a step": times.seconds * 1e3,
        "peak GiB": times.peak,
        "s to the end of step 1": times.first,
    }


# --- what a user would take instead -----------------------------------------------------------------------------------


def hf_trainer(settings: Settings, model: Any, rows: list[dict], collator: Any, batch_size: int, steps: int) -> Times:
    """Time the steps of Hugging Face's Trainer."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    every = max(1, steps // 6)
    times = Times(every)

    class Timer(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            times.__init__(every)  # type: ignore[misc]

        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            times.step(state.global_step)

    arguments = TrainingArguments(
        output_dir="hf",
        per_device_train_batch_size=batch_size,
        max_steps=steps,
        bf16=settings.device == "cuda",
        optim="adamw_torch_fused",
        learning_rate=2e-5,
        max_grad_norm=1.0,
        dataloader_num_workers=settings.choose(4, 0),
        logging_steps=every,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=settings.device == "cpu",
    )
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[Timer()]).train()
    return times
