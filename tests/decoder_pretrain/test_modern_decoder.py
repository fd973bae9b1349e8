"""A decoder of other parts through the real command: training, resuming, two processes, export, fine-tuning."""

import json
import signal
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from helpers import LAST, RUNS, assert_close_weights, assert_same_weights, metrics_that_repeat
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from shared_runs import own_world
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_modules.base import ExperimentModule
from lightning_modules.decoder_pretrain import PretrainModule
from lightning_modules.finetuning.causal_lm import FineTunedCausalLM
from lightning_modules.models.decoder import Decoder
from lightning_modules.runtime.checkpoint_io import AtomicCheckpointIO

PARTS: dict[str, Any] = {
    "bias": False,
    "positions": "rotary",
    "norm": "rms_unweighted",
    "embedding_norm": True,
    "qk_norm": True,
    "feed_forward": "relu2",
    "n_kv_head": 1,
    "tied_embeddings": False,
    "logit_soft_cap": 15.0,
    "initialization": "zero_residual",
}
MUON = {
    "class_path": "lightning_modules.optim.Muon",
    "init_args": {"lr": 0.02, "scale": "original", "adamw_lr": 0.01, "weight_decay": 0.01},
}
SETTINGS = {
    **{f"model__init_args__{name}": value for name, value in PARTS.items()},
    "model__init_args__dropout": 0.0,  # its random numbers depend on the process
    "optimizer": MUON,
    "lr_scheduler": {
        "class_path": "lightning_modules.optim.schedules.Linear",
        "init_args": {"warmup": 2},
    },
}
SIZES = {"vocab_size": 257, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16}


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights_bit_for_bit(llm_train, forked, tiny, whole):
    command = ("fit", "-c", tiny(**SETTINGS), "--run.name", "killed")
    assert forked(*command, prepare=lambda: forks.signal_after_step(13)) == -signal.SIGKILL
    resumed = llm_train(*command, "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert_same_weights(whole(**SETTINGS) / LAST, RUNS / "killed" / LAST)
    assert metrics_that_repeat(RUNS / "killed") == metrics_that_repeat(whole(**SETTINGS))


def test_two_processes_train_the_same_weights_as_one(tiny, whole, tmp_path):
    command = ("fit", "-c", tiny(**SETTINGS), "--run.name", "two", *forks.TWO_PROCESSES)
    folder = tmp_path / "world"
    folder.mkdir()
    with own_world(folder):
        output = folder / "output.txt"
        assert forks.wait(forks.start_ranks(2, *command, output=output), 120) == [0, 0], output.read_text()
        assert_close_weights(whole(**SETTINGS) / LAST, RUNS / "two" / LAST)


@pytest.mark.slow
def test_transformers_and_the_fine_tuning_read_the_exported_model(whole):
    run = whole(**SETTINGS)
    ours = PretrainModule.of_checkpoint(AtomicCheckpointIO().load_checkpoint(run / "checkpoints/best.ckpt")).eval()
    theirs = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval()
    assert type(theirs).__name__ == "NanoChatForCausalLM"
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer("the same words", return_tensors="pt").input_ids
    with torch.inference_mode():
        logits = ours(ids)
        torch.testing.assert_close(theirs(ids).logits, logits, rtol=0, atol=1e-4)
        assert logits.std() > 0.1
        greedy = theirs.generate(ids[:, :6], max_new_tokens=10, do_sample=False)[0, 6:].tolist()
    assert [int(token) for token in ours.generate(ids[:, :6], 10, temperature=0)] == greedy

    tuned = FineTunedCausalLM(str(run), vocab_size=257, block_size=16)
    assert isinstance(tuned, ExperimentModule)
    past_the_context = [int(token) for token in tuned.generate(ids[:, :6], 24, temperature=0)]
    assert past_the_context == [int(token) for token in ours.generate(ids[:, :6], 24, temperature=0)]

    again = PretrainModule(vocab_size=257, block_size=8, pretrained=str(run)).eval()
    torch.testing.assert_close(again(ids[:, :8]), logits[:, :8], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_the_callbacks_of_the_topic_measure_every_decoder(llm_train, tiny):
    topic = "lightning_modules.decoder_pretrain"
    callbacks = [
        {"class_path": f"{topic}.SignalPropagation", "init_args": {"steps": [0, 1]}},
        {"class_path": f"{topic}.AblatedLoss", "init_args": {"shares": [0.0, 0.5]}},
    ]
    settings = SETTINGS | {
        "model__init_args__feed_forward": "swiglu",
        "model__init_args__value_embeddings": True,
        "trainer__max_steps": 2,
        "trainer__val_check_interval": 2,
        "trainer__callbacks+": [*callbacks, {"class_path": "lightning_modules.runtime.export.ExportModel"}],
    }
    done = llm_train("fit", "-c", tiny(**settings))
    assert done.code == 0, done.err
    metrics = json.loads((RUNS / "tiny/summary.json").read_text())["metrics"]
    assert metrics["val/loss_ablated_0"] == pytest.approx(metrics["val/loss"])
    assert {"val/ablation_cost_50"} <= metrics.keys()
    assert sorted(path.name for path in (RUNS / "tiny/signal").iterdir()) == ["step_000000.npz", "step_000001.npz"]
    # Transformers has no class for these parts, which one line says.
    (line,) = [line for line in done.err.splitlines() if line.startswith("export: ")]
    assert "NanoChatForCausalLM has no feed_forward=swiglu, value_embeddings=True; --model.pretrained reads" in line
    best = AtomicCheckpointIO().load_checkpoint(RUNS / "tiny/checkpoints/best.ckpt")
    ours = PretrainModule.of_checkpoint(best).eval()
    again = PretrainModule(vocab_size=257, block_size=16, pretrained=str(RUNS / "tiny")).eval()
    ids = torch.arange(16)[None]
    assert torch.equal(again(ids), ours(ids))
    with pytest.raises(MisconfigurationException, match=r"AutoModelForCausalLM could not load .*llm_train_decoder"):
        FineTunedCausalLM(str(RUNS / "tiny"), vocab_size=257, block_size=16)
    sampled = llm_train("generate", "--run", RUNS / "tiny", "--prompt", "a", "--max_new_tokens", "20")
    assert sampled.code == 0, sampled.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_kv_head": 3}, "model: n_kv_head=3: must divide n_head=2"),
        ({"positions": "rotary", "n_head": 16}, "model: positions=rotary needs heads of an even width"),
    ],
)
def test_parts_that_do_not_fit_are_refused_in_one_line(arguments, message):
    with pytest.raises(MisconfigurationException, match=message) as error:
        PretrainModule(**SIZES | arguments)
    assert "\n" not in str(error.value)


def test_damaged_files_in_our_own_format_are_refused_in_one_line(tmp_path):
    PretrainModule(**SIZES, value_embeddings=True).save_pretrained(tmp_path / "model")
    config, weights = tmp_path / "model/config.json", tmp_path / "model/model.safetensors"
    settings = json.loads(config.read_text())
    half = weights.read_bytes()[:-1000]

    def refusal() -> str:
        with pytest.raises(MisconfigurationException) as caught:
            PretrainModule(vocab_size=257, block_size=16, pretrained=str(tmp_path))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    config.write_text(json.dumps(settings | {"n_layer": 3}))
    assert "could not be loaded (RuntimeError: Error(s) in loading" in refusal()
    config.write_text(json.dumps({name: value for name, value in settings.items() if name != "vocab_size"}))
    assert f"model.pretrained: {tmp_path} could not be loaded (KeyError: 'vocab_size'): make" in refusal()
    config.write_text(json.dumps(settings))
    weights.write_bytes(half)
    assert "could not be loaded (SafetensorError: Error while" in refusal()
    weights.unlink()
    assert "could not be loaded (FileNotFoundError: " in refusal()


def test_the_arguments_reach_the_decoder():
    module = PretrainModule(**SIZES, **PARTS, value_embeddings=True, vocab_multiple=64)
    config = module.decoder.config
    assert config.vocab_size == 320
    assert all(getattr(config, name) == value for name, value in PARTS.items() if name != "initialization")
    assert config.value_embeddings
    assert module.flops_per_token == Decoder(config).flops_per_token()


def test_a_checkpoint_of_the_classic_decoder_without_the_new_arguments_loads(whole):
    checkpoint = AtomicCheckpointIO().load_checkpoint(Path(whole()) / LAST)
    for name in PARTS.keys() - {"bias", "initialization"} | {"value_embeddings"}:
        checkpoint["hyper_parameters"].pop(name)
    module = PretrainModule.of_checkpoint(checkpoint)
    assert module.decoder.config.positions == "learned"
