"""The pretraining module: what it logs, what it starts from, and what it exports."""

import json
import math
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from helpers import text
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.decoder_pretrain import PretrainDataModule
from datamodules.sources import ListText
from lightning_modules.decoder_pretrain import AblatedLoss, PretrainModule, SignalPropagation
from lightning_modules.metrics import CorpusLoss, next_token_loss
from lightning_modules.models.decoder import DecoderConfig
from lightning_modules.runtime.generalization import GeneralizationGap

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16}


def test_the_loss_is_float32_and_skips_ignored_targets():
    logits = torch.randn(2, 3, 7, dtype=torch.bfloat16)
    targets = torch.tensor([[1, 2, -100], [-100, -100, 6]])
    log_probabilities = logits.double().log_softmax(-1)
    by_hand = -(log_probabilities[0, 0, 1] + log_probabilities[0, 1, 2] + log_probabilities[1, 2, 6]) / 3
    loss = next_token_loss(logits, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_the_corpus_loss_gives_every_token_the_same_weight():
    metrics = CorpusLoss()
    metrics.update(torch.tensor([[3.0, 3.0, 3.0, 0.0]]) * math.log(2), torch.tensor([[0, 1, 2, -100]]), torch.tensor(9))
    metrics.update(torch.tensor(0.0), torch.tensor([[3]]), torch.tensor(3))  # the sum of one certain token
    metrics.update(torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.long), torch.tensor(0))  # an empty share
    results = metrics.compute()
    assert results["loss"].item() == pytest.approx(3 * math.log(8) / 4)
    assert results["perplexity"].item() == pytest.approx(8 ** (3 / 4))
    assert results["bits_per_byte"].item() == pytest.approx(9 / 12)  # three bits for three tokens, twelve bytes


@pytest.mark.filterwarnings("ignore:.*LeafSpec")  # of Lightning
def test_a_step_accumulates_the_loss_the_norm_and_the_signal_of_its_micro_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(SignalPropagation, "draw", lambda self, run: [])

    def steps(name: str, batch_size: int, accumulate: int) -> tuple[dict[str, float], list[str], np.ndarray]:
        torch.manual_seed(5)
        module = PretrainModule(vocab_size=257, block_size=16, **SIZES)
        module.data = PretrainDataModule(ListText([text(500)]), 16, batch_size, windows="sequential", val_fraction=0)
        module.optimizer_factory = lambda groups: torch.optim.SGD(groups, lr=0.1)
        trainer = L.Trainer(
            max_steps=2,
            accelerator="cpu",
            accumulate_grad_batches=accumulate,
            gradient_clip_val=1e-3,
            limit_val_batches=0,
            log_every_n_steps=1,
            callbacks=[SignalPropagation([0, 1])],
            default_root_dir=tmp_path / name,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=module.data)
        files = sorted((tmp_path / name / "signal").iterdir())
        metrics = {name: value.item() for name, value in trainer.logged_metrics.items()}
        return metrics, [file.name for file in files], np.load(files[-1])["gradient_rms"]

    one, one_files, one_rms = steps("one_batch", 12, accumulate=1)
    three, three_files, three_rms = steps("three_micro_batches", 4, accumulate=3)
    assert one == pytest.approx(three, rel=1e-5)
    assert one["train/grad_norm"] > 1e-3 == pytest.approx(one["train/grad_norm_clipped"])
    assert one["train/loss"] > 1
    assert one_files == three_files == ["step_000000.npz", "step_000001.npz"]  # a step is measured once
    np.testing.assert_allclose(one_rms, three_rms, rtol=1e-4)


def test_the_exported_model_is_the_best_checkpoint(watched):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = watched[0]
    best = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    last = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    ours = PretrainModule(vocab_size=257, block_size=16, bias=False, **SIZES).eval()
    ours.load_state_dict(best["state_dict"])
    theirs = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(run / "model").encode("some text")])
    assert ids.tolist() == [list(b"some text")]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=1e-4, atol=1e-4)
    assert last["global_step"] == 16 > best["global_step"]
    assert json.loads((run / "summary.json").read_text())["best"]["step"] == best["global_step"]


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory) -> Path:
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("exported") / "gpt2"
    PretrainModule(vocab_size=300, block_size=32, **SIZES).save_pretrained(folder)
    return folder


def test_sizes_that_the_pretrained_weights_replace_are_said(gpt2_folder, capsys):
    sizes = {"vocab_size": 257, "block_size": 8, "pretrained": str(gpt2_folder)}
    PretrainModule(**sizes, **SIZES, dropout=0.1)
    assert capsys.readouterr().err == ""
    PretrainModule(**sizes, **SIZES | {"n_layer": 3}, qk_norm=True)
    line = f"pretrained: the model has n_layer={SIZES['n_layer']} in place of 3, qk_norm=False in place of True\n"
    assert capsys.readouterr().err == line


def test_training_starts_from_pretrained_weights_with_a_shorter_context(gpt2_folder):
    torch.manual_seed(3)
    original = PretrainModule(vocab_size=300, block_size=32, **SIZES).eval()
    loaded = PretrainModule(vocab_size=257, block_size=8, pretrained=str(gpt2_folder)).eval()
    assert loaded.decoder.config.block_size == 8
    ids = torch.randint(0, 257, (2, 8))
    torch.testing.assert_close(loaded(ids), original(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 400, "block_size": 8}, "data.tokenizer: it has 400 tokens, more than the 300"),
        ({"vocab_size": 257, "block_size": 64}, "block_size: 64 is longer than the context of .*, 32"),
        ({"vocab_size": 257, "block_size": 8, "pretrained": "nowhere/at/all"}, "nowhere/at/all does not exist"),
        ({"vocab_size": 257, "block_size": 8, "pretrained": "."}, r"model.pretrained: \. holds no config.json"),
        ({"vocab_size": None, "block_size": 8, "pretrained": None}, "model: vocab_size must be set"),
        ({"vocab_size": 257, "block_size": 8, "pretrained": None, "n_head": 5}, "model: n_embd=768 is not divisible"),
    ],
)
def test_sizes_that_do_not_fit_the_weights_or_each_other(gpt2_folder, arguments, message):
    with pytest.raises(MisconfigurationException, match=message) as caught:
        PretrainModule(**{"pretrained": str(gpt2_folder), **arguments})
    assert "\n" not in str(caught.value)


def test_another_kind_of_model_is_refused(gpt2_folder, tmp_path):
    config = json.loads((gpt2_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"activation_function": "relu"}))
    (tmp_path / "model.safetensors").symlink_to(gpt2_folder / "model.safetensors")
    with pytest.raises(MisconfigurationException, match="activation_function"):
        PretrainModule(vocab_size=257, block_size=8, pretrained=str(tmp_path))


@pytest.mark.parametrize(
    ("cls", "flag", "condition"),
    [
        (PretrainModule, "--n_layer=0", "v>0"),
        (PretrainModule, "--n_head=-1", "v>0"),
        (PretrainModule, "--n_embd=0", "v>0"),
        (PretrainModule, "--vocab_multiple=0", "v>0"),
        (PretrainModule, "--dropout=1", "v>=0 and v<1"),
        (PretrainModule, "--embedding_dropout=-0.1", "v>=0 and v<1"),
        (PretrainModule, "--attention_dropout=1.5", "v>=0 and v<1"),
        (PretrainModule, "--residual_dropout=NaN", "v>=0 and v<1"),
        (PretrainDataModule, "--block_size=0", "v>0"),
        (PretrainDataModule, "--batch_size=0", "v>0"),
        (PretrainDataModule, "--val_fraction=-0.1", "v>=0 and v<1"),
        (PretrainDataModule, "--test_fraction=1", "v>=0 and v<1"),
        (PretrainDataModule, "--num_workers=-1", "v>=0"),
        (PretrainDataModule, "--seed=-1", "v>=0"),
        (AblatedLoss, "--shares=[0.25, 1.0]", "v>=0 and v<1"),
        (AblatedLoss, "--shares=[-0.1]", "v>=0 and v<1"),
        (AblatedLoss, "--shares=[.nan]", "v>=0 and v<1"),
        (SignalPropagation, "--steps=[0, -1]", "v>=0"),
        (GeneralizationGap, "--n_windows=0", "v>0"),
    ],
)
def test_the_parser_refuses_values_out_of_range(cls, flag, condition):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls)
    with pytest.raises(ArgumentError, match=f"does not conform to restriction {condition}"):
        parser.parse_args([flag])


def dropouts(module: PretrainModule) -> tuple[set[float], ...]:
    decoder = module.decoder
    attention = {block.attention.dropout for block in decoder.blocks}
    return {decoder.embedding_dropout.p}, attention, {block.residual_dropout.p for block in decoder.blocks}


def test_one_dropout_or_three(gpt2_folder):
    sizes = {"vocab_size": 257, "block_size": 8}
    for start in (SIZES, {"pretrained": str(gpt2_folder)}):
        one = PretrainModule(**sizes, **start, dropout=0.3)
        assert dropouts(one) == ({0.3}, {0.3}, {0.3})
        apart = PretrainModule(**sizes, **start, dropout=0.3, embedding_dropout=0.0, attention_dropout=0.1)
        assert dropouts(apart) == ({0.0}, {0.1}, {0.3})
        assert dropouts(PretrainModule(**sizes, **start, residual_dropout=0.2)) == ({0.0}, {0.0}, {0.2})


def test_the_yaml_chooses_the_initialization(watched, llm_train, tiny):
    # No gradient reaches the matrices before a projection exactly if the projection is zero.
    saved = np.load(watched[0] / "signal/step_000000.npz")
    for name, counts in zip(saved["matrices"], saved["gradient_histograms"], strict=True):
        n_zero = counts[0]  # values at or below the smallest edge
        assert (n_zero == counts.sum()) == name.endswith(("qkv", "expansion")), name
    unknown = llm_train("fit", "-c", tiny(model__init_args__initialization="kaming"))
    assert unknown.code == 2
    (line,) = unknown.err.strip().splitlines()
    assert "tiny.yaml, line " in line
    assert line.endswith("got kaming (did you mean 'kaiming'?)")


def test_the_vocabulary_can_be_padded_for_the_hardware():
    module = PretrainModule(vocab_size=257, block_size=8, vocab_multiple=64, **SIZES)
    assert module.decoder.config == DecoderConfig(vocab_size=320, block_size=8, **SIZES)


def test_a_subclass_can_change_an_argument_that_it_passes_on():
    class TwiceAsDeep(PretrainModule):
        def __init__(self, n_layer: int = 1) -> None:
            super().__init__(vocab_size=20, block_size=8, **SIZES | {"n_layer": 2 * n_layer})

    assert len(TwiceAsDeep(n_layer=3).decoder.blocks) == 6


def test_generating_leaves_the_mode_as_it_was():
    module = PretrainModule(vocab_size=20, block_size=8, dropout=0.5, **SIZES).train()
    tokens = [int(t) for t in module.generate(torch.tensor([[1]]), max_new_tokens=12, temperature=0)]
    assert len(tokens) == 12
    assert module.decoder.training


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_good_checkpoint(llm_train, tiny, monkeypatch):
    calls = []

    loss = PretrainModule.loss

    def explode(self: PretrainModule, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        calls.append(1)
        return loss(self, batch) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(PretrainModule, "loss", explode)
    done = llm_train("fit", "-c", tiny(trainer__val_check_interval=2, trainer__limit_val_batches=1))
    assert done.code == 1
    assert "the training loss was not finite at step 4" in done.err.splitlines()[-1]
    run = Path("runs/decoder_pretrain/tiny")
    for name in ("best", "last"):
        kept = torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True)
        assert kept["global_step"] == 2
        assert all(torch.isfinite(weight).all() for weight in kept["state_dict"].values())
    assert '"status": "failed"' in (run / "summary.json").read_text()
