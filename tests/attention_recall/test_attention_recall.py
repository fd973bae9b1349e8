"""Associative recall: the data, the network with parts left out, the metrics, and the run."""

import csv
import json
import math
import signal
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import forks
import numpy as np
import pytest
import torch
import yaml
from helpers import assert_same_weights
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from shared_runs import own_world, run_command
from torch import nn

from datamodules.attention_recall.data import (
    BLANK,
    EXAMPLES_AN_EPOCH,
    IGNORED,
    AttentionRecallDataModule,
    random_bits,
)
from lightning_modules.attention_recall.module import AttentionRecallModule, RecallMetrics, attention_entropy, by_name
from lightning_modules.attention_recall.network import AttentionNetwork, PartialBlock
from lightning_modules.attention_recall.report import AttentionReport, draw_attention, write_attention
from lightning_modules.metrics import next_token_loss
from lightning_modules.models.attention import recorded_weights
from lightning_modules.models.block import Block
from lightning_modules.models.decoder import DecoderConfig
from lightning_modules.runtime.drawing import DrawsAtTheEnd
from lightning_modules.runtime.learning_curve import read_metric

OFFLINE = Path(__file__).parents[2] / "experiments/attention_recall/offline.yaml"
RUNS = Path("runs/attention_recall")
PNG = b"\x89PNG"


# The data


@pytest.mark.parametrize(
    "task",
    [
        {},
        {"n_pairs": [1], "n_keys": 1, "n_values": 3, "n_queries": 1, "block_size": 3},
        {"n_pairs": [2, 3, 7], "n_keys": 7, "n_values": 9, "n_queries": 4, "block_size": 21},
        {"n_pairs": [5], "n_queries": 9, "block_size": 19},
    ],
)
def test_every_target_is_the_value_that_followed_the_key(task):
    data = AttentionRecallDataModule(**task)
    batch = data.examples("train")[torch.arange(200)]
    assert all(part.dtype == torch.int64 for part in batch.values())
    assert set(batch["n_pairs"].tolist()) == set(data.n_pairs)
    keys, values = range(1, 1 + data.n_keys), range(1 + data.n_keys, data.vocab_size)
    for ids, targets, distances, n_pairs in zip(*(part.tolist() for part in batch.values()), strict=True):
        assert len(ids) == data.block_size
        pairs = dict(zip(ids[: 2 * n_pairs : 2], ids[1 : 2 * n_pairs : 2], strict=True))
        assert len(pairs) == len(set(pairs.values())) == n_pairs  # none twice
        assert set(pairs) <= set(keys)
        assert set(pairs.values()) <= set(values)
        assert targets[: 2 * n_pairs] == [IGNORED] * 2 * n_pairs
        rest = range(2 * n_pairs, data.block_size)
        assert sum(ids[t] != BLANK for t in rest) == data.n_queries
        for t in rest:
            assert targets[t] == pairs.get(ids[t], IGNORED)
            assert distances[t] == (0 if ids[t] == BLANK else t - ids.index(ids[t]))


def test_keys_values_places_and_questions_are_all_equally_likely():
    data = AttentionRecallDataModule(n_pairs=[4], n_queries=8, block_size=24)
    batch = data.examples("train")[torch.arange(8192)]
    ids, asked = batch["input_ids"], batch["targets"] != IGNORED
    for column in (0, 6):  # the first and the last key, and their values
        for least, tokens in ((1, ids[:, column]), (17, ids[:, column + 1])):
            counts = torch.bincount(tokens - least, minlength=16)
            assert len(counts) == 16
            assert 400 < counts.min() <= counts.max() < 630  # 512 are expected; five standard deviations are 110
    assert (asked[:, 8:].float().mean(dim=0) - 0.5).abs().max() < 0.03
    pair = (torch.arange(24) - batch["distances"])[asked] // 2
    assert (torch.bincount(pair) / len(pair) - 0.25).abs().max() < 0.01
    lengths = AttentionRecallDataModule(n_pairs=[4, 8]).examples("train")[torch.arange(4096)]["n_pairs"]
    assert 1900 < (lengths == 8).sum() < 2200


def test_an_example_is_a_function_of_seed_split_and_index():
    def example(index, seed=3, split="train", task=AttentionRecallDataModule):
        return task(seed=seed).examples(split)[torch.tensor(index)]

    several = example([7, 2**40, 7])
    for name, part in several.items():
        assert torch.equal(part[0], part[2])
        assert torch.equal(part[1], example([2**40])[name][0])
    ids = several["input_ids"][0]
    for other in (example([8]), example([7], seed=4), example([7], split="val"), example([7], split="test")):
        assert not torch.equal(other["input_ids"][0], ids)


def test_the_random_numbers_are_splitmix64s():
    def scramble(z):
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    golden = 0x9E3779B97F4A7C15
    assert scramble(golden) == 0xE220A8397B1DCDAF  # the first number of the published generator's seed 0
    state = 0
    for part in (2**32 - 1, 2, 12345):
        state = scramble(((state ^ part) + golden) % 2**64)
    expected = [scramble((state + j * golden) % 2**64) for j in (1, 2, 3)]
    assert random_bits(2**32 - 1, 2, np.array([9, 12345]), 3)[1].tolist() == expected


def test_splits_share_no_example_and_none_comes_twice():
    data = AttentionRecallDataModule()
    splits = [data.examples(split)[torch.arange(3000)]["input_ids"] for split in ("train", "val", "test")]
    assert len(torch.cat(splits).unique(dim=0)) == 9000


def test_training_data_has_no_end_and_validation_stays():
    data = AttentionRecallDataModule(batch_size=8, val_examples=20)
    everything = data.examples("train")
    loader = data.train_dataloader()
    assert len(loader) == EXAMPLES_AN_EPOCH // 8
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        for number, batch in enumerate(islice(loader, 2)):
            start = epoch * EXAMPLES_AN_EPOCH + 8 * number
            expected = everything[torch.arange(start, start + 8)]
            assert all(torch.equal(batch[name], expected[name]) for name in expected)
    validation = [batch["input_ids"] for batch in data.val_dataloader()]
    assert [len(ids) for ids in validation] == [8, 8, 4]
    assert torch.equal(torch.cat(validation), data.examples("val")[torch.arange(20)]["input_ids"])
    assert not torch.equal(validation[0], next(iter(data.test_dataloader()))["input_ids"])


def test_tokens_have_names():
    data = AttentionRecallDataModule(n_pairs=[2], n_keys=2, n_values=3)
    assert data.token_names == ["·", "k1", "k2", "v1", "v2", "v3"]
    assert data.vocab_size == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_pairs": [4, 17], "block_size": 99}, r"17 pairs, more than the 16 of data.n_keys"),
        ({"n_values": 7}, r"8 pairs, more than the 7 of data.n_values"),
        ({"block_size": 31}, r"block_size is 31: 8 pairs .* and 16 queries .* need at least 32"),
        ({"n_pairs": []}, r"data.n_pairs is \[\]"),
    ],
)
def test_numbers_that_do_not_fit_each_other_cost_one_line(arguments, message):
    with pytest.raises(MisconfigurationException, match=message) as caught:
        AttentionRecallDataModule(**arguments)
    assert "\n" not in str(caught.value)


# The network


def network(**arguments):
    torch.manual_seed(0)
    return AttentionNetwork(**{"vocab_size": 12, "block_size": 8, "n_embd": 16, "n_head": 2} | arguments).eval()


IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def changed(position):
    ids = IDS.clone()
    ids[0, position] = 11
    return ids


def test_with_all_parts_it_is_the_block():
    torch.manual_seed(0)
    whole, partial = Block(DecoderConfig(5, n_head=2, n_embd=16)), PartialBlock(16, 2)
    partial.load_state_dict(whole.state_dict())
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(partial(x), whole(x))


def test_one_head_alone_is_the_formula():
    head = network(n_layer=1, n_head=1, without=["residual", "norm", "feed_forward"])
    x = head.token_embedding(IDS) + head.position_embedding(torch.arange(8))
    attention = head.blocks[0].attention
    query, key, value = (x @ w.T for w in attention.qkv.weight.chunk(3))
    scores = (query @ key.mT / math.sqrt(16)).masked_fill(torch.ones(8, 8).triu(1) > 0, -math.inf)
    expected = scores.softmax(-1) @ value @ attention.projection.weight.T @ head.output.weight.T
    torch.testing.assert_close(head(IDS), expected)


def test_without_the_scale_scores_are_the_dot_products():
    both = {name: network(without=without) for name, without in (("scaled", []), ("not", ["scale"]))}
    for name, factor in (("scaled", 1 / math.sqrt(8)), ("not", 1.0)):
        attention = both[name].blocks[0].attention
        x = torch.randn(1, 2, 16)
        query, key, _ = attention.qkv(x).view(1, 2, 3, 2, 8).permute(2, 0, 3, 1, 4)
        scores = factor * query @ key.mT
        torch.testing.assert_close(attention.weights(x)[..., 1, :], scores[..., 1, :].softmax(-1))


def test_without_the_mask_it_sees_the_future():
    for without, sees in (([], False), (["mask"], True)):
        net = network(without=without)
        assert (not torch.allclose(net(changed(7))[:, :7], net(IDS)[:, :7])) == sees


def test_without_positions_one_block_cannot_tell_which_value_followed_which_key():
    swapped = IDS[:, [0, 3, 2, 1, 4, 5, 6, 7]].clone()
    swapped[0, 1], swapped[0, 3] = 8, 7
    ids = swapped[:, [0, 3, 2, 1, 4, 5, 6, 7]]  # the two values the other way round
    for arguments, knows in (({"without": ["positions"]}, False), ({}, True), ({"n_layer": 2}, True)):
        net = network(**{"n_layer": 1} | arguments)
        assert (not torch.allclose(net(ids)[:, 4:], net(swapped)[:, 4:], atol=1e-5)) == knows


def test_without_the_residual_the_output_of_a_layer_replaces_its_input():
    for without, forgets in (([], False), (["residual"], True)):
        net = network(without=without, n_layer=1)
        nn.init.zeros_(net.blocks[0].attention.projection.weight)  # attention finds nothing
        assert torch.allclose(net(changed(7)), net(IDS)) == forgets


def test_without_norm_or_feed_forward_there_is_none():
    assert not any(isinstance(module, nn.LayerNorm) for module in network(without=["norm"]).modules())
    small = network(without=["feed_forward"])
    assert not any("feed_forward" in name for name, _ in small.named_parameters())
    assert any("feed_forward" in name for name, _ in network().named_parameters())


def test_queries_and_keys_start_with_variance_one_and_so_dot_products_with_their_length():
    net = network(n_embd=128, n_head=2, vocab_size=200, block_size=64)
    x = net.blocks[0].attention_norm(net.token_embedding(torch.arange(64)) + net.position_embedding.weight)
    query, key, _ = net.blocks[0].attention.qkv(x).view(64, 3, 2, 64).permute(1, 2, 0, 3)
    for part in (query, key):
        assert part.var().item() == pytest.approx(1, rel=0.1)
    assert (query @ key.mT).var().item() == pytest.approx(64, rel=0.15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_embd": 10, "n_head": 4}, "model: n_embd=10 is not divisible by n_head=4"),
        ({"without": ["head"]}, r"model: without=\['head'\]: there are scale, mask"),
        ({"vocab_size": None}, "model: vocab_size must be set"),
    ],
)
def test_sizes_that_do_not_fit_each_other_cost_one_line(arguments, message):
    with pytest.raises(MisconfigurationException, match=message) as caught:
        AttentionRecallModule(**{"vocab_size": 12, "block_size": 8} | arguments)
    assert "\n" not in str(caught.value)


# What solves the task


def made_by_hand(data):
    """Two layers of one head that recall, and nothing else: no norm, no feed-forward network, nothing learned.

    The stream has four parts: the token, the position, the token before, and the answer. The first layer looks one
    position back and copies the token there; the second looks for its own token among the tokens before.
    """
    V, T = data.vocab_size, data.block_size  # noqa: N806
    token, position, before, answer = (
        slice(start, start + n) for start, n in ((0, V), (V, T), (V + T, V), (2 * V + T, V))
    )
    C = 3 * V + T  # noqa: N806
    net = AttentionNetwork(V, T, n_layer=2, n_head=1, n_embd=C, without=["norm", "feed_forward"])
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    sharp = 100 * math.sqrt(C)
    with torch.no_grad():
        net.token_embedding.weight[:, token] = torch.eye(V)
        net.position_embedding.weight[:, position] = torch.eye(T)
        net.output.weight[:, answer] = torch.eye(V)
        one_back, same = torch.eye(T).roll(-1, dims=0), torch.eye(V)
        layers = [(position, one_back, position, before), (token, same, before, answer)]
        for block, (asks, looks_for, offers, into) in zip(net.blocks, layers, strict=True):
            query, key, value = block.attention.qkv.weight.chunk(3)
            query[: len(looks_for), asks] = sharp * looks_for
            key[: len(looks_for), offers] = torch.eye(len(looks_for))
            value[:V, token] = torch.eye(V)
            block.attention.projection.weight[into, :V] = torch.eye(V)
        net.output.weight[: 1 + data.n_keys] = 0  # only values are answers
    return net


def test_two_layers_of_attention_alone_solve_it():
    data = AttentionRecallDataModule()
    batch = data.examples("test")[torch.arange(64)]
    asked = batch["targets"] != IGNORED
    with recorded_weights(net := made_by_hand(data)) as weights, torch.no_grad():
        answers = net(batch["input_ids"]).argmax(dim=-1)
    assert torch.equal(answers[asked], batch["targets"][asked])
    assert weights[0][:, 0].diagonal(-1, -2, -1).min() > 0.99


@pytest.mark.parametrize(("n_layer", "least", "most"), [(1, 0.25, 0.45), (2, 0.98, 1.0)])
def test_two_blocks_learn_what_one_cannot(n_layer, least, most):
    data = AttentionRecallDataModule(batch_size=32, n_keys=6, n_values=6, n_pairs=[3], n_queries=6, block_size=12)
    torch.manual_seed(0)
    net = AttentionNetwork(data.vocab_size, data.block_size, n_layer, n_embd=48, without=["norm", "feed_forward"])
    optimizer = torch.optim.AdamW(net.parameters(), lr=6e-3)
    for batch in islice(data.train_dataloader(), 120):
        next_token_loss(net(batch["input_ids"]), batch["targets"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    test = data.examples("test")[torch.arange(1000)]
    asked = test["targets"] != IGNORED
    accuracy = (net(test["input_ids"]).argmax(dim=-1) == test["targets"])[asked].float().mean()
    assert least < accuracy <= most  # one block guesses among three values


# The metrics


def test_metrics_by_hand():
    metrics = RecallMetrics(block_size=6, n_layer=1, n_head=2)
    targets = torch.tensor([[IGNORED, IGNORED, IGNORED, IGNORED, 2, 3], [IGNORED, IGNORED, IGNORED, 1, IGNORED, 1]])
    logits = torch.zeros(2, 6, 4)  # ln 4 nats an answer
    logits[0, 4, 2] = logits[0, 5, 1] = logits[1, 3, 1] = logits[1, 5, 0] = 1e-3  # right, wrong, right, wrong
    distances = torch.tensor([[0, 0, 0, 0, 2, 5], [0, 0, 0, 3, 0, 5]])
    alike, one = torch.full((2, 6, 6), 1 / 6), torch.eye(6).expand(2, 6, 6)
    metrics.update(logits, [torch.stack([alike, one], dim=1)], targets, distances, n_pairs=torch.tensor([2, 1]))
    empty = torch.zeros(0, 6, dtype=torch.int64)  # a process with no share of the last batch
    metrics.update(torch.zeros(0, 6, 4), [torch.zeros(0, 2, 6, 6)], empty, empty, torch.zeros(0, dtype=torch.int64))
    found = {name: value.item() for name, value in by_name(metrics.compute()).items()}
    assert found == {
        "loss": pytest.approx(math.log(4), abs=1e-2),
        "accuracy": 0.5,
        "accuracy/pairs_1": 0.5,
        "accuracy/pairs_2": 0.5,
        "accuracy/distance_02_03": 1.0,
        "accuracy/distance_04_07": 0.0,
        "attention_entropy": pytest.approx(math.log(6) / 2),
        "attention_entropy/layer_0_head_0": pytest.approx(math.log(6)),
        "attention_entropy/layer_0_head_1": 0.0,
    }


def test_one_head_of_one_layer_has_its_entropy_too():
    metrics = RecallMetrics(block_size=2, n_layer=1, n_head=1)
    asks = torch.tensor([[IGNORED, 1]])
    weights = [torch.full((1, 1, 2, 2), 0.5)]
    metrics.update(torch.zeros(1, 2, 4), weights, asks, torch.tensor([[0, 1]]), n_pairs=torch.tensor([1]))
    found = by_name(metrics.compute())
    assert found["attention_entropy/layer_0_head_0"] == found["attention_entropy"] == pytest.approx(math.log(2))


@pytest.mark.parametrize(("without", "variance"), [([], 1), (["scale"], 64)])
def test_the_entropy_at_the_start_is_that_of_independent_normal_scores(without, variance):
    data = AttentionRecallDataModule(n_pairs=[8])
    batch = data.examples("val")[torch.arange(64)]
    torch.manual_seed(0)
    net = AttentionNetwork(data.vocab_size, data.block_size, n_head=1, n_embd=64, without=without)
    with recorded_weights(net) as weights:
        net(batch["input_ids"])
    entropy = attention_entropy(weights, batch["targets"]).mean().item()
    expected = [
        torch.special.entr((variance**0.5 * torch.randn(4000, n)).softmax(-1)).sum(-1).mean().item()
        for n in range(17, 33)
    ]
    assert entropy == pytest.approx(np.mean(expected), abs=0.2)
    if not without:
        assert entropy == pytest.approx(np.log(np.arange(17, 33)).mean() - 1 / 2, abs=0.2)


# The run


def write_config(folder: Path) -> Path:
    """Write the offline experiment, small enough for a second: twelve steps, a validation after every four."""
    config = yaml.safe_load(OFFLINE.read_text())
    config["model"]["init_args"] |= {"n_embd": 16, "n_head": 2}
    config["data"]["init_args"] |= {"n_pairs": [2, 4], "n_queries": 4, "block_size": 12, "val_examples": 32}
    config["trainer"] |= {"max_steps": 12, "val_check_interval": 4, "log_every_n_steps": 1}
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.fixture
def tiny(tmp_path):
    return write_config(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that was not interrupted, to read only."""
    folder = tmp_path_factory.mktemp("whole")
    with own_world(folder):
        done = run_command("fit", "-c", write_config(folder))
    assert done.code == 0, done.err
    return folder / RUNS / "tiny"


def test_a_run_leaves_its_metrics_maps_and_figures(whole):
    at_the_start = {}
    for metric in ("init/attention_entropy", "init/grad_norm", "init/grad_norm_query_key"):
        steps, (at_the_start[metric],) = read_metric(whole / "metrics.csv", metric)
        assert steps == [0]
    _, norms = read_metric(whole / "metrics.csv", "train/grad_norm")
    assert at_the_start["init/grad_norm"] == pytest.approx(norms[0])  # of the first step
    assert 0 < at_the_start["init/grad_norm_query_key"] < norms[0]
    assert 1 < at_the_start["init/attention_entropy"] < math.log(12)
    steps, accuracy = read_metric(whole / "metrics.csv", "val/accuracy")
    assert steps == [4, 8, 12]
    with (whole / "recall.csv").open(newline="") as file:
        rows = [{name: int(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert sum(row["asked"] for row in rows) == 32 * 4
    assert sum(row["correct"] for row in rows) / (32 * 4) == pytest.approx(accuracy[-1])

    content = json.loads((whole / "attention.json").read_text())
    weights = torch.tensor(content["weights"])
    assert weights.shape == (2, 2, 12, 12)  # layers, heads
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 2, 12), atol=1e-3, rtol=0)
    assert len(content["answers"]) == 4
    for query, answer in content["answers"]:
        assert content["tokens"][answer - 1] == content["tokens"][query]
        assert content["tokens"][answer].startswith("v")
    for figure in ("attention_maps", "accuracy_by_distance", "learning_curve"):
        assert (whole / "figures" / f"{figure}.png").read_bytes().startswith(PNG)


def test_a_checkpoint_is_evaluated_on_the_test_split(llm_train, whole):
    tested = llm_train("test", "-c", whole / "config.yaml", "--ckpt_path", whole / "checkpoints/last.ckpt")
    assert tested.code == 0, tested.err
    assert "test/accuracy" in tested.err


def test_a_run_without_a_validation_leaves_and_draws_nothing(tmp_path):
    sanity_check = SimpleNamespace(state=SimpleNamespace(fn="fit"), sanity_checking=True, default_root_dir=tmp_path)
    AttentionReport().on_validation_end(sanity_check, AttentionRecallModule(vocab_size=4, block_size=4))
    assert list(tmp_path.iterdir()) == []
    assert AttentionReport().draw(tmp_path) == []


def test_maps_of_many_heads_fit_on_a_page(tmp_path):
    data = AttentionRecallDataModule()
    weights = [torch.full((1, 16, 32, 32), 1 / 32)]
    write_attention(tmp_path / "attention.json", data.token_names, data.examples("val")[torch.arange(1)], weights)
    drawn = draw_attention(tmp_path / "attention.json", tmp_path / "maps.png").read_bytes()
    width, height = (int.from_bytes(drawn[start : start + 4]) for start in (16, 20))  # where PNG has them
    assert height < width < 15 * 120  # inches, dots per inch


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(llm_train, forked, tiny, whole, monkeypatch):
    monkeypatch.setattr(DrawsAtTheEnd, "on_train_end", lambda *args: None)  # the run `whole` draws
    assert forked("fit", "-c", tiny, prepare=lambda: forks.die_after_step(8)) == -signal.SIGKILL
    resumed = llm_train("fit", "-c", tiny, "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    run = RUNS / "tiny"
    assert_same_weights(whole / "checkpoints/last.ckpt", run / "checkpoints/last.ckpt")
    assert read_metric(run / "metrics.csv", "init/grad_norm") == read_metric(whole / "metrics.csv", "init/grad_norm")


def test_parts_are_left_out_by_a_flag():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(AttentionRecallModule, "model")
    assert parser.parse_args(["--model.without=[residual,norm]"]).model.without == ["residual", "norm"]
    with pytest.raises(ArgumentError, match="nose"):
        parser.parse_args(["--model.without=[nose]"])


@pytest.mark.parametrize(
    "flag", ["data.n_queries=0", "data.val_examples=0", "data.n_pairs=[0,2]", "model.n_layer=0", "model.n_head=0"]
)
def test_a_number_out_of_range_is_refused_by_the_parser(flag):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(AttentionRecallDataModule, "data")
    parser.add_class_arguments(AttentionRecallModule, "model")
    with pytest.raises(ArgumentError, match=flag.split("=")[0]) as refused:
        parser.parse_args([f"--{flag}"])
    assert "does not conform to restriction v>0" in str(refused.value)
