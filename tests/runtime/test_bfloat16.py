"""The line about a processor that is slow in bfloat16."""

from types import SimpleNamespace

import pytest
import torch

from lightning_modules.runtime import bfloat16


@pytest.mark.parametrize(
    ("precision", "device", "times", "is_slow"),
    [
        ("bf16-mixed", "cpu", 68.6, True),
        ("bf16-true", "cpu", 68.6, True),
        ("bf16-mixed", "cpu", 0.6, False),
        ("bf16-mixed", "cuda", 68.6, False),
        ("32-true", "cpu", 68.6, False),
    ],
)
def test_advice_is_for_a_cpu_that_is_slow_in_bfloat16(monkeypatch, precision, device, times, is_slow):
    monkeypatch.setattr(bfloat16, "time_against_float32", lambda: times)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)), precision=precision)
    line = bfloat16.advice(trainer)
    assert (line is not None) == is_slow
    if line is not None:
        assert line.startswith(f"trainer.precision {precision}: this processor multiplies matrices 69 times slower")


def test_a_command_says_it_before_it_reads_the_data(monkeypatch, llm_train, tiny):
    monkeypatch.setattr(bfloat16, "time_against_float32", lambda: 68.6)
    done = llm_train("fit", "-c", tiny(), "--trainer.max_steps=1", "--trainer.precision=bf16-mixed")
    assert done.code == 0, done.err
    assert "--trainer.precision 32-true is faster" in done.err.splitlines()[0]


def test_products_in_both_number_types_are_timed():
    assert 0.01 < bfloat16.time_against_float32.__wrapped__() < 1_000
