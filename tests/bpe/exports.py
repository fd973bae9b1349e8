"""A tokenizer that is exported."""

from pathlib import Path
from typing import Any

from exported import Exported

from lightning_modules.bpe import BPEModule


class Tokenizer(Exported):
    """A tokenizer without a model."""

    def export(self) -> None:
        """Write the folder of the tokenizer."""
        self.module.save_pretrained(self.folder)


def learned(folder: Path) -> Exported:
    """Return a tokenizer of three merges."""
    learner = BPEModule(vocabulary_size=300, model_max_length=12)
    learner.merges = [(b"a", b"t"), (b"t", b"h"), (b"th", b"at")]
    return Tokenizer(folder, learner, None, {"kind": "tokenizer", "text": "that hat"}, check)


def check(model: Exported, said: dict[str, Any]) -> None:
    """Check the token ids, the context and the end-of-text token."""
    ids = model.module.rust_tokenizer(model.module.merges).encode("that hat").ids
    assert said == {"ids": ids, "context": 12, "end": "<|endoftext|>"}
    assert len(ids) < len("that hat")


MODELS = {"learned": learned}
