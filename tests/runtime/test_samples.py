"""Samples of generated text: what a resumed run keeps, and arguments that are refused."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.runtime.samples import SampleText


class Written(SampleText):
    """Samples that need no model: a continuation is the step."""

    def draw(self, trainer, pl_module):
        self.metrics = {"samples/step": float(trainer.global_step)}
        return [f" goes on at {trainer.global_step}" for _ in self.prompts]


def logged(callback: SampleText, step: int, of_first: list[dict[str, float]], rank: int = 0) -> dict[str, float]:
    """Make a validation on one process, and return the metrics that it logs; rank 0 appends them to `of_first`."""

    def broadcast(metrics: dict[str, float]) -> dict[str, float]:
        if rank == 0:
            of_first.append(metrics)
        return of_first[-1]

    trainer = SimpleNamespace(
        state=SimpleNamespace(fn=TrainerFn.FITTING), strategy=SimpleNamespace(broadcast=broadcast), global_step=step,
        is_global_zero=rank == 0, callback_metrics={}, default_root_dir=".", loggers=[],
    )  # fmt: skip
    metrics: dict[str, float] = {}
    callback.on_validation_epoch_end(trainer, SimpleNamespace(log_dict=lambda new, **_: metrics.update(new)))
    callback.on_validation_end(trainer, SimpleNamespace())
    return metrics


def validate(callback: SampleText, step: int) -> list[str]:
    """Make a validation, and return the heads of the columns of each prompt in `samples.md`."""
    logged(callback, step, [])
    return re.findall(r"^step .*", Path("samples.md").read_text(), flags=re.MULTILINE)


def resumed(prompts: list[str] | None, state: dict[str, object]) -> SampleText:
    callback = Written(prompts)
    callback.load_state_dict(state)
    return callback


def test_a_resumed_run_keeps_the_samples_of_the_same_prompts_only(capsys):
    first = Written(["a", "b"])
    validate(first, 8)
    state = first.state_dict()
    assert validate(resumed(["a", "b"], state), 16) == [f"step 8{' ' * 39}| step 16"] * 2
    # A run that is stopped before its first validation hands on what it has.
    assert len(validate(resumed(["a", "b"], resumed(["a", "b"], state).state_dict()), 16)[0]) > 40
    assert not capsys.readouterr().err
    for others in (["a", "b", "c"], ["a"], ["a", "c"]):
        assert validate(resumed(others, state), 16) == ["step 16"] * len(others)
        assert "samples.md: the prompts are not those of the checkpoint" in capsys.readouterr().err
    del state["prompts"]  # a checkpoint of an earlier version
    assert validate(resumed(["a", "b"], state), 16) == [f"step 8{' ' * 39}| step 16"] * 2
    assert validate(resumed(["a"], state), 16) == ["step 16"]


def test_of_many_validations_the_first_the_newest_and_two_between_are_shown():
    callback = Written(["a"])
    for step in range(1, 7):
        (heads,) = validate(callback, step)
    assert re.findall(r"step \d", heads) == ["step 1", "step 3", "step 4", "step 6"]


def test_every_process_logs_what_the_first_measures_so_that_all_agree_which_checkpoint_is_the_best():
    of_first: list[dict[str, float]] = []
    assert [logged(Written(["a"]), 8, of_first, rank) for rank in (0, 1)] == [{"samples/step": 8.0}] * 2


@pytest.mark.parametrize(
    ("flag", "condition"),
    [
        ("--top_p=0", "v>0 and v<=1"),
        ("--top_p=1.5", "v>0 and v<=1"),
        ("--top_k=0", "v>0"),
        ("--temperature=-1", "v>=0"),
        ("--temperature=inf", "v>=0 and v<inf"),
        ("--max_new_tokens=0", "v>0"),
    ],
)
def test_the_parser_refuses_what_generation_would(flag, condition):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SampleText)
    with pytest.raises(ArgumentError, match=f"does not conform to restriction {condition}"):
        parser.parse_args([flag])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": ["a", ""]}, "prompts has an empty text"),
    ],
)
def test_what_no_range_says_is_refused_before_the_first_step(arguments, reason):
    class OtherSamples(SampleText):
        pass

    with pytest.raises(MisconfigurationException, match=f"OtherSamples: {reason}"):
        OtherSamples(**arguments)
