"""An error in the user's own code shows where it is, whatever library it passes on its way."""

import traceback
from pathlib import Path

import pytest
from helpers import TINY

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
