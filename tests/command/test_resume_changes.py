"""What a resumed run may change of its configuration, setting by setting."""

import copy
import shutil
from pathlib import Path

import pytest
import yaml
from helpers import LAST, contents, with_settings
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from experiments.run.resume import changes

SAVED = {
    "seed_everything": 1,
    "run": {"name": "a"},
    "model": {"class_path": "lightning_modules.t.M", "init_args": {"width": 8, "dropout": 0.0, "compile": False}},
    "data": {
        "class_path": "datamodules.t.D",
        "init_args": {
            "source": {"class_path": "datamodules.sources.TextFiles", "init_args": {"paths": "old/text.txt"}},
            "tokenizer": "owner/name",
            "batch_size": 4,
            "num_workers": 0,
        },
    },
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1, "betas": [0.9, 0.99]}},
    "lr_scheduler": {"class_path": "lightning_modules.optim.schedules.Cosine", "init_args": {"final": 0.1}},
    "trainer": {
        "max_steps": 10,
        "devices": 1,
        "strategy": "auto",
        "precision": None,
        "accumulate_grad_batches": 1,
        "limit_train_batches": None,
        "gradient_clip_val": 1.0,
        "callbacks": [
            {"class_path": "lightning_modules.runtime.stop.GracefulStop", "init_args": {"every_n_steps": 10}}
        ],
    },
}
CALLBACKS = [
    {"class_path": "lightning_modules.runtime.averaging.AveragedWeights"},
    {"class_path": "lightning_modules.runtime.stop.GracefulStop", "init_args": {"every_n_steps": 5}},
]


def changed(**settings: object) -> dict:
    return changes(SAVED, with_settings(copy.deepcopy(SAVED), settings))


@pytest.mark.parametrize(
    ("setting", "value", "recorded"),
    [
        ("optimizer__init_args__lr", 0.5, {"optimizer.lr": [0.1, 0.5]}),
        ("optimizer__init_args__betas", [0.9, 0.95], {"optimizer.betas": [[0.9, 0.99], [0.9, 0.95]]}),
        ("lr_scheduler__init_args__final", 0.0, {"lr_scheduler.final": [0.1, 0.0]}),
        ("trainer__max_steps", 20, {"trainer.max_steps": [10, 20]}),
        ("trainer__devices", 2, {"trainer.devices": [1, 2]}),
        ("trainer__strategy", "ddp", {"trainer.strategy": ["auto", "ddp"]}),
        ("trainer__precision", "bf16-mixed", {"trainer.precision": [None, "bf16-mixed"]}),
        ("trainer__gradient_clip_val", None, {"trainer.gradient_clip_val": [1.0, None]}),
        ("model__init_args__dropout", 0.1, {"model.dropout": [0.0, 0.1]}),
        ("model__init_args__compile", True, {"model.compile": [False, True]}),
        ("data__init_args__num_workers", 2, {"data.num_workers": [0, 2]}),
        ("run__name", "b", {}),
        ("trainer__new_flag", 3, {}),  # of a later version: the saved configuration has no value
    ],
)
def test_a_setting_that_can_change_is_recorded_with_both_values(setting, value, recorded):
    assert changed(**{setting: value}) == recorded


def test_callbacks_are_compared_by_their_classes():
    assert changed(trainer__callbacks=CALLBACKS) == {
        "trainer.callbacks": [["GracefulStop"], ["AveragedWeights", "GracefulStop"]],
        "trainer.callbacks.GracefulStop.every_n_steps": [10, 5],
    }


@pytest.mark.parametrize(
    ("setting", "value", "name"),
    [
        ("seed_everything", 2, "seed_everything"),
        ("model__class_path", "lightning_modules.t.N", "model"),
        ("model__init_args__width", 16, "model.width"),
        ("data__class_path", "datamodules.t.E", "data"),
        ("data__init_args__batch_size", 8, "data.batch_size"),
        ("data__init_args__tokenizer", "other/name", "data.tokenizer"),
        ("data__init_args__source__class_path", "datamodules.sources.PythonText", "data.source"),
        ("data__init_args__source__init_args__paths", "elsewhere/text.txt", "data.source.paths"),
        ("trainer__accumulate_grad_batches", 2, "trainer.accumulate_grad_batches"),
        ("trainer__limit_train_batches", 5, "trainer.limit_train_batches"),
        ("optimizer__class_path", "torch.optim.SGD", "optimizer"),
    ],
)
def test_a_setting_that_cannot_change_is_refused_in_one_line(setting, value, name):
    with pytest.raises(MisconfigurationException) as refused:
        changed(**{setting: value})
    message = str(refused.value)
    assert message.startswith(f"{name}: it is {value}, and the run to resume has ")
    assert message.endswith("; keep it, or start a new run")
    assert "\n" not in message


def test_one_batch_is_not_all_batches():
    before, now = copy.deepcopy(SAVED), copy.deepcopy(SAVED)
    before["trainer"] |= {"val_check_interval": 1, "max_time": 1, "limit_val_batches": 0, "overfit_batches": 0.0}
    now["trainer"] |= {"val_check_interval": 1.0, "max_time": 1.0, "limit_val_batches": 0.0, "overfit_batches": 0}
    assert changes(before, now) == {"trainer.val_check_interval": [1, 1.0]}
    before["trainer"]["limit_train_batches"], now["trainer"]["limit_train_batches"] = 1.0, 1
    with pytest.raises(MisconfigurationException, match=r"trainer\.limit_train_batches: it is 1, .* has 1\.0"):
        changes(before, now)


def test_a_file_or_folder_that_was_moved_or_copied_may_have_another_path(tmp_path):
    old, new = tmp_path / "old/text", tmp_path / "new/text"
    name = "data__init_args__source__init_args__paths"
    before = with_settings(copy.deepcopy(SAVED), {name: [str(old)]})
    now = with_settings(copy.deepcopy(SAVED), {name: [str(new)]})
    recorded = {"data.source.paths": [[str(old)], [str(new)]]}
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "part.txt").write_text("same")
    assert changes(before, now) == recorded
    (new / "part.txt").write_text("other")
    with pytest.raises(MisconfigurationException, match=r"data\.source\.paths: it is"):
        changes(before, now)
    shutil.rmtree(old)
    assert changes(before, now) == recorded
    new.rename(tmp_path / "new/other")
    with pytest.raises(MisconfigurationException, match=r"data\.source\.paths: it is"):
        changes(before, now)


def shuffled(path: str, seed: int = 0) -> dict:
    source = {"class_path": "datamodules.sources.TextFiles", "init_args": {"paths": path}}
    return {"class_path": "datamodules.sources.Shuffled", "init_args": {"source": source, "seed": seed}}


@pytest.mark.parametrize(
    ("sources", "name"),
    [
        ([shuffled("c.txt"), shuffled("b.txt"), "d.txt"], "data.source.sources.0.source.paths"),
        ([shuffled("b.txt"), shuffled("a.txt"), "d.txt"], "data.source.sources.0.source.paths"),
        ([shuffled("a.txt"), shuffled("b.txt", seed=1), "d.txt"], "data.source.sources.1.seed"),
        ([shuffled("a.txt"), shuffled("b.txt"), "e.txt"], "data.source.sources.2"),
        ([shuffled("a.txt"), "d.txt", shuffled("b.txt")], "data.source.sources"),
        ([shuffled("a.txt"), shuffled("b.txt")], "data.source.sources"),
    ],
)
def test_each_source_of_a_mixture_and_their_order_are_kept(sources, name):
    key = "data__init_args__source"
    mixture = {"class_path": "datamodules.sources.Mixture", "init_args": {"weights": [3, 1, 1]}}
    mixture["init_args"]["sources"] = [shuffled("a.txt"), shuffled("b.txt"), "d.txt"]
    before = with_settings(copy.deepcopy(SAVED), {key: mixture})
    assert changes(before, copy.deepcopy(before)) == {}
    now = with_settings(copy.deepcopy(before), {f"{key}__init_args__sources": sources})
    with pytest.raises(MisconfigurationException, match=rf"^{name}: it is "):
        changes(before, now)


@pytest.mark.parametrize("architecture", [{"n_layer": 2, "n_head": 1}, {}, None])
def test_a_mapping_in_the_model_is_kept(architecture):
    key = "model__init_args__architecture"
    before = with_settings(copy.deepcopy(SAVED), {key: {"n_layer": 2}})
    with pytest.raises(MisconfigurationException, match=r"^model\.architecture: it is "):
        changes(before, with_settings(copy.deepcopy(SAVED), {key: architecture}))


def test_two_callbacks_of_one_class_and_the_order_of_schedules_are_compared():
    timers = [{"class_path": "t.Timer", "init_args": {"duration": hours}} for hours in (1, 2)]
    schedules = [{"class_path": f"t.{name}"} for name in ("Linear", "Cosine")]
    lists = {"trainer__callbacks": timers, "lr_scheduler": {"class_path": "t.Together", "init_args": {"of": schedules}}}
    before = with_settings(copy.deepcopy(SAVED), copy.deepcopy(lists))
    timers[0]["init_args"]["duration"] = 3
    schedules.reverse()
    changed = changes(before, with_settings(copy.deepcopy(SAVED), lists))
    assert changed["trainer.callbacks.Timer.duration"] == [1, 3]
    assert changed["lr_scheduler.of"] == [["Linear", "Cosine"], ["Cosine", "Linear"]]
    timers[1]["init_args"]["duration"] = 4
    changed = changes(before, with_settings(copy.deepcopy(SAVED), lists))
    assert changed["trainer.callbacks.Timer.2.duration"] == [2, 4]


def test_a_class_that_has_moved_is_the_same_class():
    before = with_settings(
        copy.deepcopy(SAVED), {"trainer__callbacks": [{"class_path": "lightning_modules.GracefulStop"}]}
    )
    before = with_settings(before, {"lr_scheduler__class_path": "lightning_modules.schedules.Cosine"})
    assert changes(before, SAVED) == {}


@pytest.mark.slow
def test_the_command_refuses_before_it_writes(llm_train, tiny, whole):
    run = whole()
    before = contents(run)
    for flag, code in (("--data.batch_size=8", 1), ("--optimizer=torch.optim.SGD", 1), ("--seed_everything=9", 1)):
        refused = llm_train("fit", "-c", tiny(), "--ckpt_path", run / LAST, flag)
        name, _, value = flag.removeprefix("--").partition("=")
        assert (refused.code, refused.err.startswith(f"error: {name}: it is {value}, and")) == (code, True), refused.err
    assert contents(run) == before
    assert not Path("runs").exists()
    assert yaml.safe_load((run / "config.yaml").read_text())["seed_everything"] == 5
