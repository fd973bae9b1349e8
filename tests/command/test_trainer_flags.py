"""Every argument of Lightning's Trainer: it runs, or is refused in one line.

A small model runs with many arguments at a time. `tests/benchmarks/arguments_of_the_trainer.py` runs every argument
alone, over every topic.
"""

import copy
import inspect
import os
import re
from functools import partial

import lightning as L
import pytest
import torch
from helpers import RUNS
from lightning.pytorch import callbacks
from trainer_flags import ALONE_VALUES, CALLBACKS, CASES, FLAGS, combinations, fault, flags_of

from experiments.__main__ import _mistake_behind
from lightning_modules.base import ExperimentModule

# Of the values alone, those that the suite runs; a benchmark runs all.
IN_THE_SUITE = [
    ("callbacks", "null"),
    ("callbacks", f"+{CALLBACKS}Timer callbacks.duration=00:00:00:00"),
    ("callbacks", f"+{CALLBACKS}BatchSizeFinder refused: data.batch_size"),
    ("callbacks", f"+{CALLBACKS}EarlyStopping callbacks.monitor=val/lost refused: val/lost"),
    ("callbacks", f"+{CALLBACKS}BackboneFinetuning refused: BackboneFinetuning"),
    ("fast_dev_run", "2"),
    ("enable_checkpointing", "false refused: "),
    *((name, "0 refused: nothing would be trained") for name in ("max_steps", "max_epochs", "limit_train_batches")),
    ("accumulate_grad_batches", "0 refused: "),
    ("check_val_every_n_epoch", "0 refused: give 1 or more"),
    ("gradient_clip_val", "-1 refused: give 0 or more"),
    ("val_check_interval", "0 refused: for no validation, leave it out"),
    ("val_check_interval", "0.5 refused: also --trainer.check_val_every_n_epoch 1"),
    ("accelerator", "tpu refused: "),
    ("devices", "many refused: "),
    ("precision", "transformer-engine refused: "),
    ("barebones", "true refused: barebones"),
]


@pytest.fixture(autouse=True)
def _global_settings():
    """Restore the settings of torch that the trainer changes for the whole process."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False
    torch.set_default_dtype(torch.float32)
    assert not torch.is_anomaly_enabled()


def test_the_table_has_every_argument_of_the_trainer():
    assert set(FLAGS) == set(inspect.signature(L.Trainer).parameters)


@pytest.mark.slow
@pytest.mark.parametrize("flags", combinations(), ids=range(len(combinations())))
def test_arguments_run_together(llm_train, tiny, flags):
    done = llm_train("fit", "-c", tiny(trainer__max_steps=4, trainer__val_check_interval=2), *flags)
    assert fault(done.code, done.err, RUNS / "tiny") == ""
    assert done.code == 0, done.err.splitlines()[-1]


def test_the_table_has_every_callback_of_lightning():
    named = {value.split(" ")[0].removeprefix(f"+{CALLBACKS}") for value in FLAGS["callbacks"] if value[0] == "+"}
    assert named == set(callbacks.__all__)


class Averaging(callbacks.WeightAveraging):
    """A callback of the user, on one of Lightning's."""


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: callbacks.SpikeDetection().on_train_batch_end(None, None, {}, None, 0), "SpikeDetection .*: KeyError"),
        (lambda: callbacks.BaseFinetuning().setup(None, None, "fit"), "BaseFinetuning .*: NotImplementedError"),
        (lambda: callbacks.WeightAveraging().on_train_end(None, None), "WeightAveraging"),
        (lambda: Averaging().on_train_end(None, None), None),
        (lambda: torch.cat([]), None),
    ],
)
def test_an_error_in_a_callback_of_lightning_names_the_callback(call, said):
    with pytest.raises(Exception) as raised:  # noqa: PT011 - of any class
        call()
    mistake = _mistake_behind(raised.value)
    assert (mistake is None) == (said is None)
    assert said is None or re.match(f"the callback {said}", str(mistake))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ..."),
            "Tried to allocate 2 GiB",
        ),
        (RuntimeError("CUDA error: out of memory"), "CUDA error: out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), "you tried 9 bytes"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("shapes cannot be multiplied"), None),
    ],
)
def test_a_run_that_the_memory_cannot_hold_is_one_line(error, said):
    mistake = _mistake_behind(error)
    assert (mistake is None) == (said is None)
    assert said is None or re.match(rf"the memory is not enough \(.*{said}\): give a smaller", str(mistake))


def test_the_table_has_the_values_of_the_suite():
    assert set(IN_THE_SUITE) <= set(CASES)
    assert set(CASES) >= ALONE_VALUES


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), IN_THE_SUITE, ids=lambda part: str(part).removeprefix("+" + CALLBACKS))
def test_an_argument_alone_runs_or_is_refused_in_one_line(llm_train, tiny, name, value):
    flags, refusal = flags_of(name, value)
    done = llm_train("fit", "-c", tiny(trainer__max_steps=4, trainer__val_check_interval=2), *flags)
    assert fault(done.code, done.err, RUNS / "tiny") == ""
    assert (done.code != 0) == (refusal is not None), done.err
    assert (refusal or "") in done.err.splitlines()[-1]


def test_a_time_alone_ends_a_run_whose_schedule_does_not_need_the_length(llm_train, tiny):
    constant = {"class_path": "lightning_modules.optim.schedules.Constant", "init_args": {"warmup": 2}}
    config = tiny(lr_scheduler=constant, trainer__max_steps=-1, trainer__max_time="00:00:00:00")
    done = llm_train("fit", "-c", config)
    assert (done.code, "finished at step" in done.err) == (0, True), done.err


def test_a_copy_of_a_module_shares_its_data_and_factories():
    module = ExperimentModule()
    module.layer = torch.nn.Linear(2, 2)
    module.data = open(os.devnull)  # noqa: SIM115 - cannot be copied
    module.optimizer_factory = partial(torch.optim.SGD, [module.data])
    copied = copy.deepcopy(module)
    assert copied.data is module.data
    assert copied.optimizer_factory is module.optimizer_factory
    assert copied.layer is not module.layer
    assert torch.equal(copied.layer.weight, module.layer.weight)
