"""`llm-train generate`: continues a prompt with the model of a run."""

import argparse
import importlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.tokenizers import encode
from experiments.run_folder import CHECKPOINTS, CONFIG
from lightning_modules.base import ExperimentModule
from lightning_modules.checkpoint_io import AtomicCheckpointIO


def load_run(run: Path, checkpoint: str, device: torch.device) -> ExperimentModule:
    """Builds the module of a run with the weights of one of its checkpoints.

    Args:
        run: Run folder.
        checkpoint: `best` or `last`; where there is no best one, the last one is taken.
        device: Where the module goes.

    Raises:
        MisconfigurationException: If the folder holds no run, or no checkpoint that is whole.
    """
    if not (run / CONFIG).is_file():
        raise MisconfigurationException(
            f"--run {run}: no {CONFIG} in it; give the folder of a run, such as runs/TOPIC/NAME"
        )
    path = run / CHECKPOINTS / f"{checkpoint}.ckpt"
    if checkpoint == "best" and not path.is_file():
        path = path.with_name("last.ckpt")
    loaded = AtomicCheckpointIO().load_checkpoint(path, map_location=device)
    module_name, class_name = yaml.safe_load((run / CONFIG).read_text())["model"]["class_path"].rsplit(".", 1)
    module_class = getattr(importlib.import_module(module_name), class_name)
    accepted = inspect.signature(module_class).parameters
    arguments = {name: value for name, value in loaded["hyper_parameters"].items() if name in accepted}
    module = module_class(**arguments | ({"compile": False} if "compile" in accepted else {}))
    if not hasattr(module, "generate"):
        raise MisconfigurationException(f"--run {run}: a {class_name} does not generate text")
    module.on_load_checkpoint(loaded)
    module.load_state_dict(loaded["state_dict"])
    return module.to(device).eval()


def decode_stream(tokenizer: object, tokens: Iterable[int]) -> Iterator[str]:
    """Text as it comes; the bytes of a character that several tokens make up are held back until it is whole.

    Args:
        tokenizer: A fast tokenizer of transformers, of bytes or characters.
        tokens: Token ids.
    """
    held: list[int] = []
    for token in tokens:
        held.append(token)
        text = tokenizer.decode(held)
        if not text.endswith("\N{REPLACEMENT CHARACTER}") or len(held) == 4:  # the longest character has four bytes
            yield text
            held = []
    yield tokenizer.decode(held)


def main(args: Sequence[str]) -> None:
    """Prints a prompt and its continuation, token by token.

    Args:
        args: Command line, `generate` first.
    """
    parser = argparse.ArgumentParser(
        prog="llm-train generate", description="Continue a prompt with the model of a run.", allow_abbrev=False
    )
    parser.add_argument("--run", type=Path, required=True, help="run folder, such as runs/decoder_pretrain/offline")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="length of the continuation (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top_k", type=int, help="draw from this many likeliest tokens only")
    parser.add_argument("--top_p", type=float, help="draw from the fewest tokens with this much probability (0 to 1)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed, the same text (default: 0)")
    parser.add_argument("--checkpoint", choices=["best", "last"], default="best", help="which weights (default: best)")
    options = parser.parse_args(args[1:])

    from transformers import PreTrainedTokenizerFast

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = load_run(options.run, options.checkpoint, device)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.run / "tokenizer")
    if not options.prompt:
        raise MisconfigurationException("--prompt is empty: give at least one character to continue")
    prompt = torch.from_numpy(encode(tokenizer, [options.prompt])[0].astype("int64"))[None].to(device)  # (1, T)
    try:
        tokens = module.generate(
            prompt,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            generator=torch.Generator(device).manual_seed(options.seed),
            stop_token=tokenizer.eos_token_id,
        )
        print(options.prompt, end="", flush=True)
        for text in decode_stream(tokenizer, (int(token) for token in tokens)):
            print(text, end="", flush=True)
        print()
    except ValueError as error:
        raise MisconfigurationException(f"generate: {error}") from error
