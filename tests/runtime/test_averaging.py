"""Averaged weights: their formula, what is validated, saved and exported, and runs that are resumed."""

import signal
from types import SimpleNamespace

import forks
import lightning as L
import pytest
import torch
from helpers import BEST, LAST, RUNS, assert_same_weights, weights
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_modules.base import ExperimentModule
from lightning_modules.runtime.averaging import AveragedWeights

AVERAGING = {"class_path": "lightning_modules.runtime.averaging.AveragedWeights", "init_args": {"decay": 0.6}}
EXPORT = {"class_path": "lightning_modules.runtime.export.ExportModel"}
SETTINGS = {"trainer__callbacks+": [EXPORT, AVERAGING], "trainer__max_steps": 16}


def checkpoint(run, name: str = LAST) -> dict:
    return torch.load(run / name, weights_only=True)


def averages(loaded: dict) -> dict[str, torch.Tensor]:
    return next(state["averages"] for key, state in loaded["callbacks"].items() if "AveragedWeights" in key)


def test_the_average_follows_the_weights_closely_at_first_and_skips_micro_batches():
    module = nn.Linear(1, 1, bias=False)
    trainer = SimpleNamespace(global_step=0, optimizers=[torch.optim.SGD(module.parameters(), lr=0.1)])
    callback = AveragedWeights(decay=0.2)
    values, expected = [1.0, 5.0, -3.0, 2.0], 1.0
    with torch.no_grad():
        module.weight.fill_(values[0])
        callback.on_train_start(trainer, module)
        for step, value in enumerate(values[1:], start=1):
            callback.on_train_batch_end(trainer)  # of an earlier micro-batch: no step
            module.weight.fill_(value)
            trainer.global_step = step
            callback.on_train_batch_end(trainer)
            decay = min(0.2, step / (9 + step))
            expected = decay * expected + (1 - decay) * value
            assert callback.state_dict()["averages"]["weight"].item() == pytest.approx(expected)
    assert callback.updates == 3


def test_tied_weights_are_saved_as_averages_under_each_of_their_names():
    module = nn.ModuleDict({"embedding": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
    module["head"].weight = module["embedding"].weight
    trainer = SimpleNamespace(global_step=1, optimizers=[torch.optim.SGD(module.parameters(), lr=0.1)])
    callback = AveragedWeights()
    callback.load_state_dict({"updates": 1, "averages": {"embedding.weight": torch.full((3, 2), 7.0)}})
    callback.on_train_start(trainer, module)
    checkpoint = {"state_dict": module.state_dict()}
    callback.on_save_checkpoint(trainer, module, checkpoint)
    saved = checkpoint["state_dict"]
    assert all((saved[name] == 7).all() for name in ("embedding.weight", "head.weight"))
    assert saved["embedding.weight"].data_ptr() == saved["head.weight"].data_ptr()  # the file has them once
    assert checkpoint["trained_weights"].keys() == {"embedding.weight"}


class AtTheEndOfValidations(L.Callback):
    """Callback that keeps the weight at the end of a validation, as others write files of it."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.weight = pl_module.layer.weight.detach().clone()


class OneLayer(ExperimentModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 1)
        self.optimizer_factory = lambda groups: torch.optim.SGD(groups, lr=0.1)
        self.track(MeanMetric())

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layer(batch).square().mean()

    def evaluation_step(self, batch: torch.Tensor, metrics: MeanMetric) -> None:
        metrics.update(self.loss(batch))

    def evaluation_results(self, metrics: MeanMetric, split: str) -> dict[str, torch.Tensor]:
        return {"loss": metrics.compute()}


@pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*does not have many workers")  # of Lightning
@pytest.mark.parametrize("averaging_is_first", [True, False])
def test_callbacks_in_any_order_find_the_averages_at_the_end_of_a_validation(tmp_path, averaging_is_first):
    averaging, reader, module = AveragedWeights(decay=0.9), AtTheEndOfValidations(), OneLayer()
    callbacks = [averaging, reader] if averaging_is_first else [reader, averaging]
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(callbacks=callbacks, accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, **off)
    batches = DataLoader(torch.ones(4, 2), batch_size=1)
    trainer.fit(module, batches, batches)
    assert torch.equal(reader.weight, averaging.state_dict()["averages"]["layer.weight"])
    assert not torch.equal(reader.weight, module.layer.weight)


@pytest.mark.slow
def test_the_averages_are_validated_and_exported_and_training_goes_on_without_them(llm_train, whole):
    run, plain = whole(**SETTINGS), whole(trainer__max_steps=16)
    trained = checkpoint(run)["trained_weights"]
    assert all(torch.equal(trained[name], weight) for name, weight in weights(plain / LAST).items())
    assert not torch.equal(weights(run / LAST)["decoder.final_norm.weight"], trained["decoder.final_norm.weight"])
    exported = weights(run / "model/model.safetensors")
    assert torch.equal(exported["transformer.wpe.weight"], weights(run / BEST)["decoder.position_embedding.weight"])

    best = (run / "summary.json").read_text()
    done = llm_train("validate", "-c", run / "config.yaml", "--ckpt_path", "best")
    assert done.code == 0, done.err
    result = float(done.err.partition("val/loss ")[2].split()[0])
    assert f'"value": {result}'[:14] in best


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights_and_averages(llm_train, forked, tiny, whole):
    command = ("fit", "-c", tiny(**SETTINGS), "--run.name", "killed")
    assert forked(*command, prepare=lambda: forks.signal_after_step(12)) == -signal.SIGKILL
    done = llm_train(*command, "--ckpt_path", "last")
    assert done.code == 0, done.err
    assert_same_weights(whole(**SETTINGS) / LAST, RUNS / "killed" / LAST)
    ours, theirs = (checkpoint(run)["trained_weights"] for run in (RUNS / "killed", whole(**SETTINGS)))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_weights_of_low_precision_have_averages_in_float32(llm_train, tiny):
    done = llm_train("fit", "-c", tiny(**SETTINGS), "--trainer.precision=bf16-true", "--run.name", "low")
    assert done.code == 0, done.err
    loaded = checkpoint(RUNS / "low")
    assert {average.dtype for average in averages(loaded).values()} == {torch.float32}
    assert {weight.dtype for weight in loaded["state_dict"].values()} == {torch.bfloat16}


def test_the_float32_averages_are_stored_once(whole):
    loaded = checkpoint(whole(**SETTINGS))
    for name, average in averages(loaded).items():
        assert average.data_ptr() == loaded["state_dict"][name].data_ptr()


def test_a_resumed_run_keeps_averaging(llm_train, tiny, whole):
    last = whole(**SETTINGS) / LAST
    refused = llm_train("fit", "-c", tiny(**SETTINGS), "--ckpt_path", last, "--trainer.callbacks=[]")
    reason = "error: trainer.callbacks: the checkpoint has averaged weights, and this run does not average them"
    assert (refused.code, refused.err.splitlines()[-1].startswith(reason)) == (1, True), refused.err
