"""Values of every argument of Lightning's Trainer, and what a run with them must show.

After "refused:" is a part of the line that refuses a value. A value of several words sets several arguments; a word
with a dot sets an argument of a class.
"""

import csv
import math
from pathlib import Path

CALLBACKS = "lightning.pytorch.callbacks."
FLAGS: dict[str, list[str]] = {
    "accelerator": ["cpu", "auto", "gpu refused: ", "tpu refused: ", "mps refused: ", "abacus refused: abacus"],
    "strategy": [
        "auto",
        "ddp",
        "ddp_find_unused_parameters_true",
        "fsdp refused: ",
        "deepspeed refused: ",
        '{"class_path":"lightning_modules.runtime.sharded.FullyShardedStrategy"}',
    ],
    "devices": ["1", "auto", "0 refused: ", "[0] refused: ", "many refused: "],
    "num_nodes": ["1", "0 refused: "],
    "precision": [
        "null",
        "32-true",
        "64-true",
        "bf16-mixed",
        "bf16-true",
        "16-mixed",
        "16-true",
        "32",
        "64",
        "16",
        "bf16",
        "transformer-engine refused: ",
        "transformer-engine-float16 refused: ",
    ],
    "logger": ["false", "true", "null", "lightning.pytorch.loggers.CSVLogger logger.save_dir=csv"],
    "callbacks": [
        "null",
        "[]",
        f"+{CALLBACKS}Timer callbacks.duration=00:00:10:00",
        f"+{CALLBACKS}Timer callbacks.duration=00:00:00:00",
        f"+{CALLBACKS}EarlyStopping callbacks.monitor=val/loss",
        f"+{CALLBACKS}ModelCheckpoint",
        f"+{CALLBACKS}LearningRateMonitor",
        f"+{CALLBACKS}DeviceStatsMonitor",
        f"+{CALLBACKS}ModelSummary",
        f"+{CALLBACKS}StochasticWeightAveraging callbacks.swa_lrs=0.01 refused: swa_epoch_start",
        f"+{CALLBACKS}TQDMProgressBar refused: multiple progress bar",
        f"+{CALLBACKS}RichProgressBar refused: multiple progress bar",
        f"+{CALLBACKS}LearningRateFinder refused: optimizer.lr",
        f"+{CALLBACKS}BatchSizeFinder refused: data.batch_size",
        f"+{CALLBACKS}OnExceptionCheckpoint callbacks.dirpath=checkpoints",
        f"+{CALLBACKS}EarlyStopping refused: monitor",
        f"+{CALLBACKS}EarlyStopping callbacks.monitor=val/lost refused: val/lost",
        f"+{CALLBACKS}ModelCheckpoint callbacks.monitor=val/lost callbacks.save_top_k=2",
        f"+{CALLBACKS}ModelCheckpoint callbacks.every_n_train_steps=1 callbacks.save_top_k=-1",
        f"+{CALLBACKS}ModelCheckpoint callbacks.save_last=link",
        f"+{CALLBACKS}ModelCheckpoint callbacks.save_top_k=3 refused: monitor=None",
        f"+{CALLBACKS}LearningRateMonitor callbacks.log_momentum=true callbacks.log_weight_decay=true",
        f"+{CALLBACKS}LearningRateMonitor logger=false refused: no logger",
        f"+{CALLBACKS}DeviceStatsMonitor callbacks.cpu_stats=true",
        f"+{CALLBACKS}ModelSummary callbacks.max_depth=-1",
        f"+{CALLBACKS}RichModelSummary",
        f"+{CALLBACKS}RichProgressBar enable_progress_bar=false",
        f"+{CALLBACKS}ProgressBar refused: multiple progress bar",
        f'+{CALLBACKS}GradientAccumulationScheduler callbacks.scheduling={{"0":2}}',
        f"+{CALLBACKS}StochasticWeightAveraging callbacks.swa_lrs=0.01 callbacks.swa_epoch_start=1 max_epochs=2",
        f"+{CALLBACKS}WeightAveraging",
        f"+{CALLBACKS}EMAWeightAveraging callbacks.decay=0.9",
        f"+{CALLBACKS}ModelPruning callbacks.pruning_fn=l1_unstructured callbacks.amount=0.1",
        f"+{CALLBACKS}ModelPruning callbacks.pruning_fn=lost refused: lost",
        f"+{CALLBACKS}SpikeDetection",
        f"+{CALLBACKS}ThroughputMonitor callbacks.batch_size_fn=builtins.len callbacks.window_size=2",
        f"+{CALLBACKS}LambdaCallback",
        f"+{CALLBACKS}LambdaCallback callbacks.on_fit_start=builtins.max refused: not supported between",
        f"+{CALLBACKS}BackboneFinetuning refused: BackboneFinetuning",
        f"+{CALLBACKS}BaseFinetuning refused: BaseFinetuning",
        f"+{CALLBACKS}BasePredictionWriter",
        f"+{CALLBACKS}Callback",
        f"+{CALLBACKS}Checkpoint",
    ],
    "fast_dev_run": ["true", "2"],
    "max_epochs": ["1", "2", "0 refused: nothing would be trained"],
    "min_epochs": ["1", "2"],
    "max_steps": ["1", "3", "0 refused: nothing would be trained"],
    "min_steps": ["1", "4"],
    "max_time": [
        "00:00:10:00",
        "00:00:00:00",
        '{"minutes":1}',
        "00:00:00:00 max_steps=-1 max_epochs=-1 refused: the length of the run",
    ],
    "limit_train_batches": ["0 refused: nothing would be trained", "1", "2", "0.5", "1.0", "2.5 refused: "],
    "limit_val_batches": ["0", "1", "0.5", "1.0"],
    "limit_test_batches": ["0", "1"],
    "limit_predict_batches": ["0", "1"],
    "overfit_batches": ["1", "2", "0.5", "1.0"],
    "val_check_interval": [
        "1",
        "2",
        "00:00:00:01",
        '{"seconds":1}',
        "0.5 check_val_every_n_epoch=1",
        "1.0 check_val_every_n_epoch=1",
        "1000000",
        "0.5 refused: also --trainer.check_val_every_n_epoch 1",
        "0 refused: for no validation, leave it out",
    ],
    "check_val_every_n_epoch": ["null", "1", "2", "0 refused: give 1 or more"],
    "num_sanity_val_steps": ["0", "1", "2", "-1", "-2 refused: give -1 or more"],
    "log_every_n_steps": ["1", "2", "0", "1000", "-1 refused: give 0 or more"],
    "enable_checkpointing": ["true", "false refused: ", "false callbacks=[]"],
    "enable_progress_bar": ["true", "false"],
    "enable_model_summary": ["true", "false"],
    "accumulate_grad_batches": ["2", "3", "0 refused: "],
    "gradient_clip_val": ["0", "0.1", "1", "-1 refused: give 0 or more"],
    "gradient_clip_algorithm": ["norm", "value", "value gradient_clip_val=0.1", "norm gradient_clip_val=0.1"],
    "deterministic": ["true", "warn", "false"],
    "benchmark": ["true", "false"],
    "inference_mode": ["true", "false"],
    "use_distributed_sampler": ["true", "false"],
    "profiler": ["simple", "advanced", "pytorch", "xla refused: ", "none refused: profiler"],
    "detect_anomaly": ["true"],
    "barebones": ["true refused: barebones"],
    "plugins": ["null", "[]", "lightning.pytorch.plugins.io.AsyncCheckpointIO"],
    "sync_batchnorm": ["true"],
    "reload_dataloaders_every_n_epochs": ["1", "2 max_epochs=2"],
    "default_root_dir": ["elsewhere refused: set run.root"],
    "enable_autolog_hparams": ["true", "false"],
    "model_registry": ["a_name"],
}
CASES = [(name, value) for name, values in FLAGS.items() for value in values]
# Arguments whose values do not go with those of others, and such values.
ALONE = {"strategy", "devices", "callbacks", "fast_dev_run", "plugins", "max_time", "enable_checkpointing"}
ALONE_VALUES = {
    *(("precision", value) for value in ("null", "16-true", "32", "64", "16", "bf16")),
    ("val_check_interval", "1000000"),
}


def combinations() -> list[list[str]]:
    """Return flags of runs with a value of every argument that goes with others; each value is in one of them."""
    together = {
        name: [v for v in values if " " not in v and (name, v) not in ALONE_VALUES]
        for name, values in FLAGS.items()
        if name not in ALONE
    }
    together = {name: values for name, values in together.items() if values}
    n_runs = max(map(len, together.values()))
    return [[f"--trainer.{name}={values[k % len(values)]}" for name, values in together.items()] for k in range(n_runs)]


def flags_of(name: str, value: str) -> tuple[list[str], str | None]:
    """Return the flags of a case, and a part of the line that refuses it, or `None`."""
    value, is_refused, refusal = value.partition(" refused: ")
    first, *others = value.split(" ")
    append, first = ("+", first[1:]) if first.startswith("+") else ("", first)
    flags = [f"--trainer.{name}{append}={first}", *(f"--trainer.{other}" for other in others)]
    return flags, refusal if is_refused else None


def fault(code: int, printed: str, run: Path) -> str:
    """Return what is wrong with the end of a run, or nothing: it has finite losses, or one line says why it fails."""
    lines = printed.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if "Traceback" in printed or (code and (code not in (1, 2) or errors != lines[-1:])) or (not code and errors):
        return f"exit code {code}: {lines[-1:]}"
    if (run / "metrics.csv").is_file():
        with (run / "metrics.csv").open() as file:
            losses = [(key, value) for row in csv.DictReader(file) for key, value in row.items() if "loss" in key]
        if not all(math.isfinite(float(value)) for _, value in losses if value):
            return f"losses that are not finite: {losses}"
    return ""
