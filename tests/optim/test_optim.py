"""Learning-rate schedules against values worked out by hand, and the weight-decay groups."""

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from transformers import Adafactor

from experiments.help import options
from lightning_modules.base import ExperimentModule
from lightning_modules.optim import ScheduleFactory, build_schedule, check_optimizer, weight_decay_groups
from lightning_modules.optim.schedules import (
    Constant,
    Cosine,
    InverseTime,
    Linear,
    OneCycle,
    ReduceOnPlateau,
    StepSchedule,
    WarmupStableDecay,
)

PEAK = 0.5


def optimizer(lr: float = PEAK) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def rates(schedule: StepSchedule, steps: int) -> list[float]:
    """The learning rate of each step, as a share of the peak."""
    seen = []
    for _ in range(steps):
        seen.append(schedule.get_last_lr()[0] / PEAK)
        schedule.optimizer.step()
        schedule.step()
    return seen


def test_every_schedule_warms_up_in_a_straight_line_that_learns_from_the_first_step():
    for schedule_class in (Constant, Linear, Cosine, InverseTime, WarmupStableDecay, ReduceOnPlateau):
        assert rates(schedule_class(optimizer(), 20, warmup=4), 5)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_warmup_below_one_is_a_share_of_the_run():
    assert Constant(optimizer(), 200, warmup=0.1).warmup_steps == 20
    assert Constant(optimizer(), 200, warmup=7).warmup_steps == 7


def test_a_run_that_ends_in_its_warmup_never_reaches_the_peak():
    assert rates(Cosine(optimizer(), 2, warmup=10), 2) == pytest.approx([0.1, 0.2])


def test_constant():
    assert rates(Constant(optimizer(), 3), 3) == [1.0, 1.0, 1.0]


def test_linear_falls_by_equal_steps():
    assert rates(Linear(optimizer(), 4, final=0.2), 5) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_inverse_time_halves_when_decay_times_steps_is_one_whatever_the_length_of_the_run():
    for total_steps in (4, 1000):
        seen = rates(InverseTime(optimizer(), total_steps, warmup=2, decay=0.5), 9)
        assert seen == pytest.approx([0.5, 1.0, 1.0, 2 / 3, 1 / 2, 2 / 5, 1 / 3, 2 / 7, 1 / 4])


def test_cosine_passes_the_middle_half_way_and_stays_at_its_end():
    seen = rates(Cosine(optimizer(), 8, final=0.1), 12)
    assert seen[0] == 1.0
    assert seen[4] == pytest.approx(0.55)
    assert seen[2] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert seen[8:] == pytest.approx([0.1] * 4)


def test_warmup_stable_decay_is_flat_until_its_last_share():
    seen = rates(WarmupStableDecay(optimizer(), 10, decay=0.4), 11)
    assert seen[:7] == pytest.approx([1.0] * 7)
    assert seen[8] == pytest.approx(1 - math.sqrt(0.5))
    for decay in (0.4, 0.2, 0.05, 1.0):
        assert rates(WarmupStableDecay(optimizer(), 10, decay=decay), 11)[10] == 0.0


def test_one_cycle_rises_then_falls():
    seen = rates(OneCycle(optimizer(), 10, warmup=4, initial=0.04, final=0.01), 11)
    assert seen[0] == pytest.approx(0.04)
    assert seen[2] == pytest.approx(0.52)
    assert seen[4] == pytest.approx(1.0)
    assert seen[7] == pytest.approx(0.505)
    assert seen[10] == pytest.approx(0.01)


def test_plateau_halves_the_rate_after_more_than_patience_bad_validations():
    schedule = ReduceOnPlateau(optimizer(), 100, factor=0.5, patience=1)
    multipliers = []
    for loss in (2.0, 1.0, 1.0, 1.0, 0.9, 0.9, 0.9):
        schedule.observe({"val/loss": torch.tensor(loss)})
        multipliers.append(schedule.multiplier(50))
    assert multipliers == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25]


def test_plateau_counts_small_improvements_as_none_and_stops_at_its_lowest_rate():
    schedule = ReduceOnPlateau(optimizer(), 100, factor=0.5, patience=0, threshold=0.1, final=0.3)
    multipliers = []
    for loss in (1.0, 0.91, 0.89, 0.89, 0.79):
        schedule.observe({"val/loss": torch.tensor(loss)})
        multipliers.append(schedule.multiplier(50))
    assert multipliers == [1.0, 0.5, 0.5, 0.3, 0.3]


def test_plateau_without_its_metric_names_the_metrics_that_were_logged():
    with pytest.raises(ValueError, match=r"'val/loss'.*it logged val/accuracy"):
        ReduceOnPlateau(optimizer(), 10).observe({"val/accuracy": torch.tensor(1.0)})


def test_a_restored_schedule_goes_on_where_it_was_also_in_a_longer_run():
    first = ReduceOnPlateau(optimizer(), 10, patience=0)
    for loss in (1.0, 1.0):
        first.observe({"val/loss": torch.tensor(loss)})
    rates(first, 4)
    second = ReduceOnPlateau(optimizer(), 20, patience=0)
    second.load_state_dict(first.state_dict())
    assert (second.last_epoch, second.reduction, second.total_steps) == (4, 0.5, 20)


@pytest.mark.parametrize("total_steps", [math.inf, -1])  # no limit; max_epochs of data without a length
def test_a_run_of_unknown_length_has_schedules_that_need_none_only(total_steps):
    for factory in (Cosine, partial(Constant, warmup=0.1)):
        with pytest.raises(ValueError, match="depends on the length of the run, which is unknown"):
            build_schedule(factory, optimizer(), total_steps)
    schedule = build_schedule(partial(Constant, warmup=2), optimizer(), total_steps)
    assert rates(schedule, 4) == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("schedule", "setting", "condition"),
    [
        ("Linear", "warmup=-0.1", "v>=0"),
        ("Linear", "warmup=inf", "v>=0 and v<inf"),
        ("Cosine", "final=1.5", "v>=0 and v<=1"),
        ("InverseTime", "decay=-1", "v>=0"),
        ("WarmupStableDecay", "decay=2", "v>=0 and v<=1"),
        ("OneCycle", "initial=-1", "v>=0 and v<=1"),
        ("ReduceOnPlateau", "factor=3", "v>=0 and v<=1"),
        ("ReduceOnPlateau", "threshold=3", "v>=0 and v<=1"),
        ("ReduceOnPlateau", "patience=-1", "v>=0"),
    ],
)
def test_the_parser_refuses_values_out_of_range(schedule, setting, condition):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--schedule", type=ScheduleFactory)
    with pytest.raises(ArgumentError, match=f"does not conform to restriction {condition}"):
        parser.parse_args([f"--schedule=lightning_modules.optim.schedules.{schedule}", f"--schedule.{setting}"])


def test_the_parser_gives_plain_numbers_that_a_checkpoint_can_hold(tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--schedule", type=ScheduleFactory)
    flags = ["--schedule=lightning_modules.optim.schedules.ReduceOnPlateau", "--schedule.factor=0.25"]
    parsed = parser.parse_args([*flags, "--schedule.patience=3", "--schedule.warmup=2"])
    schedule = parser.instantiate_classes(parsed).schedule(optimizer(), 10)
    torch.save(schedule.state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    assert (state["arguments"]["factor"], state["arguments"]["patience"]) == (0.25, 3)
    assert schedule.warmup_steps == 2


WARM = {"class_path": "torch.optim.lr_scheduler.LinearLR", "init_args": {"start_factor": 0.5, "total_iters": 2}}
FALL = {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.5}}


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("InSequence", {"schedules": [WARM, FALL], "milestones": [2]}, [0.5, 0.75, 1.0, 0.5, 0.25]),
        ("Together", {"schedules": [WARM, FALL]}, [0.5, 0.375, 0.25, 0.125, 0.0625]),
    ],
)
def test_schedules_of_torch_are_combined(name, arguments, expected):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--schedule", type=ScheduleFactory)
    spec = {"class_path": f"lightning_modules.optim.schedules.{name}", "init_args": arguments}
    factory = parser.instantiate_classes(parser.parse_object({"schedule": spec})).schedule
    combined = build_schedule(factory, optimizer(), 5)
    seen = []
    for _ in range(5):
        seen.append(combined.get_last_lr()[0] / PEAK)
        combined.optimizer.step()
        combined.step()
    assert seen == pytest.approx(expected)


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        (partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5), [1, 0.5]),
        (lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), [1, 0.5]),
        (torch.optim.lr_scheduler.LinearLR, [1 / 3, 1 / 3 + 2 / 15]),
        (partial(torch.optim.lr_scheduler.PolynomialLR, total_iters=4), [1, 0.75]),
        (lambda optimizer, n_steps: Linear(optimizer, n_steps), [1, 0.8]),
        (Linear, [1, 0.8]),
        (partial(Linear, warmup=2), [0.5, 1]),
    ],
)
def test_a_schedule_may_be_set_in_python(factory, expected):
    schedule = build_schedule(factory, optimizer(), 5)
    assert [schedule.get_last_lr()[0] / PEAK] == pytest.approx(expected[:1])
    schedule.optimizer.step()
    schedule.step()
    assert [schedule.get_last_lr()[0] / PEAK] == pytest.approx(expected[1:])


def test_an_argument_that_a_schedule_of_torch_lacks_is_not_the_length():
    with pytest.raises(TypeError, match="max_lr"):
        build_schedule(partial(torch.optim.lr_scheduler.OneCycleLR, total_steps=50), optimizer(), 5)


def test_a_schedule_of_torch_that_takes_built_ones_names_what_to_take():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--schedule", type=ScheduleFactory)
    parsed = parser.parse_args(["--schedule=torch.optim.lr_scheduler.ChainedScheduler"])
    with pytest.raises(ValueError, match="take InSequence or Together"):
        build_schedule(parser.instantiate_classes(parsed).schedule, optimizer(), 5)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.norm = nn.LayerNorm(3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embedding.weight


def test_matrices_decay_once_and_vectors_and_frozen_weights_do_not():
    decayed, undecayed = weight_decay_groups(Tied())
    assert [name for name, _ in decayed["params"]] == ["embedding.weight"]
    assert [name for name, _ in undecayed["params"]] == ["norm.weight", "norm.bias", "head.bias"]
    assert "weight_decay" not in decayed
    assert undecayed["weight_decay"] == 0.0
    built = torch.optim.AdamW([decayed, undecayed], lr=1e-3, weight_decay=0.3)
    assert [group["weight_decay"] for group in built.param_groups] == [0.3, 0.0]


def test_the_optimizers_of_torch_are_listed_and_train_or_are_refused():
    listed = {kind.name for kind in options.classes("optimizer") if kind.path.startswith("torch.optim.")}
    known = vars(torch.optim).values()
    kinds = {kind for kind in known if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)}
    for kind in kinds - {torch.optim.Optimizer, torch.optim.Muon}:  # the project has a Muon for all parameters
        if kind.__name__ not in listed:
            with pytest.raises(MisconfigurationException, match=f"optimizer: {kind.__name__} cannot train here: it"):
                check_optimizer(partial(build, kind))
            continue
        check_optimizer(partial(build, kind))
        module = nn.Sequential(nn.Embedding(3, 2), nn.LayerNorm(2), nn.Linear(2, 2))
        chosen = kind(weight_decay_groups(module), lr=0.1)
        before = module[2].weight.clone()
        module(torch.tensor([0, 2])).square().sum().backward()
        chosen.step(lambda: None)
        assert not torch.equal(module[2].weight, before), kind
    assert len(listed) >= 12
    assert "Muon" not in listed


def module_with(factory: Callable, schedule: Callable | None = None) -> ExperimentModule:
    module = ExperimentModule()
    module.layer = nn.Linear(2, 2)
    module.optimizer_factory, module.schedule_factory = factory, schedule
    module.trainer = SimpleNamespace(estimated_stepping_batches=4)
    return module


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (
            torch.optim.AdamW,
            {"fused": True, "foreach": True},
            "AdamW does not work with these arguments: RuntimeError: ",
        ),
        (torch.optim.AdamW, {"betas": (0.9, 1.5)}, "Invalid beta parameter"),
        (torch.optim.AdamW, {"differentiable": True}, "differentiable is for .*; leave it out$"),
        (torch.optim.Adadelta, {"capturable": True}, "capturable is for CUDA graphs, not for a CPU; leave it out$"),
        (Adafactor, {}, "lr is null; set it to a number, for Adafactor with --optimizer.relative_step false$"),
    ],
)
def test_arguments_with_which_an_optimizer_fails_are_refused(kind, arguments, message):
    with pytest.raises(MisconfigurationException, match=f"^optimizer: {message}"):
        module_with(partial(kind, **arguments)).configure_optimizers()


class Rate(torch.optim.Optimizer):
    """An optimiser whose rate has another name."""

    def __init__(self, params: object) -> None:
        super().__init__(params, {"rate": 0.1})


def test_an_optimizer_without_lr_in_its_groups_is_refused():
    with pytest.raises(MisconfigurationException, match=r"^optimizer: Rate has no lr in its parameter groups"):
        module_with(Rate).configure_optimizers()


def test_an_optimizer_that_takes_an_argument_is_not_refused():
    module_with(partial(torch.optim.AdamW, fused=True, capturable=True)).configure_optimizers()


class OfUser(torch.optim.SGD):
    """An optimiser that does not belong to this project."""

    def __init__(self, params: object) -> None:
        super().__init__(params, foreach=True, fused=True)


@pytest.mark.filterwarnings("ignore:Detected call of")  # no optimiser has stepped
def test_an_error_in_the_code_of_the_user_stays_as_it_is():
    with pytest.raises(RuntimeError, match="`fused` and `foreach`"):
        module_with(OfUser).configure_optimizers()

    def broken(step: int) -> float:
        return 1 / (step - 1)

    module = module_with(torch.optim.SGD, partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=broken))
    schedule = module.configure_optimizers()["lr_scheduler"]["scheduler"]
    with pytest.raises(ZeroDivisionError):
        module.lr_scheduler_step(schedule, None)


def build(kind: type, *_: object) -> None:
    """Stand for the function of which the parser makes a factory."""
