"""`llm-train estimate`: the memory of a training step, counted by hand; the measured speed; what it does not know."""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers import TINY
from torch import Tensor, nn

from experiments import estimate
from experiments.class_paths import import_class
from experiments.estimate import DEVICES, MEASURED
from lightning_modules.base import ExperimentModule
from lightning_modules.runtime import private_names
from lightning_modules.runtime.peak_flops import peak_flops
from lightning_modules.runtime.step_memory import StepMemory, step_memory

ROOT = Path(__file__).parents[2]
DECODER = yaml.safe_load(TINY.read_text())["model"]["class_path"]
N, C = 4 * 32, 16  # tokens of a batch, and width


class Chain(ExperimentModule):
    """A module whose tensors can be counted."""

    def __init__(self, compile: bool = False) -> None:
        super().__init__(compile)
        self.table = nn.Embedding(3, C)
        self.frozen = nn.Parameter(torch.zeros(5), requires_grad=False)
        self.optimizer_factory = torch.optim.AdamW

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return a sum: the input of each function is kept for the backward pass."""
        return self.table(batch["input_ids"]).sin().cos().sin().cos().sum()


class Products(Chain):
    """A chain with a linear layer."""

    def __init__(self, compile: bool = False) -> None:
        super().__init__(compile)
        self.linear = nn.Linear(C, C, bias=False)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return a sum of products."""
        return self.linear(self.table(batch["input_ids"])).sin().cos().sin().cos().sum()


class Prepared(Chain):
    """A chain that prepares what its loss needs."""

    def before_compilation(self) -> None:
        """Set a function."""
        self.last = torch.sin

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return a sum."""
        return self.last(self.table(batch["input_ids"])).sum()


def memory_of(
    compile: bool, kind: type[Chain] = Chain, precision: str = "32-true", n: int = 4, **arguments: bool
) -> StepMemory:
    """Return the memory of a step of the chain."""
    with private_names.without_data():
        batch = {"input_ids": torch.zeros(n, 32, dtype=torch.int64)}
        return step_memory(kind(compile), batch, precision, **arguments)


def test_the_memory_of_a_step_is_that_of_its_tensors():
    found, matrix, tensor = memory_of(compile=False, accumulates=True), 4 * 3 * C, 4 * N * C
    assert found[:2] == (matrix + 4 * 5, matrix)
    assert found.optimizer == 2 * matrix + 4  # two moments of each weight, and the number of the step
    # The four inputs, and in the backward pass of a cosine: the sine of its input, its negative, and the product.
    assert found.activations == pytest.approx(7 * tensor, abs=8)
    assert found.total == sum(found)
    # The gradient of the first batch is made when the activations are gone.
    assert memory_of(compile=False).total == found.total - matrix


@pytest.mark.slow
def test_a_compiled_step_keeps_one_of_the_results_in_a_row():
    # The others are computed again; the largest tensor counts twice.
    assert memory_of(compile=True).activations == pytest.approx((1 + 2) * 4 * N * C, abs=8)


@pytest.mark.slow
def test_a_step_is_prepared_as_in_a_run():
    assert memory_of(compile=True, kind=Prepared).activations > 0


@pytest.mark.parametrize("compile", [False, True])
def test_weights_in_low_precision_are_counted_once_and_not_for_each_example(compile):
    one, two = (memory_of(compile, Products, "bf16-mixed", n, accumulates=True) for n in (4, 8))
    assert one.copies == two.copies == 2 * C * C
    assert two.activations == pytest.approx(2 * one.activations, abs=16)
    assert memory_of(compile, Products).copies == 0


def test_the_speed_of_the_measured_run_is_the_measured_one():
    with torch.device("meta"):
        model = import_class(DECODER)(50257, 1024, vocab_multiple=64)
    n_weights = sum(weight.numel() for weight in model.parameters())
    trainer = {"max_steps": 100, "accumulate_grad_batches": 8}
    speed, _, time = estimate.time_lines(model, trainer, 64 * 1024, n_weights, 1, "h200")
    found = re.match(r"speed   ([\d,]+) tokens/s at MFU 0.444, measured with GPT-2 small", speed)
    page = (ROOT / "experiments/trainer/README.md").read_text()
    measured = re.search(r"`compile: true` \| ([\d,]+) tokens/s, MFU 0.444, 19.9 GiB", page)
    assert float(found[1].replace(",", "")) == pytest.approx(float(measured[1].replace(",", "")), rel=2e-3)
    assert time == "time    0.03 h for 52,428,800 tokens, without validations and samples"
    assert all(f"MFU {row.mfu}" in page for row in MEASURED)
    assert all(peak_flops(device.name, "float16") for device in DEVICES.values())


@pytest.mark.slow
def test_an_estimate_is_printed_and_no_run_begins(llm_train, tiny):
    config = tiny()
    done = llm_train("estimate", "-c", config, "--devices", "2", "--device", "L4", "--model.n_layer=1")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    n_weights = int(re.match(r"model   PretrainModule: ([\d,]+) weights", lines[0])[1].replace(",", ""))
    assert "memory  of a step with 2 x 16 tokens on each device, 32-true, not compiled, in GiB:" in lines
    assert "fits    on 2 x l4, 22 GiB each:" in lines
    fits = {line.split()[0]: line.split("GiB ")[1] for line in lines if line.endswith(": fits")}
    assert fits == {"trainer/ddp": "a device: fits", "trainer/fsdp": "a device, bf16-mixed: fits"}
    assert any(line.startswith("speed   not known: the step is smaller than") for line in lines)
    assert any(line.startswith("device  trainer.accelerator is cpu; this estimate is of a GPU, l4") for line in lines)
    assert lines[-1] == f"next    llm-train fit -c {config} -c trainer/ddp --model.n_layer=1 --trainer.devices 2"
    assert n_weights < 20_000
    assert not Path("runs").exists()


@pytest.mark.slow
def test_what_fits_nowhere_ends_without_a_command(llm_train, tiny, monkeypatch):
    monkeypatch.setattr(estimate, "_USABLE", 1e-6)
    for flags in ([], ["-c", "trainer/gpu"]):
        done = llm_train("estimate", "-c", tiny(), *flags)
        assert (done.code, "does not fit" in done.out, "next" in done.out) == (0, True, False), done.err


@pytest.mark.parametrize(("batch", "n_devices"), [(4, 1), (64, 8)])
def test_the_speed_of_a_step_that_is_smaller_than_those_measured_is_not_known(batch, n_devices):
    model, trainer = SimpleNamespace(flops_per_token=6 * 10_700_000), {"max_steps": 10, "accumulate_grad_batches": 1}
    times = partial(estimate.time_lines, model, trainer, n_weights=10_700_000, n_devices=n_devices, device="h100")
    assert times(batch * 256)[0].startswith("speed   not known: the step is smaller than")
    assert "tokens/s at MFU 0.212, measured with 10.7 million weights" in times(n_devices * 64 * 256)[0]


@pytest.mark.parametrize(
    ("words", "proposed"),
    [
        ("-c a.yaml --model.n_layer 1", "-c a.yaml -c trainer/gpu --model.n_layer 1"),
        ("--model.n_layer 1 --config=a.yaml -cb.yaml", "--model.n_layer 1 --config=a.yaml -cb.yaml -c trainer/gpu"),
        ("--model mine.Model", "-c trainer/gpu --model mine.Model"),
    ],
)
def test_a_file_comes_after_the_others_and_before_the_flags(words, proposed):
    assert estimate.with_file(words.split(), "trainer/gpu") == proposed.split()


@pytest.mark.parametrize(
    ("files", "accelerator", "n_devices", "expected"),
    [
        (["mine.yaml"], "cpu", 1, False),
        (["mine.yaml"], "gpu", 1, True),
        (["mine.yaml"], "gpu", 2, False),
        (["mine.yaml", "experiments/trainer/fsdp.yaml"], "auto", 2, True),
    ],
)
def test_a_preset_is_added_if_there_is_none(files, accelerator, n_devices, expected):
    assert estimate.has_preset(files, accelerator, n_devices) == expected


def test_memory_on_several_devices():
    memory = StepMemory(weights=4_000, gradients=4_000, optimizer=8_000, copies=1_000, activations=3_000)
    of = partial(estimate.presets, memory, largest=100, rest=50)
    assert of(1) == {"trainer/gpu": 20_000}
    assert of(8) == {"trainer/ddp": 20_000 + 4_000, "trainer/fsdp": 2_000 + 4 * 50 + 2 * 2 * 100 + 3_000}


MINE = """
from torch import float64, nn
from lightning_modules.base import ExperimentModule

class OtherBatches(ExperimentModule):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 2)

    def loss(self, batch):
        return self.table(batch["context"]).sum()

class Converted(OtherBatches):
    def __init__(self) -> None:
        super().__init__()
        self.table.to(float64)

class Misspelt(OtherBatches):
    def __init__(self) -> None:
        super().__init__()
        self.tabel.to(float64)
"""
SWAP = "RuntimeError: _apply(): Couldn't swap Embedding.weight"  # of PyTorch


@pytest.mark.slow
def test_what_an_estimate_does_not_know_is_one_line(llm_train, tiny):
    config = tiny()
    assert "error: --device cpu: only GPUs are estimated" in llm_train("estimate", "--device", "cpu").err
    assert "error: --device h10: is not in the table (did you mean" in llm_train("estimate", "--device=h10").err
    said = "error: llm-train estimate: argument --devices: must be a whole number of at least 1, got 0"
    assert llm_train("estimate", "--devices=0").err.startswith(said)
    assert llm_train("estimate").err.startswith("error: estimate: give an experiment by -c NAME; ")
    assert llm_train("estimate", config).err == (
        f"error: estimate {config}: a file needs -c (did you mean 'llm-train estimate -c {config}'?)\n"
    )
    missing = llm_train("estimate", "-c", config, "--data.tokenizer", "nowhere/tokenizer")
    assert (missing.code, len(missing.err.splitlines())) == (1, 1)
    Path("mine.py").write_text(MINE)
    refused = "error: estimate:"
    converted = llm_train("estimate", "-c", config, "--model=mine.Converted")
    assert converted.err == f"{refused} Converted cannot be built without memory: {SWAP}\n"
    misspelt = llm_train("estimate", "-c", config, "--model=mine.Misspelt")
    assert misspelt.err.startswith(f"{refused} Misspelt cannot be built without memory: AttributeError: 'Misspelt' ")
    other = llm_train("estimate", "-c", config, "--model=mine.OtherBatches")
    line = "memory  not known: the batches have 'context' too, and only those of decoders, input_ids and targets, are"
    assert line in other.out, other.err
    assert other.out.endswith(f"\nnext    llm-train fit -c {config} --model=mine.OtherBatches\n")


@pytest.mark.slow
def test_a_batch_that_the_devices_cannot_share_is_refused_as_in_a_run(llm_train, tiny):
    config, said = tiny(), "error: data.batch_size is 4, the global batch over all 3 processes: give a multiple of 3\n"
    for flags in (["--devices=3"], ["-c", "trainer/ddp", "--trainer.devices=3"]):
        done = llm_train("estimate", "-c", config, *flags)
        assert (done.code, done.err) == (1, said)


@pytest.mark.parametrize(
    ("devices", "n_nodes", "expected"),
    [(3, 1, 3), ("3", 2, 6), ([0, 2], 1, 2), ("0,1", 1, 2), ("1,", 1, 1), ("auto", 1, 1), (-1, 2, 2)],
)
def test_the_devices_of_a_trainer_are_counted(devices, n_nodes, expected):
    assert estimate.devices_of({"devices": devices, "num_nodes": n_nodes}) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("callback", "flag", "counts"),
    [
        ("freeze.Freeze", "layers=:", "10,960 weights, of which 4,400 are trained"),
        ("lora.LoRA", "rank=2", "11,984 weights, of which 1,024 are trained"),
    ],
)
def test_a_fine_tuning_is_estimated_with_what_its_callbacks_add_and_freeze(llm_train, tiny, callback, flag, counts):
    flags = [f"--trainer.callbacks+=lightning_modules.finetuning.{callback}", f"--trainer.callbacks.{flag}"]
    done = llm_train("estimate", "-c", tiny(), *flags, "--trainer.precision=bf16-true")
    assert (done.code, done.out.splitlines()[0]) == (0, f"model   PretrainModule: {counts}"), done.err


@pytest.mark.slow
def test_a_preset_is_estimated_with_its_own_precision(llm_train, tiny, monkeypatch):
    monkeypatch.setattr(estimate, "GIB", 2**10)

    def needed(*flags: str) -> str:
        done = llm_train("estimate", "-c", tiny(), *flags)
        assert done.code == 0, done.err
        return next(line for line in done.out.splitlines() if line.startswith("        trainer/gpu "))

    alone, of_run = needed(), needed("-c", "trainer/gpu")
    assert alone == of_run.replace("a device", "a device, bf16-mixed")
    assert needed("--trainer.precision=32-true") not in (alone, of_run)
