"""The random numbers of a batch depend only on the seed, the number of the batch in the run, and the rank."""

import itertools
from types import SimpleNamespace

import torch

from lightning_modules.runtime.reproducible import ReproducibleSteps


def random_numbers(seed: int, batches_done: int, rank: int) -> tuple[float, ...]:
    """What a module draws in a training step, whatever was drawn before."""
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=batches_done, _batches_that_stepped=batches_done))
    trainer = SimpleNamespace(
        fit_loop=loop, global_rank=rank, global_step=batches_done, callbacks=[], accumulate_grad_batches=1
    )
    module = SimpleNamespace(device=torch.device("cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.rand(batches_done + 1)
        ReproducibleSteps(seed).on_train_batch_start(trainer, module, None, batch_idx=0)
        return tuple(torch.rand(4).tolist())


def test_every_seed_batch_and_rank_gets_random_numbers_of_its_own():
    drawn = [random_numbers(*which) for which in itertools.product(range(2), range(5), range(3))]
    assert len(set(drawn)) == len(drawn) == 30


def test_a_seed_may_have_any_size():
    assert len({random_numbers(seed, 0, 0) for seed in (-1, 2**63 + 5, 10**30 + 7)}) == 3


def test_a_batch_gets_the_same_random_numbers_again():
    for which in ((0, 0, 0), (1, 7, 0), (1, 7, 2)):
        assert random_numbers(*which) == random_numbers(*which)
