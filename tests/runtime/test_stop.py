"""Runs that end after any step of an epoch: by a signal, by a failure, or by weights that are not finite."""

import os
import signal
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import BEST, LAST
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from datamodules.base import GlobalBatches, shuffled
from lightning_modules.common.signals import STOPS, leave_to_the_parent
from lightning_modules.runtime import private_names
from lightning_modules.runtime.averaging import AveragedWeights
from lightning_modules.runtime.checkpoint import RunCheckpoint
from lightning_modules.runtime.checkpoint_io import AtomicCheckpointIO
from lightning_modules.runtime.reproducible import ReproducibleSteps
from lightning_modules.runtime.stop import GracefulStop, StopOnNonFiniteLoss
from lightning_modules.runtime.throughput import Throughput

AT_EPOCH_ENDS = {"check_val_every_n_epoch": 1, "val_check_interval": 1.0}
QUIET = {f"enable_{part}": False for part in ("progress_bar", "model_summary", "checkpointing")}


class Numbers(Dataset):
    def __getitem__(self, positions: Tensor) -> dict[str, Tensor]:
        return {"input_ids": torch.sin(positions + 1.0)}


class Line(L.LightningModule):
    """A line with dropout, so that its weights depend on the order of the data and on random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.1, 0.2, 0.3]))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        x = batch["input_ids"]
        loss = (nn.functional.dropout(self.w, 0.3) * x[:, None] + 1).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.w.sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class Rows(Logger):
    """A logger that keeps the metrics of each step."""

    name = version = ""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = defaultdict(dict)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows[step].update({name: float(value) for name, value in metrics.items() if "perf" not in name})

    def log_hyperparams(self, *_: object) -> None: ...


class Signal(L.Callback):
    """Sends SIGTERM to this process after a step, before other callbacks have seen it."""

    def __init__(self, at: int | None) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == self.at and not private_names.is_accumulating(trainer):
            signal.raise_signal(signal.SIGTERM)


class InValidation(L.Callback):
    """Sends SIGTERM to this process within the validation of a step, and counts the batches that are validated."""

    def __init__(self, at: int | None) -> None:
        self.at, self.n_batches = at, 0

    def on_validation_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        self.n_batches += 1
        if trainer.global_step == self.at:
            signal.raise_signal(signal.SIGTERM)
            self.at = None


class Draw(L.Callback):
    """Logs a random number at the end of each validation."""

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log("val/drawn", torch.rand(()))


def fit(
    folder: Path,
    batches: int,
    logger: Rows,
    at: int | None = None,
    added: Sequence[L.Callback] = (),
    workers: int = 0,
    every: int | None = None,
    **settings: object,
) -> tuple:
    """Train with the callbacks of the defaults; return the exit code, the step, the weights and the tokens seen.

    Args:
        folder: Folder of the run, which goes on if it has a checkpoint.
        batches: Number of batches in an epoch.
        logger: Logger of the metrics.
        at: Step after which the run gets a signal.
        added: Further callbacks.
        workers: Processes that load the data.
        every: Steps between two checkpoints.
        **settings: Arguments of the trainer.
    """
    settings = {"max_epochs": -1, "check_val_every_n_epoch": None, "log_every_n_steps": 1} | settings
    throughput, last = Throughput(), folder / LAST
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[
            *(ReproducibleSteps(3), Signal(at), GracefulStop(every_n_steps=2), throughput, AveragedWeights()),
            *(*added, RunCheckpoint(every_n_train_steps=every)),
        ],
        logger=logger,
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **settings,
    )
    module, code = Line(), 0
    loaders = [
        DataLoader(Numbers(), sampler=GlobalBatches(n, shuffled(n, 0), 4), batch_size=None, num_workers=n_workers)
        for n, n_workers in ((4 * batches, workers), (12, 0))
    ]
    try:
        trainer.fit(module, *loaders, ckpt_path=last if last.is_file() else None)
    except SystemExit as leave:
        code = leave.code
    return code, trainer.global_step, module.w.tolist(), throughput.state_dict()["tokens_seen"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("batches", "settings", "stops"),
    [
        (1, {"max_steps": 5, "val_check_interval": 4}, (1, 2, 4, 5)),
        (3, {"max_steps": 7, "val_check_interval": 4}, (2, 3, 4, 6)),
        (2, AT_EPOCH_ENDS | {"max_steps": 5, "check_val_every_n_epoch": 2}, (2, 4)),
        (2, AT_EPOCH_ENDS | {"max_epochs": 3, "check_val_every_n_epoch": 2}, (1, 2, 4, 6)),
        (2, {"max_steps": 5, "limit_val_batches": 0}, (2, 3, 5)),
        (2, {"max_steps": 5, "limit_val_batches": 0, "workers": 1}, (4,)),
        (3, {"max_steps": 3, "val_check_interval": 4, "accumulate_grad_batches": 4}, (1, 2)),
    ],
)
def test_a_run_stops_after_any_step_and_resumes_exactly(tmp_path, batches, settings, stops):
    whole = Rows()
    finished = fit(tmp_path / "whole", batches, whole, **settings)
    for at in stops:
        rows, folder = Rows(), tmp_path / str(at)
        code, step, *_ = fit(folder, batches, rows, at, **settings)
        assert (code, step) == (0 if at == finished[1] else 143, at)  # a run that is done ends as usual
        if code:
            assert fit(folder, batches, rows, **settings) == finished
        assert rows.rows == whole.rows
        ours, theirs = (
            torch.load(f / LAST, weights_only=True)["state_dict"]["w"] for f in (folder, tmp_path / "whole")
        )
        assert torch.equal(ours, theirs)  # the averages


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("batches", "settings", "validated"),
    [
        (1, {"max_steps": 9, "val_check_interval": 4}, (4, 8, 9)),
        (3, {"max_steps": 9, "val_check_interval": 4}, (4, 8, 9)),
        (5, AT_EPOCH_ENDS | {"max_epochs": 3, "val_check_interval": 2}, (2, 4, 7, 14, 15)),
        (2, AT_EPOCH_ENDS | {"max_epochs": 3}, (2, 4, 6)),
        (2, AT_EPOCH_ENDS | {"max_steps": 5, "check_val_every_n_epoch": 2}, (4, 5)),
        (4, {"max_steps": 5, "val_check_interval": 4, "accumulate_grad_batches": 2}, (2, 4, 5)),
    ],
)
def test_a_run_leaves_a_validation_and_does_it_again_when_it_is_resumed(tmp_path, batches, settings, validated, capfd):
    whole, last, draw = Rows(), validated[-1], Draw()
    finished = fit(tmp_path / "whole", batches, whole, added=[draw], **settings)
    for at in validated:
        rows, folder, left = Rows(), tmp_path / str(at), InValidation(at)
        code, step, *_ = fit(folder, batches, rows, added=[left, draw], **settings)
        assert (code, step) == ((0 if at == last else 143), at)  # the validation of the last step is waited for
        if code:
            assert capfd.readouterr().err.startswith("SIGTERM: leaving this validation, which the resumed run does")
            assert left.n_batches % 3 == 1
            assert "val/loss" not in rows.rows[at - 1]
            assert fit(folder, batches, rows, added=[again := InValidation(at), draw], **settings)[0] == 143
            assert again.n_batches == 1
            assert fit(folder, batches, rows, added=[draw], **settings) == finished
        assert rows.rows == whole.rows
        for name in (LAST, BEST):
            ours, theirs = (torch.load(f / name, weights_only=True) for f in (folder, tmp_path / "whole"))
            for part in ("state_dict", "trained_weights"):
                assert torch.equal(ours[part]["w"], theirs[part]["w"])
            assert ours["callbacks"]["RunCheckpoint"] == theirs["callbacks"]["RunCheckpoint"]
            assert "validation_is_due" not in ours


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_epoch_start", "on_validation_batch_start"])
def test_a_validation_that_a_callback_of_others_prepares_is_waited_for(tmp_path, hook, capfd):
    prepares = InValidation(4)
    setattr(prepares, hook, lambda *_: None)
    rows = Rows()
    assert fit(tmp_path, 3, rows, added=[prepares], max_steps=9, val_check_interval=4)[:2] == (143, 4)
    assert (prepares.n_batches, "val/loss" in rows.rows[3]) == (3, True)
    assert capfd.readouterr().err.startswith("SIGTERM: stopping after this validation, with a checkpoint; a second")


@pytest.mark.filterwarnings("ignore")
def test_a_validation_whose_last_batch_is_in_progress_is_ended(tmp_path, capfd):
    rows, settings = Rows(), {"max_steps": 9, "val_check_interval": 4, "limit_val_batches": 1}
    assert fit(tmp_path, 3, rows, added=[InValidation(4)], **settings)[:2] == (143, 4)
    assert "val/loss" in rows.rows[3]
    assert capfd.readouterr().err.startswith("SIGTERM: stopping after this validation, with a checkpoint; a second")


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_stops_early_resumes_from_the_validation_at_the_end_of_an_epoch(tmp_path):
    """There `EarlyStopping` reads the metric when the epoch ends, which is after the checkpoint of the validation."""

    def stopping() -> EarlyStopping:
        return EarlyStopping("val/loss", patience=1, min_delta=100.0)

    settings, whole, rows = AT_EPOCH_ENDS | {"max_epochs": 9, "limit_val_batches": 1}, Rows(), Rows()
    finished = fit(tmp_path / "whole", 3, whole, added=[stopping()], **settings)
    assert finished[:2] == (0, 6)
    assert fit(tmp_path, 3, rows, added=[stopping(), InValidation(3)], **settings)[:2] == (143, 3)
    assert fit(tmp_path, 3, rows, added=[stopping()], **settings) == finished
    assert rows.rows == whole.rows


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_validates_no_longer_when_it_is_resumed_has_left_no_validation(tmp_path):
    settings = {"max_steps": 9, "val_check_interval": 4}
    for at, changed, is_due in ((4, {}, True), (6, {"limit_val_batches": 0}, False)):
        left = [InValidation(4), Signal(6)]
        assert fit(tmp_path, 3, Rows(), added=left, **settings | changed)[:2] == (143, at)
        assert torch.load(tmp_path / LAST, weights_only=True).get("validation_is_due", False) == is_due


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "validated"),  # steps counted from 0
    [
        ({"val_check_interval": 4}, [3, 7, 9]),
        ({"val_check_interval": 4, "max_steps": 10}, [3, 7, 9]),
        ({"val_check_interval": 4, "limit_train_batches": 3}, [3, 5]),
        ({"val_check_interval": 4, "accumulate_grad_batches": 2}, [1, 3, 5]),
        (AT_EPOCH_ENDS | {"check_val_every_n_epoch": 3}, [9]),
        (AT_EPOCH_ENDS | {"check_val_every_n_epoch": 3, "max_steps": 8}, [7]),
        ({"val_check_interval": 4, "min_epochs": 2}, [3, 7, 9]),
    ],
)
def test_the_last_step_is_validated_and_the_run_can_be_made_longer(tmp_path, settings, validated):
    rows, whole = Rows(), Rows()
    fit(tmp_path, 5, rows, **{"max_epochs": 2} | settings)
    assert [step for step, metrics in rows.rows.items() if "val/loss" in metrics] == validated
    # Its checkpoint is that of the validation, as in a run that is killed there; nothing is left to do.
    assert fit(tmp_path, 5, rows, **{"max_epochs": 2} | settings)[1] == validated[-1] + 1
    longer = settings | {"max_steps": -1, "max_epochs": 4}
    assert fit(tmp_path, 5, rows, **longer) == fit(tmp_path / "whole", 5, whole, **longer)
    for step in whole.rows:
        rows.rows[step].pop("val/loss", None)
        whole.rows[step].pop("val/loss", None)
    assert rows.rows == whole.rows


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("shortest", "validated"), [({"min_epochs": 4}, [14, 19]), ({"min_steps": 12}, [11]), ({"min_steps": 3}, [4])]
)
def test_a_run_that_may_not_stop_yet_goes_on_as_before(tmp_path, capfd, shortest, validated):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            trainer.should_stop = trainer.should_stop or trainer.global_step >= 2

    settings = AT_EPOCH_ENDS | {"check_val_every_n_epoch": 3, "max_epochs": 9} | shortest
    rows, whole = Rows(), Rows()
    finished = fit(tmp_path / "whole", 5, whole, added=[Stop()], **settings)
    assert [step for step, metrics in whole.rows.items() if "val/loss" in metrics] == validated
    assert fit(tmp_path, 5, rows, 3, added=[Stop()], **settings)[:2] == (143, 3)
    assert "SIGTERM: stopping after this step, with a checkpoint" in capfd.readouterr().err
    assert fit(tmp_path, 5, rows, added=[Stop()], **settings) == finished
    assert rows.rows == whole.rows


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("every", "saved"), [(2, 4), (3, 3)])  # at the end of an epoch, and within one
def test_a_killed_run_resumes_from_a_checkpoint_of_every_so_many_steps(tmp_path, every, saved):
    class Fail(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
            if trainer.global_step == 5:
                raise ConnectionError

    settings, whole, rows = {"max_steps": 7, "limit_val_batches": 0}, Rows(), Rows()
    finished = fit(tmp_path / "whole", 2, whole, **settings)
    with pytest.raises(ConnectionError):
        fit(tmp_path, 2, rows, added=[Fail()], every=every, **settings)
    assert torch.load(tmp_path / LAST, weights_only=True)["global_step"] == saved
    assert fit(tmp_path, 2, rows, every=every, **settings) == finished
    assert rows.rows == whole.rows


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("batches", "every", "seconds", "exchanges"),
    [
        *((batches, 2, 0.0, [1, 2, 4]) for batches in (1, 2, 3)),
        (3, 5, 2.0, [1, 2, 4, 5, 7]),
        (3, 5, 40.0, [1, 2, 3, 4]),
    ],
)
def test_processes_exchange_signals_every_so_many_steps_and_at_least_every_five_seconds(
    tmp_path, monkeypatch, batches, every, seconds, exchanges
):
    trainers, steps = [], []

    class OfTwo(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            (stop,) = (callback for callback in trainer.callbacks if isinstance(callback, GracefulStop))
            stop._group, stop.every_n_steps = object(), every
            trainers.append(trainer)

    def reduce(of_all: Tensor, **_: object) -> None:
        assert of_all[0] == 0
        of_all[1].clamp_(min=seconds)  # a step of the other process
        steps.append(trainers[0].global_step)
        if len(steps) == len(exchanges):  # the other process has a signal
            of_all[0] = signal.SIGTERM

    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    code, step, *_ = fit(tmp_path, batches, Rows(), added=[OfTwo()], max_steps=9, limit_val_batches=0)
    assert (code, step, steps) == (143, exchanges[-1], exchanges)


@pytest.mark.filterwarnings("ignore")
def test_a_step_that_breaks_the_weights_leaves_the_checkpoint_before_it(tmp_path):
    class Break(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Line, *_: object) -> None:
            if trainer.global_step == 4:
                pl_module.w.data[1] = float("nan")

    reason = "a weight was not finite after step 4: .*; the last good checkpoint was kept"
    with pytest.raises(MisconfigurationException, match=reason):
        fit(tmp_path, 3, Rows(), added=[Break(), StopOnNonFiniteLoss()], max_steps=9, val_check_interval=2)
    for name in (LAST, BEST):
        assert torch.load(tmp_path / name, weights_only=True)["global_step"] == 2


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_that_fits_again_asks_once_a_step(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(GracefulStop, "_stop_if_asked", lambda _, trainer: asked.append(trainer.global_step))
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[GracefulStop()], logger=False, default_root_dir=tmp_path, **QUIET
    )
    loader = DataLoader(Numbers(), sampler=GlobalBatches(12, shuffled(12, 0), 4), batch_size=None)
    trainer.fit(Line(), loader)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Line(), loader)
    assert asked == [1, 2, 3, 4, 5, 6]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["fit", "validate"])
def test_sigterm_before_the_first_step_and_in_an_evaluation_exits_with_its_code(tmp_path, method):
    class InValidation(L.Callback):
        def on_validation_batch_end(self, *_: object) -> None:
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    stop = GracefulStop()
    trainer = L.Trainer(accelerator="cpu", callbacks=[stop, InValidation()], logger=False, max_steps=3, **QUIET)
    loader = DataLoader(Numbers(), sampler=GlobalBatches(12, shuffled(12, 0), 4), batch_size=None)
    loaders = [loader, loader] if method == "fit" else [loader]
    with pytest.raises(SystemExit) as stopped:
        getattr(trainer, method)(Line(), *loaders)
    assert (stopped.value.code, trainer.global_step) == (143, 0)
    stop.teardown(trainer, None, method)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.filterwarnings("ignore")
def test_after_a_run_signals_are_handled_as_before_it(tmp_path):
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    fit(tmp_path, 2, Rows(), max_steps=2, limit_val_batches=0)
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.filterwarnings("ignore")
def test_sigusr1_in_a_job_of_slurm_is_a_sigterm_and_lightning_writes_no_checkpoint_of_its_own(tmp_path, monkeypatch):
    for name, value in {"JOB_ID": "5", "JOB_NAME": "x", "NTASKS": "1", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "1")

    class Usr1(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            if trainer.global_step == 3:
                signal.raise_signal(signal.SIGUSR1)

    assert fit(tmp_path, 2, Rows(), added=[Usr1()], max_steps=5, limit_val_batches=0)[:2] == (143, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_a_copy_of_a_process_ignores_the_signals_of_a_job_and_ends_by_a_sigterm_that_came_before():
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        for number in STOPS:
            os.kill(os.getpid(), number)
        leave_to_the_parent()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
