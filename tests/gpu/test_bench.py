"""The benchmark of the GPU in its short form, so that it works when there is a GPU."""

import json

import pytest
from gpu.bench import ROWS, main
from gpu.runs import Settings


@pytest.mark.parametrize("row", ["a", "e"])
def test_a_row_runs_shortened(row):
    lines = list(ROWS[row].measure(Settings(short=True)))
    assert all(line.figures for line in lines)
    assert {"a": "MFU" not in lines[0].figures, "e": lines[0].figures == {"equal": "2 of 2"}}[row]


@pytest.mark.slow
def test_the_kernels_of_a_step_and_a_variant_are_measured(tmp_path):
    assert main(["--short", "--rows", "a", "--kernels", "--out", str(tmp_path / "figures.json")]) == 0
    lines = json.loads((tmp_path / "figures.json").read_text())["rows"]["a"]["lines"]
    shares = [line["share"] for line in lines if "share" in line]
    assert shares == sorted(shares, reverse=True)
    assert 0.5 < sum(shares) <= 1
    assert lines[-1]["who"] == "bare loop, attention of cuDNN"


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
