"""Frozen weights stay as they were, cost nothing, and a resumed run freezes what the uninterrupted run froze."""

import copy
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import forks
import lightning as L
import pytest
import torch
import yaml
from helpers import RUNS, TINY, assert_same_weights, text, weights, with_settings
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from shared_runs import own_world, run_command
from tiny_bases import llama
from torch import nn
from torch.utils.data import DataLoader

from experiments.class_paths import import_class
from lightning_modules.base import ExperimentModule
from lightning_modules.finetuning.adapters import adapted_layers, merged
from lightning_modules.finetuning.bases import save_pretrained
from lightning_modules.finetuning.freeze import Freeze, GradualUnfreezing, Stage, frozen_modules
from lightning_modules.finetuning.lora import LoRA
from lightning_modules.finetuning.rates import LayerwiseRates
from lightning_modules.finetuning.selection import ModelParts, Selection
from lightning_modules.runtime import private_names
from lightning_modules.runtime.learning_curve import read_metric

ROOM = "lightning_modules.finetuning."
TinyModule = import_class(yaml.safe_load(TINY.read_text())["model"]["class_path"])
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16}


def decoder(n_layer: int = 4, dropout: float = 0.0) -> TinyModule:
    torch.manual_seed(0)
    return TinyModule(vocab_size=30, block_size=8, n_layer=n_layer, n_head=2, n_embd=8, dropout=dropout)


class Wrapped(ExperimentModule):
    """A module of Transformers inside a module of a topic."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


@pytest.fixture(scope="module")
def bert() -> Wrapped:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
    return Wrapped(BertForSequenceClassification(BertConfig(**sizes, intermediate_size=16)))


@pytest.fixture(scope="module")
def gpt_neo() -> Wrapped:
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 16}
    special = {"bos_token_id": None, "eos_token_id": None}
    return Wrapped(GPTNeoForCausalLM(GPTNeoConfig(**sizes, **special, attention_types=[[["global", "local"], 1]])))


@pytest.fixture(autouse=True)
def _unfreeze(bert: Wrapped, gpt_neo: Wrapped):
    yield
    for model in (bert, gpt_neo):
        model.requires_grad_(True)
        model.scaled_rates.clear()


def frozen(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


# --- selections -------------------------------------------------------------------------------------------------------


def test_a_model_has_embeddings_layers_and_a_head_whatever_it_is(bert, gpt_neo):
    ours = ModelParts(decoder())
    assert set(ours.embeddings) == {"decoder.token_embedding.weight", "decoder.position_embedding.weight"}
    assert ours.stack == "decoder.blocks"
    assert all(name.startswith("decoder.blocks.2.") for name in ours.layers[2])
    assert set(ours.head) == {"decoder.final_norm.weight", "decoder.final_norm.bias"}

    theirs = ModelParts(gpt_neo)  # whose output matrix is that of the embeddings
    assert set(theirs.embeddings) == {"model.transformer.wte.weight", "model.transformer.wpe.weight"}
    assert set(theirs.head) == {"model.transformer.ln_f.weight", "model.transformer.ln_f.bias"}

    encoder = ModelParts(bert)
    assert {name.split(".")[2] for name in encoder.embeddings} == {"embeddings"}
    assert len(encoder.layers) == 3
    assert {name.removeprefix("model.").split(".weight")[0].split(".bias")[0] for name in encoder.head} == {
        "bert.pooler.dense",
        "classifier",
    }


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [(0, {0}), ("3", {3}), (-1, {3}), (":2", {0, 1}), ("1:-1", {1, 2}), ("-2:", {2, 3}), (":50%", {0, 1}),
     ("25%:75%", {1, 2}), (":", {0, 1, 2, 3}), (":9", {0, 1, 2, 3}), (":62.5%", {0, 1})],
)  # fmt: skip
def test_layers_are_counted_as_python_counts(layers, chosen):
    names = Selection(layers=layers).of(decoder())
    assert {int(name.split(".")[2]) for name in names} == chosen


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"layers": "4:"}, "there is no such layer; there are 4, decoder.blocks.0 to decoder.blocks.3"),
        ({"layers": 4}, "there is no such layer; there are 4, decoder.blocks.0 to decoder.blocks.3"),
        ({"layers": -5}, "there is no such layer"),
        ({"layers": "3:1"}, "there is no such layer"),
        ({"layers": "half"}, "'half' is no range: write one layer"),
        ({"layers": "0:1:2"}, "is no range"),
        ({"layers": ""}, "is no range"),
        (
            {"patterns": ["*.norm.*"]},
            r"no parameter is named '\*.norm.\*'; there are decoder.final_norm.bias, .*, "
            r"decoder.blocks.\*.attention_norm.weight, .* and 10 others; all are in decoder.token_embedding.\*, "
            r"decoder.position_embedding.\*, decoder.blocks.\*, decoder.final_norm.\*$",
        ),
        ({"patterns": ["*bias", "encoder*"]}, "no parameter is named 'encoder"),
        ({}, "nothing is named; set embeddings, layers, patterns or all_but_head"),
        ({"all_but_head": True, "patterns": ["*final_norm*"]}, "everything is frozen; leave something to train"),
    ],
)
def test_a_selection_of_nothing_or_of_everything_is_refused_in_one_line(selection, message):
    with pytest.raises(MisconfigurationException, match=f"^Freeze: .*{message}") as caught:
        Freeze(**selection).setup(None, decoder(), "fit")
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("attention_norm.weight") <= 1  # a star in place of the number of the layer


def test_a_model_without_layers_has_names_only():
    for selection, message in (
        ({"layers": 0}, "layers 0"),
        ({"embeddings": True}, "embeddings"),
        ({"all_but_head": True}, "all_but_head"),
    ):
        message = f"^Freeze: {message}: the model has no stack of layers; name parameters by patterns$"
        with pytest.raises(MisconfigurationException, match=message):
            Freeze(**selection).setup(None, Wrapped(nn.Linear(2, 2)), "fit")
    with pytest.raises(
        MisconfigurationException, match=r"^LayerwiseRates: .* no stack of layers; remove it from train"
    ):
        LayerwiseRates().setup(None, Wrapped(nn.Linear(2, 2)), "fit")
    model = Wrapped(nn.Linear(2, 2))
    Freeze(patterns=["*.bias"]).setup(None, model, "fit")
    assert frozen(model) == {"model.bias"}


def test_all_but_the_head_of_a_classifier(bert):
    Freeze(all_but_head=True).setup(None, bert, "fit")
    trained = {name for name, parameter in bert.named_parameters() if parameter.requires_grad}
    assert trained == set(ModelParts(bert).head)
    dropouts = {name: m in set(frozen_modules(bert)) for name, m in bert.named_modules() if isinstance(m, nn.Dropout)}
    assert not dropouts.pop("model.dropout")  # it is applied before the classifier, as a part of the head
    assert all(dropouts.values())


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the runs, with the weights that all of them start from."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(1)
    TinyModule(vocab_size=257, block_size=16, **SIZES).save_pretrained(folder / "start")
    return folder


def fit_arguments(
    world: Path, name: str, class_path: str, arguments: dict, **settings: object
) -> tuple[str | Path, ...]:
    """Write the YAML of a tiny run with a callback, 4 batches an epoch; return the arguments of the command."""
    config = yaml.safe_load(TINY.read_text())
    config["model"]["init_args"] = {"pretrained": str(world / "start"), "dropout": 0.1}
    config["data"]["init_args"] |= {
        "source": {"class_path": "datamodules.sources.ListText", "init_args": {"texts": [text(300)]}},
        "batch_size": 20,
    }
    config["trainer"] |= {"val_check_interval": 3, "log_every_n_steps": 1}
    config["trainer"]["callbacks"] = [
        {"class_path": "lightning_modules.runtime.reproducible.ReproducibleSteps"},
        {"class_path": "lightning_modules.runtime.checkpoint.RunCheckpoint"},
        {"class_path": ROOM + class_path, "init_args": arguments},
        {"class_path": "lightning_modules.runtime.export.ExportModel"},
    ]
    file = world / f"{name}.yaml"
    file.write_text(yaml.safe_dump(with_settings(config, settings)))
    return "fit", "-c", file


def whole_and_resumed(
    world: Path, name: str, class_path: str, arguments: dict, max_steps: int, killed_at: int
) -> SimpleNamespace:
    """Run once to the end, and once with a kill after a step and a resumed rest."""
    command = fit_arguments(world, name, class_path, arguments, trainer__max_steps=max_steps)
    with own_world(world):
        whole = run_command(*command, "--run.name", f"{name}_whole")
        assert whole.code == 0, whole.err
        killed = forks.start(*command, "--run.name", f"{name}_killed", prepare=lambda: forks.die_after_step(killed_at))
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
        runs = world / RUNS
        at_kill = shutil.copy(runs / f"{name}_killed/checkpoints/last.ckpt", world / f"{name}_at_kill.ckpt")
        resumed = run_command(*command, "--run.name", f"{name}_killed", "--ckpt_path", "last")
        assert resumed.code == 0, resumed.err
    return SimpleNamespace(whole=runs / f"{name}_whole", killed=runs / f"{name}_killed", at_kill=at_kill, err=whole.err)


STAGES = [
    {"epoch": 1, "layers": -1, "rate": 0.5},
    {"epoch": 2, "layers": ":", "rate": 0.25},
    {"epoch": 9, "embeddings": True},
]


@pytest.fixture(scope="module")
def gradual(world: Path) -> SimpleNamespace:
    """Three epochs, killed in the second."""
    return whole_and_resumed(world, "gradual", "freeze.GradualUnfreezing", {"stages": STAGES}, 10, killed_at=6)


@pytest.fixture(scope="module")
def lora(world: Path) -> SimpleNamespace:
    return whole_and_resumed(world, "lora", "lora.LoRA", {"rank": 2, "dropout": 0.2}, 6, killed_at=3)


def start_weights(world: Path) -> dict[str, torch.Tensor]:
    return started(world).state_dict()


def started(world: Path) -> TinyModule:
    return TinyModule(vocab_size=257, block_size=16, pretrained=str(world / "start")).eval()


def in_optimizer(checkpoint: Path) -> tuple[set[str], set[str]]:
    """Names of the parameters that the optimiser holds, and of those with a state."""
    (state,) = torch.load(checkpoint, weights_only=True)["optimizer_states"]
    names = {
        i: name
        for group in state["param_groups"]
        for i, name in zip(group["params"], group["param_names"], strict=True)
    }
    return set(names.values()), {names[i] for i in state["state"]}


# --- frozen for the whole run ----------------------------------------------------------------------------------------


def test_frozen_weights_stay_bit_for_bit_and_leave_nothing_in_the_optimiser(world, monkeypatch):
    modes = []
    step = TinyModule.training_step

    def watched(self: TinyModule, *args: object) -> torch.Tensor:
        parts = (self.decoder.embedding_dropout, *self.decoder.blocks[0].modules(), *self.decoder.blocks[1].modules())
        modes.append([module.training for module in parts])
        loss = step(self, *args)
        self.train()  # as Lightning and users may do at any time
        return loss

    monkeypatch.setattr(TinyModule, "training_step", watched)
    command = fit_arguments(world, "frozen", "freeze.Freeze", {"embeddings": True, "layers": ":50%"})
    done = run_command(*command, "--trainer.max_steps", "4")
    assert done.code == 0, done.err
    run = RUNS / "frozen"
    before, after = start_weights(world), weights(run / "checkpoints/last.ckpt")
    unmoved = {name for name in before if torch.equal(before[name], after[name])}
    is_frozen = {name for name in before if "embedding" in name or ".blocks.0." in name}
    assert unmoved == is_frozen
    assert in_optimizer(run / "checkpoints/last.ckpt") == (set(before) - is_frozen,) * 2

    n_frozen = sum(before[name].numel() for name in is_frozen)
    n_trained = sum(weight.numel() for weight in before.values()) - n_frozen
    assert f"{n_trained:,} parameters are trained" in done.err
    for metric, count in (("model/trained_parameters", n_trained), ("model/frozen_parameters", n_frozen)):
        assert read_metric(run / "metrics.csv", metric)[1] == [count] * 4
    (optimizer,) = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["optimizer_states"]
    moments = [state[name] for state in optimizer["state"].values() for name in ("exp_avg", "exp_avg_sq")]
    assert sum(moment.numel() for moment in moments) == 2 * n_trained  # so the file is smaller by two moments

    n = len(list(decoder().decoder.blocks[0].modules()))
    assert modes == [[False] * (1 + n) + [True] * n] * 4

    command = fit_arguments(world, "frozen", "freeze.Freeze", {"embeddings": True, "layers": 1})  # of the same sizes
    refused = run_command(*command, "--trainer.max_steps", "5", "--ckpt_path", "last")
    first = "attention.qkv.weight"
    assert (refused.code, refused.err.splitlines()[-1].partition(";")[0]) == (
        1,
        f"error: optimizer: the checkpoint has the state of decoder.blocks.1.{first} in the place of "
        f"decoder.blocks.0.{first}",
    )


@pytest.mark.parametrize("keep_dropout", [False, True])
def test_frozen_modules_run_in_evaluation_mode_unless_they_keep_their_dropout(keep_dropout):
    model = decoder(n_layer=2, dropout=0.1)
    model.trainer = SimpleNamespace(global_step=0, log_every_n_steps=2)
    callback = Freeze(embeddings=True, layers=0, keep_dropout=keep_dropout)
    callback.setup(None, model, "fit")
    callback.on_train_start(SimpleNamespace(callbacks=[callback]), model)
    model.train()
    callback.on_train_batch_start(None, model)
    parts = model.decoder
    assert all(module.training == keep_dropout for module in (parts.embedding_dropout, *parts.blocks[0].modules()))
    assert all(module.training for module in parts.blocks[1].modules())


def saved_for_backward(model: TinyModule) -> int:
    """Bytes of activations that a forward pass keeps, without the weights."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(torch.zeros(16, 8, dtype=torch.long)).sum()
    loss.backward()
    return sum(kept.values())


def test_a_frozen_beginning_keeps_no_graph():
    model = decoder()
    everything = saved_for_backward(model)
    outputs = {}
    for i, block in enumerate(model.decoder.blocks):
        block.register_forward_hook(lambda _, __, output, i=i: outputs.update({i: output.requires_grad}))
    Freeze(embeddings=True, layers=":50%").setup(None, model, "fit")
    half = saved_for_backward(model)
    assert outputs == {0: False, 1: False, 2: True, 3: True}
    assert half < 0.6 * everything
    model.zero_grad()
    saved_for_backward(model)
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


# --- unfrozen in stages ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stages_are_unfrozen_at_their_epochs_and_learn_at_their_rates(world, gradual):
    before = start_weights(world)
    last = gradual.whole / "checkpoints/last.ckpt"
    moved, state = {}, {}
    for step, checkpoint in ((6, gradual.at_kill), (10, last)):
        after = weights(checkpoint)
        moved[step] = {name for name in before if not torch.equal(before[name], after[name])}
        listed, state[step] = in_optimizer(checkpoint)
        assert listed == set(before)  # from the start, so that a resumed run finds the groups that were saved
    final_norm = {name for name in before if "final_norm" in name}
    layers = [{name for name in before if f".blocks.{i}." in name} for i in range(2)]
    assert moved == state == {6: final_norm | layers[1], 10: final_norm | layers[1] | layers[0]}
    n_trained = [sum(before[name].numel() for name in names) for names in (final_norm, moved[6], moved[10])]
    steps, logged = read_metric(gradual.whole / "metrics.csv", "model/trained_parameters")
    assert logged == [n_trained[(step - 1) // 4] for step in steps]
    assert steps == list(range(1, 11))
    (optimizer,) = torch.load(last, weights_only=True)["optimizer_states"]
    rates = {name: group["lr"] for group in optimizer["param_groups"] for name in group["param_names"]}
    shares = {name: rates[name] / rates["decoder.final_norm.weight"] for name in rates}
    assert {shares[name] for name in layers[1]} == {0.5}
    assert {shares[name] for name in layers[0]} == {0.25}
    assert "epoch 2: " in gradual.err


@pytest.mark.slow
def test_a_run_killed_between_two_stages_resumes_to_the_same_weights(gradual):
    assert_same_weights(gradual.whole / "checkpoints/last.ckpt", gradual.killed / "checkpoints/last.ckpt")
    whole, killed = (
        read_metric(run / "metrics.csv", "model/frozen_parameters") for run in (gradual.whole, gradual.killed)
    )
    assert whole == killed


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_parameters_frozen_for_the_whole_run_are_not_unfrozen(order):
    callbacks = GradualUnfreezing([Stage(epoch=1, layers=":")]), Freeze(layers=0)
    model = decoder(n_layer=2)
    steps = {"current_epoch": 0, "global_step": 0, "log_every_n_steps": 2}
    trainer = SimpleNamespace(strategy=None, callbacks=callbacks, **steps)
    model.trainer = trainer
    for i in order:
        callbacks[i].setup(trainer, model, "fit")
    layers = [{f"decoder.blocks.{i}.{name}" for name, _ in model.decoder.blocks[i].named_parameters()} for i in (0, 1)]
    for i in order:
        callbacks[i].on_train_start(trainer, model)
    assert frozen(model) == layers[0] | layers[1]
    trainer.current_epoch = 1
    for i in order:
        callbacks[i].on_train_batch_start(trainer, model)
    assert frozen(model) == layers[0]
    trainer.current_epoch = 0  # as in a fit that ends before the stage
    callbacks[0].on_train_batch_start(trainer, model)
    assert not model.decoder.blocks[1].training
    callbacks[0].teardown(trainer, model, "fit")
    assert frozen(model) == layers[0]
    assert model.decoder.blocks[1].training


def test_the_earliest_stage_that_names_a_parameter_has_it():
    model = decoder(n_layer=2)
    stages = [Stage(epoch=2, layers=":", rate=0.25), Stage(epoch=1, layers=1, rate=0.5), Stage(epoch=1, layers=1)]
    GradualUnfreezing(stages).setup(SimpleNamespace(strategy=None), model, "fit")
    assert {model.scaled_rates[name] for name in ModelParts(model).layers[0]} == {0.25}
    assert {model.scaled_rates[name] for name in ModelParts(model).layers[1]} == {0.5}


def test_stages_that_leave_nothing_to_train_at_first_are_refused():
    trainer = SimpleNamespace(strategy=None, current_epoch=0)
    callback, model = GradualUnfreezing([Stage(epoch=1, patterns=["*"])]), decoder()
    callback.setup(trainer, model, "test")  # does nothing
    callback.setup(trainer, model, "fit")
    with pytest.raises(MisconfigurationException, match=r"^GradualUnfreezing: everything is frozen"):
        callback.on_train_start(trainer, model)
    with pytest.raises(MisconfigurationException, match="stages is empty"):
        GradualUnfreezing([])


def test_gradual_unfreezing_says_what_ddp_needs():
    plain, patient = (SimpleNamespace(strategy=s) for s in (DDPStrategy(), DDPStrategy(find_unused_parameters=True)))
    assert not private_names.takes_unused_parameters(plain)
    assert private_names.takes_unused_parameters(patient)
    with pytest.raises(MisconfigurationException, match=r"trainer\.strategy to ddp_find_unused_parameters_true"):
        GradualUnfreezing([Stage(layers=0, epoch=1)]).setup(plain, decoder(), "fit")


def test_each_layer_learns_slower_than_the_one_above(bert):
    LayerwiseRates(decay=0.5).setup(None, bert, "fit")
    shares = bert.scaled_rates
    assert shares["model.bert.encoder.layer.2.output.dense.weight"] == 0.5
    assert shares["model.bert.encoder.layer.0.output.dense.weight"] == 0.125
    assert shares["model.bert.embeddings.word_embeddings.weight"] == 0.0625
    assert "model.classifier.weight" not in shares
    bert.optimizer_factory = lambda groups: torch.optim.AdamW(groups, lr=0.1)
    groups = bert.configure_optimizers().param_groups
    assert [group["lr"] for group in groups] == pytest.approx(
        [0.1, 0.1, 0.05, 0.05, 0.025, 0.025, 0.0125, 0.0125, 0.00625, 0.00625]
    )
    assert sum(len(group["params"]) for group in groups) == len(list(bert.parameters()))


@pytest.mark.parametrize(
    ("callback", "arguments", "message"),
    [
        ("rates.LayerwiseRates", {"decay": 1.5}, r"decay.*1\.5 does not conform to restriction v>0 and v<=1"),
        ("freeze.GradualUnfreezing", {"stages": [{"epoch": -1}]}, "epoch.*-1 does not conform to restriction v>=0"),
        ("freeze.GradualUnfreezing", {"stages": [{"rate": -0.5}]}, "rate.*-0.5 does not conform to restriction v>=0"),
        ("lora.LoRA", {"rank": 0}, "rank.*0 does not conform to restriction v>0"),
        ("lora.LoRA", {"alpha": 0.0}, "alpha.*0.0 does not conform to restriction v>0"),
        ("lora.LoRA", {"dropout": 1.0}, "dropout.*1.0 does not conform to restriction v>=0 and v<1"),
    ],
)
def test_the_parser_refuses_numbers_out_of_range(callback, arguments, message):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.Callback, "callback")
    with pytest.raises(ArgumentError, match=f"(?s){message}"):
        parser.parse_object({"callback": {"class_path": ROOM + callback, "init_args": arguments}})


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_lora_trains_adapters_alone_and_exports_a_plain_model(world, lora):
    from transformers import AutoModelForCausalLM

    run = lora.whole
    before, after = start_weights(world), weights(run / "checkpoints/best.ckpt")
    for name, weight in before.items():
        adapted = name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
        assert torch.equal(weight, after[adapted if adapted in after else name])
    adapters = {name for name in after if "lora_" in name}
    assert len(adapters) == 2 * 4 * 2  # two matrices for four layers in each of two blocks
    assert in_optimizer(run / "checkpoints/last.ckpt") == (adapters, adapters)

    module = started(world)
    module.on_load_checkpoint(torch.load(run / "checkpoints/best.ckpt", weights_only=True))
    module.load_state_dict(after)
    module.eval()
    plain = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    assert not [name for name, _ in plain.named_parameters() if "lora" in name]
    ids = torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, module(ids), rtol=1e-4, atol=1e-5)
        assert (module(ids) - started(world)(ids)).abs().max() > 1e-3


@pytest.mark.slow
def test_a_run_with_adapters_generates_and_validates(llm_train, lora):
    assert llm_train("generate", "--run", lora.whole, "--prompt", "a", "--max_new_tokens", "5").code == 0
    validated = llm_train(
        "validate", "-c", lora.whole / "config.yaml", "--ckpt_path", lora.whole / "checkpoints/best.ckpt"
    )
    assert validated.code == 0, validated.err


@pytest.mark.slow
def test_a_killed_lora_run_resumes_to_the_same_weights(lora):
    assert_same_weights(lora.whole / "checkpoints/last.ckpt", lora.killed / "checkpoints/last.ckpt")


def test_adapters_can_be_chosen_and_a_new_head_trained_with_them(bert):
    model = copy.deepcopy(bert)
    LoRA(rank=2, targets=["*.query", "*.value"], also_trained=["*classifier*", "*query.bias"]).setup(None, model, "fit")
    assert set(adapted_layers(model)) == {
        f"model.bert.encoder.layer.{i}.attention.self.{name}" for i in range(3) for name in ("query", "value")
    }
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name}
    assert trained == {
        "model.classifier.weight",
        "model.classifier.bias",
        *(f"model.bert.encoder.layer.{i}.attention.self.query.base_layer.bias" for i in range(3)),
    }
    with pytest.raises(
        MisconfigurationException, match=r"no linear layer is named '\*.qkv'; there are .*layer.\*.attent"
    ):
        LoRA(targets=["*.qkv"]).setup(None, copy.deepcopy(bert), "fit")


def fitted(folder: Path, model: L.LightningModule, *callbacks: L.Callback, epochs: int = 1) -> L.Trainer:
    """Train a module for one step an epoch."""
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    settings = {"accelerator": "cpu", "max_epochs": epochs, "log_every_n_steps": 1, "default_root_dir": folder}
    trainer = L.Trainer(callbacks=[*callbacks], **settings, **off)
    model.optimizer_factory = lambda groups: torch.optim.SGD(groups, lr=0.1)
    ids = torch.arange(8)[None]
    trainer.fit(model, DataLoader([{"input_ids": ids, "targets": ids}], batch_size=None))
    return trainer


class TrainingModes(L.Callback):
    """Callback that notes in each step which blocks are in training mode, and how many parameters are trained."""

    def __init__(self) -> None:
        self.modes: list[list[bool]] = []
        self.counts: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: TinyModule, *_: object) -> None:
        self.modes.append([block.training for block in pl_module.decoder.blocks])
        self.counts.append(float(trainer.callback_metrics["model/trained_parameters"]))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 3, 1, 0)])
def test_freezing_and_rates_apply_to_adapters_in_any_order_of_the_callbacks(tmp_path, capfd, order):
    callbacks = (
        LoRA(rank=2, targets=["*.qkv"], also_trained=["*.qkv.bias"]),
        Freeze(layers=0),
        LayerwiseRates(decay=0.5),
        GradualUnfreezing([Stage(epoch=1, layers=1, rate=0.75)]),
    )
    model, seen = decoder(), TrainingModes()
    (optimizer,) = fitted(tmp_path, model, *(callbacks[i] for i in order), seen, epochs=2).optimizers
    shares = {name: group.get("lr_share", 1.0) for group in optimizer.param_groups for name in group["param_names"]}
    layer = "decoder.blocks.{}.attention.qkv."
    ends = ("lora_A.default.weight", "lora_B.default.weight", "base_layer.bias")
    assert shares == {layer.format(i) + end: share for i, share in ((1, 0.75 / 8), (2, 0.25), (3, 0.5)) for end in ends}
    assert seen.modes == [[False, False, True, True], [False, True, True, True]]
    n_trained = sum(model.get_parameter(layer.format(1) + end).numel() for end in ends)  # the same in each layer
    assert seen.counts == [2 * n_trained, 3 * n_trained]
    said = [line.partition(" parameters")[0] for line in capfd.readouterr().err.splitlines() if " are frozen" in line]
    assert said == [f"epoch 0: {2 * n_trained}", f"epoch 1: {3 * n_trained}"]  # by the last callback alone


def test_another_fit_of_a_module_has_the_same_learning_rates(tmp_path):
    model = decoder()
    for _ in range(2):
        (optimizer,) = fitted(tmp_path, model, LayerwiseRates(decay=0.5)).optimizers
        assert {group.get("lr_share", 1.0) for group in optimizer.param_groups} == {
            1,
            1 / 2,
            1 / 4,
            1 / 8,
            1 / 16,
            1 / 32,
        }


@pytest.mark.parametrize(
    ("pattern", "ends"),
    [
        ("*.0.attention.qkv.weight", ["base_layer.weight"]),
        (
            "*.0.attention.qkv.*",
            ["base_layer.weight", "base_layer.bias", "lora_A.default.weight", "lora_B.default.weight"],
        ),
        ("*.0.*qkv*weight", ["base_layer.weight"]),
        ("*.0.*lora_A*", ["lora_A.default.weight"]),
    ],
)
def test_a_pattern_selects_the_weights_of_adapted_layers_by_their_plain_names(pattern, ends):
    model = decoder()
    LoRA(rank=2, targets=["*.qkv"]).setup(None, model, "fit")
    assert list(Selection(patterns=[pattern]).of(model)) == [f"decoder.blocks.0.attention.qkv.{end}" for end in ends]


def test_adapters_that_are_all_frozen_are_refused(tmp_path, bert):
    callbacks = Freeze(patterns=["model.bert.*"]), LoRA(also_trained=["*classifier*"])
    with pytest.raises(MisconfigurationException, match=r"^LoRA: another callback freezes all adapters; remove Freeze"):
        fitted(tmp_path, copy.deepcopy(bert), *callbacks)


def test_a_model_with_adapters_is_loaded_and_trained_again_with_and_without_the_callback(tmp_path):
    def checkpoint_of(model: L.LightningModule, *callbacks: L.Callback) -> dict:
        trainer = fitted(tmp_path, model, *callbacks)
        trainer.save_checkpoint(tmp_path / "model.ckpt")
        return torch.load(tmp_path / "model.ckpt", weights_only=True)

    callback = LoRA(rank=2, alpha=3.0, dropout=0.1, targets=["*.qkv"], also_trained=["*final_norm*", "*qkv.bias"])
    first = checkpoint_of(decoder(), callback)
    assert first["adapters"].keys() == {"targets", "rank", "alpha", "dropout", "also_trained"}

    def trained(model: nn.Module) -> set[str]:
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    names = trained(TinyModule.of_checkpoint(first))
    assert {"decoder.final_norm.weight", "decoder.blocks.0.attention.qkv.base_layer.bias"} < names
    del first["adapters"]["also_trained"]  # as in older checkpoints
    for callbacks, expected in (([], {name for name in names if "lora" in name}), ([callback], names)):
        again = TinyModule.of_checkpoint(first)
        second = checkpoint_of(again, *callbacks)
        assert trained(again) == expected
        assert second["adapters"].items() >= first["adapters"].items()
        assert trained(TinyModule.of_checkpoint(second)) == expected
        before = first["state_dict"]
        assert {name for name, weight in second["state_dict"].items() if not torch.equal(weight, before[name])} >= {
            name for name in expected if "lora_A" not in name
        }


@pytest.mark.parametrize(
    ("changed", "message"), [({"alpha": 6.0}, "alpha of LoRA is 3.0 in"), ({"rank": 3}, ".*lora_A.")]
)
def test_a_checkpoint_with_adapters_of_another_scale_or_rank_is_refused(changed, message):
    saved = decoder()
    LoRA(rank=2, alpha=3.0).setup(None, saved, "fit")
    checkpoint = {"state_dict": saved.state_dict()}
    saved.on_save_checkpoint(checkpoint)
    resumed = decoder()
    LoRA(**{"rank": 2, "alpha": 3.0} | changed).setup(None, resumed, "fit")
    with pytest.raises(
        MisconfigurationException, match=f"^ckpt_path: the checkpoint does not fit the model: {message}"
    ):
        resumed.on_load_checkpoint(checkpoint)


def test_adapters_are_merged_and_unmerged():
    model = decoder(n_layer=1)
    callback = LoRA(rank=2)
    for _ in range(2):  # the second time, the model has its adapters
        callback.setup(None, model, "fit")
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.lora_B["default"].weight)
    ids = torch.arange(8)[None]
    with_adapters = model(ids)
    names = set(model.state_dict())
    with merged(model):
        assert set(model.state_dict()) == set(decoder(n_layer=1).state_dict())
        torch.testing.assert_close(model(ids), with_adapters, rtol=1e-4, atol=1e-5)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model(ids), with_adapters, rtol=1e-4, atol=1e-5)


def test_an_adapted_output_layer_that_is_tied_to_the_embeddings_is_exported_with_a_matrix_of_its_own(tmp_path):
    from transformers import AutoModelForCausalLM

    model = nn.Module()
    model.model = llama()
    LoRA(rank=2, targets=["*"]).setup(None, model, "fit")
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.lora_B["default"].weight)
    ids, embeddings = torch.arange(8)[None], model.model.get_input_embeddings().weight
    before, with_adapters = embeddings.clone(), model.model(ids).logits
    with merged(model):
        assert torch.equal(embeddings, before)
        save_pretrained(model.model, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not plain.config.tie_word_embeddings
    torch.testing.assert_close(plain(ids).logits, with_adapters, rtol=1e-4, atol=1e-4)
    assert model.model.config.tie_word_embeddings
    assert model.model.lm_head.base_layer.weight is embeddings
    torch.testing.assert_close(model.model(ids).logits, with_adapters, rtol=1e-4, atol=1e-4)


def test_rates_of_a_callback_multiply_those_that_a_module_has_set(tmp_path):
    model = decoder()
    model.learning_rate_shares = {"decoder.token_embedding.weight": 0.5}
    (optimizer,) = fitted(tmp_path, model, LayerwiseRates(decay=0.5)).optimizers
    shares = {name: group.get("lr_share", 1.0) for group in optimizer.param_groups for name in group["param_names"]}
    assert shares["decoder.token_embedding.weight"] == 0.5 / 32
