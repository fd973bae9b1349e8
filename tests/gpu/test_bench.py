"""The benchmark of the GPU in its short form, so that it works when there is a GPU."""

import json
from types import SimpleNamespace

import pytest
from gpu.bench import ROWS, main
from gpu.runs import Settings, _longest
from torch.autograd import DeviceType


@pytest.mark.parametrize("row", ["a", "e"])
def test_a_row_runs_shortened(row):
    lines = list(ROWS[row].measure(Settings(short=True)))
    assert all(line.figures for line in lines)
    assert {"a": "MFU" not in lines[0].figures, "e": lines[0].figures == {"equal": "2 of 2"}}[row]


@pytest.mark.slow
@pytest.mark.parametrize("row", ["a", "b"])
def test_the_kernels_and_variants_of_a_step_are_measured(row, tmp_path):
    given = ["--short", "--rows", row, "--kernels", "--variants", "--out", str(tmp_path / "figures.json")]
    assert main(given) == 0
    lines = json.loads((tmp_path / "figures.json").read_text())["rows"][row]["lines"]
    shares = [line["share"] for line in lines if "share" in line]
    assert shares == sorted(shares, reverse=True)
    assert 0.5 < sum(shares) <= 1
    assert not any("failed" in line for line in lines)
    assert {"flash attention", "all that are faster"} <= {line["who"] for line in lines}


def test_the_kernels_of_a_gpu_are_without_the_calls_of_the_host():
    recorded = [
        ("cudaDeviceSynchronize", DeviceType.CPU, 0.0, 900.0, 1),
        ("cudaLaunchKernel", DeviceType.CPU, 0.0, 100.0, 20),
        ("Context Sync", DeviceType.CUDA, 0.0, 0.0, 1),
        ("softmax", DeviceType.CUDA, 100.0, 0.0, 10),
        ("gemm", DeviceType.CUDA, 300.0, 0.0, 10),
    ]
    names = ("key", "device_type", "self_device_time_total", "self_cpu_time_total", "count")
    events = [SimpleNamespace(**dict(zip(names, event, strict=True))) for event in recorded]
    lines = _longest(events, on_gpu=True, n_steps=10, most=15)
    assert [(line.who, line.figures["share"], line.figures["ms a step"]) for line in lines] == [
        ("gemm", 0.75, 0.03),
        ("softmax", 0.25, 0.01),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("row", sorted(ROWS.keys() - {"a", "e"}))
def test_the_other_rows_run_shortened(row, tmp_path):
    assert main(["--short", "--rows", row, "--out", str(tmp_path / "figures.json")]) == 0
    lines = json.loads((tmp_path / "figures.json").read_text())["rows"][row]["lines"]
    assert lines
    assert not any(line.get("equal") == "False" for line in lines)


def test_a_row_that_fails_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    def fails(settings):
        yield from ()
        raise ValueError("no such kernel\nand more")

    monkeypatch.setitem(ROWS, "a", ROWS["a"].__class__("a row that fails", fails))
    monkeypatch.setitem(ROWS, "b", ROWS["a"].__class__("a row without lines", lambda settings: iter(())))
    assert main(["--short", "--rows", "a,b", "--out", str(tmp_path / "figures.json")]) == 1
    printed = capsys.readouterr().out
    assert "failed: ValueError: no such kernel (see " in printed
    assert "b: a row without lines" in printed
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert (rows["a"]["error"], rows["b"]["error"]) == ("ValueError: no such kernel", None)
