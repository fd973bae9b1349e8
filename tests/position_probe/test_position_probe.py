"""The probes one by one and in stacks, their measures, and the results on sinusoids and on rows without order."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forks
import numpy as np
import pytest
import torch
import yaml
from helpers import assert_same_weights, with_settings
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from shared_runs import own_world, run_command

from datamodules.position_probe import PositionProbeDataModule
from datamodules.position_probe.position_matrices import load_positions
from lightning_modules.position_probe import PositionReport, ShiftedPerplexity, WangChenModule
from lightning_modules.position_probe.measures import ProbeMeasures
from lightning_modules.position_probe.probes import ORDER, PROBES, TARGETS, standardized, targets_of
from lightning_modules.position_probe.shifted_perplexity import perplexity, shuffle_positions
from lightning_modules.runtime.learning_curve import read_metric

ROOT = Path(__file__).parents[2]

G, T, D, K, W = 3, 7, 5, len(TARGETS), 2
FIRST, SECOND = torch.tensor([0, 6, 3]), torch.tensor([4, 2, 3])


# Probes


def filled(kind: str) -> torch.nn.Module:
    probes = PROBES[kind](G, D, K, W)
    for parameter in probes.parameters():
        torch.nn.init.normal_(parameter)
    return probes.requires_grad_(False)


def by_hand(probes: torch.nn.Module, kind: str, x: torch.Tensor, y: torch.Tensor, g: int, k: int) -> torch.Tensor:
    bias = probes.bias.view(G, K)[g, k]
    units = slice(k * W, (k + 1) * W)
    if kind == "mlp":
        hidden = x @ probes.first[g, :, units] + y @ probes.second[g, :, units]
        return torch.relu(hidden + probes.hidden_bias.view(G, -1)[g, units]) @ probes.readout[g, k] + bias
    value = x @ probes.first[g, :, k] + y @ probes.second[g, :, k] + bias
    if kind == "bilinear":
        value = value + (x @ probes.first_factor[g, :, units]) @ (y @ probes.second_factor[g, :, units])
    return value


@pytest.mark.parametrize("kind", ["linear", "bilinear", "mlp"])
def test_a_stack_of_probes_is_the_formula_for_each(kind):
    probes, rows = filled(kind), torch.randn(G, T, D)
    outputs = probes(rows, FIRST, SECOND)
    assert outputs.shape == (G, len(FIRST), K)
    for g in range(G):
        for b, (i, j) in enumerate(zip(FIRST, SECOND, strict=True)):
            for k in range(K):
                expected = by_hand(probes, kind, rows[g, i], rows[g, j], g, k)
                assert outputs[g, b, k].item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("kind", ["linear", "bilinear", "mlp"])
def test_the_probes_of_a_stack_share_nothing(kind):
    probes = filled(kind).requires_grad_(True)
    probes(torch.randn(G, T, D), FIRST, SECOND)[1, :, 2].sum().backward()
    for name, parameter in probes.named_parameters():
        gradient = parameter.grad  # (G, D, K ...) of what reads rows; of the rest each table has K parts
        reads_rows = gradient.dim() == 3 and gradient.size(1) == D
        by_table = gradient.view(G, D, K, -1).transpose(1, 2) if reads_rows else gradient.view(G, K, -1)
        reached = (by_table != 0).flatten(2).any(dim=2)  # (G, K)
        assert reached.nonzero().tolist() == [[1, 2]], name


def test_targets_of_a_pair():
    assert targets_of(torch.tensor([3, 5]), torch.tensor([7, 1])).tolist() == [[3, 1, 4, 4], [5, 0, -4, 4]]


def test_rows_are_standardized_by_those_that_the_probe_trains_on():
    rows = torch.randn(T, D) * torch.tensor([1.0, 50, 1e-3, 7, 0]) + 3
    seen = torch.tensor([True] * 5 + [False] * 2)
    x = standardized(rows, seen)
    assert x[seen].mean(dim=0) == pytest.approx(torch.zeros(D), abs=1e-5)
    deviation = x[seen].std(dim=0, correction=0)
    assert deviation[:4] == pytest.approx(deviation[0].expand(4), rel=1e-4)
    assert (x[:, 4] == 0).all()  # a constant component
    assert torch.linalg.matrix_norm(x[seen], 2).item() == pytest.approx(5**0.5, rel=1e-5)
    far = rows.clone()
    far[-1] = 1e3
    assert torch.equal(standardized(far, seen)[seen], x[seen])


# Measures


def test_measures_by_hand_and_over_two_processes():
    C, F, B, N = 2, 2, 12, 9  # noqa: N806
    draw = torch.Generator().manual_seed(0)
    pairs = torch.stack([torch.randperm(N, generator=draw)[:2] for _ in range(B)])
    side = torch.randint(-1, 3, (F, B), generator=draw)
    targets = targets_of(pairs[:, 0], pairs[:, 1]).expand(C, 1, B, K)
    predictions = targets + torch.randn(C, F, B, K, generator=draw)
    predictions[..., ORDER] -= 0.5  # logits
    losses = torch.rand(C, F, B, K, generator=draw)

    whole = ProbeMeasures(C, F, N)
    whole.update(pairs, side, losses, predictions, targets)
    found = whole.compute()
    for s in range(3):
        members = [(f, b) for f in range(F) for b in range(B) if side[f, b] == s]
        for c in range(C):
            for k in range(K):
                p, t = (
                    torch.stack([x[c, f, b, k] for f, b in members]) for x in (predictions, targets.expand(C, F, B, K))
                )
                if k == ORDER:
                    right = ((p > 0) == (t == 1)).double().mean().item()
                    assert found["score"][s, c, k].item() == pytest.approx(right)
                    assert found["error"][s, c, k].item() == pytest.approx(1 - right)
                    continue
                assert found["error"][s, c, k].item() == pytest.approx((p - t).abs().mean().item(), rel=1e-4)
                folds = torch.tensor([f for f, _ in members])
                variation = sum(((t[folds == f] - t[folds == f].mean()) ** 2).sum() for f in set(folds.tolist()))
                explained = 1 - ((p - t) ** 2).sum().item() / float(variation)
                assert found["score"][s, c, k].item() == pytest.approx(max(0, explained), abs=1e-4)
    interpolation = torch.stack([losses[0, f, b] for f in range(F) for b in range(B) if side[f, b] == 1])
    assert found["loss"].item() == pytest.approx(interpolation.mean().item(), rel=1e-5)
    apart = (pairs[:, 0] - pairs[:, 1]).abs()
    b = next(b for b in range(B) if (side[:, b] == 1).any())
    same = [(g, e) for g in range(F) for e in range(B) if side[g, e] == 1 and apart[e] == apart[b]]
    expected = np.mean([float((predictions - targets)[1, g, e, 0].abs()) for g, e in same])
    assert found["error_by_distance"][1, apart[b], 1, 0].item() == pytest.approx(expected, rel=1e-5)
    assert found["count_by_distance"][1, apart[b]].item() == len(same)

    halves = ProbeMeasures(C, F, N)
    for part in (slice(0, 5), slice(5, None)):
        halves.update(pairs[part], side[:, part], losses[:, :, part], predictions[:, :, part], targets[:, :, part])
    for name, value in halves.compute().items():
        torch.testing.assert_close(value, found[name], equal_nan=True)
    assert all(reduction is torch.sum or "sum" in reduction.__name__ for reduction in whole._reductions.values())


# The command


def write(folder: Path, name: str = "probes", **settings: object) -> Path:
    """Write the YAML of a run of seconds on sinusoids; settings replace values by their key path."""
    names = ("runtime.reproducible.ReproducibleSteps", "runtime.stop.GracefulStop", "runtime.checkpoint.RunCheckpoint")
    config = {
        "seed_everything": 1,
        "model": {
            "class_path": "lightning_modules.position_probe.PositionProbeModule",
            "init_args": {"probe": "linear"},
        },
        "data": {
            "class_path": "datamodules.position_probe.PositionProbeDataModule",
            "init_args": {"source": "sinusoids", "n_positions": 64, "n_embd": 32, "batch_size": 256},
        },
        "optimizer": {
            "class_path": "torch.optim.SGD",
            "init_args": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 3e-3},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 80,
            "max_epochs": -1,
            "val_check_interval": 40,
            "check_val_every_n_epoch": None,
            "callbacks": [{"class_path": f"lightning_modules.{name}"} for name in names],
        },
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(with_settings(config, settings), sort_keys=False))
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run with the reports; tests only read it."""
    folder = tmp_path_factory.mktemp("run")
    with own_world(folder):
        config = write(folder)
        reports = ["PositionReport", "ShiftedPerplexity"]
        added = [{"class_path": f"lightning_modules.position_probe.{name}"} for name in reports]
        callbacks = yaml.safe_load(config.read_text())["trainer"]["callbacks"]
        done = run_command("fit", "-c", write(folder, trainer__callbacks=callbacks[:2] + added + callbacks[2:]))
    assert done.code == 0, done.err
    return folder / "runs/position_probe/probes"


def last(run: Path, metric: str) -> float:
    return read_metric(run / "metrics.csv", metric)[1][-1]


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


@pytest.mark.slow
def test_position_and_order_are_found_in_sinusoids_and_not_in_gaussian_rows(run):
    inside = "val/interpolation"
    assert last(run, f"{inside}/position_explained") > 0.95
    assert last(run, f"{inside}/order_accuracy") > 0.97
    assert last(run, f"{inside}/signed_distance_explained") > 0.95
    assert last(run, f"{inside}/distance_explained") < 0.3  # no linear probe can find it
    for control in ("gaussian", "shuffled", "random_labels", "initialization"):
        assert last(run, f"val/{control}/interpolation/position_explained") < 0.2
        assert last(run, f"val/{control}/interpolation/order_accuracy") == pytest.approx(0.5, abs=0.15)
    selectivity = last(run, f"{inside}/order_accuracy") - last(run, "val/random_labels/interpolation/order_accuracy")
    assert last(run, f"{inside}/order_selectivity") == pytest.approx(selectivity, abs=1e-5)
    assert last(run, "geometry/toeplitz_fit") == pytest.approx(1, abs=1e-4)


def test_tables_agree_with_the_metrics(run):
    found = {(row["case"], row["side"], row["target"]): row for row in table(run / "probes.csv")}
    assert len(found) == 5 * 3 * 4  # sinusoids are no control of themselves
    order = found["real", "interpolation", "order"]
    selectivity = last(run, "val/interpolation/order_selectivity")
    assert float(order["selectivity"]) == pytest.approx(selectivity, abs=1e-4)
    assert {row["case"] for row in table(run / "components.csv")} == {"real", "shuffled", "gaussian", "initialization"}
    rows = table(run / "probes_by_distance.csv")
    by_distance = [row for row in rows if (row["case"], row["target"]) == ("real", "order")]
    pairs = [int(row["pairs"]) for row in by_distance]
    mistakes = np.average([float(row["error"]) for row in by_distance], weights=pairs)
    assert mistakes == pytest.approx(float(order["error"]), abs=1e-4)
    measured = {row["measure"]: row["real"] for row in table(run / "geometry.csv")}
    assert float(measured["effective_rank"]) == pytest.approx(last(run, "geometry/effective_rank"), rel=1e-4)
    with np.load(run / "positions.npz") as saved:
        assert saved["real"] == pytest.approx(load_positions("sinusoids", 64, 32).rows, abs=1e-6)


def test_figures_are_drawn(run):
    for name in ("similarity", "similarity_by_distance", "curve", "spectra", "probes_by_distance"):
        assert (run / f"figures/{name}.png").stat().st_size > 10_000
    assert not (run / "shifted_perplexity.csv").exists()  # sinusoids have no model


@pytest.mark.slow
def test_killed_and_resumed_is_the_same_to_the_bit(llm_train, forked, run, tmp_path):
    cut = write(tmp_path)
    checkpoint = Path("runs/position_probe/probes/checkpoints/last.ckpt")
    assert forked("fit", "-c", cut, prepare=lambda: forks.die_after_step(40)) != 0
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 40
    resumed = llm_train("fit", "-c", cut, "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert_same_weights(run / "checkpoints/last.ckpt", checkpoint)


def test_a_missing_matrix_is_one_line_and_leaves_no_folder(llm_train, tmp_path):
    failed = llm_train("fit", "-c", write(tmp_path, data__init_args__source="runs/decoder_pretrain/offline"))
    errors = [line for line in failed.err.splitlines() if line.startswith("error: ")]
    assert (failed.code, len(errors)) == (1, 1), failed.err
    assert "offline` makes one" in errors[0]
    assert "Traceback" not in failed.err
    assert not Path("runs").exists()


def test_a_file_that_is_no_matrix_is_named_as_a_file(llm_train, tmp_path):
    Path("text.txt").write_text("a text")
    failed = llm_train("fit", "-c", write(tmp_path, data__init_args__source="text.txt"))
    assert "data.source: text.txt is a file: give the folder of a model, a .npy, or a name on the hub" in failed.err


def test_a_test_of_data_without_a_test_split_names_another_command(llm_train, tmp_path):
    failed = llm_train("test", "-c", write(tmp_path))
    said = (
        "error: test: PositionProbeDataModule has no test_dataloader, and so nothing to test; use `llm-train validate"
    )
    assert (failed.code, failed.err.splitlines()[-1].startswith(said)) == (1, True), failed.err
    assert not Path("runs").exists()


def test_an_argument_out_of_range_is_refused_by_the_parser(llm_train, tmp_path):
    refused = llm_train("fit", "-c", write(tmp_path, model__init_args__width=0))
    assert refused.code == 2
    assert "model.width" in refused.err
    assert "0 does not conform to restriction v>0" in refused.err


# Wang and Chen's experiments

SMALL = ("--data.source=sinusoids", "--data.n_positions=60", "--data.n_embd=32", "--data.batch_size=256")


@pytest.mark.slow
def test_the_experiments_of_wang_and_chen(llm_train):
    recipe = ROOT / "experiments/position_probe/wang_chen.yaml"
    done = llm_train("fit", "-c", recipe, *SMALL, "--trainer.max_steps=2", "--trainer.limit_val_batches=1")
    assert done.code == 0, done.err
    run = Path("runs/position_probe/wang_chen")
    assert last(run, "train/real/position_error") < 1
    assert last(run, "train/real/order_error") < 0.12
    assert last(run, "train/shuffled/position_error") > 9
    assert last(run, "train/shuffled/order_error") > 0.2  # the pairs share positions, so it is less than one half
    logged = read_metric(run / "metrics.csv", "train/gaussian/order_error")[1]
    assert logged[0] != logged[1]  # other pairs and folds
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert state["repetitions"] == 2
    assert (state["sums"] / 2)[0, 1].item() == pytest.approx(last(run, "train/real/order_error"), abs=1e-5)
    following = done.err.splitlines()[-1].removeprefix("next    llm-train ")
    assert following == "fit -c position_probe/full --data.n_positions 60 --data.source sinusoids --data.n_embd 32"
    tried = llm_train(*following.split(), "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu")
    assert tried.code == 0, tried.err


def test_wang_chen_module_has_no_validation_and_no_test():
    module = WangChenModule()
    assert not is_overridden("validation_step", module)
    assert not is_overridden("test_step", module)


def test_wang_chen_module_refuses_several_processes():
    module = WangChenModule()
    module._trainer = SimpleNamespace(world_size=2)
    with pytest.raises(MisconfigurationException, match=r"this run has 2 processes, .* give --trainer\.devices 1$"):
        module.on_fit_start()


def test_wang_chen_module_proposes_to_probe_all_rows_of_a_model():
    module = WangChenModule()
    module.data = SimpleNamespace(matrix=SimpleNamespace(model="openai-community/gpt2", rows=[0] * 512))
    assert module.next_command("runs/position_probe/wang_chen") == "llm-train fit -c position_probe/full"


def test_the_errors_of_a_loaded_wang_chen_module_are_kept_in_a_further_fit():
    data = PositionProbeDataModule("sinusoids", n_positions=30, n_embd=4)
    data.setup("fit")
    checkpoint = {"state_dict": {"unused": torch.zeros(1), "sums": torch.ones(len(data.cases), 2).double()}}
    checkpoint |= {"hyper_parameters": {}, "module_class": "lightning_modules.position_probe.WangChenModule"}
    checkpoint["state_dict"]["repetitions"] = torch.tensor(3)
    module = WangChenModule.of_checkpoint(checkpoint)
    module.data = data
    module.setup("fit")
    assert module.repetitions == 3
    assert (module.sums == 1).all()


def test_pairs_too_few_for_their_folds():
    module = WangChenModule()
    module.data = PositionProbeDataModule("sinusoids", n_positions=30, n_embd=4)
    module.data.setup("fit")
    module.setup("fit")
    with pytest.raises(MisconfigurationException, match=r"model\.n_folds is 5, too many for 4 examples"):
        module.training_step({"pairs": torch.tensor([[0, 1], [2, 1], [3, 4], [5, 9]])}, 0)


def test_the_study_of_models_reads_no_text():
    study = yaml.safe_load((ROOT / "experiments/position_probe/studies/models.yaml").read_text())
    assert "--data.text=null" in study["command"]  # or whole models would be downloaded
    assert {"openai-community/gpt2", "sinusoids"} <= set(study["parameters"]["data.source"]["values"])


# Shifted starts


@pytest.fixture
def decoder() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=30, n_positions=24, n_embd=8, n_layer=1, n_head=2, attn_pdrop=0.0)
    model = GPT2LMHeadModel(config).eval()
    torch.nn.init.normal_(model.transformer.wpe.weight)
    return model


def test_perplexity_from_another_start_and_with_shuffled_positions(decoder):
    windows = torch.randint(30, (20, 6))  # more than one batch
    with torch.no_grad():
        logits = decoder(windows, position_ids=torch.arange(14, 20).expand(20, 6)).logits
    nats = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    assert perplexity(decoder, windows, start=14) == pytest.approx(nats.exp().item(), rel=1e-5)
    assert perplexity(decoder, windows, start=0) != pytest.approx(nats.exp().item(), rel=1e-5)

    before = decoder.transformer.wpe.weight.detach().clone()
    shuffle_positions(decoder, seed=0)
    after = decoder.transformer.wpe.weight.detach()
    assert not torch.equal(before, after)
    assert sorted(map(tuple, before.tolist())) == sorted(map(tuple, after.tolist()))


def test_the_reports_of_a_model_with_text(decoder, tmp_path):
    decoder.save_pretrained(tmp_path / "model")
    data = PositionProbeDataModule(str(tmp_path))
    data.setup("fit")
    windows = torch.randint(30, (5, 6))
    data.text_windows = lambda: windows
    trainer = SimpleNamespace(default_root_dir=tmp_path, fast_dev_run=False, loggers=[])
    module = SimpleNamespace(data=data, device="cpu")
    ShiftedPerplexity(n_starts=4).on_fit_start(trainer, module)
    rows = table(tmp_path / "shifted_perplexity.csv")
    assert [int(row["start"]) for row in rows] == [0, 6, 12, 18]
    assert [float(row["perplexity"]) for row in rows] == pytest.approx(
        [perplexity(decoder, windows, start) for start in (0, 6, 12, 18)], rel=1e-4
    )
    shuffle_positions(decoder, seed=data.seed)
    assert float(rows[1]["perplexity_shuffled"]) == pytest.approx(perplexity(decoder, windows, 6), rel=1e-4)
    assert (tmp_path / "figures/shifted_perplexity.png").stat().st_size > 5_000

    trainer.fast_dev_run = True  # measures the matrix, which has a token angle, and writes nothing
    (tmp_path / "shifted_perplexity.csv").unlink()
    report = PositionReport()
    for callback in (report, ShiftedPerplexity(n_starts=2)):
        callback.on_fit_start(trainer, module)
    assert 0 < report.measures["token_angle"] < 90
    trainer.fast_dev_run = False
    report.on_train_end(trainer, module)  # without a validation there is nothing to draw
    left = {file.name for file in tmp_path.rglob("*") if file.is_file()}
    assert not left & {"shifted_perplexity.csv", "geometry.csv", "probes.csv", "probes_by_distance.png"}

    (tmp_path / "model/config.json").write_text("{}")  # damaged after the matrix was read
    with pytest.raises(MisconfigurationException, match=r"^data\.source: .*could not load .*/model \(ValueError: "):
        ShiftedPerplexity().on_fit_start(trainer, module)
