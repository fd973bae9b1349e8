"""The number of steps to a given loss."""

from types import SimpleNamespace

import pytest

from lightning_modules.runtime.steps_to_loss import StepsToLoss


def steps(
    losses: dict[int, float], target: float, resume_at: int | None = None, new_target: float | None = None
) -> list[float]:
    """Return what is logged in a run with these losses by step, which may be resumed after one of them."""
    logged = []
    logger = SimpleNamespace(log_metrics=lambda metrics, step: logged.append(metrics["steps_to_loss"]))
    callback = StepsToLoss(target)
    for step, loss in losses.items():
        trainer = SimpleNamespace(
            callback_metrics={"val/loss": loss},
            global_step=step,
            loggers=[logger],
            sanity_checking=False,
            state=SimpleNamespace(fn="fit"),
        )
        callback.on_validation_end(trainer, None)
        if step == resume_at:
            state, callback = callback.state_dict(), StepsToLoss(new_target or target)
            callback.load_state_dict(state)
    return logged


def test_the_step_is_interpolated_and_logged_once():
    losses = {10: 4.0, 20: 3.0, 30: 3.5, 40: 1.5, 50: 1.0}
    for resume_at in (None, *losses):
        assert steps(losses, 2.5, resume_at) == pytest.approx([35.0])
    assert steps(losses, 4.5) == [10.0]
    assert steps(losses, 0.5) == []


def test_a_resumed_run_with_another_target_logs_its_step_too():
    losses = {10: 4.0, 20: 2.0, 30: 1.5, 40: 0.5}
    assert steps(losses, 2.5, resume_at=20, new_target=1.0) == pytest.approx([17.5, 35.0])
