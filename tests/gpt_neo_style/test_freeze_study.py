"""The arms of the study of frozen weights train the parameters that their names say."""

import re
from pathlib import Path

import pytest
import yaml

from experiments.class_paths import import_class
from experiments.help.options import DEFAULTS
from lightning_modules.base import ExperimentModule

STUDIES = Path(__file__).parents[2] / "experiments/gpt_neo_style/studies"
ARMS = {
    "nothing": {"w", "h.0", "h.1", "h.2", "h.3", "ln_f"},
    "embeddings": {"h.0", "h.1", "h.2", "h.3", "ln_f"},
    "first_quarter": {"h.1", "h.2", "h.3", "ln_f"},
    "first_half": {"h.2", "h.3", "ln_f"},
    "first_three_quarters": {"h.3", "ln_f"},
    "all_but_last_block": {"h.3"},
    "last_layer": {"h.3", "ln_f"},
    "lora": {"h.0", "h.1", "h.2", "h.3"},
}


@pytest.mark.parametrize("arm", ARMS)
def test_the_arms_of_the_study_train_what_their_names_say(arm):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = ExperimentModule()
    model.model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=8, n_embd=8, n_layer=4, n_head=2))
    trainer = yaml.safe_load((STUDIES / f"freeze/{arm}.yaml").read_text())["trainer"]
    for callback in trainer.get("callbacks+", []):
        import_class(callback["class_path"])(**callback["init_args"]).setup(None, model, "fit")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {re.match(r"model\.transformer\.(w|h\.\d|ln_f)", name)[1] for name in trained} == ARMS[arm]
    assert all(("lora_" in name) == (arm == "lora") for name in trained)


def test_every_arm_is_in_a_study():
    studies = [yaml.safe_load((STUDIES / f"{name}.yaml").read_text()) for name in ("freeze_weights", "freeze_smollm2")]
    arms = [[Path(value).stem for value in study["parameters"]["config"]["values"]] for study in studies]
    assert {*arms[0], *arms[1]} == {*ARMS}


def test_arms_add_their_callbacks_to_those_of_an_experiment(llm_train, tiny):
    arms = [f"--config={STUDIES}/freeze/{arm}.yaml" for arm in ("gradual", "lora")]
    parsed = llm_train("fit", "-c", tiny(), *arms, "--print_config")
    assert parsed.code == 0, parsed.err
    callbacks = yaml.safe_load(parsed.out)["trainer"]["callbacks"]
    defaults = yaml.safe_load(DEFAULTS.read_text())["trainer"]["callbacks"]
    assert [callback["class_path"] for callback in callbacks] == [
        *(callback["class_path"] for callback in defaults),
        "lightning_modules.finetuning.freeze.GradualUnfreezing",
        "lightning_modules.finetuning.lora.LoRA",
    ]
    assert [stage["epoch"] for stage in callbacks[-2]["init_args"]["stages"]] == [2, 4, 6]
