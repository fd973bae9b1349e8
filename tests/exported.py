"""Parts of the decoders that Transformers has classes for."""

from typing import Any

LLAMA: dict[str, Any] = {"positions": "rotary", "norm": "rms", "feed_forward": "swiglu"}
NANOCHAT: dict[str, Any] = {
    "positions": "rotary",
    "norm": "rms_unweighted",
    "feed_forward": "relu2",
    "qk_norm": True,
    "embedding_norm": True,
    "bias": False,
}
