"""The topic through its functions and through the real command."""

import csv
import json
from pathlib import Path

import torch

from datamodules.majority import MajorityDataModule
from datamodules.majority.data import counts_of, margins_of
from lightning_modules.majority.network import MajorityNetwork

OFFLINE = Path(__file__).parents[2] / "experiments/majority/offline.yaml"


def test_counts_and_margins_of_a_sequence_by_hand():
    sequence = torch.tensor([[0, 2, 2, 1, 2, 1]])
    assert counts_of(sequence, 4).tolist() == [[1, 2, 3, 0]]
    assert margins_of(sequence, 4).tolist() == [1]


def test_every_sequence_has_one_most_frequent_token_which_is_its_label():
    examples = MajorityDataModule(seed=3).examples("train")
    assert examples.margins.min() > 0
    assert torch.equal(examples.input_ids.mode(dim=1).values, examples.labels)


def test_the_splits_differ_and_are_a_function_of_the_seed():
    ids = {seed: MajorityDataModule(seed=seed).examples("val").input_ids for seed in (0, 1)}
    assert torch.equal(ids[0], MajorityDataModule(seed=0).examples("val").input_ids)
    assert not torch.equal(ids[0], ids[1])
    assert not torch.equal(ids[0], MajorityDataModule(seed=0).examples("test").input_ids)


def test_the_order_of_the_tokens_does_not_matter():
    network = MajorityNetwork(vocab_size=5, n_classes=5, width=8)
    ids = torch.randint(5, (3, 7))
    torch.testing.assert_close(network(ids), network(ids.flip(dims=(1,))))


def test_a_run_learns_and_leaves_its_report(llm_train):
    done = llm_train("fit", "-c", OFFLINE)
    assert done.code == 0, done.err
    run = Path("runs/majority/offline")
    metrics = json.loads((run / "summary.json").read_text())["metrics"]
    assert metrics["val/accuracy"] > 0.6  # a guess has 1 in 8
    rows = list(csv.DictReader((run / "accuracy_by_margin.csv").open()))
    assert [int(row["margin"]) for row in rows] == sorted(int(row["margin"]) for row in rows)
    assert (run / "figures/accuracy_by_margin.png").is_file()
