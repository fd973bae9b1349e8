"""The benchmark of the GPU in its short form, so that it works when there is a GPU."""

import json
import subprocess
import time
from types import SimpleNamespace

import pytest
from gpu import bench
from gpu.bench import ROWS, main, run_row
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
        ("cudaDeviceSynchronize", DeviceType.CPU, 0.0, 900.0, 1, False),
        ("cudaLaunchKernel", DeviceType.CPU, 0.0, 100.0, 20, False),
        ("Context Sync", DeviceType.CUDA, 0.0, 0.0, 1, False),
        ("Optimizer.step#AdamW.step", DeviceType.CUDA, 400.0, 0.0, 10, True),  # the range of the kernels in it
        ("softmax", DeviceType.CUDA, 100.0, 0.0, 10, False),
        ("gemm", DeviceType.CUDA, 300.0, 0.0, 10, False),
    ]
    names = ("key", "device_type", "self_device_time_total", "self_cpu_time_total", "count", "is_user_annotation")
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


@pytest.mark.parametrize("is_stuck", [pytest.param(True, marks=pytest.mark.slow), False])
def test_what_a_row_has_started_ends_with_it(monkeypatch, tmp_path, is_stuck):
    def measure(settings):
        started = bench.multiprocessing.get_context("fork").Process(target=time.sleep, args=(100,))
        started.start()  # the process of the row waits for it
        (tmp_path / "pid").write_text(str(started.pid))
        if is_stuck:
            time.sleep(100)
        yield from ()

    monkeypatch.setitem(ROWS, "a", ROWS["a"].__class__("a row", measure))
    monkeypatch.setattr(bench, "SECONDS_TO_END", 0.2)
    began = time.monotonic()
    report = run_row("a", Settings(short=True), tmp_path / "a", tmp_path / "log", 10 if is_stuck else 60)
    assert time.monotonic() - began < 60
    assert report["error"] == ("stopped after 10 s" if is_stuck else None)
    command = ["ps", "-o", "stat=", (tmp_path / "pid").read_text()]
    while subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() not in ("", "Z"):
        assert time.monotonic() - began < 90  # it is killed when it next runs; nobody reads its exit code
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--rows", "h"], [300]),
        (["--rows", "a,h", "--seconds", "600"], [300, 600]),
        (["--rows", "a,b,h"], [110, 150, 300]),
        (["--rows", "a,b,h", "--variants"], [300, 300, 300]),
        (["--rows", "a,b", "--variants", "--seconds", "600"], [480, 600]),
    ],
)
def test_a_row_may_take_its_share_of_the_time(monkeypatch, tmp_path, arguments, expected):
    given = []

    def measured(name, settings, folder, log, seconds, start):
        given.append(round(seconds))
        return {"lines": [], "error": None, "seconds": 0.0}

    monkeypatch.setattr(bench, "run_row", measured)
    monkeypatch.setattr(bench, "processes", lambda: None)
    assert main(["--short", *arguments, "--out", str(tmp_path / "figures.json")]) == 0
    assert given == expected
