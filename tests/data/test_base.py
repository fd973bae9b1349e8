"""The loaders and the order of the data, on one process and on several."""

import importlib
import inspect
import pkgutil
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import Dataset, SequentialSampler

import datamodules
from datamodules import base
from datamodules.base import ExperimentDataModule, GlobalBatches, Permutation, shuffled
from lightning_modules.common.ranges import NonNegativeInt, PositiveInt


class Squares(Dataset):
    """A dataset whose items tell which they are."""

    def __getitem__(self, positions):
        assert positions.dtype == torch.int64
        return {"positions": positions, "squares": positions**2}


def batches(n=23, batch_size=4, epoch=0, skip=0, seed=7, **options):
    sampler = GlobalBatches(n, shuffled(n, seed), batch_size, **options)
    sampler.set_epoch(epoch)
    sampler.skip = skip
    return [batch.tolist() for batch in sampler]


def flat(lists):
    return list(chain.from_iterable(lists))


def attach(datamodule, rank, world_size, overfit_batches=0.0):
    """Give a datamodule the trainer of one process of several."""
    share = {"distributed_sampler_kwargs": {"num_replicas": world_size, "rank": rank}} if world_size > 1 else {}
    strategy = SimpleNamespace(root_device=torch.device("cpu"), **share)  # strategies of one device have no sampler
    datamodule.trainer = SimpleNamespace(strategy=strategy, overfit_batches=overfit_batches)
    return datamodule


# --- order -----------------------------------------------------------------------------------------------------------


def test_an_epoch_has_each_position_once_in_an_order_of_its_own():
    order = shuffled(100, seed=3)
    assert order(0).dtype == torch.int64
    assert sorted(order(0).tolist()) == list(range(100))
    assert order(0).tolist() == shuffled(100, seed=3)(0).tolist()
    different = [order(0), order(1), shuffled(100, seed=4)(0), shuffled(100, seed=4)(1), torch.arange(100)]
    assert len({tuple(each.tolist()) for each in different}) == 5


def test_the_order_leaves_the_global_generators_alone():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    shuffled(100, seed=3)(0)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_an_incomplete_batch_is_left_out():
    assert [len(batch) for batch in batches(23, 4)] == [4] * 5
    assert len(GlobalBatches(23, shuffled(23, 0), 4)) == 5
    assert len(GlobalBatches(24, shuffled(24, 0), 4)) == 6


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_shares_of_a_batch_make_up_the_batch_of_one_process(world_size):
    shares = [batches(rank=rank, world_size=world_size) for rank in range(world_size)]
    assert all(len(share) == 4 // world_size for rank in shares for share in rank)
    assert [flat(parts) for parts in zip(*shares, strict=True)] == batches()


@pytest.mark.parametrize("skip", [0, 1, 3, 5])
def test_the_order_after_a_skip_is_that_of_an_uninterrupted_run(skip):
    assert batches(epoch=2, skip=skip) == batches(epoch=2)[skip:]


def test_a_skip_holds_for_one_iteration():
    sampler = GlobalBatches(23, shuffled(23, 7), 4)
    sampler.skip = 2
    assert len(list(sampler)) == 3
    assert len(list(sampler)) == 5
    assert len(sampler) == 5  # the length of an epoch, whatever is skipped


@pytest.mark.parametrize(("n", "world_size"), [(23, 2), (21, 2), (21, 4), (20, 4), (1, 4)])
def test_evaluation_deals_out_every_position_once(n, world_size):
    shares = [
        [share.tolist() for share in GlobalBatches(n, lambda epoch: torch.arange(n), 4, rank, world_size, False)]
        for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1  # as many batches in every process
    assert len(shares[0]) == -(-n // 4)
    dealt = [flat(parts) for parts in zip(*shares, strict=True)]
    assert flat(dealt) == list(range(n))


def test_what_is_sent_to_a_worker_is_the_share_alone():
    share = next(iter(GlobalBatches(1000, shuffled(1000, 0), 4)))
    assert share.untyped_storage().nbytes() == 4 * 8


# --- loaders ---------------------------------------------------------------------------------------------------------


def loaded(loader, epoch=0, skip=0):
    loader.sampler.set_epoch(epoch)
    loader.sampler.skip = skip
    return [batch["positions"].tolist() for batch in loader]


def test_workers_load_the_same_batches():
    alone = ExperimentDataModule(4, seed=1).training_loader(Squares(), 23)
    helped = ExperimentDataModule(4, num_workers=2, seed=1).training_loader(Squares(), 23)
    assert helped.persistent_workers
    assert len(alone) == len(helped) == 5
    for epoch, skip in ((0, 0), (1, 3), (2, 0)):
        assert loaded(helped, epoch, skip) == loaded(alone, epoch, skip)
        assert len(loaded(alone, epoch, skip)) == 5 - skip


def test_a_loader_leaves_the_global_generator_alone():
    loader = ExperimentDataModule(4).training_loader(Squares(), 23)
    state = torch.get_rng_state()
    assert len(loaded(loader)) == 5
    assert torch.equal(torch.get_rng_state(), state)


def test_training_follows_the_order_given_and_otherwise_shuffles():
    datamodule = ExperimentDataModule(2, seed=5)
    backwards = datamodule.training_loader(Squares(), 4, lambda epoch: torch.arange(4).flip(0))
    assert loaded(backwards) == [[3, 2], [1, 0]]
    assert flat(loaded(datamodule.training_loader(Squares(), 4), epoch=3)) == shuffled(4, 5)(3).tolist()


def test_processes_share_what_the_strategy_says():
    loaders = [attach(ExperimentDataModule(4, seed=1), rank, 2).training_loader(Squares(), 23) for rank in (0, 1)]
    whole = loaded(ExperimentDataModule(4, seed=1).training_loader(Squares(), 23))
    assert [first + second for first, second in zip(*map(loaded, loaders), strict=True)] == whole


def test_a_process_may_get_an_empty_share_of_the_last_evaluation_batch():
    positions = torch.tensor([10, 20, 30, 40, 50])
    shares = [
        loaded(attach(ExperimentDataModule(4), rank, 2).evaluation_loader(Squares(), positions)) for rank in (0, 1)
    ]
    assert shares == [[[10, 20], [50]], [[30, 40], []]]


def test_a_trainer_of_one_process_takes_whole_batches():
    datamodule = attach(ExperimentDataModule(4), 0, 1)
    assert [len(batch) for batch in loaded(datamodule.training_loader(Squares(), 8))] == [4, 4]


def test_a_run_that_overfits_has_the_batches_of_the_first_epoch_in_each():
    plain = ExperimentDataModule(2, seed=5).training_loader(Squares(), 8)
    overfits = attach(ExperimentDataModule(2, seed=5), 0, 1, overfit_batches=2).training_loader(Squares(), 8)
    assert isinstance(overfits.sampler, SequentialSampler)  # Lightning replaces others
    assert loaded(overfits, epoch=3) == loaded(overfits) == loaded(plain) != loaded(plain, epoch=3)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_batch_that_the_processes_cannot_share_evenly():
    with pytest.raises(
        MisconfigurationException, match=r"data.batch_size is 4, .* all 3 processes: give a multiple of 3"
    ):
        attach(ExperimentDataModule(4), 0, 3).training_loader(Squares(), 23)


def test_a_datamodule_in_a_message_reads_no_data():
    class Unread(ExperimentDataModule):
        def train_dataloader(self):
            raise AssertionError("the data are read")

    assert f"args ({Unread(2)})" == "args (Unread)"


def test_too_few_examples_for_a_batch():
    with pytest.raises(MisconfigurationException, match=r"an epoch has 3 .*, too few .*batch_size 4"):
        ExperimentDataModule(4).training_loader(Squares(), 3)


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"batch_size": 1, "num_workers": -1}, {"batch_size": 1, "seed": -1}]
)
def test_the_parser_refuses_numbers_out_of_range(wrong):
    name, value = list(wrong.items())[-1]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ExperimentDataModule, "data")
    with pytest.raises(ArgumentError, match=rf"(?s){name}.*{value} does not conform to restriction"):
        parser.parse_object({"data": wrong})


@pytest.mark.parametrize(
    "topic", [module.name for module in pkgutil.iter_modules(datamodules.__path__) if module.ispkg]
)
def test_the_datamodules_of_all_topics_have_the_same_ranges(topic):
    package = importlib.import_module(f"datamodules.{topic}")
    reached = [vars(package)[name] for name in package.__all__ if name.endswith("DataModule")]  # by YAML
    assert reached
    for each in reached:
        assert issubclass(each, ExperimentDataModule)
        types = {name: parameter.annotation for name, parameter in inspect.signature(each).parameters.items()}
        assert types.get("batch_size", PositiveInt) is PositiveInt
        assert types.get("num_workers", NonNegativeInt) is NonNegativeInt
        assert types.get("seed", NonNegativeInt) is NonNegativeInt


# --- orders that are computed when they are needed -------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 1000])
def test_a_permutation_has_each_number_once(n):
    numbers = np.arange(n)
    permutation = Permutation(n, 1, 2)
    assert sorted(permutation(numbers)) == numbers.tolist()
    assert permutation(numbers[::-1]).tolist() == permutation(numbers)[::-1].tolist()
    assert permutation(numbers).tolist() == Permutation(n, 1, 2)(numbers).tolist()
    assert n < 17 or permutation(numbers).tolist() not in (Permutation(n, 1, 3)(numbers).tolist(), numbers.tolist())


def test_a_permutation_is_random():
    """Compare the places of each number over many keys, and its neighbours, with those of a uniform permutation."""
    places = np.stack([Permutation(10, seed)(np.arange(10)) for seed in range(1_000)])
    counts = np.stack([np.bincount(column, minlength=10) for column in places.T])
    assert abs(counts - 100).max() < 48  # five standard deviations
    neighbours = (np.diff(places) == 1).sum()
    assert abs(neighbours - 1_000 * 9 / 10) < 150
    large = Permutation(10**12, 0)(np.arange(10**11, 10**11 + 20_000))
    assert len(set(large.tolist())) == 20_000
    assert abs(large.mean() / 10**12 - 0.5) < 0.02
    assert abs(np.corrcoef(large[1:], large[:-1])[0, 1]) < 0.04


@pytest.mark.parametrize("make", [shuffled, lambda n, seed: lambda epoch: shuffled(n, seed)(epoch) + 7])
def test_an_order_that_does_not_fit_into_memory_has_each_position_once(monkeypatch, make):
    in_memory = make(101, 3)(2)
    monkeypatch.setattr(base, "MOST_IN_MEMORY", 100)
    order = make(101, 3)
    assert sorted(order(2)[:].tolist()) == sorted(in_memory.tolist())
    assert order(2)[:].tolist() != order(1)[:].tolist()
    ranks = [GlobalBatches(101, order, 10, rank, 2) for rank in range(2)]
    ranks[0].skip = ranks[1].skip = 3
    shares = [[batch.tolist() for batch in rank] for rank in ranks]
    assert [one + two for one, two in zip(*shares, strict=True)] == order(0)[30:100].view(7, 10).tolist()


# --- resumed runs -----------------------------------------------------------------------------------------------------


class Rows(Dataset):
    """A dataset of given numbers, with random ones, and floats that differ each time, as the features of a base may."""

    def __init__(self, numbers):
        self.numbers = torch.tensor([*numbers])

    def __getitem__(self, positions):
        numbers = {"input_ids": self.numbers[positions], "mask": torch.randint(9, positions.shape)}
        return numbers | {"features": torch.tensor(np.random.default_rng().random(2))}


def in_turn(epoch):
    return torch.arange(9)


@pytest.mark.parametrize(
    ("numbers", "changed"),
    [(range(9), False), (range(10), True), ([*range(8), 100], True), (range(8, -1, -1), True)],
)
def test_a_resumed_run_must_have_the_examples_of_its_checkpoint(numbers, changed):
    first, resumed = ExperimentDataModule(batch_size=9), ExperimentDataModule(batch_size=9)
    assert first.state_dict() == {}
    before = torch.random.get_rng_state()
    first.training_loader(Rows(range(9)), 9, in_turn)
    assert torch.equal(torch.random.get_rng_state(), before)
    resumed.load_state_dict(first.state_dict())
    if changed:
        with pytest.raises(MisconfigurationException, match="not those that the checkpoint was trained on"):
            resumed.training_loader(Rows(numbers), len(numbers), in_turn)
    else:
        resumed.training_loader(Rows(numbers), len(numbers), in_turn)


def test_a_checkpoint_of_an_earlier_version_does_not_know_its_examples():
    resumed = ExperimentDataModule(batch_size=2)
    resumed.load_state_dict({})
    resumed.training_loader(Rows([1, 2, 3]), 3)


def test_examples_are_compared_once_in_a_run():
    first, resumed = ExperimentDataModule(batch_size=9), ExperimentDataModule(batch_size=9)
    first.training_loader(Rows(range(9)), 9)
    resumed.load_state_dict(first.state_dict())
    resumed.training_loader(Rows(range(9)), 9)
    resumed.training_loader(Rows(range(20)), 20)  # as with trainer.reload_dataloaders_every_n_epochs


class Noisy(Rows):
    def __getitem__(self, positions):
        return {"input_ids": torch.from_numpy(np.random.default_rng().integers(1000, size=len(positions)))}


class WithFeatures(Rows):
    """A dataset whose batches have features in place of tokens, or the tokens too."""

    def __init__(self, numbers, has_features):
        super().__init__(numbers)
        self.has_features = has_features

    def __getitem__(self, positions):
        return {"features": self.numbers[positions] / 2} if self.has_features else self.inputs(positions)

    def inputs(self, positions):
        return {"input_ids": self.numbers[positions]}


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (Noisy(range(9)), Noisy(range(9))),
        (WithFeatures(range(9), True), WithFeatures(range(9), False)),
        (WithFeatures(range(9), False), WithFeatures(range(9), True)),
        (Squares(), Squares()),
    ],
)
def test_random_examples_and_features_in_the_place_of_tokens_do_not_count(before, now):
    first, resumed = ExperimentDataModule(batch_size=9), ExperimentDataModule(batch_size=9)
    first.training_loader(before, 9)
    resumed.load_state_dict(first.state_dict())
    resumed.training_loader(now, 9)
