"""Each private name of other libraries that is used: a new version that drops or moves one fails here first."""

import ast
import functools
import inspect
import re
import signal
from argparse import ArgumentError, ArgumentParser, _ActionsContainer
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import wandb
from jsonargparse import ArgumentParser as JSONArgumentParser
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer import trainer as trainer_module
from lightning.pytorch.trainer.connectors.logger_connector import logger_connector
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import Metric
from transformers import PreTrainedConfig, PreTrainedModel
from wandb.sdk.lib.service.service_connection import ServiceConnection
from wandb.sdk.lib.service.service_process import ServiceProcess
from wandb.sdk.wandb_setup import _WandbSetup

from lightning_modules.metrics import CorpusLoss
from lightning_modules.runtime import private_names
from lightning_modules.runtime.stop import GracefulStop

ROOT = Path(__file__).parents[2]
# owner: the private names that it must have, as attributes or in its source
HELD = {
    L.Trainer: ["_signal_connector", "_logger_connector"],
    logger_connector._LoggerConnector: ["_callback_metrics"],
    _FitLoop: ["_combined_loader", "_data_fetcher", "_should_accumulate"],
    _TrainingEpochLoop: ["_broadcast_sigterm_tensor", "_batches_that_stepped", "_should_check_val_fx"],
    _EvaluationLoop: ["_has_run"],
    DDPStrategy: ["_ddp_kwargs"],
    ModelParallelStrategy: ["_data_parallel_size", "_process_group_backend"],
    nn.Module: ["_apply"],
    LightningCLI: ["_dump_config", "_parse_ckpt_path", "_subcommand_parsers"],
    _ActionsContainer: ["_actions"],
    Metric: ["_apply"],
    WandbLogger: ["_wandb_init", "_save_dir", "_id", "_experiment"],
    wandb.Run: ["_log_artifact"],
    _WandbSetup: ["_connection"],
    ServiceConnection: ["_proc"],
    ServiceProcess: ["_process"],
    PreTrainedConfig: ["_attn_implementation"],
    PreTrainedModel: ["_can_compile_fullgraph"],
}

OPERATORS = {  # of torch, with the names of the arguments that are passed
    "_flash_attention_forward": [
        *("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"),
        *("return_debug_mask", "scale", "window_size_left", "window_size_right"),
    ],
}
FOREACH = ["_foreach_add_", "_foreach_lerp_", "_foreach_mul", "_foreach_mul_"]  # functions of torch, without a source


def test_torch_has_functions_over_lists_of_tensors():
    values = [torch.ones(2), torch.ones(3)]
    private_names.foreach_mul_(values, 2.0)
    private_names.foreach_mul_(values, [1.0, 2.0])
    private_names.foreach_add_(values, [torch.ones(2), torch.ones(3)], alpha=-2.0)
    private_names.foreach_lerp_(values, [torch.ones(2), torch.ones(3)], 0.5)
    halves = private_names.foreach_mul(values, 0.5)
    assert [value.tolist() for value in halves] == [[0.25] * 2, [0.75] * 3]


def test_a_size_can_be_made_a_variable_of_compiled_functions():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    double = torch.compile(lambda x: x * 2, backend=counter)
    for size in (3, 4, 5):
        x = torch.ones(2, size)
        private_names.make_size_a_variable(x, 1)
        double(x)
    assert counter.frame_count == 1


class Named:
    def __init__(self, width: int, depth: int = 1) -> None:
        """Take two arguments."""


class Passes(Named):
    def __init__(self, height: int = 2, **others: Any) -> None:
        super().__init__(depth=height, **others)


def test_the_arguments_of_a_class_are_also_those_that_it_passes_on():
    assert private_names.argument_names(Named) == {"width", "depth"}
    assert private_names.argument_names(Passes) == {"height", "width"}


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_unscaled_once(fused):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler), optimizers=[optimizer])
    scaler.scale((weight * 3).sum()).backward()
    if not fused:
        scaler.unscale_(optimizer)  # Lightning does it
    private_names.unscale_gradients(trainer)
    assert weight.grad.tolist() == [3.0] * 3
    scaler.step(optimizer)
    assert weight.tolist() == pytest.approx([0.999 * 0.99999] * 3, abs=1e-5)


@pytest.mark.parametrize(("name", "arguments"), OPERATORS.items())
def test_torch_has_operators(name, arguments):
    schema = getattr(torch.ops.aten, name).default._schema
    assert [argument.name for argument in schema.arguments][: len(arguments)] == arguments
    assert schema.returns[0].name == "output"


@pytest.mark.parametrize(("owner", "names"), HELD.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_the_owner_has_the_names(owner, names):
    source = inspect.getsource(owner)
    assert [
        name for name in names if not re.search(rf"\bself\.{name}\b|\bdef {name}\b|^    {name}: ", source, re.M)
    ] == []


PRIVATE = re.compile(r"_[a-z]")


@functools.cache
def attributes_and_functions(file: Path) -> tuple[list[ast.Attribute], set[str]]:
    """Return the attributes with private names that a file reads or sets, and the private functions it defines."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    attributes = [node for node in nodes if isinstance(node, ast.Attribute) and PRIVATE.match(node.attr)]
    return attributes, {node.name for node in nodes if isinstance(node, ast.FunctionDef) and PRIVATE.match(node.name)}


def private_attributes(file: Path) -> set[str]:
    """Return the private names that a file reads, sets or defines."""
    attributes, functions = attributes_and_functions(file)
    return {node.attr for node in attributes} | functions


def test_every_private_name_of_the_file_is_held_here():
    file = ROOT / "lightning_modules/runtime/private_names.py"
    held = {name for names in HELD.values() for name in names} | {*FOREACH, *OPERATORS}
    assert private_attributes(file) == held


def test_no_other_file_uses_them():
    held = {name for names in HELD.values() for name in names} - {"_id", "_process"} | {*FOREACH, *OPERATORS}
    found = []
    for room in ("lightning_modules", "experiments", "datamodules"):
        for file in (ROOT / room).rglob("*.py"):
            if file.name != "private_names.py" and (used := private_attributes(file) & held):
                found.append((str(file.relative_to(ROOT)), used))
    assert found == []


def test_no_other_file_uses_a_private_name_of_another_object():
    """A private name follows `self` or `cls`, or is assigned or defined in the same file."""
    public = ("_fields", "_replace", "_asdict", "_make")  # of named tuples
    found = []
    for room in ("lightning_modules", "experiments", "datamodules"):
        for file in (ROOT / room).rglob("*.py"):
            if file.name == "private_names.py":
                continue
            attributes, own = attributes_and_functions(file)
            for node in attributes:
                if node.attr not in own:
                    if node.attr in public or (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                        continue
                    assigned = f"self.{node.attr}" in file.read_text() or f"{node.attr}:" in file.read_text()
                    if not assigned:
                        found.append(f"{file.relative_to(ROOT)}, line {node.lineno}: {ast.unparse(node)}")
    assert found == []


class Watch(L.Callback):
    """Records the results of the functions during a run."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, bool]] = []
        self.loaders = 0

    def on_train_batch_end(self, trainer, *_):
        self.seen.append(
            (
                private_names.batches_done_in_epoch(trainer),
                private_names.batches_done(trainer),
                private_names.is_accumulating(trainer),
            )
        )
        self.loaders = len(private_names.train_dataloaders(trainer))


def fit(*callbacks: L.Callback, **arguments: object) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    trainer.fit(BoringModel(), DataLoader(RandomDataset(32, 3)))
    return trainer


def test_progress_and_accumulation():
    watch = Watch()
    fit(watch, max_epochs=2, accumulate_grad_batches=2)
    assert watch.seen == [(1, 0, True), (2, 1, False), (3, 2, False), (1, 3, True), (2, 4, False), (3, 5, False)]
    assert watch.loaders == 1


def test_fetching_starts_again_from_the_dataloader():
    batches = []

    class Restart(L.Callback):
        def on_train_start(self, trainer, pl_module):
            private_names.train_dataloaders(trainer)[0].sampler.skip = None
            private_names.restart_fetching(trainer)
            private_names.restart_fetching(trainer)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            batches.append(batch)

    fit(Restart(), max_epochs=1)
    assert len(batches) == 3


class Broadcast(L.Callback):
    """Calls what Lightning calls at each batch of several processes."""

    def on_train_batch_start(self, trainer, *_):
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()


@pytest.mark.parametrize(("callbacks", "broadcasts"), [([], 3), ([GracefulStop()], 0)], ids=["stock", "GracefulStop"])
def test_a_run_with_graceful_stop_skips_the_broadcast_of_sigterm(monkeypatch, callbacks, broadcasts):
    calls = []
    monkeypatch.setattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor", lambda self: calls.append(1))
    fit(*callbacks, Broadcast(), max_epochs=1)
    assert len(calls) == broadcasts


def test_the_broadcast_of_sigterm_is_a_method_that_each_batch_calls_whatever_ran_before():
    fit(GracefulStop(), max_epochs=1)  # skips it on its own trainer, and leaves Lightning's class as it is
    defined = vars(_TrainingEpochLoop)["_broadcast_sigterm_tensor"]
    assert "torch.distributed.broadcast(" in inspect.getsource(defined)
    assert "self._broadcast_sigterm_tensor()" in inspect.getsource(_TrainingEpochLoop.advance)


def test_lightning_handles_sigterm_unless_it_is_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    trainer = L.Trainer(accelerator="cpu", logger=False)
    connector = trainer._signal_connector
    try:
        connector.register_signal_handlers()
        assert signal.getsignal(signal.SIGTERM) is not before
        connector.teardown()
        private_names.leave_sigterm_alone(trainer)
        connector.register_signal_handlers()
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        connector.teardown()
    assert "_signal_connector.register_signal_handlers()" in inspect.getsource(L.Trainer._run)


def test_lightnings_thread_watches_the_list_of_processes_of_the_launcher():
    assert "_launch_process_observer(self.procs)" in inspect.getsource(_SubprocessScriptLauncher.launch)
    processes = [SimpleNamespace(poll=lambda: 143, returncode=143, pid=1)]
    watcher = _ChildProcessObserver(main_pid=-1, child_processes=processes)
    stop = SimpleNamespace(strategy=SimpleNamespace(launcher=SimpleNamespace(procs=processes)))
    GracefulStop().on_exception(stop, None, SystemExit(143))
    assert watcher._run()  # it has nothing more to watch, and kills nothing


def test_strategies():
    class Trainer:
        def __init__(self, strategy: Strategy) -> None:
            self.strategy = strategy

    assert not private_names.takes_unused_parameters(Trainer(DDPStrategy()))
    assert private_names.takes_unused_parameters(Trainer(DDPStrategy(find_unused_parameters=True)))
    assert private_names.takes_unused_parameters(Trainer(ModelParallelStrategy()))
    strategy = ModelParallelStrategy()
    assert strategy._data_parallel_size == "auto"
    private_names.set_data_parallel_size(strategy, 3)
    assert strategy._data_parallel_size == 3
    private_names.set_process_group_backend(strategy, "cpu:gloo,cuda:nccl")
    assert strategy.process_group_backend == "cpu:gloo,cuda:nccl"


def test_a_module_moves_without_its_shards(monkeypatch):
    monkeypatch.setattr(private_names, "DTensor", nn.Parameter)
    module = BoringModel()
    module.register_buffer("table", torch.ones(2))
    module.metric = CorpusLoss()
    private_names.move_all_but_shards(module, torch.device("meta"))
    assert [t.device.type for t in (module.table, module.metric.nats, module.layer.weight)] == ["meta", "meta", "cpu"]
    assert module.device.type == "meta"


def test_activations_are_computed_again_in_the_backward_pass():
    calls = []
    layer = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    layer[0].register_forward_hook(lambda *_: calls.append(1))
    private_names.recompute_in_backward(layer)
    layer(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert len(calls) == 2


def test_metrics_keep_their_dtypes_where_a_module_is_cast():
    metric = CorpusLoss()
    nn.ModuleList([metric]).to(torch.bfloat16)
    assert metric.nats.dtype == torch.float64


def test_names_of_options():
    parser = ArgumentParser(add_help=False)
    parser.add_argument("--width")
    assert private_names.option_names(parser) == ["width"]
    assert private_names.default_classes(parser) == {}
    parser = JSONArgumentParser()
    parser.add_argument("--width", default={"height": 1})
    default = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    parser.add_argument("--optimizer", type=Callable[[Iterable], torch.optim.Optimizer], default=default)
    assert private_names.default_classes(parser) == {"optimizer": default}


def test_names_in_configurations_are_imported_if_the_longest_entry_allows_it():
    assert {"os", "subprocess", "pickle", "builtins.exec"} <= set(private_names.NEVER_IMPORTED)
    parser = JSONArgumentParser(exit_on_error=False)
    parser.add_argument("--make", type=Callable[[], Any])
    with private_names.restricted_imports({"*": False, "torch.nn": True, "torch.nn.init": False}):
        assert parser.parse_args(["--make=torch.nn.ReLU"])
        for denied in ("collections.Counter", "torch.nn.init.ones_"):
            with pytest.raises(
                ArgumentError, match=r"Importing '[\w.]+' is not allowed, denied by the '[\w.*]+' entry "
            ):
                parser.parse_args([f"--make={denied}"])
    assert parser.parse_args(["--make=torch.nn.init.ones_"])


def test_the_class_that_a_factory_builds():
    parser = JSONArgumentParser()
    parser.add_argument("--optimizer", type=Callable[[Iterable], torch.optim.Optimizer])
    factory = parser.instantiate(parser.parse_args(["--optimizer=torch.optim.SGD", "--optimizer.lr=0.1"])).optimizer
    assert private_names.built_class(factory) is torch.optim.SGD
    assert private_names.built_class(torch.optim.SGD) is torch.optim.SGD
    assert private_names.built_class(partial(torch.optim.SGD, lr=0.1)) is torch.optim.SGD
    assert private_names.built_class(lambda groups: torch.optim.SGD(groups, lr=0.1)) is None
    assert private_names.built_class(partial(max, default=0)) is None


def test_a_wandb_logger_is_set_up_after_it_is_built(tmp_path):
    logger = private_names.OpenWandbLogger(project="p", mode="disabled")
    assert (logger.settings["project"], logger.run) == ("p", None)
    assert "anonymous" in logger.settings
    logger.store_in(str(tmp_path))
    logger.continue_run("abc")
    assert (logger.save_dir, logger.version, logger.settings["id"]) == (str(tmp_path), "abc", "abc")
    assert logger.experiment is logger.run
    assert logger.run.id == "abc"
    logger.run.finish()  # or the next logger of this process would use the run
    other = object()
    logger.run = other
    assert logger.experiment is other
    expected = {"artifact_or_path", "aliases", "is_user_created", "use_after_commit"}
    assert expected <= set(inspect.signature(wandb.Run._log_artifact).parameters)


def test_the_process_of_wandb_can_be_ended():
    assert "x_transaction_log_flush_interval" in wandb.Settings.model_fields
    wandb.teardown()  # that of other tests
    assert private_names.wandb_service() is None
    wandb.setup(wandb.Settings(mode="offline"))
    private_names.wandb_service().kill()
    with pytest.raises((SystemExit, ConnectionError)):  # of the killed process
        wandb.teardown()
    assert private_names.wandb_service() is None


def test_the_random_states_of_unused_gpus_are_left_alone(monkeypatch):
    assert "with isolate_rng():" in inspect.getsource(L.Trainer._run_stage)
    monkeypatch.setattr(trainer_module, "isolate_rng", trainer_module.isolate_rng)
    private_names.leave_unused_gpus_alone()
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: asked.append("cuda") or False)
    before = torch.get_rng_state()
    with trainer_module.isolate_rng():
        torch.rand(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert not asked


def test_loggers_are_given_the_number_of_the_step():
    assert "_batches_that_stepped" in inspect.getsource(logger_connector)


def test_torch_says_whether_it_finds_a_compiler():
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        assert not private_names.finds_cpp_compiler()


def test_tensors_without_data_have_shapes_only():
    with private_names.without_data():
        matrix = torch.ones(10**6, 10**6)
        assert (matrix @ matrix).shape == (10**6, 10**6)
        assert not private_names.has_data(matrix)
    assert private_names.has_data(torch.ones(2))


def test_the_largest_memory_of_tensors_is_seen():
    with private_names.memory_watched() as most:
        first = torch.zeros(1000)
        second = first + 1
        part = second[:10]
        del first, second
        assert most() == 8000
        third = part.new_zeros(500)  # the part keeps the second
    assert (most(), third.sum()) == (8000, 0)


def test_torch_divides_a_function_as_it_is_told():  # tests/command/test_estimate.py traces one
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._functorch.aot_autograd import aot_module_simplified

    assert "partition_fn" in inspect.signature(aot_module_simplified).parameters
    assert "inner_exception" in inspect.getsource(BackendCompilerFailed)
