"""`llm-train generate`: continue a prompt with the model of a run, or answer questions in the terminal."""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.errors import CommandParser, UserError
from experiments.working_folder import importable

if TYPE_CHECKING:  # imported where they are used: the help answers without them
    import numpy as np
    import torch

    from experiments.api import Run


def read_references(files: Iterable[Path]) -> list[str]:
    """Return the paragraphs of text files in UTF-8; empty lines separate them."""
    found: list[str] = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"--references {file}: cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise UserError(f"--references {file}: is not UTF-8 ({error})") from error
        if not text.strip():
            raise UserError(f"--references {file}: is empty; each paragraph is a reference")
        found += [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text.strip())]
    return found


def chat(answer: Callable[[str, Sequence[str]], None], references: Sequence[str]) -> None:
    """Ask for questions until one is empty, the input ends, or Ctrl-C.

    Args:
        answer: Prints the answer to a question from references.
        references: References of all questions. If empty, the user is asked for references, and for others after an
            empty question.

    Raises:
        UserError: If the input is no terminal and ends without a question.
    """
    given, n_questions = list(references), 0
    try:
        while True:
            if not references:
                print("References, one a line, then an empty line:")
                given = [line.strip() for line in iter(input, "")]
            for number, text in enumerate(given, start=1):
                print(f"[{number}] {text}")
            while question := input("\nQuestion: ").strip():
                answer(question, given)
                n_questions += 1
            if references:
                return
    except (EOFError, KeyboardInterrupt) as error:
        print()
        if isinstance(error, EOFError) and not n_questions and not sys.stdin.isatty():
            raise UserError(
                "--chat: the input ended without a question; without --references, an empty line ends the references "
                "and the question follows it; --chat --prompt QUESTION answers one question"
            ) from error


def main(args: Sequence[str]) -> None:
    """Print a prompt and its continuation, or the answers to questions, token by token."""
    options = _parse(args)
    from experiments import trust

    packages = trust.allowed(args)
    with importable(packages):
        _generate(options, packages)


def _generate(options: argparse.Namespace, packages: Sequence[str]) -> None:
    import torch

    from experiments import api
    from lightning_modules.common.messages import say

    run = api.load_run(options.run, options.checkpoint, allow=packages)
    run.module.to(dtype_of_weights(options.precision, run))
    generator = torch.Generator(run.module.device).manual_seed(options.seed)

    def stream(prompt: "str | np.ndarray", max_new_tokens: int, temperature: float) -> Iterator[str]:
        """Yield the text that follows a prompt, a text or token ids of shape (T,)."""
        if options.temperature is not None:
            temperature = options.temperature
        return run.stream(prompt, max_new_tokens, temperature, options.top_k, options.top_p, generator)

    try:
        if options.chat:
            answer, references = _answering(options, run, stream), read_references(options.references)
            if options.prompt is None:
                chat(answer, references)
            else:
                answer(options.prompt, references)
        else:
            longest = 200 if options.max_new_tokens is None else options.max_new_tokens
            texts = stream(options.prompt, longest, temperature=0.8)
            first = next(texts, "")  # before anything is printed, since it may refuse the arguments
            _print(chain([options.prompt + first], texts))
            if _learned_to_answer(run):
                say("the run has learned to answer questions: with --chat, the prompt is a question")
    except ValueError as error:
        raise UserError(f"generate: {error}") from error


def _learned_to_answer(run: "Run") -> bool:
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    try:
        return hasattr(run.data_class, "prompts")
    except MisconfigurationException:  # a class of another package, which may not be imported
        return False


def dtype_of_weights(precision: str | None, run: "Run") -> "torch.dtype":
    """Return the dtype of the weights: the one asked for, or on a GPU bfloat16 if the run was trained with it."""
    import torch

    if precision is None and run.module.device.type == "cuda":
        precision = str(run.config.get("trainer", {}).get("precision"))
    return torch.bfloat16 if str(precision).startswith("bf16") else torch.float32


def _print(texts: Iterable[str]) -> None:
    for text in texts:
        print(text, end="", flush=True)
    print()


def _answering(
    options: argparse.Namespace, run: "Run", stream: Callable[..., Iterator[str]]
) -> Callable[[str, Sequence[str]], None]:
    """Return a function that prints answers, with prompts in the format that the run was trained on."""
    arguments = run.data_arguments
    if not hasattr(run.data_class, "prompts"):
        raise UserError(
            f"--chat: {run.folder} has not learned to answer ({run.data_class.__name__} has no prompts); give --prompt"
        )
    prompts = run.data_class.prompts(run.tokenizer, arguments)
    longest = arguments["max_answer_tokens"] if options.max_new_tokens is None else options.max_new_tokens
    if longest >= prompts.block_size:
        raise UserError(
            f"--max_new_tokens {longest}: question and answer have {prompts.block_size} tokens together; give fewer"
        )

    def answer(question: str, references: Sequence[str]) -> None:
        prompt = prompts.prompt(question, references, longest)
        if prompt is None:
            most = prompts.block_size - longest
            what = f"too long: with an answer of {longest} tokens, a prompt may have {most}"
            if options.prompt is not None:
                raise UserError(f"--prompt is {what}")
            print(f"({what})")
            return
        n_read = len(prompt.references)
        if prompt.n_cut or n_read < len(references):
            print(f"(read {n_read} of {len(references)} references{', the last one in part' * prompt.n_cut})")
        texts = stream(prompt.ids, longest, temperature=0.0)
        first = next(filter(None, map(str.lstrip, texts)), "")  # without leading space
        _print(chain([first], texts))

    return answer


def _parse(args: Sequence[str]) -> argparse.Namespace:
    description = "Continue a prompt with the model of a run, or ask it questions."
    parser = CommandParser(prog="llm-train generate", description=description)
    parser.add_argument("--run", type=Path, required=True, help="run folder, such as runs/TOPIC/NAME")
    parser.add_argument("--prompt", help="text to continue; with --chat, the question to answer")
    parser.add_argument("--chat", action="store_true", help="ask questions, in the format that the run was trained on")
    parser.add_argument(
        "--references", type=Path, nargs="+", default=[], metavar="FILE",
        help="text files whose paragraphs are the references of a chat (default: ask for them; with --prompt, none)",
    )  # fmt: skip
    parser.add_argument(
        "--max_new_tokens", type=int, help="length of the text (default: 200; in a chat, the run's max_answer_tokens)"
    )
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest token (default: 0.8; in a chat, 0)")
    parser.add_argument("--top_k", type=int, help="sample from this many likeliest tokens only")
    parser.add_argument(
        "--top_p", type=float, help="sample from the smallest set of tokens with this probability (above 0, at most 1)"
    )
    parser.add_argument(
        "--precision", choices=["32", "bf16"], help="of the weights (default: 32; on a GPU, bf16 if the run had it)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default: 0)")
    parser.add_argument("--checkpoint", choices=["best", "last"], default="best", help="which weights (default: best)")
    parser.add_argument("--allow", metavar="PACKAGE", help="package of your own whose classes the run may name")
    options = parser.parse_args(args[1:])
    if options.prompt is None and not options.chat:
        parser.error("give --prompt TEXT, --chat or both")
    if options.prompt == "":
        parser.error("--prompt is empty: give at least one character to continue")
    if options.references and not options.chat:
        parser.error("--references are for --chat: write them into the prompt")
    if not 0 <= options.seed < 2**63:
        parser.error(f"--seed {options.seed}: must be in [0, 2^63)")
    return options
