"""Sharded weights: precision, what is held in memory and when, gradients that are accumulated, shards on the host."""

import json
import pydoc
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import ZipFile

import forks
import pytest
import torch
import yaml
from held_weights import measure
from helpers import LAST, RUNS, TINY, weights
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from shared_runs import own_world
from torch.distributed.tensor import DTensor

from lightning_modules.runtime import sharded, shards
from lightning_modules.runtime.checkpoint_io import AtomicCheckpointIO
from lightning_modules.runtime.private_names import without_data
from lightning_modules.runtime.samples import SampleText
from lightning_modules.runtime.sharded import FullyShardedStrategy

MODULE: Any = pydoc.locate(yaml.safe_load(TINY.read_text())["model"]["class_path"])
SETTINGS = {
    "model__init_args__dropout": 0.0,
    "model__init_args__n_layer": 3,
    "model__init_args__n_embd": 48,
    "data__init_args__batch_size": 4,
    "data__init_args__val_fraction": 0.008,  # five windows, the last of which one process has alone
    "trainer__gradient_clip_val": 0.5,
    "trainer__accumulate_grad_batches": 2,
    "trainer__max_steps": 3,
    "trainer__val_check_interval": 6,
    "trainer__num_sanity_val_steps": 1,
    "trainer__log_every_n_steps": 1,
    "trainer__callbacks+": [
        {
            "class_path": "lightning_modules.runtime.samples.SampleText",
            "init_args": {"prompts": ["ae"], "max_new_tokens": 4, "temperature": 0.0},
        },
        {"class_path": "lightning_modules.runtime.generalization.GeneralizationGap", "init_args": {"n_windows": 5}},
    ],
}
STRATEGY = "--trainer.strategy"
ON_HOST = [f"{STRATEGY}.{name}=true" for name in ("cpu_offload", "save_distributed_checkpoint")]
ON_HOST += [f"{STRATEGY}.{name}=false" for name in ("sync_every_batch", "whole_model")]
LONGER = ("--trainer.max_steps=4", "--trainer.val_check_interval=8")
SHARDS = f"{RUNS}/32-true/checkpoints/best.ckpt"


def precision(name: str) -> str:
    return f"--trainer.precision={name}"


def gathered(module: torch.nn.Module) -> int:
    """Return the number of blocks whose weights are whole in memory."""
    return sum(
        any(not isinstance(p, DTensor) and p.untyped_storage().nbytes() for p in block.parameters() if p.ndim == 2)
        for block in module.decoder.blocks
    )


def watch(file: Path) -> None:
    """For `prepare`: write the most blocks that are whole in memory in each kind of work, as a JSON object.

    A batch without rows does not run the network.
    """
    most: dict[str, Any] = {}

    def note(work: str, module: torch.nn.Module) -> None:
        if not isinstance(module.trainer.strategy, FullyShardedStrategy):
            return
        most[work] = max(most.get(work, 0), gathered(module))
        file.write_text(json.dumps(most))

    evaluate, draw = MODULE.evaluation_step, SampleText.draw
    start, shard = FullyShardedStrategy.on_validation_start, FullyShardedStrategy.shard

    def evaluation_step(self: Any, batch: dict[str, Any], metrics: Any) -> None:
        if len(batch["input_ids"]) == 0:
            most["empty batches"] = most.get("empty batches", 0) + 1
            return
        hooks = [b.feed_forward.register_forward_hook(lambda *_: note("validation", self)) for b in self.decoder.blocks]
        evaluate(self, batch, metrics)
        for hook in hooks:
            hook.remove()

    def drawn(self: SampleText, trainer: Any, module: Any) -> list[str]:
        note("samples", module)
        return draw(self, trainer, module)

    def started(self: FullyShardedStrategy) -> None:
        start(self)
        most["inference mode"] = self.lightning_module.trainer.fit_loop.epoch_loop.val_loop.inference_mode
        note("start", self.lightning_module)

    names = ("reduce_scatter_single", "reduce_scatter_tensor")  # the second before torch 2.13
    name = next(name for name in names if hasattr(torch.distributed, name))
    reduce = getattr(torch.distributed, name)
    runs: list[str] = []
    types: set[str] = set()

    def sharded(self: FullyShardedStrategy, module: Any) -> None:
        runs.append(f"reductions, {module.trainer.precision}")
        shard(self, module)

    def reduced(*args: Any, **kwargs: Any) -> Any:
        most[runs[-1]] = most.get(runs[-1], 0) + 1
        types.update(str(value.dtype) for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        most["types"] = sorted(types)
        return reduce(*args, **kwargs)

    setattr(torch.distributed, name, reduced)
    FullyShardedStrategy.shard = sharded  # type: ignore[method-assign]
    MODULE.evaluation_step, SampleText.draw = evaluation_step, drawn  # type: ignore[method-assign]
    FullyShardedStrategy.on_validation_start = started  # type: ignore[method-assign]


@pytest.fixture
def jobs(tiny, tmp_path_factory) -> Path:
    """Return the folder in which a job of two processes has made its runs, once in a test session."""
    folder = tmp_path_factory.getbasetemp() / "sharded_jobs"
    if (folder / "codes.txt").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()

    def prepare(rank: int) -> None:
        measure(folder / f"held_{rank}.txt")
        watch(folder / f"gathered_{rank}.txt")

    fit = ("fit", "-c", tiny(**SETTINGS), *(word for word in forks.SHARDED if "precision" not in word))
    with own_world(folder):
        first = (*fit, precision("bf16-mixed"), "--run.name=bf16-mixed", f"{STRATEGY}.sync_every_batch=false")
        then = [
            (*fit, precision("bf16-true"), "--run.name=bf16-true", f"{STRATEGY}.activation_checkpointing=true"),
            (*fit, precision("32-true"), "--run.name=32-true", *ON_HOST),
            (*fit, precision("32-true"), "--run.name=longer", *ON_HOST, "--ckpt_path", SHARDS, *LONGER),
        ]
        job = forks.start_ranks(2, *first, prepare=prepare, output=folder / "output.txt", then=then)
        (folder / "codes.txt").write_text(str(forks.wait(job)))
    return folder


def column(run: Path, name: str) -> torch.Tensor:
    header, *rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    return torch.tensor([float(row[header.index(name)]) for row in rows if row[header.index(name)]])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tolerance"), [("32-true", 1e-6), ("bf16-mixed", 2e-4), ("bf16-true", 2e-3)])
def test_sharded_processes_learn_what_one_process_does_in_the_same_precision(jobs, whole, name, tolerance):
    assert (jobs / "codes.txt").read_text() == "[0, 0]"
    one, sharded = whole(**SETTINGS, trainer__precision=name), jobs / RUNS / name
    for metric in ("train/loss", "val/loss", "val/train_text_loss"):
        torch.testing.assert_close(column(sharded, metric), column(one, metric), rtol=tolerance, atol=0)
    saved = AtomicCheckpointIO().load_checkpoint(sharded / LAST)["state_dict"]
    dtypes = {weight.dtype for weight in saved.values()}
    assert dtypes == {torch.bfloat16 if name == "bf16-true" else torch.float32}


@pytest.mark.slow
def test_gradients_are_added_up_in_float32_after_each_batch_or_once_a_step(jobs):
    units, batches, steps = 4, 6, 3  # the units: three blocks and the rest
    for rank in range(2):
        counted = json.loads((jobs / f"gathered_{rank}.txt").read_text())
        found = [counted[f"reductions, {name}"] for name in ("bf16-true", "bf16-mixed", "32-true")]
        assert found == [units * batches, units * steps, units * (steps + 1)]  # the last is the step of `longer`
        assert counted["types"] == ["torch.float32"]


@pytest.mark.slow
def test_nothing_is_kept_of_the_weights_of_blocks_between_forward_and_backward_pass(jobs, whole):
    saved = weights(whole(**SETTINGS) / LAST)
    # The rest, in float32: embeddings and norms. Its tied output matrix is copied in bfloat16.
    rest = sum(w.numel() for name, w in saved.items() if "blocks" not in name or "norm" in name)
    expected = 4 * rest + 2 * saved["decoder.token_embedding.weight"].numel()
    for rank in range(2):
        held = [json.loads(line) for line in (jobs / f"held_{rank}.txt").read_text().splitlines()]
        assert {step["n_copies"] for step in held[:6]} == {1}
        # An odd number of rows is padded. A block would add 70%.
        assert [step["units"] + step["copies"] for step in held[:6]] == [pytest.approx(expected, rel=0.01)] * 6


@pytest.mark.slow
def test_a_validation_gathers_one_block_at_a_time_and_samples_the_whole_model(jobs):
    of_rank = [json.loads((jobs / f"gathered_{rank}.txt").read_text()) for rank in range(2)]
    assert [most["start"] for most in of_rank] == [0, 0]
    assert [most["inference mode"] for most in of_rank] == [False, False]  # what it gathers could not be trained
    assert [most["validation"] for most in of_rank] == [1, 1]
    assert of_rank[0]["samples"] == 3
    assert (of_rank[0].get("empty batches"), of_rank[1]["empty batches"] > 0) == (None, True)


@pytest.mark.slow
def test_samples_can_be_left_out_so_that_no_process_holds_the_whole_model(jobs, whole):
    one = whole(**SETTINGS, trainer__precision="bf16-mixed")
    ours, expected = ((run / "samples.md").read_text().splitlines() for run in (jobs / RUNS / "bf16-mixed", one))
    assert [line for line in ours if "val/loss" not in line] == [line for line in expected if "val/loss" not in line]
    assert not (jobs / RUNS / "32-true/samples.md").exists()
    line = "SampleText is left out: it needs the whole model, and trainer.strategy.whole_model is false\n"
    assert (jobs / "output.txt").read_text().count(line) == 2  # in the two runs of float32, once


def test_float16_is_refused_in_one_line(llm_train, tiny):
    refused = llm_train("fit", "-c", tiny(), *forks.SHARDED[:2], "--trainer.accelerator=cpu", precision("16-mixed"))
    assert (refused.code, len(refused.err.splitlines())) == (1, 1), refused.err
    assert "precision='16-mixed'" in refused.err


@pytest.mark.slow
def test_each_process_saves_its_share_and_any_layout_goes_on_from_the_shares(jobs, llm_train, tiny):
    best = jobs / SHARDS
    (folder,) = [path for path in best.parent.iterdir() if path.is_dir()]
    assert sorted(path.name for path in folder.iterdir()) == ["0.ckpt", "1.ckpt"]
    assert best.samefile(best.with_name("last.ckpt"))
    assert best.stat().st_size < 0.1 * sum(path.stat().st_size for path in folder.iterdir())
    assert "export: no model/, for the checkpoints are in shards" in (jobs / "output.txt").read_text()
    done = llm_train("fit", "-c", tiny(**SETTINGS), "--run.name=longer", "--ckpt_path", best, *LONGER)
    assert done.code == 0, done.err
    one, two = (AtomicCheckpointIO().load_checkpoint(run / LAST) for run in (RUNS / "longer", jobs / RUNS / "longer"))
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], weight, rtol=1e-3, atol=1e-4)
    (one_state, two_state) = (checkpoint["optimizer_states"][0]["state"] for checkpoint in (one, two))
    assert {i: set(state) for i, state in two_state.items()} == {i: set(state) for i, state in one_state.items()}
    for i, state in one_state.items():
        torch.testing.assert_close(two_state[i]["exp_avg"], state["exp_avg"], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_command_makes_whole_files_of_shards(jobs, llm_train):
    run = RUNS / "32-true"
    shutil.copytree(jobs / run, run)
    files = AtomicCheckpointIO()
    before = files.load_checkpoint(run / LAST)
    done = llm_train("convert", run)
    assert (done.code, [line.split()[0] for line in done.out.splitlines()]) == (0, ["wrote", "wrote"]), done.err
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["best.ckpt", "last.ckpt"]
    after = torch.load(run / LAST, weights_only=True)
    assert str(after) == str(before)
    again = llm_train("convert", run)
    assert (again.code, [line.split()[0] for line in again.out.splitlines()]) == (0, ["whole", "whole"])
    assert not (run / ".lock").exists()
    refused = llm_train("convert", run.parent)
    assert (refused.code, len(refused.err.splitlines())) == (1, 1), refused.err


class Rows:
    """What `rows_like` needs of a `DTensor` of one of n processes; torch makes one in such processes only."""

    placements = ()
    from_local = staticmethod(lambda local, *_, shape, **__: (local, shape))

    def __init__(self, rank: int, n: int) -> None:
        self.device_mesh = SimpleNamespace(size=lambda: n, get_local_rank=lambda: rank)
        self.shape = torch.Size([7, 2])
        self.to_local = lambda: torch.empty(0)


@pytest.mark.parametrize("n_before", [1, 3, 5])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 9])
def test_another_number_of_processes_reads_the_rows_of_each(monkeypatch, n_before, n):
    monkeypatch.setattr(shards, "DTensor", Rows)
    tensor = torch.arange(14.0).view(7, 2)

    def parts(number: int) -> list[torch.Tensor]:
        chunks = tensor.chunk(number)  # fewer if the last processes have no rows
        return [*chunks, *[tensor[:0]] * (number - len(chunks))]

    files = [{"w": part} for part in parts(n_before)]
    files[0]["step"] = torch.tensor(3.0)  # is not sharded
    for rank, expected in enumerate(parts(n)):
        rows, shape = shards.rows_like(files, "w", Rows(rank, n))
        assert (rows.tolist(), shape) == (expected.tolist(), tensor.shape)
        assert shards.rows_like(files, "step", Rows(rank, n)) is files[0]["step"]


def test_what_is_sharded_as_another_tensor_is_where_that_is(monkeypatch):
    """Shards that are kept on the host have a mesh of GPUs, to which PyTorch moves what it shards."""

    class Shard(torch.Tensor):
        device = torch.device("cpu")
        device_mesh = placements = None

    monkeypatch.setattr(shards, "DTensor", Shard)
    monkeypatch.setattr(shards, "distribute_tensor", lambda tensor, *_, **__: SimpleNamespace(to=lambda device: device))
    assert shards.sharded_as(torch.zeros(2).as_subclass(Shard), torch.zeros(2)) == torch.device("cpu")
    whole = torch.zeros(2)
    assert shards.sharded_as(torch.zeros(2), whole) is whole


def test_weights_on_the_host_and_buffers_on_a_gpu_are_loaded():
    strategy, loaded = FullyShardedStrategy(cpu_offload=True), []
    with without_data():
        strategy.model = torch.nn.Linear(2, 3)
        strategy.model.register_buffer("counts", torch.zeros(3, device="cuda"))
        strategy.model.load_state_dict = lambda state_dict, strict, assign: loaded.append((sorted(state_dict), strict))
        state = {name: torch.ones(3, 2) for name in ("weight", "bias", "counts", "unknown")}
        strategy.load_model_state_dict({"state_dict": state})
    assert loaded == [(sorted(state), True)]


@pytest.mark.parametrize(("folder", "reason"), [("../shards_1_a", "refused"), ("shards_1_a", "no such checkpoint")])
def test_a_checkpoint_names_no_shards_elsewhere(tmp_path, folder, reason):
    file = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "shards": {"folder": folder, "n": 1}}, file)
    with pytest.raises(MisconfigurationException, match=reason):
        AtomicCheckpointIO().load_checkpoint(file)


def test_shards_that_no_checkpoint_names_are_removed(tmp_path):
    files = AtomicCheckpointIO()
    for name in ("shards_1_a", "shards_2_b", "shards_of_mine"):
        files.save_checkpoint({"state_dict": {}}, tmp_path / name / "0.ckpt")
    files.save_checkpoint({"state_dict": {}, "shards": {"folder": "shards_2_b", "n": 1}}, tmp_path / "last.ckpt")
    (tmp_path / "best.ckpt").write_bytes(b"damaged")
    files.remove_unused_shards(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"best.ckpt", "last.ckpt", "shards_2_b", "shards_of_mine"}


def damage(file: Path) -> None:
    """Change a byte of the tensor in a file, which `torch.load` does not notice."""
    content = bytearray(file.read_bytes())
    content[content.index(torch.ones(4).numpy().tobytes())] ^= 1
    file.write_bytes(content)


@pytest.fixture
def three_shards(tmp_path) -> Path:
    """A checkpoint of three shards, of which the last is damaged."""
    files = AtomicCheckpointIO()
    for number in range(3):
        files.save_checkpoint({"state_dict": {"state_dict/w": torch.ones(4)}}, tmp_path / f"shards_1_a/{number}.ckpt")
    files.save_checkpoint({"state_dict": {}, "shards": {"folder": "shards_1_a", "n": 3}}, tmp_path / "last.ckpt")
    damage(tmp_path / "shards_1_a/2.ckpt")
    return tmp_path / "last.ckpt"


def test_the_shards_are_checked_once_by_all_processes_together(three_shards):
    files = AtomicCheckpointIO()
    assert len(files.load_parts(three_shards, rank=1, n_ranks=2)[1]) == 3
    for rank, n_ranks in ((0, 1), (0, 2), (2, 4)):
        with pytest.raises(MisconfigurationException, match=r"2\.ckpt: the checkpoint is damaged"):
            files.load_parts(three_shards, rank=rank, n_ranks=n_ranks)


def test_all_processes_refuse_a_shard_that_one_of_them_finds_damaged(three_shards, monkeypatch):
    errors: list[str] = []

    def of_both(trainer: Any, error: str) -> list[str]:
        errors.append(error)
        return errors

    monkeypatch.setattr(sharded, "gathered", of_both)
    monkeypatch.setattr(FullyShardedStrategy, "world_size", 2)
    for rank in (0, 1):
        monkeypatch.setattr(FullyShardedStrategy, "global_rank", rank)
        strategy = FullyShardedStrategy()
        strategy.checkpoint_io, strategy._lightning_module = AtomicCheckpointIO(), SimpleNamespace(trainer=None)
        with pytest.raises(MisconfigurationException, match=r"2\.ckpt: the checkpoint is damaged"):
            strategy.load_checkpoint(three_shards)
    assert [bool(error) for error in errors] == [True, False]


def test_a_save_does_not_read_the_other_checkpoints_to_their_end(three_shards, monkeypatch):
    files = AtomicCheckpointIO()
    files.save_checkpoint({"state_dict": {"w": torch.ones(4)}}, three_shards.with_name("best.ckpt"))
    damage(three_shards.with_name("best.ckpt"))
    assert files.shards_of(three_shards.with_name("best.ckpt"), check=False) is None
    with pytest.raises(MisconfigurationException, match="damaged"):
        files.shards_of(three_shards.with_name("best.ckpt"))
    monkeypatch.delattr(ZipFile, "testzip")
    files.remove_unused_shards(three_shards.parent)
    assert len(list(three_shards.parent.iterdir())) == 3
