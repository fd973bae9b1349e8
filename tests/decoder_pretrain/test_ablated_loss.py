"""The gap between training and validation text, and the loss with units switched off."""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from helpers import text
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

from datamodules.decoder_pretrain import PretrainDataModule
from datamodules.sources import ListText
from datamodules.token_files import TokenFile
from datamodules.windows import TokenWindows
from lightning_modules.base import ExperimentModule
from lightning_modules.decoder_pretrain.ablated_loss import AblatedLoss, units_switched_off
from lightning_modules.decoder_pretrain.module import PretrainModule
from lightning_modules.models.decoder import Decoder, DecoderConfig
from lightning_modules.runtime.generalization import GeneralizationGap
from lightning_modules.runtime.learning_curve import LearningCurve, read_metric

GAP = ("val/train_text_loss", "val/gap")


def metric(run: Path, name: str) -> list[float]:
    return read_metric(run / "metrics.csv", name)[1]


@pytest.fixture(scope="module")
def evaluated() -> list[dict[str, float]]:
    """The results of two validations and a test of one module, on the text that it would train on."""
    same = ListText([text(200)])
    module = PretrainModule(vocab_size=257, block_size=16, n_layer=2, n_head=2, n_embd=16, initialization="kaiming")
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("LLM_TRAIN_CACHE", folder)
        module.data = PretrainDataModule(same, 16, 4, val_source=same, test_source=same)
        trainer = L.Trainer(
            accelerator="cpu",
            callbacks=[GeneralizationGap(n_windows=10_000), AblatedLoss([0, 0.25, 0.5])],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            default_root_dir=folder,
        )
        return [
            evaluate(module, datamodule=module.data, verbose=False)[0]
            for evaluate in (trainer.validate, trainer.validate, trainer.test)
        ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec")  # of Lightning
def test_there_is_no_gap_if_both_texts_are_the_same(evaluated):
    results = evaluated[0]
    assert results["val/train_text_loss"] == pytest.approx(results["val/loss"], rel=1e-6)
    assert results["val/gap"] == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_a_validation_text_of_other_words_opens_the_gap(watched):
    gaps = metric(watched[0], "val/gap")
    losses = zip(metric(watched[0], "val/loss"), metric(watched[0], "val/train_text_loss"), strict=True)
    assert gaps == pytest.approx([unseen - seen for unseen, seen in losses], abs=1e-5)
    assert gaps[-1] > max(gaps[0], 0.05)


def test_with_all_units_the_loss_is_the_validation_loss_and_each_evaluation_switches_off_the_same_units(evaluated):
    first, second, test = evaluated
    assert second == first
    assert first["val/loss_ablated_0"] == first["val/loss"]
    assert first["val/ablation_cost_0"] == 0
    for share in (25, 50):
        loss = first[f"val/loss_ablated_{share}"]
        assert loss != first["val/loss"]
        assert first[f"val/ablation_cost_{share}"] == pytest.approx(loss - first["val/loss"], abs=1e-6)
    assert test == {f"test/{name.removeprefix('val/')}": first[name] for name in first if name not in GAP}


def test_the_share_is_exact_the_rest_is_scaled_and_larger_shares_include_smaller_ones():
    decoder = Decoder(DecoderConfig(vocab_size=20, block_size=8, n_layer=2, n_head=2, n_embd=8)).eval()
    hidden: list[torch.Tensor] = []
    for block in decoder.blocks:
        block.feed_forward.projection.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0]))
    ids = torch.randint(20, (2, 8))

    def factors(share: float, number: int = 0) -> torch.Tensor:
        """Return the factors of the hidden units of the first block, (32,)."""
        hidden.clear()
        whole = decoder(ids)
        with units_switched_off(decoder, share, seed=3, number=number):
            decoder(ids)
        assert torch.equal(decoder(ids), whole)
        ratios = hidden[2] / hidden[0]  # each pass appends the hidden units of both blocks
        torch.testing.assert_close(ratios, ratios[:1, :1].expand_as(ratios))  # the same at all positions
        return ratios[0, 0]

    quarter, half = factors(0.25), factors(0.5)
    assert (quarter == 0).sum() == 8
    assert (half == 0).sum() == 16
    assert ((half == 0) | (quarter != 0)).all()
    torch.testing.assert_close(quarter[quarter != 0], torch.full((24,), 4 / 3))
    assert torch.equal(factors(0.25), quarter)
    assert not torch.equal(factors(0.25, number=1), quarter)


def test_the_units_are_switched_off_where_the_activations_are_and_in_their_number_type():
    decoder = Decoder(DecoderConfig(vocab_size=20, block_size=8, n_layer=1, n_head=2, n_embd=8))
    activations = torch.ones(2, 8, 32, device="meta", dtype=torch.bfloat16)  # the weights are on the CPU, in float32
    with units_switched_off(decoder, 0.5, seed=3, number=0):
        output = decoder.blocks[0].feed_forward.activation(activations)
    assert (output.device.type, output.dtype) == ("meta", torch.bfloat16)


def test_at_least_one_share_is_needed():
    with pytest.raises(MisconfigurationException, match="AblatedLoss: shares is empty"):
        AblatedLoss([])


def test_a_run_that_logged_nothing_has_no_figures(tmp_path):
    for callback in (GeneralizationGap(), AblatedLoss([0.5]), LearningCurve()):
        assert callback.draw(tmp_path) == []


def test_figures_of_callbacks_that_a_resumed_run_adds_begin_with_their_first_validation(tmp_path, monkeypatch):
    rows = ["step,val/loss,val/train_text_loss,val/loss_ablated_50", "8,1.0,,", "16,2.0,0.5,4.0", "24,3.0,0.7,5.0"]
    (tmp_path / "metrics.csv").write_text("\n".join(rows))
    drawn: list[dict[str, tuple[list[float], list[float]]]] = []

    def keep(figure: Figure, file: Path) -> Path:
        lines = figure.axes[0].get_lines()
        drawn.append({str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in lines})
        return file

    for callback in (GeneralizationGap(), AblatedLoss([0.5])):
        monkeypatch.setattr(f"{type(callback).__module__}.save_figure", keep)
        assert len(callback.draw(tmp_path)) == 1
    gap, ablated = drawn
    assert gap == {
        "validation text": ([16, 24], [2.0, 3.0]),
        "training text, no dropout": ([16, 24], [0.5, 0.7]),
    }
    assert ablated == {"step 16": ([0, 50], [2.0, 4.0]), "step 24": ([0, 50], [3.0, 5.0])}


def test_modules_and_data_without_a_text_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"AblatedLoss: LightningModule has no decoder"):
        AblatedLoss([0.5]).setup(L.Trainer(logger=False), L.LightningModule(), "fit")
    module = ExperimentModule()
    module.data = SimpleNamespace(train_dataloader=lambda: DataLoader([1]))
    with pytest.raises(MisconfigurationException, match="GeneralizationGap: SimpleNamespace has no running text"):
        GeneralizationGap().on_fit_start(L.Trainer(logger=False), module)
    windows = TokenWindows(TokenFile(tmp_path / "tokens.bin", "uint16", 9), 4, None)
    module.data = SimpleNamespace(
        train_dataloader=lambda: DataLoader(windows), evaluation_loader=lambda dataset, starts: []
    )
    with pytest.raises(MisconfigurationException, match="GeneralizationGap: ExperimentModule computes no validation"):
        GeneralizationGap().on_validation_epoch_end(L.Trainer(logger=False), module)
