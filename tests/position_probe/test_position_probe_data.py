"""Position matrices from each kind of source, their controls, and pairs of positions with held-out blocks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import save_file

from datamodules.position_probe.data import EXTRAPOLATION, INTERPOLATION, SEEN, PositionProbeDataModule, hold_out_blocks
from datamodules.position_probe.position_matrices import PositionMatrix, controls, load_positions, sinusoids
from datamodules.sources import ListText
from lightning_modules.common.pretrained import model_folder

ROWS = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(11, 8, generator=torch.Generator().manual_seed(1))
NAMES = {
    "gpt2": ("transformer.wpe.weight", "transformer.wte.weight"),
    "gpt_neo": ("wpe.weight", "wte.weight"),
    "bert": ("bert.embeddings.position_embeddings.weight", "bert.embeddings.word_embeddings.weight"),
    "roberta": ("embeddings.position_embeddings.weight", "embeddings.word_embeddings.weight"),
}


def save_model(folder: Path, model_type: str = "gpt2", rows: torch.Tensor = ROWS, **config: object) -> str:
    """Write the folder of a model with its two embedding tables and a further tensor; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type} | config))
    names = NAMES.get(model_type, ("a", "b"))
    save_file({names[0]: rows, "other": torch.zeros(3), names[1]: TOKENS}, folder / "model.safetensors")
    return str(folder)


def save_array(file: Path, array: np.ndarray) -> str:
    np.save(file, array)
    return str(file)


# Matrices


def test_sinusoids_are_the_papers():
    made = sinusoids(5, 6)
    for position in range(5):
        for i in range(3):
            angle = position / 10_000 ** (2 * i / 6)
            assert made[position, 2 * i : 2 * i + 2] == pytest.approx([np.sin(angle), np.cos(angle)])
    assert sinusoids(4, 5).shape == (4, 5)


@pytest.mark.parametrize("model_type", NAMES)
def test_the_tables_of_a_model_are_read_from_its_folder_or_its_run(tmp_path, model_type):
    settings = {"initializer_range": 0.5} | ({"pad_token_id": 1} if model_type == "roberta" else {})
    save_model(tmp_path / "runs/some_topic/run/model", model_type, **settings)
    for source in ("runs/some_topic/run", str(tmp_path / "runs/some_topic/run/model")):
        matrix = load_positions(source)
        first = 2 if model_type == "roberta" else 0  # its first positions are for padding
        assert matrix.rows == pytest.approx(ROWS[first:].numpy())
        assert matrix.tokens == pytest.approx(TOKENS.numpy())
        assert (matrix.initial_std, matrix.model_type) == (0.5, model_type)


def test_the_model_of_a_run_comes_first_as_for_a_base(tmp_path):
    save_model(tmp_path / "run", rows=ROWS + 1)
    inner = save_model(tmp_path / "run/model")
    source = str(tmp_path / "run")
    assert load_positions(source).model == inner == str(model_folder(source))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions_are_read_too(tmp_path, dtype):
    rows = load_positions(save_model(tmp_path / "m", rows=ROWS.to(dtype))).rows
    assert rows == pytest.approx(ROWS.to(dtype).double().numpy())


def test_a_model_in_several_files(tmp_path):
    folder = Path(save_model(tmp_path / "m"))
    (folder / "model.safetensors").unlink()
    save_file({"wpe.weight": ROWS}, folder / "a.safetensors")
    save_file({"wte.weight": TOKENS}, folder / "b.safetensors")
    index = {"weight_map": {"wte.weight": "b.safetensors", "wpe.weight": "a.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    matrix = load_positions(str(folder))
    assert matrix.rows == pytest.approx(ROWS.numpy())
    assert matrix.tokens == pytest.approx(TOKENS.numpy())


def test_an_array_and_its_first_positions(tmp_path):
    source = save_array(tmp_path / "rows.npy", ROWS.numpy().astype(np.float16))
    assert load_positions(source).rows.shape == (24, 8)
    kept = load_positions(source, n_positions=10)
    assert kept.rows == pytest.approx(ROWS[:10].numpy(), abs=2e-3)
    assert kept.tokens is None


def test_controls_keep_the_shape_and_the_statistics_of_the_matrix():
    matrix = PositionMatrix(rows=ROWS.double().numpy() * np.arange(1, 9) + 7, initial_std=0.3)
    tables = controls(matrix, seed=0)
    assert set(tables) == {"shuffled", "gaussian", "sinusoids", "initialization"}
    assert sorted(map(tuple, tables["shuffled"])) == sorted(map(tuple, matrix.rows))
    assert not np.array_equal(tables["shuffled"], matrix.rows)
    many = controls(PositionMatrix(rows=np.tile(matrix.rows, (200, 1)), initial_std=0.3), seed=0)
    assert many["gaussian"].mean(axis=0) == pytest.approx(matrix.rows.mean(axis=0), abs=0.5)
    assert many["gaussian"].std(axis=0) == pytest.approx(matrix.rows.std(axis=0), rel=0.1)
    assert many["initialization"].std() == pytest.approx(0.3, rel=0.05)


def no_folder(path: Path) -> str:
    path.mkdir()
    return str(path)


def damaged(path: Path, content: bytes, name: str = "model.safetensors") -> str:
    folder = Path(save_model(path))
    if name == "model.safetensors.index.json":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    return str(folder)


def text_file(path: Path) -> str:
    path.write_text("no numbers")
    return str(path)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda p: save_model(p / "m", "llama"), {}, "a llama model, has no table of absolute positions"),
        (lambda p: save_model(p / "m", "bert", position_embedding_type="relative_key"), {}, "has no table of absolute"),
        (lambda p: "runs/decoder_pretrain/offline", {}, "fit -c decoder_pretrain/offline` makes one"),
        (lambda p: "./nowhere", {}, "does not exist .*give the folder of a model"),
        (lambda p: no_folder(p / "empty"), {}, "neither a config.json nor a model/ with one"),
        (lambda p: "someone/some-model", {}, "the Hugging Face hub gave no model of that name"),
        (lambda p: "runs/lost", {}, "runs/lost does not exist"),
        (lambda p: "what-is-this", {}, "the Hugging Face hub gave no model of that name"),
        (lambda p: "nowhere.npy", {}, "nowhere.npy does not exist"),
        (lambda p: text_file(p / "a.npy"), {}, "could not be read as an array of numbers"),
        (lambda p: save_array(p / "a.npy", np.array([{}, 1])), {}, "could not be read as an array of numbers"),
        (lambda p: save_array(p / "a.npy", np.ones(9)), {}, r"float64 of the shape \(9,\): a position matrix has"),
        (lambda p: save_array(p / "a.npy", np.ones((9, 4), int)), {}, "int64 of the shape"),
        (lambda p: save_array(p / "a.npy", np.ones((9, 4))), {}, "all rows of .* are the same"),
        (lambda p: save_array(p / "a.npy", np.eye(9, 2)), {}, "have 2 components"),
        (lambda p: save_array(p / "a.npy", np.diag([1, 1, np.nan, 1])), {}, "row 2 of .* not finite"),
        (lambda p: save_array(p / "a.npy", np.eye(9)), {"n_positions": 10}, "n_positions is 10, but .* has 9"),
        (lambda p: "sinusoids", {}, "data.n_positions is needed for data.source sinusoids"),
        (lambda p: damaged(p / "m", b"12345"), {}, "is damaged or no safetensors file"),
        (lambda p: damaged(p / "m", b"\x04" + bytes(7) + b"[1]]"), {}, "is damaged or no safetensors file"),
        (lambda p: damaged(p / "m", b"\x03" + bytes(7) + b"[1]"), {}, "is damaged or no safetensors file"),
        (lambda p: damaged(p / "m", b"\x02" + bytes(7) + b"{}"), {}, "has no tensor wpe.weight"),
        (
            lambda p: damaged(p / "m", b'{"model_type": ', "config.json"),
            {},
            r"config\.json is damaged \(Expecting value",
        ),
        (lambda p: damaged(p / "m", b"\xff{}", "config.json"), {}, r"config\.json is damaged"),
        (lambda p: damaged(p / "m", b"[]", "config.json"), {}, r"config\.json is damaged \(it holds no dict\)"),
        (lambda p: damaged(p / "m", b"{", "model.safetensors.index.json"), {}, r"index\.json is damaged"),
        (lambda p: damaged(p / "m", b"{}", "model.safetensors.index.json"), {}, r"no model\.safetensors with wpe"),
        (
            lambda p: damaged(p / "m", b'{"weight_map": [1]}', "model.safetensors.index.json"),
            {},
            r"index\.json is damaged \(weight_map is \[1\]\)",
        ),
        (
            lambda p: damaged(p / "m", b'{"weight_map": {"wpe.weight": 1}}', "model.safetensors.index.json"),
            {},
            r"index\.json is damaged \(wpe\.weight is 1\)",
        ),
        (
            lambda p: damaged(p / "m", b'{"model_type": ["gpt2"]}', "config.json"),
            {},
            r"config\.json is damaged \(model_type is \['gpt2'\]\)",
        ),
        (lambda p: save_model(p / "m", initializer_range="a"), {}, r"damaged \(initializer_range is 'a'\)"),
        (lambda p: save_model(p / "m", "roberta", pad_token_id="a"), {}, r"damaged \(pad_token_id is 'a'\)"),
    ],
)
def test_a_source_without_a_position_matrix_is_refused_in_one_line(tmp_path, make, settings, message):
    with pytest.raises(MisconfigurationException, match=message) as caught:
        load_positions(make(tmp_path), **settings)
    assert "\n" not in str(caught.value)


def test_a_model_without_its_weights(tmp_path):
    folder = Path(save_model(tmp_path / "m"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(MisconfigurationException, match=r"no model\.safetensors with wpe.weight: save the model"):
        load_positions(str(folder))


# Pairs


def data(**settings: object) -> PositionProbeDataModule:
    module = PositionProbeDataModule(**{"source": "sinusoids", "n_positions": 50, "n_embd": 8} | settings)
    module.setup("fit")
    return module


def test_every_inner_block_is_held_out_once_with_training_blocks_on_both_sides():
    held_out = hold_out_blocks(53, 10, 4, np.random.default_rng(0))
    *interpolation, extrapolation = held_out
    block = np.arange(53) * 10 // 53
    assert np.sum(interpolation, axis=0).tolist() == [int(0 < b < 9) for b in block]
    for fold in held_out:
        assert all(len(set(fold[block == b])) == 1 for b in range(10))  # blocks stay whole
    for fold in interpolation:
        assert fold.sum() > 2
        assert not fold[[0, -1]].any()
    assert extrapolation.tolist() == [b >= 8 for b in block]


def batches(loader: torch.utils.data.DataLoader) -> dict[str, torch.Tensor]:
    seen = list(loader)
    return {
        "pairs": torch.cat([batch["pairs"] for batch in seen]),
        "side": torch.cat([batch["side"] for batch in seen], dim=1),
    }


def test_no_fold_trains_on_a_position_it_is_tested_on():
    module = data()
    train = module.train_pairs[torch.arange(len(module.train_pairs))]
    val = batches(module.val_dataloader())
    assert len(batches(module.train_dataloader())["pairs"]) == len(module.train_pairs) // 512 * 512
    for fold, held_out in enumerate(module.held_out):
        trained = train["pairs"][train["side"][fold] == SEEN]
        assert not held_out[trained].any()
        for side in (INTERPOLATION, EXTRAPOLATION):
            tested = val["pairs"][val["side"][fold] == side]
            assert held_out[tested].all()
            assert (len(tested) > 0) == ((side == EXTRAPOLATION) == (fold == len(module.held_out) - 1))
        new = val["pairs"][val["side"][fold] == SEEN]
        assert len(new) > 0
        assert not held_out[new].any()
        known = {tuple(pair) for pair in trained.tolist()} | {tuple(pair) for pair in trained.flip(1).tolist()}
        assert known.isdisjoint(map(tuple, new.tolist()))  # neither as it is nor the other way round
    for pairs in (train["pairs"], val["pairs"]):
        assert (pairs[:, 0] != pairs[:, 1]).all()
        assert len({tuple(pair) for pair in pairs.tolist()}) == len(pairs)


def test_tables_and_labels():
    module = data(source="gaussian", seed=3)
    assert module.cases == ["real", "random_labels", "shuffled", "sinusoids", "initialization"]
    assert module.rows.shape == (5, 50, 8)
    assert torch.equal(module.rows[0], module.rows[1])
    assert module.labels[0].tolist() == module.labels[2].tolist() == list(range(50))
    assert sorted(module.labels[1].tolist()) == list(range(50)) != module.labels[1].tolist()
    assert torch.equal(data(source="gaussian", seed=3).rows, module.rows)
    assert not torch.equal(data(source="gaussian", seed=4).rows, module.rows)


def test_a_sample_of_very_many_pairs_is_tested():
    module = data(n_positions=700, batch_size=4096)
    assert len(module.val_pairs) == 2**16
    side = batches(module.val_dataloader())["side"]
    assert ((side == INTERPOLATION).sum(dim=1)[:-1] > 1000).all()
    assert (side == EXTRAPOLATION).sum() > 1000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_positions": 19}, "has 19 positions, too few for data.n_blocks 10 .* at least 20"),
        ({"n_blocks": 5}, "data.n_blocks is 5 and data.n_folds 4"),
    ],
)
def test_impossible_splits_are_refused_in_one_line(settings, message):
    with pytest.raises(MisconfigurationException, match=message) as caught:
        data(**settings)
    assert "\n" not in str(caught.value)


def test_text_windows(tmp_path, monkeypatch):
    module = data(source=save_model(tmp_path / "m"), n_positions=None, n_blocks=6, text=ListText(["ab"]))
    monkeypatch.setattr("datamodules.position_probe.data.load_tokenizer", lambda name: name)
    monkeypatch.setattr(
        "datamodules.position_probe.data.encode",
        lambda tokenizer, texts: [np.array([*text.encode()]) for text in texts],
    )
    with pytest.raises(MisconfigurationException, match=r"data\.text has 2 tokens, fewer than the 6 of one window"):
        module.text_windows()
    module.text = ListText(["abcd", "efghijklmnop"])
    assert module.text_windows().tolist() == [[*b"abcdef"], [*b"ghijkl"]]  # the rest is shorter than a window
    module.text = ListText(["a" * 500, "not read: the windows are full"])
    assert module.text_windows().tolist() == [[*b"aaaaaa"]] * 64
    module.text = None
    assert module.text_windows() is None
