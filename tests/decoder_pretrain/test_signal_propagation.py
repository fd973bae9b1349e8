"""What is measured of the signal, and that measuring changes nothing."""

from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from helpers import assert_same_weights
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.decoder_pretrain import signal_propagation
from lightning_modules.decoder_pretrain.module import PretrainModule
from lightning_modules.decoder_pretrain.signal_propagation import SignalPropagation, require_decoder
from lightning_modules.runtime.drawing import DrawsAtTheEnd
from lightning_modules.runtime.learning_curve import read_metric


def at(run: Path, name: str) -> dict[int, float]:
    """Return a metric of a run by step."""
    return dict(zip(*read_metric(run / "metrics.csv", name), strict=True))


def test_watching_a_run_does_not_change_it(watched):
    seen, unseen = watched
    assert_same_weights(unseen / "checkpoints/last.ckpt", seen / "checkpoints/last.ckpt")
    for metric in ("train/loss", "train/grad_norm"):
        assert at(seen, metric) == at(unseen, metric)
        assert len(at(seen, metric)) == 16
    figures = {figure.stem for figure in (seen / "figures").iterdir()}
    assert figures == {"learning_curve", "signal_by_depth", "signal_histograms", "generalization_gap", "ablation"}


def test_the_numbers_that_are_measured(watched):
    run = watched[0]
    assert sorted(path.name for path in (run / "signal").iterdir()) == [
        "step_000000.npz", "step_000005.npz", "step_000015.npz"
    ]  # fmt: skip
    stream = [at(run, f"signal/residual_std/{depth:02d}") for depth in range(3)]
    assert list(stream[0]) == [0, 5, 15]
    assert stream[0][0] == pytest.approx(0.02 * (2 / 0.9) ** 0.5, rel=0.1)  # token and position, scaled by dropout
    assert stream[0][0] == stream[1][0] == stream[2][0]  # the blocks add nothing yet
    assert stream[2][15] > stream[1][15] > stream[0][15]
    assert at(run, "init/residual_growth") == {0: 1.0}

    saved = np.load(run / "signal/step_000000.npz")
    assert saved["residual_histograms"].sum(1).tolist() == [4 * 16 * 16] * 3  # (B, T, C)

    # These are the gradients of the training step before clipping: with those of the norms they give the norm logged.
    for step in (0, 5, 15):
        sizes = [(257 + 16) * 16, 12 * 16**2, 12 * 16**2]
        squares = [size * at(run, f"signal/gradient_rms/{depth:02d}")[step] ** 2 for depth, size in enumerate(sizes)]
        norm = at(run, "train/grad_norm")[step + 1]
        assert 0.9 * norm < sum(squares) ** 0.5 < norm


def test_the_residual_stream_is_that_of_all_micro_batches_of_all_processes(monkeypatch, tmp_path):
    module = PretrainModule(vocab_size=20, block_size=8, n_layer=1, n_head=2, n_embd=8, positions="rotary")
    module.decoder.token_embedding.weight.data += torch.arange(20)[:, None]  # so that the micro-batches differ
    batches = torch.arange(16).view(2, 1, 8)
    trainer = SimpleNamespace(global_step=0, default_root_dir=tmp_path, loggers=[], world_size=1)
    sent: list[np.ndarray] = []  # to the other processes
    received: list[np.ndarray] = []

    def gathered(_: object, own: np.ndarray) -> list[np.ndarray]:
        sent.append(own)
        return [own, *received]

    monkeypatch.setattr(signal_propagation, "gathered", gathered)

    def measured(*micro_batches: torch.Tensor) -> dict[str, np.ndarray]:
        callback = SignalPropagation([0])
        for batch in micro_batches:
            callback.on_train_batch_start(trainer, module, None, 0)
            module.decoder(batch).sum().backward()
            with torch.no_grad():
                module.decoder(batch)  # a validation
        callback.on_before_optimizer_step(trainer, module, None)
        return dict(np.load(tmp_path / "signal/step_000000.npz"))

    whole, in_turn = measured(batches.flatten(0, 1)), measured(*batches)
    measured(batches[0])
    received.append(sent[-1])
    by_two = measured(batches[1])
    embedding = module.decoder.token_embedding(batches.flatten())
    assert whole["residual_std"][0] == pytest.approx(embedding.std().item(), rel=1e-6)
    for found in (in_turn, by_two):
        assert found["residual_std"] == pytest.approx(whole["residual_std"], rel=1e-6)
        assert (found["residual_histograms"] == whole["residual_histograms"]).all()


def test_a_failed_run_leaves_its_figures():
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


def test_without_measured_steps_there_are_no_figures(tmp_path):
    assert SignalPropagation([0]).draw(tmp_path) == []


def test_at_least_one_step_is_needed():
    with pytest.raises(MisconfigurationException, match="SignalPropagation: steps is empty"):
        SignalPropagation([])


def test_modules_whose_decoder_cannot_be_hooked_are_refused():
    module = PretrainModule(vocab_size=20, block_size=8, n_layer=1, n_head=2, n_embd=8)
    require_decoder(module, "Callback")
    module.hparams["compile"] = True
    for refused, reason in (
        (module, "the layers of a compiled decoder cannot be hooked"),
        (L.LightningModule(), "LightningModule has no decoder"),
    ):
        with pytest.raises(MisconfigurationException, match=f"Callback: {reason}"):
            require_decoder(refused, "Callback")
