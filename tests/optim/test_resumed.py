"""What a resumed run changes of its optimiser and schedule: it is applied and said, or refused."""

import contextlib
import csv
import json
import math
import shutil
import signal
from collections.abc import Callable
from functools import partial
from inspect import signature

import forks
import pytest
import torch
import yaml
from helpers import LAST, RUNS, assert_same_weights
from jsonargparse import ArgumentParser
from torch import nn
from transformers import Adafactor

from lightning_modules.optim import ScheduleFactory, build_schedule
from lightning_modules.optim.resumed import _WITH_STATE
from lightning_modules.optim.schedules import Constant, Cosine, InverseTime, Linear, ReduceOnPlateau, WarmupStableDecay

PEAK = 0.5


def rates_of(schedule: torch.optim.lr_scheduler.LRScheduler, steps: int) -> list[float]:
    """The learning rates of the next steps, as shares of the peak."""
    seen = []
    for _ in range(steps):
        seen.append(schedule.optimizer.param_groups[0]["lr"] / PEAK)
        schedule.optimizer.step()
        schedule.step()
    return seen


def new(schedule_class: type, total_steps: int, lr: float = PEAK, **arguments: object):
    return schedule_class(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr), total_steps, **arguments)


def resumed(first, steps: int, second):
    """Run a schedule, and return another one that continues from its checkpoint."""
    rates_of(first, steps)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    return second


def test_a_cosine_made_longer_goes_on_at_its_rate_and_is_stretched():
    second = resumed(new(Cosine, 8), 4, new(Cosine, 12))
    whole = rates_of(new(Cosine, 16), 16)
    assert rates_of(second, 9) == pytest.approx([*whole[8:], 0.0])  # half of the cosine in twice as many steps
    assert second.change_of_length == "the rest of the schedule of 8 steps is stretched to end at step 12"


def test_a_schedule_is_compressed_into_a_shorter_run_and_stretched_twice():
    second = resumed(new(Linear, 8), 4, new(Linear, 6))
    assert rates_of(second, 2) == pytest.approx([0.5, 0.25])
    third = resumed(new(Linear, 8), 4, new(Linear, 12))
    fourth = resumed(third, 4, new(Linear, 10))
    assert rates_of(fourth, 3) == pytest.approx([0.25, 0.125, 0.0])
    assert fourth.planned_steps == 10


@pytest.mark.parametrize("schedule", [Linear, Cosine, WarmupStableDecay])
def test_a_schedule_made_longer_ends_at_zero_exactly(schedule):
    for step in range(1, 11):
        second = resumed(new(schedule, 11), step, new(schedule, 14))
        rates_of(second, 14 - step)
        assert second.get_last_lr() == [0.0]
    twice = resumed(resumed(new(schedule, 100), 1, new(schedule, 103)), 3, new(schedule, 110))
    rates_of(twice, 106)
    assert twice.get_last_lr() == [0.0]


@pytest.mark.parametrize("schedule", [Constant, Cosine, InverseTime])
def test_a_stretched_warmup_rises_to_the_peak_in_small_steps(schedule):
    second = resumed(new(schedule, 8, warmup=0.5), 2, new(schedule, 16, warmup=0.5))
    assert rates_of(second, 4) == pytest.approx([0.75, 0.75 + 3 / 28, 0.75 + 6 / 28, 1.0])


def test_a_decay_in_inverse_time_keeps_its_speed_after_a_warmup_that_was_a_share_of_another_length():
    settings = {"warmup": 0.5, "decay": 0.5}
    second = resumed(new(InverseTime, 8, **settings), 5, new(InverseTime, 14, **settings))
    third = resumed(second, 1, new(InverseTime, 30, **settings))
    assert rates_of(third, 3) == pytest.approx([1 / 2, 1 / 2.5, 1 / 3])  # at steps 2 to 4 after the warm-up of 4
    assert second.change_of_length == third.change_of_length == ""
    stretched = resumed(new(InverseTime, 8, **settings), 2, new(InverseTime, 14, **settings))
    assert "is stretched to end at step 14" in stretched.change_of_length  # in the warm-up, which ends at step 6
    resumed_again = resumed(stretched, 5, new(InverseTime, 30, **settings))
    assert rates_of(resumed_again, 2) == pytest.approx([1 / 1.5, 1 / 2])
    assert resumed_again.change_of_length == ""


def test_a_schedule_that_is_still_flat_takes_the_new_length():
    second = resumed(new(WarmupStableDecay, 10, decay=0.4), 5, new(WarmupStableDecay, 20, decay=0.4))
    assert rates_of(second, 16) == pytest.approx(rates_of(new(WarmupStableDecay, 20, decay=0.4), 21)[5:])
    assert second.change_of_length == "the schedule is that of 20 steps in place of 10"


def test_a_decay_that_has_begun_is_stretched():
    second = resumed(new(WarmupStableDecay, 10, decay=0.4), 8, new(WarmupStableDecay, 14, decay=0.4))
    assert rates_of(second, 7)[0] == pytest.approx(1 - 0.5**0.5)
    assert second.optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


@pytest.mark.parametrize("schedule", [Constant, InverseTime, ReduceOnPlateau])
def test_schedules_without_a_length_do_not_change(schedule):
    second = resumed(new(schedule, 10), 4, new(schedule, 50))
    assert rates_of(second, 3) == pytest.approx(rates_of(new(schedule, 10), 7)[4:])
    assert second.change_of_length == ""


def test_a_plateau_reduces_the_rate_of_the_next_step_as_a_run_that_is_resumed_there():
    first = new(ReduceOnPlateau, 10, patience=0)
    first.observe({"val/loss": 1.0})
    rates_of(first, 4)
    first.observe({"val/loss": 1.0})
    second = resumed(first, 0, new(ReduceOnPlateau, 10, patience=0))
    assert rates_of(first, 3) == rates_of(second, 3) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"patience": 1}, [0.5, 0.5, 0.25]),
        ({"factor": 0.1}, [0.5, 0.05, 0.005]),
        ({"monitor": "val/bits"}, [0.5, 0.5, 0.25]),  # the first value of another metric is the best so far
    ],
)
def test_a_plateau_with_another_argument_keeps_its_reductions(changed, expected):
    first = new(ReduceOnPlateau, 10, patience=0)
    for loss in (1.0, 1.0):
        first.observe({"val/loss": loss})
    second = resumed(first, 4, new(ReduceOnPlateau, 10, **{"patience": 0} | changed))
    seen = []
    for _ in expected:
        seen += rates_of(second, 1)
        second.observe({"val/loss": 1.0, "val/bits": 2.0})
    assert seen == pytest.approx(expected)


def test_a_new_schedule_or_argument_or_peak_is_followed_from_the_step_on():
    assert rates_of(resumed(new(Cosine, 8), 4, new(Linear, 8, final=0.2)), 2) == pytest.approx([0.6, 0.5])
    assert rates_of(resumed(new(Linear, 8), 4, new(Linear, 8, final=0.2)), 2) == pytest.approx([0.6, 0.5])
    assert rates_of(resumed(new(Linear, 8), 4, new(Linear, 8, lr=2 * PEAK)), 2) == pytest.approx([1.0, 0.75])


def test_a_checkpoint_of_an_earlier_version_is_followed_as_before():
    first, second = new(Linear, 8, final=0.2), new(Linear, 16, final=0.2)
    rates_of(first, 4)
    state = {"last_epoch": 4, "_step_count": 5, "base_lrs": [PEAK], "_last_lr": [0.3], "final": 0.2}
    second.load_state_dict(state)
    assert rates_of(second, 2) == pytest.approx([0.8, 0.75])


# --- the command ------------------------------------------------------------------------------------------------------

SCHEDULES = "lightning_modules.optim.schedules"
TORCH = "torch.optim.lr_scheduler"


def logged(run: str, name: str = "train/lr") -> dict[int, float]:
    with (RUNS / run / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


@pytest.fixture
def continued(llm_train, tiny, whole, tmp_path):
    """Return a function that continues a copy of a finished run of 24 steps with other flags."""

    def run(*flags: str, **settings: object):
        shutil.rmtree(RUNS, ignore_errors=True)
        shutil.copytree(whole(**settings), RUNS / "run")
        config = tiny(**settings)
        return llm_train("fit", "-c", config, "--run.name", "run", "--ckpt_path", "last", *flags)

    return run


def settings_in_checkpoint() -> dict:
    return torch.load(RUNS / "run" / LAST, weights_only=True)["optimizer_states"][0]["param_groups"][0]


def test_changed_settings_of_the_optimiser_are_applied_and_said(continued):
    done = continued("--trainer.max_steps=28", "--optimizer.lr=0.5", "--optimizer.weight_decay=0.3")
    assert done.code == 0, done.err
    assert (
        "from step 24 on: lr 0.5 in place of 0.01; weight_decay 0.3 in place of 0.1; "
        "the rest of the schedule of 24 steps is stretched to end at step 28\n"
    ) in done.err
    assert logged("run")[28] == pytest.approx(0.05)  # the end of the schedule is a tenth of the peak
    assert logged("run")[24] < 0.01
    assert settings_in_checkpoint()["weight_decay"] == 0.3
    config = yaml.safe_load((RUNS / "run/config.yaml").read_text())
    assert config["optimizer"]["init_args"]["lr"] == 0.5
    first, second = json.loads((RUNS / "run/environment.json").read_text())
    assert "resumed" not in first
    assert (second["resumed"]["checkpoint"], second["resumed"]["step"]) == (str(RUNS / "run" / LAST), 24)
    changed = {"trainer.max_steps": [24, 28], "optimizer.lr": [0.01, 0.5], "optimizer.weight_decay": [0.1, 0.3]}
    paths = "data.source.paths"  # of a copy of the text
    assert {name: both for name, both in second["resumed"]["changed"].items() if name != paths} == changed


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_version_resumes_as_before_or_with_other_settings(llm_train, forked, tiny, whole):
    command = ("fit", "-c", tiny(), "--run.name")
    assert forked(*command, "kept", prepare=lambda: forks.die_after_step(16)) == -signal.SIGKILL
    checkpoint = torch.load(RUNS / "kept" / LAST, weights_only=True)
    del checkpoint["optimizer_settings"]
    state = checkpoint["lr_schedulers"][0]
    for name in ("schedule", "arguments", "stretches"):
        del state[name]
    state["final"] = 0.1  # arguments were among the state
    torch.save(checkpoint, RUNS / "kept" / LAST)
    shutil.copytree(RUNS / "kept", RUNS / "changed")

    kept = llm_train(*command, "kept", "--ckpt_path", "last")
    assert (kept.code, "from step" in kept.err) == (0, False), kept.err
    assert_same_weights(whole() / LAST, RUNS / "kept" / LAST)
    changed = llm_train(*command, "changed", "--ckpt_path", "last", "--optimizer.lr=0.5")
    assert (changed.code, "from step 16 on: lr 0.5 in place of 0.01" in changed.err) == (0, True), changed.err
    assert logged("changed")[20] == pytest.approx(50 * logged("kept")[20])


def test_another_schedule_is_followed_from_the_step_on(continued):
    done = continued("--trainer.max_steps=28", f"--lr_scheduler={SCHEDULES}.Constant")
    assert done.code == 0, done.err
    assert "from step 24 on: lightning_modules.Constant in place of lightning_modules.Cosine" in done.err
    assert logged("run")[28] == 0.01


@pytest.mark.slow
def test_a_resumed_run_can_drop_its_schedule_or_take_one(continued, llm_train, tiny):
    done = continued("--trainer.max_steps=28", "--lr_scheduler=null")
    assert done.code == 0, done.err
    assert "from step 24 on: no schedule in place of lightning_modules.Cosine" in done.err
    assert logged("run")[28] == 0.01
    linear = [f"--lr_scheduler={SCHEDULES}.Linear", *(f"--lr_scheduler.{name}=0" for name in ("warmup", "final"))]
    linear.append("--trainer.max_steps=32")
    added = llm_train("fit", "-c", tiny(), "--run.name", "run", "--ckpt_path", "last", *linear)
    assert added.code == 0, added.err
    assert "from step 28 on: lightning_modules.Linear in place of no schedule" in added.err
    assert logged("run")[32] == pytest.approx(0.01 / 32)


@pytest.mark.slow
def test_a_schedule_that_ended_at_zero_cannot_be_made_longer(continued):
    schedule = {"class_path": f"{SCHEDULES}.Linear", "init_args": {}}
    refused = continued("--trainer.max_steps=28", lr_scheduler=schedule)
    assert refused.code == 1
    assert '"status": "finished"' in (RUNS / "run/summary.json").read_text()
    assert "max_steps: 24" in (RUNS / "run/config.yaml").read_text()
    assert refused.err.splitlines()[-1].startswith("error: lr_scheduler: the schedule ended before step 24 with a rate")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--optimizer=torch.optim.SGD"], "optimizer: the checkpoint has the state of torch.AdamW, from which torch.S"),
        (["--optimizer.amsgrad=true"], "optimizer: the checkpoint has no state for amsgrad; keep it off"),
        ([f"--lr_scheduler={TORCH}.ConstantLR"], "lr_scheduler: torch.ConstantLR cannot take over at step 24"),
    ],
)
def test_what_cannot_be_changed_is_refused(llm_train, tiny, whole, tmp_path, flags, reason):
    copied = shutil.copy(whole() / LAST, tmp_path / "copied.ckpt")  # without the configuration of its run
    refused = llm_train("fit", "-c", tiny(), "--ckpt_path", copied, "--trainer.max_steps=28", *flags)
    assert (refused.code, refused.err.splitlines()[-1].startswith(f"error: {reason}")) == (1, True), refused.err
    assert not list(RUNS.glob("*"))


def test_the_settings_that_are_refused_are_those_for_which_a_step_needs_state():
    def with_gradient(kind: Callable[..., torch.optim.Optimizer], **settings: object) -> torch.optim.Optimizer:
        weight = nn.Parameter(torch.ones(2, 2))
        weight.grad = torch.ones(2, 2)
        return kind([weight], lr=PEAK, **settings)

    kinds = {f"torch.{name}": kind for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
    kinds["transformers.Adafactor"] = partial(Adafactor, relative_step=False)
    needing: dict[str, set[str]] = {}
    for path, kind in kinds.items():
        for name, argument in signature(kind).parameters.items():
            if argument.default not in (0, None) or name in ("lr", "capturable", "differentiable", "foreach", "fused"):
                continue
            with contextlib.suppress(ValueError, RuntimeError):  # `nesterov` without momentum, dense gradients
                first = with_gradient(kind)
                second = with_gradient(kind, **{name: True if argument.default is False else 0.5})
                groups = second.state_dict()["param_groups"]
                first.step(lambda: 1.0)
                second.load_state_dict(first.state_dict() | {"param_groups": groups})
                try:
                    second.step(lambda: 1.0)
                except KeyError:
                    needing.setdefault(path, set()).add(name)
    assert needing == _WITH_STATE


# --- torch's schedules ------------------------------------------------------------------------------------------------


def by_class(name: str, **init_args: object) -> dict:
    return {"class_path": f"{TORCH}.{name}", "init_args": init_args}


@pytest.mark.slow
def test_a_plateau_of_torch_is_told_of_validations_and_resumes(llm_train, tiny):
    schedule = by_class("ReduceLROnPlateau", patience=0, threshold=0.999)  # a tenth after each validation but the first
    command = ("fit", "-c", tiny(lr_scheduler=schedule, **{"trainer__callbacks+": []}), "--run.name", "run")
    done = llm_train(*command)
    assert done.code == 0, done.err
    longer = llm_train(*command, "--ckpt_path", "last", "--trainer.max_steps=28")
    assert longer.code == 0, longer.err
    rates = {4: 0.01, 8: 0.01, 12: 0.01, 16: 0.01, 20: 0.001, 24: 0.001, 28: 1e-4}
    assert logged("run") == pytest.approx(rates)
    linear = (f"--lr_scheduler={SCHEDULES}.Linear", "--trainer.max_steps=32")
    replaced = llm_train(*command, "--ckpt_path", "last", *linear)
    assert replaced.code == 0, replaced.err
    assert logged("run") == pytest.approx(rates | {32: 0.01 / 32})  # at step 28, and not after 5 validations


@pytest.mark.slow
def test_schedules_of_torch_that_are_combined_are_replaced_by_one_of_this_project(llm_train, tiny):
    both = {"schedules": [by_class("ExponentialLR", gamma=0.9)]}
    schedule = {"class_path": f"{SCHEDULES}.Together", "init_args": both}
    command = ("fit", "-c", tiny(lr_scheduler=schedule, trainer__max_steps=4), "--run.name", "run")
    assert llm_train(*command).code == 0
    linear = (f"--lr_scheduler={SCHEDULES}.Linear", "--trainer.max_steps=8")
    replaced = llm_train(*command, "--ckpt_path", "last", *linear)
    assert replaced.code == 0, replaced.err
    assert logged("run") == pytest.approx({4: 0.01 * 0.9**3, 8: 0.01 / 8})


@pytest.mark.slow
def test_every_schedule_of_torch_that_needs_no_other_schedule_can_be_named():
    arguments = {
        "ConstantLR": {}, "CosineAnnealingLR": {"T_max": 9}, "CosineAnnealingWarmRestarts": {"T_0": 3},
        "CyclicLR": {"base_lr": 0.1, "max_lr": 0.2}, "ExponentialLR": {"gamma": 0.9},
        "LambdaLR": {"lr_lambda": "math.sqrt"},
        "LinearLR": {}, "MultiStepLR": {"milestones": [2, 4]}, "MultiplicativeLR": {"lr_lambda": "math.sqrt"},
        "OneCycleLR": {"max_lr": 0.2}, "PolynomialLR": {}, "ReduceLROnPlateau": {}, "StepLR": {"step_size": 2},
    }  # fmt: skip
    named = {name for name in torch.optim.lr_scheduler.__all__ if name.endswith(("LR", "Restarts", "Plateau"))}
    assert named - arguments.keys() == {"SequentialLR", "SWALR"} & named
    parser = ArgumentParser()
    parser.add_argument("--schedule", type=ScheduleFactory)
    for name, init_args in arguments.items():
        parsed = parser.parse_object({"schedule": by_class(name, **init_args)})
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK, momentum=0.9)
        schedule = build_schedule(parser.instantiate(parsed).schedule, optimizer, 10)
        assert type(schedule).__name__ == name
    assert schedule.step_size == 2


def test_the_one_cycle_of_torch_is_told_the_length_unless_it_is_given():
    for given, length in (({}, 10), ({"total_steps": 7}, 7), ({"epochs": 2, "steps_per_epoch": 3}, 6)):
        parser = ArgumentParser()
        parser.add_argument("--schedule", type=ScheduleFactory)
        parsed = parser.parse_object({"schedule": by_class("OneCycleLR", max_lr=0.2, **given)})
        optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
        assert build_schedule(parser.instantiate(parsed).schedule, optimizer, 10).total_steps == length
    factory = parser.instantiate(parser.parse_object({"schedule": by_class("OneCycleLR", max_lr=0.2)})).schedule
    with pytest.raises(ValueError, match="OneCycleLR depends on the length of the run, which is unknown"):
        build_schedule(factory, optimizer, math.inf)


def test_rates_that_differ_are_logged_by_their_groups(llm_train, tiny):
    muon = {"class_path": "lightning_modules.optim.Muon", "init_args": {"lr": 0.02, "adamw_lr": 0.004}}
    done = llm_train("fit", "-c", tiny(optimizer=muon, trainer__max_steps=4, lr_scheduler=None), "--run.name", "run")
    assert done.code == 0, done.err
    assert (logged("run", "train/lr/muon"), logged("run", "train/lr/adamw")) == ({4: 0.02}, {4: 0.004})


def test_a_wrong_argument_of_a_schedule_is_one_line(llm_train, tiny):
    for schedule, code, reason in (
        (by_class("StepLR", step_siz=3), 2, "Option 'step_siz' is not accepted (did you mean 'step_size'?)"),
        (by_class("LinearLR", start_factor=2.0), 1, "error: lr_scheduler: Starting multiplicative factor"),
        (
            by_class("CyclicLR", base_lr=0.1, max_lr=0.2, step_size_up=0, cycle_momentum=False),
            1,
            "error: lr_scheduler: CyclicLR does not work with these arguments: ZeroDivisionError",
        ),
        (  # in its first step
            by_class("StepLR", step_size=0),
            1,
            "error: lr_scheduler: StepLR does not work with these arguments: ZeroDivisionError: ",
        ),
    ):
        done = llm_train("fit", "-c", tiny(lr_scheduler=schedule))
        assert (done.code, reason in done.err.splitlines()[-1]) == (code, True), done.err
