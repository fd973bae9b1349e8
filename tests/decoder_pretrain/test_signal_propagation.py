"""What is measured of the signal, and that measuring changes nothing."""

from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
from helpers import assert_same_weights
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.decoder_pretrain.module import PretrainModule
from lightning_modules.decoder_pretrain.signal_propagation import SignalPropagation, check_decoder
from lightning_modules.runtime.drawing import DrawsAtTheEnd
from lightning_modules.runtime.learning_curve import read_metric

RUNS = Path("runs/decoder_pretrain")
CALLBACKS = "lightning_modules.runtime"
MEASURED = {
    "class_path": f"{CALLBACKS}.signal_propagation.SignalPropagation",
    "init_args": {"steps": [0, 5, 23, 1000]},
}


def at(run: Path, name: str) -> dict[int, float]:
    return dict(zip(*read_metric(run / "metrics.csv", name), strict=True))


def test_watching_a_run_does_not_change_it(llm_train, tiny):
    watchers = [
        MEASURED,
        {"class_path": f"{CALLBACKS}.before_training.LossBeforeTraining"},
        {"class_path": f"{CALLBACKS}.generalization.GeneralizationGap", "init_args": {"n_windows": 8}},
        {"class_path": f"{CALLBACKS}.generalization.AblatedLoss", "init_args": {"shares": [0, 0.5]}},
    ]
    unseen = tiny(trainer__log_every_n_steps=1, **{"trainer__callbacks+": []})
    assert llm_train("fit", "-c", unseen, "--run.name", "unseen").code == 0
    seen = tiny(trainer__log_every_n_steps=1, **{"trainer__callbacks+": watchers})
    assert llm_train("fit", "-c", seen, "--run.name", "seen").code == 0
    assert_same_weights(RUNS / "unseen/checkpoints/last.ckpt", RUNS / "seen/checkpoints/last.ckpt")
    for metric in ("train/loss", "train/grad_norm"):
        assert at(RUNS / "seen", metric) == at(RUNS / "unseen", metric)
    figures = {figure.stem for figure in (RUNS / "seen/figures").iterdir()}
    assert figures == {"learning_curve", "signal_by_depth", "signal_histograms", "generalization_gap", "ablation"}


def test_what_is_measured_and_when(llm_train, tiny):
    config = tiny(
        **{"trainer__callbacks+": [MEASURED]},
        trainer__log_every_n_steps=1,
        model__init_args__initialization="zero_residual",
        model__init_args__bias=False,
        model__init_args__dropout=0.0,
    )
    assert llm_train("fit", "-c", config).code == 0
    run = RUNS / "tiny"
    assert sorted(path.name for path in (run / "signal").iterdir()) == [
        "step_000000.npz", "step_000005.npz", "step_000023.npz"
    ]  # fmt: skip
    stream = [at(run, f"signal/residual_std/{depth:02d}") for depth in range(3)]
    assert list(stream[0]) == [0, 5, 23]
    assert stream[0][0] == pytest.approx(0.02 * 2**0.5, rel=0.1)  # token and position
    assert stream[0][0] == stream[1][0] == stream[2][0]  # the blocks add nothing yet
    assert stream[2][23] > stream[1][23] > stream[0][23]
    assert at(run, "init/residual_growth") == {0: 1.0}

    saved = np.load(run / "signal/step_000000.npz")
    assert saved["residual_histograms"].sum(1).tolist() == [4 * 16 * 16] * 3  # (B, T, C)
    for name, counts in zip(saved["matrices"], saved["gradient_histograms"], strict=True):
        n_zero = counts[0]  # what lies at or below the smallest edge
        assert (n_zero == counts.sum()) == name.endswith(("qkv", "expansion")), name

    # The gradients of the step's own backward pass, before clipping: with those of the norms they make the norm logged.
    for step in (0, 5, 23):
        sizes = [(257 + 16) * 16, 12 * 16**2, 12 * 16**2]
        squares = [size * at(run, f"signal/gradient_rms/{depth:02d}")[step] ** 2 for depth, size in enumerate(sizes)]
        norm = at(run, "train/grad_norm")[step + 1]
        assert 0.9 * norm < sum(squares) ** 0.5 < norm


def test_with_accumulation_a_step_is_measured_once(llm_train, tiny):
    config = tiny(
        **{"trainer__callbacks+": [MEASURED]}, trainer__accumulate_grad_batches=3, trainer__log_every_n_steps=1
    )
    assert llm_train("fit", "-c", config, "--trainer.max_steps", "6", "--trainer.val_check_interval", "9").code == 0
    assert sorted(at(RUNS / "tiny", "signal/gradient_rms/00")) == [0, 5]


def test_a_broken_off_run_leaves_its_figures():
    drawn = []

    class Draws(DrawsAtTheEnd):
        def draw(self, run: Path) -> list[Path]:
            drawn.append(run)
            return [run / "figures" / "signal.png"]

    pictures: dict[str, list[str]] = {}
    logger = SimpleNamespace(log_image=pictures.__setitem__)
    for step in (0, 3):
        trainer = SimpleNamespace(global_step=step, loggers=[logger, object()], default_root_dir="run")
        Draws().on_exception(trainer, L.LightningModule(), KeyboardInterrupt())
    assert drawn == [Path("run")]  # before the first step there is nothing to draw
    assert pictures == {"figures/signal": [str(Path("run/figures/signal.png"))]}


@pytest.mark.parametrize("steps", [[], [0, -1]])
def test_steps_that_cannot_be(steps):
    with pytest.raises(MisconfigurationException, match=r"steps must be numbers of 0 or more, got \["):
        SignalPropagation(steps)


def test_what_cannot_be_looked_into():
    module = PretrainModule(vocab_size=20, block_size=8, n_layer=1, n_head=2, n_embd=8)
    check_decoder(module, "Callback")
    module.hparams["compile"] = True
    for refused, reason in ((module, "a compiled decoder"), (L.LightningModule(), "LightningModule has no decoder")):
        with pytest.raises(MisconfigurationException, match=f"Callback: {reason}"):
            check_decoder(refused, "Callback")
