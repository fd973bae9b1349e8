"""Small inputs, mutated at random: each is read, or refused in one line.

2,000 inputs of six kinds are drawn from a seed: JSON lines, tables, YAML, tokenizers, arrays, and folders of runs.
Some are changed as bytes, others as the values that they hold. A batch of them is read in a copy of this process, which
works in a folder of its own. It is a fault if an input causes a traceback, takes longer than `SECONDS`, ends the
process, or makes it write, run or delete anything outside of that folder.

    python tests/benchmarks/fuzz.py [KIND ...] [--seed 0] [--share 1.0] [--keep FOLDER]
"""

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import RUNS, TINY, text

import datamodules
from datamodules.cache import cached_array
from datamodules.tokenizers import byte_tokenizer, decode_stream, encode, load_tokenizer, token_byte_lengths, vocab_size
from experiments.__main__ import _mistake_behind, main

ROOT = Path(__file__).parents[2]
COUNTS = {"json": 500, "table": 300, "yaml": 400, "tokenizer": 300, "array": 200, "run": 300}
SECONDS = 30  # on a busy machine; an input takes 0.01 to 1
BATCH = 25
ODD_BYTES = [
    *(
        b"\x00",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\r",
        b"\n",
        b"\n\n",
        b'"',
        b"'",
        b",",
        b";",
        b"{",
        b"[",
        b"]",
        b"}",
    ),
    *(
        b":",
        b"\\",
        b"\\ud83d",
        b"\\u0000",
        b"\xe2\x80\xa8",
        b"\xed\xa0\xbd",
        b"&a",
        b"*a",
        b"!!python/none",
        b"\t",
        b"1e999",
    ),
    *(b"NaN", b"-", b"#", b"[" * 3000, b"9" * 5000, b" " * 10_000, b"a" * 200_000),
]
ODD_VALUES = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        10**30,
        1.5,
        float("nan"),
        float("inf"),
        "",
        " ",
        "0",
        "null",
        "\ud83d",
        "\0",
        "é" * 9,
    ),
    *("a" * 10_000, "../../outside", "/etc/passwd", "~", "${HOME}", [], {}, [[]], [None], {"": None}, ["a", 1, None]),
    *({"class_path": "os.system"}, {"class_path": "builtins.print", "init_args": {}}, "2026-01-01", "1e5", "*", "[1]"),
    "runs/x",
]
RECORD = {"question": "Who?", "answer": "Ann [1].", "references": ["Ann did.", "Bob saw."]}
REVIEW = {"text": "a fine film", "label": 1, "film": "7"}


def named(name: str) -> Any:
    """Return a class or function of the datamodules by its name: shared code does not name topics."""
    modules = (importlib.import_module(m.name) for m in pkgutil.walk_packages(datamodules.__path__, "datamodules."))
    return next(getattr(module, name) for module in modules if hasattr(module, name))


# --- mutations --------------------------------------------------------------------------------------------------------


def change_bytes(content: bytes, draw: random.Random) -> bytes:
    """Return bytes with one to three changes."""
    for _ in range(draw.randint(1, 3)):
        place, end = draw.randrange(len(content) + 1), draw.randrange(len(content) + 1)
        how = draw.randrange(6)
        if how == 0:
            content = content[:place] + draw.choice(ODD_BYTES) + content[place:]
        elif how == 1:
            content = content[:place] + draw.choice(ODD_BYTES) + content[place + draw.randint(1, 8) :]
        elif how == 2:
            content = content[:place]
        elif how == 3:
            content = content[: min(place, end)] + content[max(place, end) :]
        elif how == 4:
            content = content[:place] + content[min(place, end) : max(place, end)] + content[place:]
        else:
            with contextlib.suppress(UnicodeError):
                content = content.decode().encode(draw.choice(["utf-16", "utf-8-sig", "latin-1", "cp1252", "utf-32"]))
    return content


def change_values(value: Any, draw: random.Random) -> Any:
    """Return a value of JSON or YAML with a part replaced, removed, renamed or repeated."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        how = draw.random()
        if how < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if how < 0.2:
            return {(draw.choice(["", "a", 1, None, key[:-1]]) if k == key else k): v for k, v in value.items()}
        return value | {key: change_values(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        i = draw.randrange(len(value))
        return draw.choice([[*value[:i], change_values(value[i], draw), *value[i + 1 :]], value[:i], value + value])
    return draw.choice(ODD_VALUES)


def changed_json(row: Any, draw: random.Random) -> bytes:
    """Return a changed value as JSON."""
    return json.dumps(change_values(row, draw), default=str).encode()


# --- kinds: each writes an input into the working folder, and returns what reads it ----------------------------------


def json_lines(draw: random.Random) -> Callable[[], Any]:
    row, read = draw.choice([(RECORD, read_records), (REVIEW, read_reviews)])
    lines = [json.dumps(row | {"n": n}).encode() for n in range(5)]
    if draw.random() < 0.5:
        lines[draw.randrange(5)] = changed_json(row, draw)
        content = draw.choice([b"\n", b"\r\n", b"\n\n"]).join(lines)
    else:
        content = change_bytes(b"\n".join(lines), draw)
    file = Path("a.jsonl")
    file.write_bytes(content)
    return lambda: read(str(file))


def table(draw: random.Random) -> Callable[[], Any]:
    content = b"text,label,film\n" + b"".join(b'"a fine, %d film",%d,7\n' % (n, n % 2) for n in range(5))
    file = Path("a.csv")
    file.write_bytes(change_bytes(content, draw))
    return lambda: read_reviews(str(file))


def read_records(file: str) -> None:
    data = named("GPT2WebGLMQADataModule")(
        named("JSONLines")(file, val_fraction=0.2), 64, 1, "byte", max_answer_tokens=8
    )
    data.setup("fit")
    for batch in data.train_dataloader():
        assert batch["input_ids"].shape == (1, 64)


def read_reviews(file: str) -> None:
    for side in ("train", "val", "test"):
        texts = [review.text for review in named("ReviewFiles")(file).reviews(side)]
        encode(byte_tokenizer(), texts)


def configuration(draw: random.Random) -> Callable[[], Any]:
    config = yaml.safe_load(TINY.read_text())
    config["trainer"] |= {"max_steps": 2, "val_check_interval": 2}
    file = Path("a.yaml")
    if draw.random() < 0.6:
        file.write_text(yaml.safe_dump(change_values(config, draw), sort_keys=False))
    else:
        file.write_bytes(change_bytes(yaml.safe_dump(config, sort_keys=False).encode(), draw))
    Path("text.txt").write_text(text(1_000))
    flags = draw.choice([[], ["--trainer.fast_dev_run=true"], ["--print_config"]])
    # Numbers that mutations made large would train for hours or fill the memory.
    limits = ["--trainer.max_steps=2", "--model.n_embd=16", "--model.n_layer=1", "--data.block_size=16"]
    return lambda: main(["fit", "-c", str(file), *limits, *flags])


def tokenizer(draw: random.Random) -> Callable[[], Any]:
    content = Path("../world/tokenizer.json").read_bytes()
    content = changed_json(json.loads(content), draw) if draw.random() < 0.7 else change_bytes(content, draw)
    Path("tokenizer").mkdir()
    Path("tokenizer/tokenizer.json").write_bytes(content)
    if draw.random() < 0.3:
        settings = {"model_max_length": 8, "eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
        Path("tokenizer/tokenizer_config.json").write_bytes(changed_json(settings, draw))
    name = draw.choice(["tokenizer", "tokenizer/tokenizer.json"])

    def read() -> None:
        loaded = load_tokenizer(name)
        (ids,) = encode(loaded, ["naïve text 123.\n"])
        "".join(decode_stream(loaded, ids.tolist()))
        assert len(token_byte_lengths(loaded)) == vocab_size(loaded)

    return read


def array(draw: random.Random) -> Callable[[], Any]:
    rows = np.random.default_rng(0).normal(size=(6, 4))
    made = draw.choice(
        [rows, rows.astype(np.float32), rows.astype("O"), rows[0], rows.astype(int), rows[:, :0], rows * np.nan]
    )
    file = io.BytesIO()
    np.save(file, made)
    content = file.getvalue() if draw.random() < 0.2 else change_bytes(file.getvalue(), draw)
    Path("a.npy").write_bytes(content)
    header = json.dumps({"wpe.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    stored = len(header).to_bytes(8, "little") + header + bytes(24)
    Path("a.safetensors").write_bytes(change_bytes(stored, draw))
    readers = [
        lambda: named("load_positions")("a.npy", draw.choice([None, 4])),
        lambda: cached_array(Path("a.npy"), lambda: np.arange(3)),
        lambda: named("read_tensor")("a.safetensors", "wpe.weight"),
    ]
    return draw.choice(readers)


def run_folder(draw: random.Random) -> Callable[[], Any]:
    run = RUNS / "a"
    shutil.copytree("../world/run", run)
    shutil.copy("../world/text.txt", "text.txt")
    files = sorted(path for path in run.rglob("*") if path.is_file())
    file = draw.choice(files)
    how = draw.random()
    if how < 0.5:
        file.write_bytes(change_bytes(file.read_bytes(), draw))
    elif how < 0.75 and file.suffix in (".json", ".yaml"):
        value = yaml.safe_load(file.read_text())
        file.write_text(
            yaml.safe_dump(change_values(value, draw))
            if file.suffix == ".yaml"
            else json.dumps(change_values(value, draw))
        )
    else:
        file.unlink()
        if draw.random() < 0.5:
            file.mkdir()
    if draw.random() < 0.2:  # a copy, or another name
        run.rename(run := run.with_name("b [1]"))
    config, limit = str(run / "config.yaml"), "--trainer.max_steps=2"
    commands = [
        ["compare", str(run)],
        ["compare", "runs"],
        ["generate", "--run", str(run), "--prompt", "a", "--max_new_tokens", "4"],
        ["validate", "-c", config, "--ckpt_path", "best"],
        ["validate", "-c", config, "--ckpt_path", str(run / "checkpoints/last.ckpt")],
        ["fit", "-c", config, "--ckpt_path", "last"],
        ["fit", "-c", config, "--auto_resume"],
        ["fit", "-c", config, "--run.name", "again", limit],
    ]
    command = draw.choice(commands)
    return lambda: main(command)


KINDS = {
    "json": json_lines,
    "table": table,
    "yaml": configuration,
    "tokenizer": tokenizer,
    "array": array,
    "run": run_folder,
}


# --- one batch --------------------------------------------------------------------------------------------------------


def forbid_outside(folder: Path) -> None:
    """Raise a fault whenever this process is about to write, delete or run anything outside of a folder."""
    allowed = (str(folder), "/dev/", "/proc/")

    def inside(path: Any) -> bool:
        if isinstance(path, int) or path is None:
            return True
        name = os.path.realpath(os.fsdecode(path))
        return name.startswith(allowed) or "__pycache__" in name

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or flags & (
                os.O_WRONLY | os.O_RDWR | os.O_CREAT
            )
            if writes and not inside(path):
                raise Outside(f"opens {path!r} to write")
        elif event in ("os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "shutil.rmtree"):
            if not inside(arguments[0]) and not (event == "os.mkdir" and Path(os.fsdecode(arguments[0])).is_dir()):
                raise Outside(f"{event} {arguments[0]!r}")
        elif event in ("os.rename", "os.link", "os.symlink", "shutil.copytree", "shutil.move"):
            if not inside(arguments[1]):
                raise Outside(f"{event} to {arguments[1]!r}")
        elif event in ("os.system", "os.exec", "os.posix_spawn"):
            raise Outside(f"{event} {arguments[0]!r}")

    sys.addaudithook(watch)


class Outside(BaseException):
    """Something outside of the folder would be written, or run."""


class TooLong(BaseException):
    """An input takes too long."""


def outcome(read: Callable[[], Any]) -> str:
    """Return `read`, `refused`, or what is wrong."""
    printed = io.StringIO()
    code: Any = 0
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(printed):
            read()
    except SystemExit as leave:
        code = leave.code or 0
    except (Outside, TooLong) as wrong:
        return f"{type(wrong).__name__}: {wrong}"
    except BaseException as error:
        if isinstance(error, Exception) and (mistake := _mistake_behind(error)) is not None:
            return "refused" if "\n" not in str(mistake).strip() else f"several lines: {mistake}"
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if Path(f.filename).is_relative_to(ROOT) and ".venv" not in f.filename]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(ours[-3:]))
        return f"traceback: {type(error).__name__}: {error} ({where})"
    lines = printed.getvalue().strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if "Traceback" in printed.getvalue() or (code and errors != lines[-1:]):
        return f"exit code {code}: {lines[-1:]}"
    return "refused" if code else "read"


def run_batch(kind: str, numbers: range, seed: int, folder: Path, results: Path) -> None:
    """Read a batch of inputs, each in a folder of its own, and write an outcome a line."""

    def too_long(*_: Any) -> None:
        raise TooLong(f"longer than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    os.environ |= {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "LLM_TRAIN_CACHE": "cache", "HOME": str(folder)}
    os.environ |= {"HF_HOME": str(folder / "hf"), "MPLCONFIGDIR": str(folder / "mpl"), "CUDA_VISIBLE_DEVICES": ""}
    sys.argv = ["llm-train"]
    tempfile.tempdir = str(folder)
    forbid_outside(folder)
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what libraries in other languages print
        os.dup2(null, stream)
    with results.open("a", buffering=1) as file:
        for number in numbers:
            own = folder / f"{kind}{number}"
            own.mkdir()
            os.chdir(own)
            draw = random.Random(f"{seed} {kind} {number}")
            read = KINDS[kind](draw)
            file.write(f"{number}\tstarted\n")
            signal.alarm(SECONDS)
            found = outcome(read)
            signal.alarm(0)
            torch.use_deterministic_algorithms(False)
            torch.set_default_dtype(torch.float32)
            file.write(f"{number}\t{' '.join(found.split())[:400]}\n")
            os.chdir(folder)
            if found in ("read", "refused"):
                shutil.rmtree(own, ignore_errors=True)


def make_world(folder: Path) -> None:
    """Train the run whose files are changed, and learn a tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir()
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator([text(500)], trainer)
    backend.save(str(folder / "tokenizer.json"))
    os.chdir(folder)
    os.environ |= {"WANDB_MODE": "disabled", "LLM_TRAIN_CACHE": "cache"}
    sys.argv = ["llm-train"]
    Path("text.txt").write_text(text(1_000))
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        main(["fit", "-c", str(TINY), "--trainer.max_steps=4", "--trainer.val_check_interval=2"])
    if not (RUNS / "tiny/model").is_dir():
        sys.exit(printed.getvalue())
    shutil.copytree(RUNS / "tiny", "run")


def fuzz(kinds: list[str], seed: int, share: float, folder: Path) -> dict[str, Counter[str]]:
    """Return the outcomes of each kind; faults are printed."""
    fork = multiprocessing.get_context("fork")
    counts: dict[str, Counter[str]] = {}
    world = fork.Process(target=make_world, args=(folder / "world",))
    world.start()
    world.join()
    for kind in kinds:
        counts[kind] = Counter()
        left = range(round(COUNTS[kind] * share))
        while left:
            results = folder / "results.txt"
            results.unlink(missing_ok=True)
            process = fork.Process(target=run_batch, args=(kind, left[:BATCH], seed, folder, results))
            process.start()
            process.join(SECONDS * 4 + BATCH * 10)
            if process.is_alive():
                process.kill()
                process.join()
            done = dict(line.split("\t", 1) for line in results.read_text().splitlines()) if results.is_file() else {}
            for number in left[:BATCH]:
                found = done.get(str(number), "" if done else "started").replace("started", "the process ended")
                if not found:  # after one that ended the process
                    left = left[left.index(number) :]
                    break
                if found not in ("read", "refused"):
                    print(f"{kind} {number}: {found}", flush=True)
                    found = "fault"
                counts[kind][found] += 1
            else:
                left = left[BATCH:]
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="share of the inputs")
    parser.add_argument("--keep", type=Path, help="folder that keeps the inputs of faults")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        found = fuzz(options.kinds or list(KINDS), options.seed, options.share, folder)
    print("| kind | inputs | read | refused in one line | faults |\n|---|---|---|---|---|")
    for kind, counts in found.items():
        print(f"| {kind} | {counts.total()} | {counts['read']} | {counts['refused']} | {counts['fault']} |")
    print(f"{time.monotonic() - began:.0f} s")
    sys.exit(1 if any(counts["fault"] for counts in found.values()) else 0)
