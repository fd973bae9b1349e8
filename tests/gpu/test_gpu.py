"""What a GPU must do: train every topic in every precision, exactly, without waiting and in little memory.

`make test-gpu` runs the tests on a GPU. Those that make sense on a CPU also run there, small, in `make test`.
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from gpu import workload
from gpu.callbacks import NoSync
from gpu.conftest import preset
from gpu.runs import Settings, fit
from helpers import LAST, RUNS, TINY, assert_same_weights
from shared_runs import own_world
from shortened import offline_experiments, run_of, shortened

from experiments.class_paths import import_class
from lightning_modules.runtime.checkpoint import RunCheckpoint
from lightning_modules.runtime.learning_curve import read_metric
from lightning_modules.runtime.peak_flops import peak_flops

OFFLINE = offline_experiments()
TRAINED = [path for path in OFFLINE if "\noptimizer:" in path.read_text()]  # the others count, on the host
DECODER = yaml.safe_load(TINY.read_text())["model"]["class_path"]


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def last(run: Path, metric: str) -> float:
    return float(read_metric(run / "metrics.csv", metric)[1][-1])


# --- every topic ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("path", OFFLINE, ids=name)
def test_every_offline_experiment_trains_on_the_gpu(llm_train, make_what_it_needs, path, precision):
    make_what_it_needs(path)
    flags = (*shortened(path), *preset("gpu"), "--trainer.precision", precision)
    done = llm_train("fit", "-c", path, *flags)
    assert done.code == 0, done.err
    summary = json.loads((run_of(path) / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["peak_gpu_memory_mib"] > 0 or path not in TRAINED
    assert "MiB on the GPU at most" in done.err
    (session,) = json.loads((run_of(path) / "environment.json").read_text())
    assert session["devices"]


@pytest.mark.gpu
@pytest.mark.parametrize("path", TRAINED, ids=name)
def test_the_host_does_not_wait_for_the_device_in_a_step(llm_train, make_what_it_needs, path):
    make_what_it_needs(path)  # the tests of the command look for waiting on the CPU, by the names of operations
    length = ("--trainer.max_steps=5", "--trainer.log_every_n_steps=100", "--trainer.limit_val_batches=1")
    checked = ("--trainer.callbacks+=gpu.callbacks.NoSync", "--trainer.accelerator=gpu")
    done = llm_train("fit", "-c", path, *shortened(path), *length, *checked)
    assert done.code == 0, done.err
    assert NoSync.checked >= 2


@pytest.mark.parametrize(
    "read",
    [
        torch.Tensor.item,
        bool,
        torch.Tensor.tolist,
        torch.Tensor.numpy,
        np.asarray,
        torch.Tensor.cpu,
        lambda x: x.to("cpu"),
        lambda x: x.to(device="cpu", dtype=torch.float64),
        torch.Tensor.nonzero,
        lambda x: x[x > 0],
    ],
    ids=["item", "bool", "tolist", "numpy", "asarray", "cpu", "to", "to_device", "nonzero", "mask"],
)
def test_what_the_host_would_wait_for_is_refused_on_the_cpu(read):
    callback, module = NoSync(), SimpleNamespace(device=torch.device("cpu"))
    trainer = SimpleNamespace(global_step=1, log_every_n_steps=100)
    value = torch.ones(1)
    callback.on_train_batch_start(trainer, module, None, 1)
    try:
        with pytest.raises(RuntimeError, match="the host would wait for the device"):
            read(value)
    finally:
        callback.on_train_batch_end(trainer, module)
    read(value)


# --- one topic, small -------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tiny):
    """Return a function that writes the YAML of the tiny run with the default callbacks and a gradient clip."""

    def write(name: str, **settings: object) -> Path:
        return tiny(name, **{"trainer__gradient_clip_val": 1.0, "trainer__precision": "32-true"} | settings)

    return write


def test_a_run_with_deterministic_true_leaves_the_tests_after_it_alone(tmp_path):
    with own_world(tmp_path):
        torch.use_deterministic_algorithms(True)  # as Lightning does for the rest of the process
    assert not torch.are_deterministic_algorithms_enabled()


class _Killed(BaseException):
    """The process was killed."""


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["false", "true", "reduce-overhead"])
def test_a_killed_run_resumes_bit_for_bit_with_deterministic_true(llm_train, small, monkeypatch, compile):
    config = small("exact", trainer__deterministic=True)
    flags = ("fit", "-c", config, "--trainer.accelerator=gpu", f"--model.compile={compile}")
    for name in ("whole", "again"):
        done = llm_train(*flags, "--run.name", name)
        assert done.code == 0, done.err
    assert_same_weights(RUNS / "whole" / LAST, RUNS / "again" / LAST)

    save = RunCheckpoint._save

    def save_and_die(self, trainer, *names):
        save(self, trainer, *names)
        if "last" in names and trainer.global_step == 8:
            raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunCheckpoint, "_save", save_and_die)
        with pytest.raises(_Killed):
            llm_train(*flags, "--run.name", "killed")
    done = llm_train(*flags, "--run.name", "killed", "--ckpt_path", "last")
    assert done.code == 0, done.err
    assert_same_weights(RUNS / "whole" / LAST, RUNS / "killed" / LAST)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["true", "reduce-overhead"])
def test_the_compiled_step_learns_what_the_eager_one_does(llm_train, small, compile):
    config = small("compiled", model__init_args__dropout=0.0)
    for name, flag in (("eager", "false"), ("compiled", compile)):
        done = llm_train("fit", "-c", config, *preset("gpu"), "--run.name", name, f"--model.compile={flag}")
        assert done.code == 0, done.err
    eager, compiled = (last(RUNS / name, "val/loss") for name in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=0.02)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("fused", [True, False])
def test_mixed_precision_logs_and_clips_the_true_gradient(llm_train, small, device, on, precision, fused):
    if device == "cpu" and (precision, fused) != ("bf16-mixed", True):
        pytest.skip("float16 is for GPUs, and one run on the CPU is enough")
    settings = {"model__init_args__dropout": 0.0, "optimizer__init_args__fused": fused, "trainer__max_steps": 4}
    norms, clipped = {}, {}
    for name in ("32-true", precision):
        config = small("mixed", **settings, trainer__log_every_n_steps=1, trainer__val_check_interval=4)
        done = llm_train("fit", "-c", config, *on, "--run.name", name, "--trainer.precision", name)
        assert done.code == 0, done.err
        for metric, values in (("train/grad_norm", norms), ("train/grad_norm_clipped", clipped)):
            values[name] = read_metric(RUNS / name / "metrics.csv", metric)[1]
        assert clipped[name] == pytest.approx([min(norm, 1.0) for norm in norms[name]], rel=1e-3)
    assert max(norms[precision]) > 1.0
    assert norms[precision][0] == pytest.approx(norms["32-true"][0], rel=0.05)
    assert all(map(math.isfinite, norms[precision]))


def in_own_process(*commands: tuple[str | Path, ...], then: str = "pass") -> str:
    """Run commands in one new process, then a line of Python; return what they print."""
    # Who starts CUDA is in the output.
    lines = ["import torch, traceback", "start = torch.cuda._lazy_init"]
    lines += ["torch.cuda._lazy_init = lambda: (torch.cuda.is_initialized() or traceback.print_stack(), start())"]
    lines += ["from experiments.__main__ import main"]
    lines += [f"main({[str(word) for word in command]})" for command in commands]
    script = "\n".join([*lines, then])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("arguments", [(), ("cpu_offload", "save_distributed_checkpoint")], ids=["", "host"])
def test_one_gpu_trains_with_the_shipped_preset_of_sharding_and_resumes(small, arguments):
    flags = [f"--trainer.strategy.{name}=true" for name in arguments]
    ablated = {"class_path": DECODER.replace("PretrainModule", "AblatedLoss"), "init_args": {"shares": [0.5]}}
    config = small("sharded", **{"trainer__callbacks+": [ablated]}, trainer__max_steps=16)
    command = ("fit", "-c", config, *preset("fsdp"), "--trainer.devices", "1", *flags)
    in_own_process(command, (*command, "--ckpt_path", "last", "--trainer.max_steps", "24"))
    assert all(math.isfinite(last(RUNS / "sharded", f"val/{name}")) for name in ("loss", "loss_ablated_50"))
    first, second = json.loads((RUNS / "sharded/environment.json").read_text())
    assert (first["precision"], second["precision"]) == ("bf16-mixed", "bf16-mixed")
    assert second["resumed"]["step"] == 16
    summary = json.loads((RUNS / "sharded/summary.json").read_text())
    assert (summary["status"], summary["step"]) == ("finished", 24)


@pytest.mark.gpu
def test_the_record_of_a_run_on_a_gpu_has_its_memory_and_speed(llm_train, small):
    done = llm_train("fit", "-c", small("record"), *preset("gpu"))
    assert done.code == 0, done.err
    peak = json.loads((RUNS / "record/summary.json").read_text())["peak_gpu_memory_mib"]
    logged = last(RUNS / "record", "perf/gpu_memory_mib")
    assert 0 < logged <= peak + 1
    assert f"{peak:,} MiB on the GPU at most" in done.err
    if peak_flops(torch.cuda.get_device_name(), "bfloat16"):
        assert 0 < last(RUNS / "record", "perf/mfu") < 1
    assert torch.get_float32_matmul_precision() == "highest"  # TF32 is allowed within the run only


@pytest.mark.gpu
def test_a_run_on_the_cpu_does_not_start_cuda(small):
    command = ("fit", "-c", small("on_cpu", trainer__max_steps=4), "--trainer.accelerator=cpu")
    printed = in_own_process(command, then="assert torch.cuda.is_available() and not torch.cuda.is_initialized()")
    assert "GPU" not in printed


@pytest.mark.gpu
def test_the_loss_of_a_large_vocabulary_takes_less_memory_than_its_scores(tmp_path):
    rows, vocabulary = 128 * 256, 50304
    text = workload.write_text(tmp_path / "words.txt", 150_000, vocabulary)
    tokenizer = workload.word_tokenizer(tmp_path / "tokenizer", vocabulary)
    model = {"init_args": {"n_layer": 1, "n_head": 1, "n_embd": 64, "compile": False}}
    data = {
        "init_args": {
            "source": {"class_path": "datamodules.sources.TextFiles", "init_args": {"paths": str(text)}},
            "tokenizer": str(tokenizer),
            "block_size": 256,
            "batch_size": rows // 256,
            "split": "tail",
            "val_fraction": 0.1,
            "num_workers": 0,
        }
    }
    clock = fit(Settings(), str(TINY), steps=4, every=2, model=model, data=data)
    assert clock.times.peak < 0.6 * rows * vocabulary * 4 / 2**30  # scores in float32 alone, in GiB


@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_tokens_are_those_of_transformers(device, batch, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = workload.save_gpt2(tmp_path / "gpt2", 97, n_layer=2, n_head=2, n_embd=32, n_positions=64)
    theirs = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    module = import_class(DECODER)(97, 64, pretrained=str(folder)).to(device).eval()
    torch.manual_seed(0)
    prompts = torch.randint(97, (batch, 5), device=device)
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    expected = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), **options)[:, 5:]
    steps = module.generate(prompts, max_new_tokens=40, temperature=0.0)
    assert torch.stack(list(steps), dim=1).tolist() == expected.tolist()


def test_text_is_generated_on_the_device_of_the_machine(llm_train, small, on, monkeypatch):
    export = [{"class_path": "lightning_modules.runtime.export.ExportModel"}]
    config = small("spoken", **{"trainer__callbacks+": export}, trainer__max_steps=8)
    assert llm_train("fit", "-c", config, *on).code == 0
    kind, devices = import_class(DECODER), []
    generate = kind.generate

    def recorded(self, *args, **options):
        devices.append(self.device.type)
        return generate(self, *args, **options)

    monkeypatch.setattr(kind, "generate", recorded)
    done = llm_train("generate", "--run", RUNS / "spoken", "--prompt", "ae", "--max_new_tokens", "12")
    assert done.code == 0, done.err
    assert devices == ["cuda" if torch.cuda.is_available() else "cpu"]
    assert done.out.startswith("ae")
    assert len(done.out) > 4
