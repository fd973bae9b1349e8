"""`llm-train estimate`: the memory, time and disk that a run will take, before it runs."""

import shlex
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments import names
from experiments.errors import CommandParser, UsageError, UserError, causes, count, did_you_mean, raised_by_constructor
from experiments.yaml_files import read_yaml

if TYPE_CHECKING:  # imported where they are used: the help answers without them
    from torch import Tensor

    from experiments.cli import ExperimentCLI
    from lightning_modules.base import ExperimentModule
    from lightning_modules.runtime.step_memory import StepMemory

GIB = 2**30
_MEASURE = "        a run of a few steps (--trainer.max_steps 20) on the device has what it took in its summary.json"
_USABLE = 0.92  # share of a GPU's memory: CUDA itself and gaps between tensors take the rest
_IN_LOW_PRECISION = 2  # bytes of a weight that is gathered in bfloat16


class Device(NamedTuple):
    """A GPU: its name for the table of peak rates, and its memory in GiB."""

    name: str
    memory: float


DEVICES = {
    "t4": Device("T4", 15),
    "l4": Device("L4", 22),
    "l40s": Device("L40S", 45),
    "a100": Device("A100-SXM4-80GB", 79),
    "a100-40gb": Device("A100-SXM4-40GB", 39),
    "h100": Device("H100 80GB HBM3", 79),
    "h200": Device("H200", 140),
    "b200": Device("B200", 178),
    "rtx4090": Device("GeForce RTX 4090", 24),
    "rtx5090": Device("GeForce RTX 5090", 31),
}


class Measured(NamedTuple):
    """A measured speed; experiments/trainer/README.md has how, and the date."""

    weights: float
    tokens: int  # of a step
    mfu: float  # model FLOP utilisation
    what: str


MEASURED = [
    Measured(124e6, 64 * 1024, 0.444, "GPT-2 small in bfloat16, compiled, on one H200"),
    Measured(10.7e6, 64 * 256, 0.212, "10.7 million weights in bfloat16, compiled with CUDA graphs, on one H200"),
]


def main(args: Sequence[str]) -> None:
    """Print what a run will take.

    Args:
        args: Command line, `estimate` first.
    """
    parser = CommandParser(
        prog="llm-train estimate",
        usage="llm-train estimate -c NAME [-c FILE ...] [--KEY VALUE ...] [--devices N] [--device NAME]",
        description="Estimate memory, time and disk of a run, with the files and flags of `llm-train fit`. Model and "
        "training step have no memory for this: they run on the shapes of the tensors.",
    )
    parser.add_argument("--devices", type=count, help="number of GPUs that share the batch (default: trainer.devices)")
    parser.add_argument("--device", default="h100", metavar="NAME", help=f"{', '.join(DEVICES)} (default: h100)")
    options, rest = parser.parse_known_args(args[1:])
    if options.device.lower() == "cpu":
        raise UsageError(
            "--device cpu: only GPUs are estimated, from a table of their memory and peak rates; for a CPU, run a few "
            "steps on it, fit with --trainer.max_steps 20: the summary.json of the run has its speed and memory"
        )
    if options.device.lower() not in DEVICES:
        raise UsageError(
            f"--device {options.device}: is not in the table{did_you_mean(options.device, DEVICES)}; "
            f"there are {', '.join(DEVICES)}"
        )
    names.with_files(["estimate", *rest])  # whose errors name this command

    import torch
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from experiments import cli
    from lightning_modules.common.messages import first_line
    from lightning_modules.runtime import private_names
    from lightning_modules.runtime.step_memory import WHOLE

    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")

    class Estimation(cli.ExperimentCLI):
        """The command `fit` up to its model, which has no data: no run begins."""

        def instantiate_classes(self) -> None:
            """Build model and data without memory for weights, in the type that the precision has for them."""
            dtype = WHOLE.get(str(self.arguments["trainer"]["precision"]), torch.float32)
            before = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
            try:
                with private_names.without_data():
                    super().instantiate_classes()
            except (RuntimeError, ValueError) as error:
                if any(isinstance(found, (MisconfigurationException, OSError)) for found in causes(error)):
                    raise
                name = self.arguments["model"].class_path.rpartition(".")[2]
                reason = raised_by_constructor(error) or error
                raise UserError(f"estimate: {name} cannot be built without memory: {first_line(reason)}") from error
            finally:
                torch.set_default_dtype(before)

        def instantiate_trainer(self, **_: Any) -> Any:
            """Print the estimate in place of training."""
            self.model.optimizer_factory = self.config_init["fit"]["optimizer"]
            n_devices = options.devices or devices_of(self.arguments["trainer"])
            lines, preset = estimate(self, n_devices, options.device.lower())
            print(*lines, sep="\n")
            if preset is not None:
                words = with_file(rest, preset) if preset else rest
                on_each = n_devices // max(1, self.arguments["trainer"]["num_nodes"])
                flags = ["--trainer.devices", str(on_each)] if options.devices and n_devices > 1 else []
                print(f"next    llm-train fit {shlex.join([*words, *flags])}")
            return SimpleNamespace(fit=lambda *_, **__: None)

    cli.main(["fit", *rest], Estimation)


def with_file(words: Sequence[str], name: str) -> list[str]:
    """Return a command line with a further configuration file, after the others and before the flags behind them."""
    end = 0
    for i, word in enumerate(words):
        if word.startswith("-c") or word.partition("=")[0] == "--config":
            end = i + (2 if word in names.FILE_FLAGS else 1)
    return [*words[:end], "-c", name, *words[end:]]


def devices_of(trainer: Mapping[str, Any]) -> int:
    """Return the number of devices that a trainer asks for, on all machines; 1 a machine if it takes what is there."""
    devices = trainer["devices"]
    if isinstance(devices, str) and "," in devices:
        devices = [device for device in devices.split(",") if device.strip()]
    on_each = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdecimal() else 1
    return max(1, on_each) * max(1, trainer["num_nodes"])


def estimate(cli: "ExperimentCLI", n_devices: int, device: str) -> tuple[list[str], str | None]:
    """Return the lines of an estimate, and the preset that the run needs to train on the devices.

    The preset is empty if the run needs no other, or if its memory is not known, and `None` if nothing fits.

    Args:
        cli: The command, with model and data.
        n_devices: Number of GPUs.
        device: Name of the GPU, in `DEVICES`.
    """
    from datamodules.base import check_share
    from lightning_modules.base import ExperimentModule
    from lightning_modules.runtime.step_memory import size_of

    model, data, trainer = cli.model, cli.datamodule, cli.arguments["trainer"]
    _change(model, cli.config_init["fit"]["trainer"]["callbacks"])
    n_weights = _count(model.parameters())
    n_trained = _count(weight for weight in model.parameters() if weight.requires_grad)
    lines = [f"model   {type(model).__name__}: {n_weights:,} weights, of which {n_trained:,} are trained"]
    batch_size, length = getattr(data, "batch_size", None), getattr(data, "block_size", None)
    if isinstance(batch_size, int):
        check_share(batch_size, n_devices)
    precision = str(trainer["precision"] or "32-true")
    if not isinstance(batch_size, int) or not isinstance(length, int) or type(model).loss is ExperimentModule.loss:
        return [*lines, "memory  not known: the batches have no fixed number of tokens;", _MEASURE], ""
    share = batch_size // n_devices
    # Sharded gradients leave activations no room that whole ones take later; for DDP this counts a little too much.
    accumulates = trainer["accumulate_grad_batches"] > 1 or n_devices > 1

    @cache
    def memory_with(precision: str) -> "StepMemory":
        return _memory(model, share, length, precision, accumulates)

    try:
        memory = memory_with(precision)
    except KeyError as error:
        counted = "only those of decoders, input_ids and targets, are counted"
        return [*lines, f"memory  not known: the batches have {error} too, and {counted};", _MEASURE], ""
    if trainer["accelerator"] == "cpu":
        lines.append(
            f"device  trainer.accelerator is cpu; this estimate is of a GPU, {device} (--device names another)"
        )
    compiled = "compiled" if model.compile_mode else "not compiled"
    on_each = " on each device" if n_devices > 1 else ""
    lines.append(f"memory  of a step with {share} x {length:,} tokens{on_each}, {precision}, {compiled}, in GiB:")
    parts = memory._asdict().items()
    lines.append("        " + ", ".join(f"{name} {_gib(value)}" for name, value in parts))
    largest, rest = _units(model)
    is_preset = has_preset(map(str, cli.arguments["config"] or ()), trainer["accelerator"], n_devices)
    needs = presets(memory, n_devices, largest, rest)
    precisions = {name: precision if is_preset else precision_with(name, precision) for name in needs}
    needs = {name: presets(memory_with(of), n_devices, largest, rest)[name] for name, of in precisions.items()}
    limit = DEVICES[device].memory * _USABLE * GIB
    lines.append(f"fits    on {n_devices} x {device}, {DEVICES[device].memory} GiB each:")
    for name, needed in needs.items():
        fits = "fits" if needed <= limit else "does not fit"
        other = f", {precisions[name]}" if precisions[name] != precision else ""
        lines.append(f"        {name:<13} {_gib(needed):>7} GiB a device{other}: {fits}")
    if min(needs.values()) > limit:
        lines.append("        a smaller data.batch_size with more trainer.accumulate_grad_batches needs less, as does")
        lines.append("        trainer.strategy.activation_checkpointing of trainer/fsdp, which is not counted here")
    lines += time_lines(model, trainer, batch_size * length, n_weights, n_devices, device)
    checkpoint = size_of(*model.parameters(), *model.buffers()) + memory.optimizer
    model_folder = f"and {_gib(memory.weights)} GiB of model/"
    lines.append(f"disk    {_gib(checkpoint)} GiB a checkpoint, last.ckpt and best.ckpt, {model_folder}")
    fitting = [name for name, needed in needs.items() if needed <= limit]
    if not fitting:
        return lines, None
    return lines, "" if is_preset else fitting[0]


def _change(model: "ExperimentModule", callbacks: Any) -> None:
    """Change a model as the callbacks of a run do that add parameters, and freeze some for all of it."""
    found = callbacks if isinstance(callbacks, list) else [callbacks]
    order = {callback: getattr(callback, "setup_order", 0) for callback in found}
    with _unmoved():
        for callback in sorted((each for each in found if order[each] < 0), key=order.__getitem__):
            callback.setup(None, model, "fit")


@contextmanager
def _unmoved() -> Iterator[None]:
    """Leave modules where and of what type they are: without data they cannot be moved."""
    from torch import nn

    to = nn.Module.to
    nn.Module.to = lambda module, *_, **__: module  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.to = to  # type: ignore[method-assign]


def has_preset(files: Iterable[str], accelerator: str, n_devices: int) -> bool:
    """Return whether a run has a preset for hardware, or settings for one GPU, so that none is to be added.

    Args:
        files: Configuration files of the command line.
        accelerator: The `trainer.accelerator` of the run.
        n_devices: Number of GPUs.
    """
    on_one_gpu = n_devices == 1 and accelerator in ("gpu", "cuda")
    return on_one_gpu or any(Path(file).absolute().parent.name == "trainer" for file in files)


def precision_with(preset: str, precision: str) -> str:
    """Return the precision of a run with a preset in front of the flags of the command line.

    Args:
        preset: Name of the preset.
        precision: That of the run without it. One in which the model was built stays.
    """
    from experiments.parser import ExperimentParser
    from lightning_modules.runtime.step_memory import WHOLE

    if precision in WHOLE or "--trainer.precision" in dict(names.flags(ExperimentParser.command_line)):
        return precision
    return read_yaml(names.find_or_explain(preset, "-c"))["trainer"].get("precision", precision)


def _memory(model: "ExperimentModule", batch_size: int, length: int, precision: str, accumulates: bool) -> "StepMemory":
    """Return the memory of a training step on one device; raise a `KeyError` if a batch has other entries."""
    import torch

    from lightning_modules.runtime import private_names
    from lightning_modules.runtime.step_memory import step_memory

    with private_names.without_data():
        batch = {name: torch.zeros(batch_size, length, dtype=torch.int64) for name in ("input_ids", "targets")}
        return step_memory(model, batch, precision, accumulates)


def _units(model: Any) -> tuple[int, int]:
    """Return the numbers of weights of the largest block, and of what is outside of the blocks."""
    from torch import nn

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = max(lists, key=lambda blocks: _count(blocks.parameters()), default=[])
    sizes = [_count(block.parameters()) for block in blocks]
    return max(sizes, default=0), _count(model.parameters()) - sum(sizes)


def presets(memory: "StepMemory", n_devices: int, largest: int, rest: int) -> dict[str, float]:
    """Return the bytes on each device with each preset, from the simplest one on.

    Args:
        memory: Memory of a step with the share of the batch that one device has.
        n_devices: Number of GPUs.
        largest: Number of weights of the largest block.
        rest: Number of weights outside of the blocks.
    """
    if n_devices == 1:
        return {"trainer/gpu": memory.total}
    # DistributedDataParallel adds gradients up in buckets, a copy of them. With FSDP2 the weights outside of the blocks
    # are whole during a step, and two blocks are: one is used while the next is gathered. Those of linear layers are
    # gathered in the type that autocast would round them to, and freed, so it makes no copies of them.
    gathered = 4 * rest + _IN_LOW_PRECISION * 2 * largest
    held = memory.weights + memory.gradients + memory.optimizer
    return {
        "trainer/ddp": memory.total + memory.gradients,
        "trainer/fsdp": held / n_devices + gathered + memory.activations,
    }


def time_lines(
    model: Any, trainer: Mapping[str, Any], tokens_of_batch: int, n_weights: int, n_devices: int, device: str
) -> list[str]:
    """Return the lines about the speed and the length of a run."""
    from lightning_modules.runtime.peak_flops import peak_flops

    flops = getattr(model, "flops_per_token", None)
    peak = peak_flops(DEVICES[device].name, "bfloat16") or peak_flops(DEVICES[device].name, "float16")
    if not flops or not peak:
        return ["speed   not known: the model has no flops_per_token, or the table no peak rate of the device"]
    if n_weights * tokens_of_batch / n_devices < min(row.weights * row.tokens for row in MEASURED):
        return [
            "speed   not known: the step is smaller than those that were measured, and to start its kernels may take",
            "        longer than to run them",
        ]
    nearest = min(MEASURED, key=lambda row: abs(row.weights - n_weights))
    speed = nearest.mfu * peak * n_devices / flops
    lines = [
        f"speed   {speed:,.0f} tokens/s at MFU {nearest.mfu}, measured with {nearest.what};",
        "        other sizes, precisions and devices differ, and the devices of a job wait for each other",
    ]
    steps, accumulated = trainer["max_steps"], trainer["accumulate_grad_batches"]
    if not isinstance(steps, int) or steps < 1:
        return [*lines, "time    not known: the run has no trainer.max_steps"]
    tokens = steps * accumulated * tokens_of_batch
    return [*lines, f"time    {tokens / speed / 3600:,.2f} h for {tokens:,} tokens, without validations and samples"]


def _count(parameters: "Iterable[Tensor]") -> int:
    return sum(parameter.numel() for parameter in parameters)


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / GIB:,.2f}"
