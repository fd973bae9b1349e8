"""What the figures of a comparison show, and how they name the runs."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.colors import to_hex

from experiments.comparison import figures
from experiments.comparison.arms import Arm, arms_of, short_labels, show_values
from experiments.comparison.figures import Curve, draw_curves, limits_of
from experiments.comparison.measures import Measure
from experiments.comparison.runs import RunResult, Series
from lightning_modules.common.figures import log_scale, new_figure, smoothed


def run(name: str, losses=(3.0, 2.0), metric="val/loss", seed=0, **settings) -> RunResult:
    steps = np.arange(1, len(losses) + 1) * 10
    series = {metric: Series(steps, np.array(losses))}
    return RunResult(name, "finished", "", settings, {"seed_everything": seed}, {}, series)


def labels(runs) -> list[str]:
    return [arm.label for arm in arms_of(runs)]


def text_of(axis) -> list[str]:
    return [tick.get_text() for tick in axis.get_ticklabels()]


def test_arms_of_a_study_of_files_are_named_by_the_file_in_place_of_what_it_sets():
    runs = [
        run(f"runs/t/s/config={name},seed={seed}", seed=seed, config=name, **settings)
        for name, settings in {
            "nothing": {},
            "lora": {"LoRA": "LoRA", "LoRA.r": 8},
            "half": {"Freeze": "Freeze", "Freeze.layers": ":50%"},
        }.items()
        for seed in (1, 2)
    ]
    assert labels(runs) == ["config=half", "config=lora", "config=nothing"]
    # One setting says more than the name of a file, and a setting that varies by itself stays.
    assert labels([run(n, config=n, n_layer=layers) for n, layers in (("a", 1), ("b", 2))]) == [
        "n_layer=1",
        "n_layer=2",
    ]
    crossed = [run(f"{n},{lr}", config=n, x=n * 2, y=n * 3, lr=lr) for n in "ab" for lr in (0.1, 0.2)]
    assert labels(crossed) == ["config=a, lr=0.1", "config=a, lr=0.2", "config=b, lr=0.1", "config=b, lr=0.2"]
    # Two files of the same name do not tell the arms apart.
    same = [run(n, config="a", x=n * 2, y=n * 3) for n in "cd"]
    assert labels(same) == ["x=cc, y=ccc", "x=dd, y=ddd"]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (["runs/a/small/tokenizer", "runs/a/large/tokenizer"], ["small/tokenizer", "large/tokenizer"]),
        (["studies/freeze/lora.yaml", "studies/freeze/half.yaml"], ["lora.yaml", "half.yaml"]),
        (["studies/lora.yaml", "none"], ["studies/lora.yaml", "none"]),
        (["/data/a.txt", "/books/a.txt"], ["data/a.txt", "books/a.txt"]),
        (["studies/lora.yaml"], ["studies/lora.yaml"]),
        ([None, "a/b", "a/c"], ["null", "b", "c"]),
    ],
)
def test_paths_are_shown_without_the_folders_that_they_share(values, shown):
    assert list(show_values(values).values()) == shown


@pytest.mark.parametrize(
    ("shown", "title", "names"),
    [
        ([{"without": '["norm"]'}, {"without": "[]"}], "without", ["[norm]", "[]"]),
        ([{"optimizer": "SGD", "lr": "0.1"}, {"optimizer": "Muon", "lr": "0.02"}], "optimizer", ["SGD", "Muon"]),
        ([{"a": "1", "b": x} for x in "12"] + [{"a": "2", "b": "1"}], "a, b", ["1, 1", "1, 2", "2, 1"]),
        ([{}], "", ["all runs"]),
    ],
)
def test_figures_name_the_fewest_settings_that_tell_arms_apart(shown, title, names):
    assert short_labels([Arm(values, values, [], []) for values in shown]) == (title, names)


@pytest.mark.parametrize(
    ("metric", "limits"),
    [
        ("val/accuracy/pairs_8", (0, 1)),
        ("val/rougeL", (0, 1)),
        ("val/ends_with_eos", (0, 1)),
        ("val/loss", (0, math.inf)),
        ("train/grad_norm", (0, math.inf)),
        ("val/gap", (-math.inf, math.inf)),
        ("init/excess_loss", (-math.inf, math.inf)),
    ],
)
def test_a_metric_has_limits(metric, limits):
    assert limits_of(metric) == limits


def test_an_interval_beyond_what_a_metric_can_be_is_not_drawn():
    accuracies = [(0.1, 0.2, 0.99), (0.1, 0.9, 1.0), (0.1, 0.5, 0.97)]

    def drawn(metric: str):
        arms = arms_of([run(f"r{seed}", values, metric, seed) for seed, values in enumerate(accuracies)])
        curves = figures.curves_of([metric], arms)
        assert (min(curves[0].low[1:]) < 0, max(curves[0].high[1:]) > 1) == (True, True)
        return arms, draw_curves(curves, arms, [0]).axes[0]

    _, axes = drawn("val/gap")
    assert (len(axes.get_lines()), len(axes.collections)) == (1, 1)  # the mean and its interval
    arms, axes = drawn("val/accuracy")
    _, *runs = axes.get_lines()
    assert [line.get_ydata().tolist() for line in runs] == [list(values) for values in accuracies]
    assert not axes.collections
    (axes,) = figures.draw_summary(arms, [Measure("val/accuracy", "last", "max")], [0]).axes
    ends = [x for bar in axes.collections for path in bar.get_paths() for x in path.vertices[:, 0]]
    assert max(ends) == 1.0


def test_an_interval_between_steps_without_one_is_drawn_as_a_line():
    losses = [(3.0, 2.5, 2.0, 1.5, 1.0), (3.0, 2.7, 2.0, 1.6, 1.1), (3.0, 2.6, 2.0, 1.7, 1.2)]
    arms = arms_of([run(f"r{seed}", values, seed=seed) for seed, values in enumerate(losses)])
    curves = figures.curves_of(["val/loss"], arms)
    (axes,) = draw_curves(curves, arms, [0]).axes
    area, line = axes.collections
    assert any({40, 50} == set(path.vertices[:, 0]) for path in area.get_paths())
    (ends,) = (path.vertices.tolist() for path in line.get_paths())
    assert ends == [[20, curves[0].low[1]], [20, curves[0].high[1]]]


def test_curves_that_lie_together_are_drawn_again_closer():
    steps = np.arange(0, 161, 20)
    arms = [SimpleNamespace(label=f"a={n}", shown={"a": str(n)}) for n in range(6)]
    curves = [Curve("val/loss", n, "", True, steps, 3 + 0.05 * n + 30 * np.exp(-steps / 9.0)) for n in range(5)]
    curves.append(Curve("val/loss", 5, "", True, steps, 9 + 20 * np.exp(-steps / 40.0)))
    whole, closer = draw_curves(curves, arms, range(6)).axes
    assert (whole.get_yscale(), closer.get_yscale()) == ("log", "linear")
    assert closer.get_ylabel() == "val/loss, closer"
    low, high = closer.get_ylim()
    assert 2.9 < low < 3.1  # the five lie from 3.0 to 3.2
    assert 3.2 < high < 3.4
    assert closer.get_xlim()[0] == 80
    spread = [Curve("val/loss", n, "", True, steps, 3.0 + 0.5 * n + 0 * steps) for n in range(6)]
    assert len(draw_curves(spread, arms, range(6)).axes) == 1


def test_steps_are_whole_numbers_and_a_logarithmic_axis_has_plain_ones():
    arms = [SimpleNamespace(label="a", shown={"a": "1"})]
    steps = np.array([6, 12, 18, 24])
    (axes,) = draw_curves([Curve("val/loss", 0, "", True, steps, np.array([5.0, 3.0, 0.5, 0.1]))], arms, [0]).axes
    assert axes.get_xticks().tolist() == [6, 12, 18, 24]
    axes.figure.draw_without_rendering()
    shown = [text for text in text_of(axes.yaxis) if text]
    assert {"0.1", "1"} <= set(shown)
    assert not any("$" in text for text in shown)
    axes = new_figure(4, 3).add_subplot()
    axes.plot([1, 2], [1e-6, 2e3])
    log_scale(axes, "y")
    axes.figure.draw_without_rendering()
    assert {"0.0001", "1", "100"} <= set(text_of(axes.yaxis))
    axes = new_figure(4, 3).add_subplot()
    axes.plot([1, 2], [1, 1e14])  # gradients of a run that diverges
    log_scale(axes, "y")
    axes.figure.draw_without_rendering()
    assert [text for text in text_of(axes.yaxis) if "e" in text]
    assert max(map(len, text_of(axes.yaxis))) <= len("100,000")


def test_training_curves_are_smoothed_with_the_raw_one_behind():
    values = [2.0 + (-1) ** step * 0.5 for step in range(60)]
    mean = smoothed(values)
    assert mean[0] == values[0]
    assert np.abs(np.array(mean[3:-3]) - 2).max() < 0.1
    assert smoothed(values[:19]) is None
    with_gap = [*values[:30], math.nan, *values[31:]]
    near = [with_gap[place - min(3, place) : place + min(3, place) + 1] for place in range(60)]
    means = [sum(found) / len(found) for found in near]
    assert smoothed(with_gap) == pytest.approx(means, nan_ok=True)
    arms = [SimpleNamespace(label="a", shown={"a": "1"})]
    curve = Curve("train/loss", 0, "", True, np.arange(60), np.array(values))
    (axes,) = draw_curves([curve], arms, [0]).axes
    raw, smooth = axes.get_lines()
    assert (raw.get_alpha(), to_hex(raw.get_color())) == (0.3, to_hex(smooth.get_color()))
    assert np.ptp(smooth.get_ydata()[5:-5]) < 0.2 * np.ptp(raw.get_ydata()[5:-5])


def test_of_two_settings_one_is_the_colour_and_the_other_the_style():
    arms = arms_of([run(f"{rate} {size}", rate=rate, size=size) for rate in (0, 0.1, 0.3) for size in ("small", "big")])
    (axes,) = draw_curves(figures.curves_of(["val/loss"], arms), arms, [0]).axes
    drawn = zip(arms, axes.get_lines(), strict=True)
    looks = {(arm.values["rate"], arm.values["size"]): (line.get_color(), line.get_linestyle()) for arm, line in drawn}
    colors = [{looks[rate, size][0] for size in ("small", "big")} for rate in (0, 0.1, 0.3)]
    assert [len(found) for found in colors] == [1, 1, 1]
    assert len(set.union(*colors)) == 3
    assert {looks[rate, size][1] for rate in (0, 0.1, 0.3) for size in ["big"]} == {"-"}
    assert {looks[rate, size][1] for rate in (0, 0.1, 0.3) for size in ["small"]} == {"--"}


def test_of_two_settings_with_three_values_each_all_arms_have_a_colour_of_their_own():
    arms = arms_of([run(f"{rate} {size}", rate=rate, size=size) for rate in (1, 2, 3) for size in (4, 5, 6)])
    (axes,) = draw_curves(figures.curves_of(["val/loss"], arms), arms, [0]).axes
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.get_lines()}) == 9


def test_an_arm_with_a_run_that_ended_early_has_no_mean():
    runs = [run(f"r{seed}", (3.0, 2.0, 1.5, 1.2), seed=seed) for seed in range(3)]
    assert [curve.run for curve in figures.curves_of(["val/loss"], arms_of(runs))] == [""]
    runs[0] = run("r0", (3.0,), seed=0)
    assert [curve.run for curve in figures.curves_of(["val/loss"], arms_of(runs))] == ["r0", "r1", "r2"]


def test_a_metric_with_one_value_is_not_called_the_last():
    kinds = [Measure(metric, "last", None).label for metric in ("val/loss", "init/grad_norm", "test/perplexity")]
    assert kinds == ["val/loss, last", "init/grad_norm", "test/perplexity"]
