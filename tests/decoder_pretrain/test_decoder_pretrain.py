"""The pretraining module: what it measures, starts from, and exports."""

import json
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.decoder_pretrain import module as decoder_pretrain
from lightning_modules.decoder_pretrain.module import PretrainModule
from lightning_modules.metrics import CorpusLoss, next_token_loss
from lightning_modules.runtime.checkpoint_io import AtomicCheckpointIO
from lightning_modules.runtime.learning_curve import read_metric

RUN = Path("runs/decoder_pretrain/tiny")
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16}


def test_the_loss_is_float32_and_skips_what_is_ignored():
    logits = torch.randn(2, 3, 7, dtype=torch.bfloat16)
    targets = torch.tensor([[1, 2, -100], [-100, -100, 6]])
    log_probabilities = logits.double().log_softmax(-1)
    by_hand = -(log_probabilities[0, 0, 1] + log_probabilities[0, 1, 2] + log_probabilities[1, 2, 6]) / 3
    loss = next_token_loss(logits, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_corpus_measures_weigh_every_token_alike():
    measures = CorpusLoss()
    uniform = torch.zeros(1, 4, 8)  # ln 8 nats a token
    certain = torch.full((1, 1, 8), -1e9).index_fill_(2, torch.tensor([3]), 0.0)  # 0 nats
    measures.update(uniform, torch.tensor([[0, 1, 2, -100]]), torch.tensor(9))
    measures.update(certain, torch.tensor([[3]]), torch.tensor(3))
    measures.update(torch.zeros(0, 4, 8), torch.zeros(0, 4, dtype=torch.long), torch.tensor(0))  # an empty share
    found = measures.compute()
    assert found["loss"].item() == pytest.approx(3 * math.log(8) / 4)
    assert found["perplexity"].item() == pytest.approx(8 ** (3 / 4))
    assert found["bits_per_byte"].item() == pytest.approx(9 / 12)  # three bits for three tokens, twelve bytes


def test_the_gradient_norm_and_the_loss_are_those_of_the_whole_step(llm_train, tiny):
    settings = {"model__init_args__dropout": 0.0, "trainer__log_every_n_steps": 1, "trainer__max_steps": 1}
    flags = ("--trainer.val_check_interval", "1.0", "--trainer.check_val_every_n_epoch", "1")
    flags += ("--trainer.limit_val_batches", "0", "--trainer.gradient_clip_val", "1e-3")
    llm_train("fit", "-c", tiny(**settings, data__init_args__batch_size=12), *flags, "--run.name", "one_batch")
    split = tiny(**settings, trainer__accumulate_grad_batches=3)
    llm_train("fit", "-c", split, *flags, "--run.name", "three_of_a_third")
    for metric in ("train/loss", "train/grad_norm"):
        one, three = (
            read_metric(RUN.with_name(run) / "metrics.csv", metric)[1] for run in ("one_batch", "three_of_a_third")
        )
        assert one == pytest.approx(three, rel=1e-5)
    assert one[0] > 1e-3  # before clipping


def test_the_exported_model_is_the_best_checkpoint(llm_train, tiny):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The rate is so high at the end that the best validation is not the last.
    llm_train(
        "fit", "-c", tiny(), "--lr_scheduler", "lightning_modules.optim.schedules.Constant", "--optimizer.lr", "3"
    )
    best = AtomicCheckpointIO().load_checkpoint(RUN / "checkpoints/best.ckpt")
    last = AtomicCheckpointIO().load_checkpoint(RUN / "checkpoints/last.ckpt")
    ours = PretrainModule(vocab_size=257, block_size=16, **SIZES).eval()
    ours.load_state_dict(best["state_dict"])
    theirs = AutoModelForCausalLM.from_pretrained(RUN / "model").eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(RUN / "model").encode("some text")])
    assert ids.tolist() == [list(b"some text")]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=1e-4, atol=1e-4)
    assert last["global_step"] == 24
    assert json.loads((RUN / "summary.json").read_text())["best"]["step"] == best["global_step"]


@pytest.fixture
def gpt2_folder(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    module = PretrainModule(vocab_size=300, block_size=32, **SIZES)
    module.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


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
        ({"vocab_size": 400, "block_size": 8}, "the tokenizer has 400 tokens, more than the 300"),
        ({"vocab_size": 257, "block_size": 64}, "block_size: 64 is longer than the context of .*, 32"),
        ({"vocab_size": 257, "block_size": 8, "pretrained": "nowhere/at/all"}, "could not be loaded"),
        ({"vocab_size": None, "block_size": 8, "pretrained": None}, "vocab_size and block_size are needed"),
    ],
)
def test_pretrained_weights_that_do_not_fit(gpt2_folder, arguments, message):
    with pytest.raises(MisconfigurationException, match=message) as caught:
        PretrainModule(**{"pretrained": str(gpt2_folder), **arguments})
    assert "\n" not in str(caught.value)


def shares_dropped(module: PretrainModule) -> tuple[set[float], ...]:
    decoder = module.decoder
    attention = {block.attention.dropout for block in decoder.blocks}
    return {decoder.embedding_dropout.p}, attention, {block.residual_dropout.p for block in decoder.blocks}


def test_one_dropout_or_three(gpt2_folder):
    sizes = {"vocab_size": 257, "block_size": 8}
    for start in (SIZES, {"pretrained": str(gpt2_folder)}):
        one = PretrainModule(**sizes, **start, dropout=0.3)
        assert shares_dropped(one) == ({0.3}, {0.3}, {0.3})
        apart = PretrainModule(**sizes, **start, dropout=0.3, embedding_dropout=0.0, attention_dropout=0.1)
        assert shares_dropped(apart) == ({0.0}, {0.1}, {0.3})
        assert shares_dropped(PretrainModule(**sizes, **start, residual_dropout=0.2)) == ({0.0}, {0.0}, {0.2})
    with pytest.raises(MisconfigurationException, match=r"model: attention_dropout=1\.5: must be in \[0, 1\)"):
        PretrainModule(**sizes, **SIZES, attention_dropout=1.5)


def test_the_yaml_chooses_the_initialization(llm_train, tiny):
    config = tiny(model__init_args__initialization="zero_residual")
    still = ("--optimizer.lr", "0", "--optimizer.weight_decay", "0", "--trainer.max_steps", "1")
    assert llm_train("fit", "-c", config, *still).code == 0
    weights = AtomicCheckpointIO().load_checkpoint(RUN / "checkpoints/last.ckpt")["state_dict"]
    drawn = {name.split(".")[-2]: bool(weight.any()) for name, weight in weights.items() if weight.dim() == 2}
    assert drawn["qkv"]
    assert drawn["expansion"]
    assert not drawn["projection"]
    unknown = llm_train("fit", "-c", tiny(model__init_args__initialization="kaming"))
    assert unknown.code == 2
    (line,) = unknown.err.strip().splitlines()
    assert "tiny.yaml, line " in line
    assert "'kaiming'" in line
    assert line.endswith("got kaming")


def test_another_kind_of_model_is_refused(gpt2_folder):
    config = json.loads((gpt2_folder / "config.json").read_text())
    (gpt2_folder / "config.json").write_text(json.dumps(config | {"activation_function": "relu"}))
    with pytest.raises(MisconfigurationException, match="activation_function"):
        PretrainModule(vocab_size=257, block_size=8, pretrained=str(gpt2_folder))


def test_the_vocabulary_can_be_padded_for_the_hardware():
    assert PretrainModule(vocab_size=257, block_size=8, vocab_multiple=64, **SIZES).decoder.config.vocab_size == 320


def test_generating_leaves_the_mode_as_it_was():
    module = PretrainModule(vocab_size=20, block_size=8, dropout=0.5, **SIZES).train()
    tokens = [int(t) for t in module.generate(torch.tensor([[1]]), max_new_tokens=12, temperature=0)]
    assert len(tokens) == 12
    assert module.decoder.training


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_good_checkpoint(llm_train, tiny, monkeypatch):
    calls = []

    def explode(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return next_token_loss(logits, targets) * (float("nan") if len(calls) == 14 else 1.0)

    monkeypatch.setattr(decoder_pretrain, "next_token_loss", explode)
    done = llm_train("fit", "-c", tiny())
    assert done.code == 1
    assert "the training loss was not finite at step 14" in done.err.splitlines()[-1]
    for name in ("best", "last"):
        kept = AtomicCheckpointIO().load_checkpoint(RUN / f"checkpoints/{name}.ckpt")
        assert kept["global_step"] == 8
        assert all(torch.isfinite(weight).all() for weight in kept["state_dict"].values())
    assert '"status": "failed"' in (RUN / "summary.json").read_text()
