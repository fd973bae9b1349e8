"""An error in the user's own code shows where it is, whatever library it passes on its way."""

import importlib
import traceback
from pathlib import Path

import pytest
import torch
from helpers import RUNS, TINY

from experiments import load_run
from experiments.yaml_files import read_yaml

KIND = f"lightning_modules.{TINY.parent.name}"
MINE = f"""
import lightning as L
from {KIND} import PretrainModule

class Reads(PretrainModule):
    def setup(self, stage):
        self.hparams.not_saved

class Logs(PretrainModule):
    def on_train_start(self):
        self.log("words", "text")

class Built(PretrainModule):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.width = [8][1]

class BuiltCallback(L.Callback):
    def __init__(self):
        raise ValueError("too narrow")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "kind", "said", "most"),
    [
        (["--model=mine.Reads"], AttributeError, "'AttributeDict' object has no attribute 'not_saved'", None),
        (["--model=mine.Logs"], ValueError, "`str` values cannot be logged", None),
        (["--model=mine.Built"], IndexError, "list index out of range", 3),
        (["--trainer.callbacks+=mine.BuiltCallback"], ValueError, "too narrow", 3),
    ],
)
def test_an_error_of_the_users_code_is_raised_as_it_is(llm_train, tiny, flags, kind, said, most):
    Path("mine.py").write_text(MINE)
    with pytest.raises(kind) as caught:
        llm_train("fit", "-c", tiny(), *flags)
    places = [Path(place.filename).name for place in traceback.extract_tb(caught.tb)]
    assert str(caught.value).endswith(said)
    assert "mine.py" in places
    if most:  # of a constructor, without the frames and the words of jsonargparse: this test, `run`, `main`, its own
        assert (places[-1], "_typehints.py" in places, len(places)) == ("mine.py", False, 1 + most)


def test_a_module_of_the_user_that_cannot_be_imported_shows_its_line(llm_train, tiny):
    Path("mine.py").write_text("import os\nWIDTH = undefined\n")
    error = llm_train("fit", "-c", tiny(), "--model=mine.Mine").err
    assert error == f"error: --model: name 'undefined' is not defined ({Path('mine.py').absolute()}, line 2)\n"


OWN = f"""
import torch
from torch import nn
from {KIND} import PretrainModule

class Weighted(PretrainModule):
    def __init__(self, weight: float = 0.1, **arguments):
        super().__init__(**arguments)
        self.weight = weight

class Fixed(Weighted):
    def __init__(self, **arguments):
        super().__init__(positions="rotary", **arguments)

class Gated(PretrainModule):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        for block in self.decoder.blocks:
            block.feed_forward.activation = nn.SiLU()

class Holds(L.Callback):
    def __init__(self, device: torch.device = torch.device("cpu"), n: int = 1):
        self.device = device

    def on_fit_start(self, trainer, pl_module):
        assert self.device == torch.device("cpu")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Weighted", "Fixed"])
def test_a_subclass_that_passes_arguments_on_is_exported_and_loaded(llm_train, tiny, kind):
    Path("mine.py").write_text(MINE + OWN)
    done = llm_train("fit", "-c", tiny(), f"--model=mine.{kind}")
    assert done.code == 0, done.err
    run = Path("runs/mine/tiny")
    assert (run / "model/config.json").is_file()
    module = load_run(run, allow=["mine"]).module
    assert module.decoder.config.n_layer == 2
    assert module.decoder.config.positions == ("rotary" if kind == "Fixed" else "learned")


@pytest.mark.slow
def test_a_decoder_with_a_module_of_the_user_has_no_model_for_other_programs(llm_train, tiny):
    Path("mine.py").write_text(MINE + OWN)
    done = llm_train("fit", "-c", tiny(), "--model=mine.Gated")
    assert done.code == 0, done.err
    assert "no model/: blocks.0.feed_forward.activation is a SiLU, which no format of a decoder has" in done.err
    run = Path("runs/mine/tiny")
    assert not (run / "model").exists()
    assert isinstance(load_run(run, allow=["mine"]).module.decoder.blocks[0].feed_forward.activation, torch.nn.SiLU)


@pytest.mark.slow
def test_a_default_that_yaml_cannot_hold_is_left_out_of_the_configuration(llm_train, tiny):
    Path("mine.py").write_text(MINE + OWN)
    done = llm_train("fit", "-c", tiny(), "--trainer.callbacks+=mine.Holds", "--trainer.callbacks.n=2")
    assert done.code == 0, done.err
    assert "Warning" not in done.err
    config = RUNS / "tiny/config.yaml"
    callback = read_yaml(config)["trainer"]["callbacks"][-1]
    assert callback == {"class_path": "mine.Holds", "init_args": {"n": 2}}
    again = llm_train("fit", "-c", config, "--run.name=again", "--allow=mine")
    assert again.code == 0, again.err


@pytest.mark.parametrize("name", ["sched", "lightning_modules"])
def test_a_module_that_is_hidden_by_an_installed_one_needs_another_name(llm_train, tiny, name):
    """A word that is wrong and hides nothing has no such hint."""
    importlib.import_module(name)
    words = ["fit", "-c", tiny(), f"--lr_scheduler={name}.Mine"]
    assert "your own code needs another name" not in llm_train(*words).err
    Path(f"{name}.py").write_text("class Mine: ...")
    error = llm_train(*words).err
    origin = "llm-train" if name == "lightning_modules" else importlib.import_module(name).__file__
    assert f"; {name} is that of {origin}, so your own code needs another name" in error
    assert error.count("\n") == 1
