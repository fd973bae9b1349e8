"""Speed and memory of a run: what counts as a token, peak rates, and no trace of CUDA in a run on the CPU."""

import csv
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import RUNS
from torch.utils.data import DataLoader

import datamodules.base
from experiments.run import run_record
from lightning_modules.runtime import throughput
from lightning_modules.runtime.peak_flops import format_of, peak_flops
from lightning_modules.runtime.tf32 import TF32
from lightning_modules.runtime.throughput import Throughput, _tokens_in


@pytest.mark.parametrize(
    ("name", "number_format", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 NVL", "bfloat16", 835.5),
        ("NVIDIA H100 PCIe", "bfloat16", 756.0),
        ("NVIDIA H200", "bfloat16", 989.4),
        ("NVIDIA GH200 480GB", "bfloat16", 989.4),
        ("NVIDIA B200", "bfloat16", 2250.0),
        ("NVIDIA L40S", "bfloat16", 362.05),
        ("NVIDIA L40", "bfloat16", 181.05),
        ("NVIDIA L4", "bfloat16", 121.0),
        ("NVIDIA RTX 6000 Ada Generation", "bfloat16", 364.2),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156.0),
        ("NVIDIA A100 80GB PCIe", "float32", 19.5),
        ("Tesla V100-SXM2-16GB", "float16", 125.0),
        ("Tesla T4", "float16", 65.0),
        ("AMD Instinct MI300X", "bfloat16", 1307.4),
        ("Tesla T4", "bfloat16", None),  # it computes bfloat16 without its matrix units
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16", None),  # a share of a GPU
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("AMD Instinct MI300X VF", "bfloat16", None),
        ("NVIDIA A10G", "bfloat16", None),  # other GPUs than those whose names begin alike
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
        ("a GPU of the future", "bfloat16", None),
    ],
)
def test_the_peak_of_a_gpu_is_that_of_dense_matrices(name, number_format, teraflops):
    assert peak_flops(name, number_format) == pytest.approx(teraflops and teraflops * 1e12)


def test_the_peak_in_float32_depends_on_tf32():
    assert [format_of(p) for p in ("bf16-mixed", "16-true", "64-true")] == ["bfloat16", "float16", None]
    assert format_of("32-true") == "float32"
    torch.set_float32_matmul_precision("high")
    try:
        assert format_of("32-true") == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(("batch", "logged"), [({"input_ids": torch.zeros(2, 3)}, True), ({"features": 0}, False)])
def test_batches_without_tokens_have_no_speed(monkeypatch, batch, logged):
    monkeypatch.setattr(throughput.private_names, "is_accumulating", lambda trainer: False)
    trainer = SimpleNamespace(log_every_n_steps=1, global_step=1, strategy=_OneProcess(), precision="32-true")
    metrics = {}
    module = SimpleNamespace(device=torch.device("cpu"), log_dict=metrics.update)
    callback = Throughput()
    callback.on_train_start(trainer, module)
    callback.on_train_batch_end(trainer, module, None, batch, 0)
    assert metrics.keys() == ({"perf/tokens_per_second", "train/tokens_seen"} if logged else set())


def test_a_validation_does_not_take_the_time_of_training_steps_that_the_device_has_not_done(monkeypatch):
    clock = SimpleNamespace(now=0.0, queued=0.0)  # seconds, of the host and of the work of the device

    def synchronize(device):
        clock.now, clock.queued = clock.now + clock.queued, 0.0

    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(throughput.private_names, "is_accumulating", lambda trainer: False)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    trainer = SimpleNamespace(log_every_n_steps=2, global_step=0, strategy=_OneProcess(), precision="64-true")
    module = SimpleNamespace(device=torch.device("cuda"), log_dict=lambda metrics: None)
    callback = Throughput()
    callback.on_train_start(trainer, module)
    for trainer.global_step in (1, 2):
        callback.on_train_batch_start(trainer, module, None, 0)
        clock.queued += 3.0
        callback.on_train_batch_end(trainer, module, None, {"input_ids": torch.zeros(2, 6)}, 0)
        callback.on_validation_start(trainer, module)
        clock.queued += 50.0
    assert callback.tokens_per_second == 24 / 6


def test_the_flops_of_all_devices_are_a_share_of_what_they_can_do(monkeypatch):
    monkeypatch.setattr(throughput.private_names, "is_accumulating", lambda trainer: False)
    monkeypatch.setattr(throughput.time, "perf_counter", iter([10.0, 14.0, 14.0]).__next__)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**20)
    strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce=lambda tensor, reduce_op: 2 * tensor)
    trainer = SimpleNamespace(log_every_n_steps=1, global_step=1, strategy=strategy, precision="bf16-mixed")
    trainer.world_size = 2
    metrics = {}
    module = SimpleNamespace(device=torch.device("cuda"), log_dict=metrics.update, flops_per_token=1e12)
    callback = Throughput()
    callback.on_train_start(trainer, module)
    callback.on_train_batch_end(trainer, module, None, {"input_ids": torch.zeros(2, 3)}, 0)
    assert metrics == {
        "perf/tokens_per_second": 12 / 4,
        "train/tokens_seen": 12.0,
        "perf/mfu": pytest.approx(3 * 1e12 / (2 * 756e12)),
        "perf/gpu_memory_mib": 3.0,
    }


def test_the_tokens_of_a_batch_are_those_that_it_names_or_all():
    counter = Throughput()
    counter._trainer = type("T", (), {"strategy": _OneProcess()})
    for batch in ({"input_ids": torch.zeros(2, 9), "n_tokens": torch.tensor(12)}, {"targets": torch.zeros(5)}, [1]):
        counter._uncounted.append(_tokens_in(batch))
    assert counter.state_dict() == {"tokens_seen": 17}
    assert counter.state_dict() == {"tokens_seen": 17}


class _OneProcess:
    root_device = torch.device("cpu")

    def reduce(self, tensor, reduce_op):
        return tensor


def test_a_run_on_the_cpu_leaves_cuda_alone_and_records_its_memory(tiny, llm_train, monkeypatch, recwarn):
    def start_cuda(*_):
        raise AssertionError("CUDA was started")

    def load(*args, pin_memory, **kwargs):
        assert not pin_memory
        return DataLoader(*args, **kwargs)

    monkeypatch.setattr(datamodules.base, "DataLoader", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # as on a machine with a GPU
    for module in (torch.cuda, torch.cuda.random):
        monkeypatch.setattr(module, "device_count", lambda: 1)
    for name in ("_lazy_init", "get_device_name"):
        monkeypatch.setattr(torch.cuda, name, start_cuda)
    # AdamW of torch 2.15 itself asks whether the GPU records a graph.
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    done = llm_train("fit", "-c", tiny(trainer__max_steps=4, trainer__val_check_interval=4, optimizer=optimizer))
    assert done.code == 0, done.err
    assert "GPU" not in done.err + done.out + "".join(str(warning.message) for warning in recwarn)
    summary = json.loads((RUNS / "tiny/summary.json").read_text())
    assert 50 < summary["peak_memory_mib"] < 20_000
    assert "peak_gpu_memory_mib" not in summary
    with (RUNS / "tiny/metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["train/tokens_seen"]) == 4 * 4 * 16
    assert not {"perf/mfu", "perf/gpu_memory_mib"} & row.keys()
    assert json.loads((RUNS / "tiny/environment.json").read_text())[0]["devices"] == []


def test_peak_memory_is_in_bytes_on_linux_and_macos(monkeypatch):
    usage = type("usage", (), {"ru_maxrss": 4096})
    monkeypatch.setattr(run_record.resource, "getrusage", lambda who: usage)
    for platform, n_bytes in (("linux", 4096 * 1024), ("darwin", 4096)):
        monkeypatch.setattr(sys, "platform", platform)
        assert run_record.peak_memory() == n_bytes


@pytest.mark.parametrize(
    "end",
    [
        lambda tf32, trainer: tf32.teardown(trainer, None, "fit"),
        lambda tf32, trainer: tf32.on_exception(trainer, None, RuntimeError()),
    ],
    ids=["teardown", "exception"],
)
@pytest.mark.parametrize(("device", "within"), [("cuda", "high"), ("cpu", "highest")])
def test_tf32_is_allowed_within_a_run_on_a_gpu(device, within, end):
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))
    callback = TF32()
    callback.setup(trainer, None, "fit")
    try:
        assert torch.get_float32_matmul_precision() == within
        end(callback, trainer)
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")
