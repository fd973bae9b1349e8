"""What is frozen stays as it was, costs nothing, and a resumed run knows what was frozen when."""

import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers import assert_same_weights, kill_when, weights
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from experiments.class_paths import import_class
from lightning_modules.base import ExperimentModule
from lightning_modules.decoder_pretrain.module import PretrainModule
from lightning_modules.finetuning.adapters import adapted_layers, merged
from lightning_modules.finetuning.freeze import Freeze, GradualUnfreezing, Stage, frozen_modules
from lightning_modules.finetuning.lora import LoRA
from lightning_modules.finetuning.rates import LayerwiseRates
from lightning_modules.finetuning.selection import Anatomy, Selection
from lightning_modules.runtime import private_names
from lightning_modules.runtime.learning_curve import read_metric

RUNS = Path("runs/decoder_pretrain")
CALLBACKS = {
    "Freeze": "lightning_modules.finetuning.freeze.Freeze",
    "GradualUnfreezing": "lightning_modules.finetuning.freeze.GradualUnfreezing",
    "LoRA": "lightning_modules.finetuning.lora.LoRA",
}
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16}


def decoder(n_layer: int = 4, dropout: float = 0.0) -> PretrainModule:
    torch.manual_seed(0)
    return PretrainModule(vocab_size=30, block_size=8, n_layer=n_layer, n_head=2, n_embd=8, dropout=dropout)


class Wrapped(ExperimentModule):
    """Any module of Transformers as a topic may have it."""

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
def _thaw(bert: Wrapped, gpt_neo: Wrapped):
    yield
    for model in (bert, gpt_neo):
        model.requires_grad_(True)
        model.learning_rate_shares.clear()


def frozen(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


# --- what is meant ---------------------------------------------------------------------------------------------------


def test_a_model_has_embeddings_layers_and_a_head_whatever_it_is(bert, gpt_neo):
    ours = Anatomy(decoder())
    assert set(ours.embeddings) == {"decoder.token_embedding.weight", "decoder.position_embedding.weight"}
    assert ours.stack == "decoder.blocks"
    assert all(name.startswith("decoder.blocks.2.") for name in ours.layers[2])
    assert set(ours.head) == {"decoder.final_norm.weight", "decoder.final_norm.bias"}

    theirs = Anatomy(gpt_neo)  # whose output matrix is that of the embeddings
    assert set(theirs.embeddings) == {"model.transformer.wte.weight", "model.transformer.wpe.weight"}
    assert set(theirs.head) == {"model.transformer.ln_f.weight", "model.transformer.ln_f.bias"}

    encoder = Anatomy(bert)
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
        (
            {"patterns": ["*.norm.*"]},
            r"no parameter is named '\*.norm.\*'; there are decoder.token_embedding.weight, "
            r"decoder.position_embedding.weight, decoder.blocks.\*.attention_norm.weight, ",
        ),
        ({"patterns": ["*bias", "encoder*"]}, "no parameter is named 'encoder"),
        ({}, "nothing is named; set embeddings, layers, patterns or all_but_head"),
        ({"all_but_head": True, "patterns": ["*final_norm*"]}, "everything is frozen; leave something to train"),
    ],
)
def test_a_selection_of_nothing_or_of_everything_is_one_line(selection, message):
    with pytest.raises(MisconfigurationException, match=f"^Freeze: .*{message}") as caught:
        Freeze(**selection).setup(None, decoder(), "fit")
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("attention_norm.weight") <= 1  # a star for the number of the layer


def test_a_model_without_layers_has_names_only():
    with pytest.raises(MisconfigurationException, match="no stack of layers; name them by patterns"):
        Freeze(layers=0).setup(None, Wrapped(nn.Linear(2, 2)), "fit")
    model = Wrapped(nn.Linear(2, 2))
    Freeze(patterns=["*.bias"]).setup(None, model, "fit")
    assert frozen(model) == {"model.bias"}


def test_all_but_the_head_of_a_classifier(bert):
    Freeze(all_but_head=True).setup(None, bert, "fit")
    trained = {name for name, parameter in bert.named_parameters() if parameter.requires_grad}
    assert trained == set(Anatomy(bert).head)
    dropouts = {name: m in set(frozen_modules(bert)) for name, m in bert.named_modules() if isinstance(m, nn.Dropout)}
    assert not dropouts.pop("model.dropout")  # before the classifier: it is the head's
    assert all(dropouts.values())


# --- frozen for good -------------------------------------------------------------------------------------------------


def freezing(tiny, tmp_path: Path, *callbacks: tuple[str, dict], **settings: object) -> Path:
    """A tiny run that starts from weights that are known, with callbacks of this file."""
    if not (tmp_path / "start").exists():
        torch.manual_seed(1)
        PretrainModule(vocab_size=257, block_size=16, **SIZES).save_pretrained(tmp_path / "start")
    export = {"class_path": "lightning_modules.runtime.export.ExportModel"}
    named = [{"class_path": CALLBACKS[name], "init_args": arguments} for name, arguments in callbacks]
    settings |= {"model__init_args": {"pretrained": str(tmp_path / "start"), "dropout": 0.1}}
    return tiny(**settings, **{"trainer__callbacks+": [*named, export]})


def start_weights(tmp_path: Path) -> dict[str, torch.Tensor]:
    return PretrainModule(vocab_size=257, block_size=16, pretrained=str(tmp_path / "start")).state_dict()


def in_optimizer(checkpoint: Path) -> tuple[set[str], set[str]]:
    """Names of the parameters that the optimiser has, and of those it keeps a state for."""
    (state,) = torch.load(checkpoint, weights_only=True)["optimizer_states"]
    names = {
        i: name
        for group in state["param_groups"]
        for i, name in zip(group["params"], group["param_names"], strict=True)
    }
    return set(names.values()), {names[i] for i in state["state"]}


def test_frozen_weights_stay_bit_for_bit_and_leave_nothing_in_the_optimiser(llm_train, tiny, tmp_path):
    config = freezing(tiny, tmp_path, ("Freeze", {"embeddings": True, "layers": ":50%"}))
    done = llm_train("fit", "-c", config)
    assert done.code == 0, done.err
    before, after = start_weights(tmp_path), weights(RUNS / "tiny/checkpoints/last.ckpt")
    unmoved = {name for name in before if torch.equal(before[name], after[name])}
    is_frozen = {name for name in before if "embedding" in name or ".blocks.0." in name}
    assert unmoved == is_frozen
    assert in_optimizer(RUNS / "tiny/checkpoints/last.ckpt") == (set(before) - is_frozen,) * 2

    n_frozen = sum(before[name].numel() for name in is_frozen)
    n_trained = sum(weight.numel() for weight in before.values()) - n_frozen
    assert f"{n_trained:,} parameters are trained" in done.err
    for metric, count in (("model/trained_parameters", n_trained), ("model/frozen_parameters", n_frozen)):
        assert read_metric(RUNS / "tiny/metrics.csv", metric)[1][-1] == count

    llm_train("fit", "-c", freezing(tiny, tmp_path), "--run.name", "all")
    sizes = [(RUNS / run / "checkpoints/last.ckpt").stat().st_size for run in ("tiny", "all")]
    assert sizes[1] - sizes[0] > 8 * n_frozen  # two moments of four bytes each


def test_frozen_modules_run_as_in_evaluation_whoever_calls_train(llm_train, tiny, tmp_path, monkeypatch):
    modes = []
    step = PretrainModule.training_step

    def watched(self: PretrainModule, *args: object) -> torch.Tensor:
        parts = (self.decoder.embedding_dropout, *self.decoder.blocks[0].modules(), *self.decoder.blocks[1].modules())
        modes.append([module.training for module in parts])
        loss = step(self, *args)
        self.train()  # what Lightning, or a user, may do at any time
        return loss

    monkeypatch.setattr(PretrainModule, "training_step", watched)
    selection = {"embeddings": True, "layers": 0}
    assert llm_train("fit", "-c", freezing(tiny, tmp_path, ("Freeze", selection))).code == 0
    n = len(list(decoder().decoder.blocks[0].modules()))
    assert len(modes) == 24
    assert all(mode == [False] * (1 + n) + [True] * n for mode in modes)

    modes.clear()
    llm_train("fit", "-c", freezing(tiny, tmp_path, ("Freeze", selection | {"keep_dropout": True})))
    assert all(all(mode) for mode in modes[1:])


def saved_for_backward(model: PretrainModule) -> int:
    """Bytes of activations that a forward pass keeps; weights are there in any case."""
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


def test_a_mistake_in_yaml_is_one_line(llm_train, tiny, tmp_path):
    done = llm_train("fit", "-c", freezing(tiny, tmp_path, ("Freeze", {"layers": "5:"})))
    assert done.code == 1
    assert "error: Freeze: layers '5:': there is no such layer; there are 2" in done.err.splitlines()[-1]


# --- thawed on the way -----------------------------------------------------------------------------------------------

STAGES = [
    {"epoch": 1, "layers": -1, "rate": 0.5},
    {"epoch": 2, "layers": ":", "rate": 0.25},
    {"epoch": 9, "embeddings": True},
]
EPOCHS = {"data__init_args__batch_size": 64, "trainer__val_check_interval": 5}  # 9 batches an epoch


def test_stages_are_thawed_at_their_epochs_and_learn_at_their_rates(llm_train, tiny, tmp_path):
    config = freezing(tiny, tmp_path, ("GradualUnfreezing", {"stages": STAGES}), **EPOCHS)
    before = start_weights(tmp_path)
    moved, state = {}, {}
    for steps in (18, 24):
        run = RUNS / f"until_{steps}"
        done = llm_train("fit", "-c", config, "--trainer.max_steps", steps, "--run.name", run.name)
        assert done.code == 0, done.err
        after = weights(run / "checkpoints/last.ckpt")
        moved[steps] = {name for name in before if not torch.equal(before[name], after[name])}
        listed, state[steps] = in_optimizer(run / "checkpoints/last.ckpt")
        assert listed == set(before)  # from the start, so that a resumed run finds the groups that were saved
    final_norm = {name for name in before if "final_norm" in name}
    layers = [{name for name in before if f".blocks.{i}." in name} for i in range(2)]
    assert moved == state == {18: final_norm | layers[1], 24: final_norm | layers[1] | layers[0]}
    n_trained = [sum(before[name].numel() for name in names) for names in (final_norm, moved[18], moved[24])]
    steps, logged = read_metric(run / "metrics.csv", "model/trained_parameters")
    assert logged == [n_trained[(step - 1) // 9] for step in steps]
    (optimizer,) = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["optimizer_states"]
    rates = {name: group["lr"] for group in optimizer["param_groups"] for name in group["param_names"]}
    shares = {name: rates[name] / rates["decoder.final_norm.weight"] for name in rates}
    assert {shares[name] for name in layers[1]} == {0.5}
    assert {shares[name] for name in layers[0]} == {0.25}
    assert "epoch 2: " in done.err


def test_a_run_killed_between_two_stages_resumes_to_the_same_weights(llm_train, forked, tiny, tmp_path):
    config = freezing(tiny, tmp_path, ("GradualUnfreezing", {"stages": STAGES}), **EPOCHS)
    llm_train("fit", "-c", config, "--run.name", "whole")
    metrics = RUNS / "killed/metrics.csv"
    status = forked(
        "fit", "-c", config, "--run.name", "killed",
        meanwhile=kill_when(lambda: metrics.is_file() and len(metrics.read_text().splitlines()) > 4),
    )  # fmt: skip
    assert status == -signal.SIGKILL
    resumed = llm_train("fit", "-c", config, "--run.name", "killed", "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert_same_weights(RUNS / "whole/checkpoints/last.ckpt", RUNS / "killed/checkpoints/last.ckpt")
    frozen_counts = [read_metric(RUNS / run / "metrics.csv", "model/frozen_parameters") for run in ("whole", "killed")]
    assert frozen_counts[0] == frozen_counts[1]


def test_what_is_frozen_for_good_is_not_thawed(llm_train, tiny, tmp_path):
    callbacks = [("GradualUnfreezing", {"stages": [{"epoch": 1, "layers": ":"}]}), ("Freeze", {"layers": 0})]
    assert llm_train("fit", "-c", freezing(tiny, tmp_path, *callbacks, **EPOCHS)).code == 0
    before, after = start_weights(tmp_path), weights(RUNS / "tiny/checkpoints/last.ckpt")
    assert all(torch.equal(before[name], after[name]) == (".blocks.0." in name) for name in before)


def test_stages_that_leave_nothing_to_train_at_first_are_refused(llm_train, tiny, tmp_path):
    stages = [{"epoch": 1, "patterns": ["*"]}]
    done = llm_train("fit", "-c", freezing(tiny, tmp_path, ("GradualUnfreezing", {"stages": stages})))
    assert done.code == 1
    assert "GradualUnfreezing: everything is frozen" in done.err.splitlines()[-1]
    for stages, message in (([], "stages is empty"), ([Stage(epoch=-1, layers=0)], "must not be negative")):
        with pytest.raises(MisconfigurationException, match=message):
            GradualUnfreezing(stages)


def test_gradual_unfreezing_says_what_ddp_needs():
    plain, patient = (SimpleNamespace(strategy=s) for s in (DDPStrategy(), DDPStrategy(find_unused_parameters=True)))
    assert not private_names.takes_unused_parameters(plain)
    assert private_names.takes_unused_parameters(patient)
    with pytest.raises(MisconfigurationException, match=r"trainer\.strategy to ddp_find_unused_parameters_true"):
        GradualUnfreezing([Stage(layers=0, epoch=1)]).setup(plain, decoder(), "fit")


def test_each_layer_learns_slower_than_the_one_above(bert):
    LayerwiseRates(decay=0.5).setup(None, bert, "fit")
    shares = bert.learning_rate_shares
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
    with pytest.raises(MisconfigurationException, match=r"decay must be in \(0, 1\], got 1.5"):
        LayerwiseRates(decay=1.5)


# --- adapters --------------------------------------------------------------------------------------------------------


def test_lora_trains_adapters_alone_and_exports_a_plain_model(llm_train, tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    done = llm_train("fit", "-c", freezing(tiny, tmp_path, ("LoRA", {"rank": 2})))
    assert done.code == 0, done.err
    before, after = start_weights(tmp_path), weights(RUNS / "tiny/checkpoints/best.ckpt")
    for name, weight in before.items():
        adapted = name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
        assert torch.equal(weight, after[adapted if adapted in after else name])
    adapters = {name for name in after if "lora_" in name}
    assert len(adapters) == 2 * 4 * 2  # two matrices for four layers in each of two blocks
    assert in_optimizer(RUNS / "tiny/checkpoints/last.ckpt") == (adapters, adapters)

    module = PretrainModule(vocab_size=257, block_size=16, pretrained=str(tmp_path / "start")).eval()
    module.on_load_checkpoint(torch.load(RUNS / "tiny/checkpoints/best.ckpt", weights_only=True))
    module.load_state_dict(after)
    plain = AutoModelForCausalLM.from_pretrained(RUNS / "tiny/model").eval()
    assert not [name for name, _ in plain.named_parameters() if "lora" in name]
    ids = torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, module(ids), rtol=1e-4, atol=1e-5)
    start = PretrainModule(vocab_size=257, block_size=16, pretrained=str(tmp_path / "start")).eval()
    assert (module(ids) - start(ids)).abs().max() > 1e-3

    assert llm_train("generate", "--run", RUNS / "tiny", "--prompt", "a", "--max_new_tokens", "5").code == 0
    validated = llm_train("validate", "-c", RUNS / "tiny/config.yaml", "--ckpt_path", "best")
    assert validated.code == 0, validated.err


def test_a_killed_lora_run_resumes_to_the_same_weights(llm_train, forked, tiny, tmp_path):
    config = freezing(tiny, tmp_path, ("LoRA", {"rank": 2, "dropout": 0.2}))
    llm_train("fit", "-c", config, "--run.name", "whole")
    last = RUNS / "killed/checkpoints/last.ckpt"
    assert forked("fit", "-c", config, "--run.name", "killed", meanwhile=kill_when(last.is_file)) == -signal.SIGKILL
    resumed = llm_train("fit", "-c", config, "--run.name", "killed", "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert_same_weights(RUNS / "whole/checkpoints/last.ckpt", last)


def test_adapters_can_be_chosen_and_a_new_head_trained_beside_them(bert):
    import copy

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
    with pytest.raises(MisconfigurationException, match="rank must be at least 1"):
        LoRA(rank=0)


def test_merging_folds_the_adapters_in_and_out_again():
    model = decoder(n_layer=1)
    LoRA(rank=2).setup(None, model, "fit")
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


# --- the study -------------------------------------------------------------------------------------------------------

STUDIES = Path(__file__).parents[2] / "experiments/gpt_neo_style/studies"
ARMS = {
    "nothing": {"w", "h.0", "h.1", "h.2", "h.3", "ln_f"},
    "embeddings": {"h.0", "h.1", "h.2", "h.3", "ln_f"},
    "first_quarter": {"h.1", "h.2", "h.3", "ln_f"},
    "first_half": {"h.2", "h.3", "ln_f"},
    "first_three_quarters": {"h.3", "ln_f"},
    "all_but_last_block": {"h.3"},
    "lora": {"h.0", "h.1", "h.2", "h.3"},
}


@pytest.mark.parametrize("arm", ARMS)
def test_the_arms_of_the_study_train_what_their_names_say(arm):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = Wrapped(GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=8, n_embd=8, n_layer=4, n_head=2)))
    trainer = yaml.safe_load((STUDIES / f"freeze/{arm}.yaml").read_text())["trainer"]
    for callback in trainer.get("callbacks+", []):
        import_class(callback["class_path"])(**callback["init_args"]).setup(None, model, "fit")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {re.match(r"model\.transformer\.(w|h\.\d|ln_f)", name)[1] for name in trained} == ARMS[arm]
    assert all(("lora_" in name) == (arm == "lora") for name in trained)


def test_every_arm_is_in_the_study():
    study = yaml.safe_load((STUDIES / "freeze_weights.yaml").read_text())
    assert [Path(value).stem for value in study["parameters"]["config"]["values"]] == list(ARMS)


def test_arms_add_their_callbacks_to_those_of_an_experiment(llm_train, tiny):
    arms = [f"--config={STUDIES}/freeze/{arm}.yaml" for arm in ("gradual", "lora")]
    plain, parsed = (llm_train("fit", "-c", tiny(), *more, "--print_config") for more in ([], arms))
    assert parsed.code == 0, parsed.err
    before, after = (yaml.safe_load(done.out)["trainer"]["callbacks"] for done in (plain, parsed))
    assert after[:-2] == before
    assert [callback["class_path"] for callback in after[-2:]] == [CALLBACKS["GradualUnfreezing"], CALLBACKS["LoRA"]]
    assert [stage["epoch"] for stage in after[-2]["init_args"]["stages"]] == [2, 4, 6]
