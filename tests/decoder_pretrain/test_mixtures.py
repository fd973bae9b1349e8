"""Mixtures of texts: shares by weight, no window twice in an epoch, and the same order for a resumed run."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from forks import signal_after_step
from helpers import LAST, RUNS, assert_same_weights, text
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules import windows
from datamodules.base import LazyOrder
from datamodules.decoder_pretrain import PretrainDataModule
from datamodules.sources import ListText, Mixture
from datamodules.windows import mixed_windows, random_windows, sequential_windows

SIZES, WEIGHTS = [10_001, 4_005, 20_003], [5, 1.5, 3.5]  # of blocks of 10 tokens, 1,000, 400 and 2,000
BEGINS = np.cumsum([0, *SIZES[:-1]])


def test_a_mixture_has_its_shares_and_no_window_twice_in_an_epoch():
    n, order = mixed_windows(SIZES, WEIGHTS, block_size=10, seed=1)
    assert n == 998 * 2  # the first text is used up, but for the two windows that rounding may need
    seen = [Counter() for _ in SIZES]
    for epoch in range(100):
        starts = order(epoch)[:].numpy()
        assert len(np.unique(starts)) == len(starts) == n
        texts = np.searchsorted(BEGINS, starts, side="right") - 1
        for number, counter in enumerate(seen):
            counter.update(starts[texts == number].tolist())
    for number, (counter, weight) in enumerate(zip(seen, WEIGHTS, strict=True)):
        assert abs(counter.total() - 100 * n * weight / 10) <= 1
        # All windows of a text have been seen as often as any other, but for those of its last round.
        assert len(counter) == (SIZES[number] - 1) // 10
        assert max(counter.values()) - min(counter.values()) <= 1
        assert all((start - BEGINS[number]) % 10 == 0 for start in counter)


def test_shares_are_exact_over_many_epochs_where_an_epoch_is_short():
    n, order = mixed_windows([121, 200, 91], [1, 1, 1], block_size=10, seed=0)
    assert n == 21
    counts = Counter()
    for epoch in range(100):
        starts = order(epoch)[:].numpy()
        assert len(np.unique(starts)) == n
        counts.update((np.searchsorted([0, 121, 321], starts, side="right") - 1).tolist())
    assert all(abs(count - 700) <= 1 for count in counts.values())


def test_the_order_of_a_mixture_depends_on_seed_and_epoch_alone():
    orders = [mixed_windows(SIZES, WEIGHTS, 10, seed)[1] for seed in (1, 1, 2)]
    orders[0](7)
    assert orders[0](3)[:].tolist() == orders[1](3)[:].tolist()
    assert orders[0](3)[100:140].tolist() == orders[1](3)[:][100:140].tolist()
    assert orders[0](3)[:].tolist() != orders[2](3)[:].tolist()
    # The second text begins an epoch with windows that the epoch before had not.
    first, second = (set(orders[0](epoch)[:].tolist()) & set(range(14_006, 40_000)) for epoch in (0, 1))
    assert not first & second


def test_a_trillion_tokens_need_no_memory():
    n, order = mixed_windows([10**12, 3 * 10**11, 10**10], [80, 19, 1], 1024, seed=0)
    assert n > 9e8
    starts = order(5)[n // 2 : n // 2 + 4096]
    shares = np.bincount(np.searchsorted([0, 10**12, 1_300_000_000_000], starts, side="right") - 1) / 4096
    assert abs(shares - [0.8, 0.19, 0.01]).max() < 0.03
    for choose in (random_windows, sequential_windows):
        n, order = choose(10**12, 1024, seed=0)
        epoch = order(1)
        assert isinstance(epoch, LazyOrder)
        batch = epoch[10**8 : 10**8 + 64]
        assert batch.tolist() != order(2)[10**8 : 10**8 + 64].tolist()
        assert len(set(batch.tolist())) == 64
        assert 0 <= batch.min() < batch.max() < 10**12 - 1024
        assert batch.max() > 10**11


def test_long_orders_are_like_short_ones(monkeypatch):
    monkeypatch.setattr(windows, "MOST_IN_MEMORY", 10)
    n, order = sequential_windows(1_000, 10, seed=1)
    starts = np.sort(order(0)[:].numpy())
    assert len(starts) == n == 99
    assert (np.diff(starts) == 10).all()
    n, order = random_windows(n_tokens=1_000, block_size=10, seed=1)
    starts = torch.cat([order(epoch)[:] for epoch in range(200)])
    assert set(starts.tolist()) == set(range(990))


def mixture(*texts, weights, **options):
    source = Mixture([ListText([one]) for one in texts], weights)
    options = {"val_fraction": 0.1, "windows": "sequential"} | options
    data = PretrainDataModule(source, 16, 4, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def test_the_windows_of_a_mixture_lie_within_its_texts():
    data = mixture(text(400), text(300, seed=1).upper(), weights=[1, 3])
    batches = torch.cat([batch["input_ids"] for batch in data.train_dataloader()])
    rows = [bytes(row.tolist()).decode() for row in batches]
    upper = sum(row == row.upper() for row in rows)
    assert abs(upper / len(rows) - 0.75) < 0.05
    assert all(row in (row.upper(), row.lower()) for row in rows)
    held_out = bytes(torch.cat([batch["input_ids"].flatten() for batch in data.val_dataloader()]).tolist()).decode()
    assert text(400)[-50:] in held_out
    assert text(300, seed=1).upper()[-50:] in held_out
    assert data.files["val"].n_tokens == sum(math.ceil(len(text(n, seed=s)) / 10) for n, s in ((400, 0), (300, 1)))


def test_a_mixture_shares_the_characters_of_its_texts():
    data = mixture("abcab" * 99, "xyz" * 99, weights=[1, 1], tokenizer="character")
    assert data.vocab_size == 7  # the end of a text is a token too
    assert data.tokenizer.decode(data.files["train"].open()[np.array([[0, 1, 2, 446, 447]])][0]) == "abcyz"


def test_a_loader_that_resumes_goes_on_with_the_same_windows():
    loaders = [mixture(text(400), text(300, seed=1), weights=[1, 3]).train_dataloader() for _ in range(2)]
    for loader in loaders:
        loader.sampler.set_epoch(1)
    whole = [batch["input_ids"].tolist() for batch in loaders[0]]
    loaders[1].sampler.skip = 5
    assert [batch["input_ids"].tolist() for batch in loaders[1]] == whole[5:]


@pytest.mark.slow  # seconds, and the order is that of the test above
def test_a_killed_run_of_a_mixture_resumes_with_the_same_weights(tiny, whole, forked, no_pictures, tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(text(1_000, seed=number))
    init = {"sources": [str(tmp_path / "0.txt"), str(tmp_path / "1.txt")], "weights": [2, 1]}
    source = {"class_path": "datamodules.sources.Mixture", "init_args": init}
    settings = {"data__init_args__source": source, "data__init_args__windows": "sequential", "trainer__max_steps": 10}
    config = tiny("killed", **settings)
    assert forked("fit", "-c", config, prepare=lambda: signal_after_step(9)) < 0
    assert forked("fit", "-c", config, "--ckpt_path", "last") == 0
    assert_same_weights(RUNS / "killed" / LAST, whole(**settings) / LAST)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Mixture(["a.txt", "b.txt"], [1]), "a mixture of 2 sources has 1 weights"),
        (lambda: Mixture(["a.txt"], [1]), "give two sources or more"),
        (lambda: Mixture(["a.txt", "b.txt"], [1, 0]), r"the weights \[1, 0\] must all be more than 0"),
        (lambda: Mixture(["a.txt", "b.txt"], [1, math.nan]), "must all be more than 0"),
        (lambda: Mixture(["a.txt", ""], [1, 1]), r"data.source.sources\[1\] is empty"),
        (lambda: Mixture(["a.txt", Mixture(["b.txt", "c.txt"], [3, 1])], [1, 1]), "a text of a mixture is a mixture"),
        (lambda: mixture("a" * 99, "b" * 99, weights=[1, 1], windows="random"), "needs data.windows sequential"),
        (
            lambda: mixture("a" * 999, "b", weights=[1, 1]).train_dataloader(),
            "source 2 of the mixture has 0 training windows of 16 tokens, and three are needed",
        ),
        (
            lambda: mixture("a" * 999, "b" * 999, weights=[1, 1e-6]).train_dataloader(),
            "source 2 of the mixture has 56 training windows of 16 tokens, and an epoch has less than one of them",
        ),
    ],
)
def test_a_mistake_in_a_mixture_is_one_line(make, said):
    with pytest.raises(MisconfigurationException, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)
