"""The gap between seen and unseen text, and the loss with units switched off."""

from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from helpers import text
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_modules.decoder_pretrain.generalization import AblatedLoss, GeneralizationGap, units_switched_off
from lightning_modules.models.decoder import Decoder, DecoderConfig
from lightning_modules.runtime.learning_curve import LearningCurve, read_metric

RUNS = Path("runs/decoder_pretrain")


def gap(n_windows: int) -> dict:
    class_path = "lightning_modules.decoder_pretrain.GeneralizationGap"
    return {"class_path": class_path, "init_args": {"n_windows": n_windows}}


def ablation(*shares: float) -> dict:
    class_path = "lightning_modules.decoder_pretrain.AblatedLoss"
    return {"class_path": class_path, "init_args": {"shares": list(shares)}}


def metric(run: str, name: str) -> list[float]:
    return read_metric(RUNS / run / "metrics.csv", name)[1]


def test_there_is_no_gap_where_both_texts_are_the_same(llm_train, tiny, tmp_path):
    same = {"class_path": "datamodules.sources.TextFiles", "init_args": {"paths": str(tmp_path / "text.txt")}}
    config = tiny(**{"trainer__callbacks+": [gap(10_000)]}, data__init_args__val_source=same)
    assert llm_train("fit", "-c", config, "--trainer.max_steps", "8").code == 0
    assert metric("tiny", "val/train_text_loss") == pytest.approx(metric("tiny", "val/loss"), rel=1e-6)
    assert metric("tiny", "val/gap") == pytest.approx([0], abs=1e-5)


def test_other_words_than_those_read_open_the_gap(llm_train, tiny, tmp_path):
    (tmp_path / "other.txt").write_text(text(200, seed=1))  # of words of its own
    other = {"class_path": "datamodules.sources.TextFiles", "init_args": {"paths": str(tmp_path / "other.txt")}}
    config = tiny(**{"trainer__callbacks+": [gap(8)]}, data__init_args__val_source=other)
    assert llm_train("fit", "-c", config).code == 0
    gaps = metric("tiny", "val/gap")
    losses = zip(metric("tiny", "val/loss"), metric("tiny", "val/train_text_loss"), strict=True)
    assert gaps == pytest.approx([unseen - seen for unseen, seen in losses], abs=1e-5)
    assert gaps[-1] > max(gaps[0], 0.05)


def test_with_all_units_the_loss_is_the_validation_loss_and_every_validation_and_test_asks_the_same(llm_train, tiny):
    config = tiny(
        **{"trainer__callbacks+": [ablation(0, 0.25, 0.5)]},
        data__init_args__test_fraction=0.05,
        optimizer__init_args__lr=0.0,
        model__init_args__initialization="kaiming",
    )
    assert llm_train("fit", "-c", config).code == 0
    whole = metric("tiny", "val/loss")
    assert metric("tiny", "val/loss_ablated_0") == whole
    assert metric("tiny", "val/ablation_cost_0") == [0, 0, 0]
    for share in (25, 50):
        losses = metric("tiny", f"val/loss_ablated_{share}")
        assert losses == [losses[0]] * 3  # the weights stand still, and the same units are switched off
        assert losses[0] != whole[0]
        assert metric("tiny", f"val/ablation_cost_{share}")[0] == pytest.approx(losses[0] - whole[0], abs=1e-6)

    assert llm_train("test", "-c", RUNS / "tiny/config.yaml", "--ckpt_path", "best").code == 0
    loss, with_all, with_half = (
        read_metric(RUNS / "tiny/metrics_test.csv", f"test/{name}")[1]
        for name in ("loss", "loss_ablated_0", "loss_ablated_50")
    )
    assert loss == with_all != with_half


def test_the_share_is_exact_the_rest_scaled_and_larger_shares_hold_smaller_ones():
    decoder = Decoder(DecoderConfig(vocab_size=20, block_size=8, n_layer=2, n_head=2, n_embd=8)).eval()
    hidden: list[torch.Tensor] = []
    for block in decoder.blocks:
        block.feed_forward.projection.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0]))
    ids = torch.randint(20, (2, 8))

    def factors(share: float, number: int = 0) -> torch.Tensor:
        """What the hidden units of the first block are multiplied by: (32,)."""
        hidden.clear()
        whole = decoder(ids)
        with units_switched_off(decoder, share, seed=3, number=number):
            decoder(ids)
        assert torch.equal(decoder(ids), whole)
        ratios = hidden[2] / hidden[0]  # after the blocks of the first pass come those of the second
        torch.testing.assert_close(ratios, ratios[:1, :1].expand_as(ratios))  # the same at all positions
        return ratios[0, 0]

    quarter, half = factors(0.25), factors(0.5)
    assert (quarter == 0).sum() == 8
    assert (half == 0).sum() == 16
    assert ((half == 0) | (quarter != 0)).all()
    torch.testing.assert_close(quarter[quarter != 0], torch.full((24,), 4 / 3))
    assert torch.equal(factors(0.25), quarter)
    assert not torch.equal(factors(0.25, number=1), quarter)


@pytest.mark.parametrize("shares", [[], [0.25, 1.0], [-0.1], [float("nan")]])
def test_shares_that_cannot_be(shares):
    with pytest.raises(MisconfigurationException, match=r"shares must be numbers from 0 to less than 1, got \["):
        AblatedLoss(shares)


def test_a_run_that_logged_nothing_has_no_figures(tmp_path):
    for callback in (GeneralizationGap(), AblatedLoss([0.5]), LearningCurve()):
        assert callback.draw(tmp_path) == []


def test_no_windows_to_read():
    with pytest.raises(MisconfigurationException, match="n_windows must be at least 1, got 0"):
        GeneralizationGap(0)


def test_modules_and_data_without_a_text():
    for callback in (GeneralizationGap(), AblatedLoss([0.5])):
        with pytest.raises(MisconfigurationException, match=r"LightningModule (measures no loss|has no decoder)"):
            callback.setup(L.Trainer(logger=False), L.LightningModule(), "fit")
    trainer = SimpleNamespace(datamodule=SimpleNamespace(train_dataloader=lambda: DataLoader([1])))
    with pytest.raises(MisconfigurationException, match="GeneralizationGap: SimpleNamespace has no running text"):
        GeneralizationGap().on_validation_epoch_end(trainer, L.LightningModule())
