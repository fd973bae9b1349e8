"""The run folder of a stranger: every command reads it, and none runs its code or writes outside of it."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import LAST
from jsonargparse import Namespace
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from experiments import trust
from lightning_modules.finetuning.bases import ENCODER_CLASSIFIER, load_pretrained
from lightning_modules.runtime import private_names

CODE = """open("it_ran", "w")
import lightning as L
class Hostile(L.Callback):
    pass
def function(*args):
    return args
"""
CALLBACKS = "trainer__callbacks"
LAMBDA = "lightning.pytorch.callbacks.LambdaCallback"
FUNCTIONS = ["torch.hub.load", "torch.load", "os.system", "builtins.exec", "subprocess.run"]
REFUSED = "is not imported"
OUTSIDE = "outside of the working folder"
# setting of the configuration, its value, part of the message
ATTACKS: list[tuple[str, Any, str]] = [
    (CALLBACKS, [{"class_path": "hostile.Hostile"}], "hostile.Hostile is not imported, because a run folder names it"),
    (CALLBACKS, ["hostile.Hostile"], "--allow hostile"),
    (CALLBACKS, [{"class_path": "hostile.function"}], REFUSED),
    (CALLBACKS, [{"class_path": LAMBDA, "init_args": {"on_fit_start": "hostile.function"}}], REFUSED),
    (CALLBACKS, "hostile.yaml", REFUSED),
    ("model__class_path", "hostile.Hostile", REFUSED),
    ("data__class_path", "hostile.Hostile", REFUSED),
    ("data__init_args__source", {"class_path": "hostile.Hostile"}, REFUSED),
    ("optimizer", "hostile.function", REFUSED),
    *(("optimizer", {"class_path": path}, REFUSED) for path in FUNCTIONS),
    ("lr_scheduler", "torch.optim.lr_scheduler.sys.modules", "lr_scheduler"),
    ("trainer__plugins", [{"class_path": "lightning.pytorch.plugins.io.TorchCheckpointIO"}], REFUSED),
    ("trainer__strategy", {"class_path": "lightning.pytorch.strategies.DeepSpeedStrategy"}, REFUSED),
    ("trainer__logger", {"class_path": "lightning.pytorch.loggers.WandbLogger"}, REFUSED),
    ("trainer__logger", {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "/"}}, OUTSIDE),
    ("data__init_args__cache_dir", "/outside", OUTSIDE),
    ("data__init_args__cache_dir", "~/outside", OUTSIDE),
    (
        "trainer__logger",
        {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": ".", "name": "../outside"}},
        OUTSIDE,
    ),
    ("trainer", "places.yaml", f"save_dir ../outside is {OUTSIDE}"),
    ("run", "my_experiment", "run: "),
    ("run__root", "../outside", OUTSIDE),
    ("run__topic", "../outside", "not a name of a folder"),
    ("run__study", "a/b", "not a name of a folder"),
    ("weights_only", False, "weights_only is not a setting of a run"),
    ("ckpt_path", "other/checkpoints/last.ckpt", "ckpt_path is not a setting of a run"),
    ("auto_resume", True, "auto_resume is not a setting of a run"),
    ("allow", "hostile", "allow is not a setting of a run"),
]


@pytest.fixture
def stranger(whole: Callable[..., Path], tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a run that came from elsewhere; its code could be imported if a command tried to."""
    tiny()
    run = Path("downloads/run")
    shutil.copytree(whole(), run)
    (run / "hostile.py").write_text(CODE)
    (run / "hostile.yaml").write_text("- class_path: hostile.Hostile\n")
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "../outside"}}
    (run / "places.yaml").write_text(yaml.safe_dump({"logger": logger}))
    monkeypatch.syspath_prepend(run)
    yield run
    sys.modules.pop("hostile", None)


def configure(run: Path, setting: str, value: Any) -> Path:
    """Change a setting of the configuration of a run, and return the file."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    *parents, last = setting.split("__")
    section = config
    for key in parents:
        section = section[key]
    section[last] = section[last] + value if isinstance(value, list) and last in section else value
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run / "config.yaml"


def it_ran() -> bool:
    """Return whether hostile code has run; a configuration is read with its folder as the working folder."""
    return any(Path().rglob("it_ran"))


def files_outside(run: Path) -> set[Path]:
    return {path for path in Path().rglob("*") if run not in path.parents and "cache" not in path.parts}


@pytest.mark.parametrize(("setting", "value", "said"), ATTACKS, ids=lambda value: str(value)[:50])
def test_a_configuration_that_chooses_code_or_places_is_refused_in_one_line(llm_train, stranger, setting, value, said):
    config, before = configure(stranger, setting, value), files_outside(stranger)
    done = llm_train("validate", "-c", config, "--ckpt_path", "best")
    assert (done.code > 0, len(done.err.splitlines())) == (True, 1), done.err
    assert said in done.err
    assert files_outside(stranger) == before
    assert not it_ran()


FORMS = [
    ["validate", "-c{run}/config.yaml", "--ckpt_path", "best"],
    ["validate", "--config={run}/config.yaml", "--ckpt_path", "best"],
    ["fit", "-c", "{run}/config.yaml", "--auto_resume"],
    ["fit", "-c", "{run}/config.yaml"],
]


@pytest.mark.parametrize("command", FORMS, ids=lambda command: " ".join(command[:1] + command[3:4]))
def test_a_configuration_is_that_of_a_run_folder_however_it_is_named(llm_train, stranger, command):
    configure(stranger, "model__class_path", "hostile.Hostile")
    done = llm_train(*(word.format(run=stranger) for word in command))
    assert (done.code > 0, len(done.err.splitlines())) == (True, 1), done.err
    assert "hostile.Hostile is not imported" in done.err
    assert not it_ran()


def test_the_next_command_of_a_process_may_import_what_a_run_folder_may_not(llm_train, stranger):
    assert llm_train("validate", "-c", configure(stranger, CALLBACKS, [{"class_path": "hostile.Hostile"}])).code > 0
    with trust.trusted(["validate", "-c", str(stranger / "config.yaml")]):
        with pytest.raises(MisconfigurationException, match=r"torch\.device is not imported"):
            trust.check("torch.device")
        assert private_names.parsing_settings["import_path_verdicts"]["*"] is False
    trust.check("torch.device")
    assert "*" not in private_names.parsing_settings["import_path_verdicts"]


@pytest.mark.parametrize(
    ("class_path", "said"),
    [
        ("lightning_modules.runtime.loggers.os", "is no class"),
        ("lightning_modules.common.files.BinaryIO", "typing.BinaryIO is not imported"),
        ("lightning_modules.lost.Module", "could not be imported"),
        ("Module", "Module is not imported"),
    ],
)
def test_generate_takes_no_other_object_of_an_allowed_package(llm_train, stranger, class_path, said):
    configure(stranger, "model__class_path", class_path)
    done = llm_train("generate", "--run", stranger, "--prompt", "a")
    assert (done.code, len(done.err.splitlines())) == (1, 1), done.err
    assert said in done.err


def test_compare_reads_a_folder_and_imports_nothing_of_it(llm_train, stranger):
    name = "<script>alert(1)</script>"
    configure(stranger, "model__class_path", "hostile.Hostile")
    configure(stranger, "optimizer__class_path", name)
    other = Path("downloads") / "other <img src=x onerror=alert(1)>"
    shutil.copytree(stranger, other)
    configure(other, "optimizer__class_path", "$\\frac{$ \x1b[31m")
    metrics = (other / "metrics.csv").read_text()
    (other / "metrics.csv").write_text(metrics.replace("val/loss", "val/<b>"))
    done = llm_train("compare", "downloads")
    assert done.code == 0, done.err
    page = Path("downloads/comparison/index.html").read_text()
    assert "&lt;script&gt;" in page
    assert not any(tag in page for tag in (name, "<img src=x", "<b>"))
    assert "\x1b" not in done.out + done.err
    assert not it_ran()


@pytest.mark.slow
def test_a_user_can_allow_a_package_and_the_next_command_says_so(llm_train, stranger):
    config = configure(stranger, CALLBACKS, [{"class_path": "hostile.Hostile"}])
    done = llm_train("fit", "-c", config, "--ckpt_path", "last", "--trainer.max_steps", "26", "--allow", "hostile")
    assert done.code == 0, done.err
    assert it_ran()
    (following,) = (line for line in done.err.splitlines() if line.startswith("next"))
    assert following.endswith(" --allow hostile")


@pytest.mark.slow
def test_what_the_user_names_by_a_flag_or_in_another_file_needs_no_permission(llm_train, stranger, tiny):
    done = llm_train("validate", "-c", stranger / "config.yaml", "--trainer.callbacks+", "hostile.Hostile")
    assert (done.code, it_ran()) == (0, True), done.err
    (stranger / "it_ran").unlink(missing_ok=True)
    Path("it_ran").unlink(missing_ok=True)
    del sys.modules["hostile"]
    own = tiny(**{"trainer__callbacks+": [{"class_path": "hostile.Hostile"}]})
    assert llm_train("validate", "-c", own, "--print_config").code == 0
    assert it_ran()


def test_what_the_user_sets_by_a_flag_or_in_another_file_may_be_anywhere(tmp_path):
    def logger(save_dir: Any) -> dict[str, Any]:
        return {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": save_dir}}

    Path("own.yaml").write_text(yaml.safe_dump({"trainer": {"logger": logger("/own")}, "run": {"root": "/runs"}}))
    Path("config.yaml").touch()
    args = ["fit", "-c", "config.yaml", "-c", "own.yaml", "--trainer.logger+", json.dumps(logger("/flag"))]
    run = Namespace(name=None, root="/runs", topic=None, study=None)
    arguments = Namespace(run=run, trainer=Namespace(logger=[Namespace(logger("/own")), logger(Path("/flag"))]))
    trust.check_places(arguments, args)
    trust.check_places(arguments, ["fit", "-c", "own.yaml"])
    trust.check_places(arguments, [*args[:3], *args[5:], "--run.root", "/runs", "--trainer.logger.save_dir=/own/"])
    # A flag of another setting with the same last word is not for these places.
    other = ["--run.save_dir", "/other", "--trainer.root=/other"]
    for place, rest in (
        ("/flag", args[:-2]),
        ("/runs", [*args[:3], *args[5:]]),
        ("/runs", [*args[:3], *args[5:], *other]),
    ):
        with pytest.raises(MisconfigurationException, match=f"^config.yaml: .* {place} is {OUTSIDE}, .*rename a file"):
            trust.check_places(arguments, rest)


def test_an_installed_package_can_declare_its_classes(monkeypatch):
    class Point:
        value = "my_package.classes"

    monkeypatch.setattr(trust.importlib.metadata, "entry_points", lambda group: [Point] if group else [])
    verdicts = trust.of_run([])
    trust.check("my_package.classes.Module", verdicts)
    with pytest.raises(MisconfigurationException):
        trust.check("my_package.other.Module", verdicts)


@pytest.mark.parametrize("name", ["config.yaml", "config_test.yaml", "deep/er/any.yaml"])
def test_a_file_is_of_a_run_folder_wherever_it_lies_in_it(tmp_path, name):
    (tmp_path / "checkpoints").mkdir()  # a project can have one, too
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/last.ckpt").touch()
    assert trust.run_folder_of(tmp_path / "run" / name) == tmp_path / "run"
    assert trust.run_folder_of(tmp_path / "experiment.yaml") is None
    assert trust.run_folder_of(tmp_path / "config_small.yaml") is None
    assert trust.run_folder_of(tmp_path / "alone/config.yaml") == tmp_path / "alone"


@pytest.mark.parametrize("link", ["metrics_validate.csv", "figures", "checkpoints/extra"])
def test_a_link_out_of_the_folder_is_refused_before_its_target_is_written(llm_train, stranger, link):
    shutil.rmtree(stranger / "figures")
    Path("precious").mkdir()
    (stranger / link).symlink_to(Path("precious").absolute())
    done = llm_train("validate", "-c", stranger / "config.yaml", "--ckpt_path", "best")
    assert done.code == 1
    assert "outside of the run folder" in done.err
    assert not list(Path("precious").iterdir())


@pytest.mark.parametrize("link", [".lock", "checkpoints/extra"])
def test_a_conversion_refuses_a_link_out_of_the_folder(llm_train, stranger, link):
    Path("precious").write_text("all")
    (stranger / link).symlink_to(Path("precious").absolute())
    done = llm_train("convert", stranger)
    assert (done.code, "outside of the run folder" in done.err) == (1, True)
    assert Path("precious").read_text() == "all"


def test_a_comparison_is_not_written_through_a_link(llm_train, stranger):
    Path("precious").mkdir()
    (stranger / "comparison").symlink_to(Path("precious").absolute())
    done = llm_train("compare", stranger)
    assert (done.code, "--out" in done.err) == (1, True)
    assert not list(Path("precious").iterdir())


def test_python_tags_in_yaml_are_not_built(llm_train, stranger):
    config = stranger / "config.yaml"
    config.write_text(config.read_text() + "seed_everything: !!python/object/apply:os.system ['touch it_ran']\n")
    for command in (["validate", "-c", config], ["generate", "--run", stranger, "--prompt", "a"]):
        done = llm_train(*command)
        assert (done.code > 0, len(done.err.splitlines())) == (True, 1), done.err
    llm_train("compare", stranger)
    assert not it_ran()


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("it_ran"),)


@pytest.mark.parametrize("plugins", [[], None])
def test_a_checkpoint_that_lightning_itself_would_read_runs_no_code(llm_train, stranger, plugins):
    config = yaml.safe_load((stranger / "config.yaml").read_text())
    config["trainer"]["plugins"] = plugins
    (stranger / "config.yaml").write_text(yaml.safe_dump(config))
    (stranger / LAST).write_bytes(pickle.dumps({"state_dict": Malicious()}, protocol=2))
    done = llm_train("validate", "-c", stranger / "config.yaml", "--ckpt_path", "last", "--weights_only", "false")
    assert done.code != 0
    assert not it_ran()


OWN_CODE = {"auto_map": {name: ["hostile.Hostile", None] for name in ("AutoTokenizer", "AutoConfig", "AutoModel")}}


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_base_that_asks_for_code_of_the_hub_is_refused(tmp_path, key):
    config = {"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 9, key: "owner/kernel"}
    of_classifier = {"model_type": ENCODER_CLASSIFIER, "encoder": config}
    for written, arguments in (
        (config, {}),
        (config, {"architecture": config}),
        (of_classifier, {"auto_class": "AutoModel"}),
    ):
        (tmp_path / "config.json").write_text(json.dumps(written))
        with pytest.raises(MisconfigurationException, match=r"model\.base: .*owner/kernel, which is code of the hub"):
            load_pretrained(str(tmp_path), **arguments)


def test_a_base_with_code_of_its_own_is_not_asked_about(llm_train, stranger, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    (stranger / "model/config.json").write_text(json.dumps({"model_type": "unknown"} | OWN_CODE))
    with pytest.raises(MisconfigurationException, match="AutoModelForCausalLM could not load"):
        load_pretrained(str(stranger))
    assert not it_ran()


SHADOWS = ("difflib", "yaml", "numpy", "matplotlib", "wandb", "torch")


def test_files_of_the_working_folder_are_not_imported_by_accident(tmp_path):
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text(CODE)
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "compare", "lost"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert "there is no such folder" in done.stderr
    assert not it_ran()
