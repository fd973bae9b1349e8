"""The threads of Hugging Face's `tokenizers`, which a copy of a process does not have.

The library encodes a batch on threads of its own. A process that is forked, such as a worker of a loader, would wait
for them for ever. The library therefore uses one thread in such a copy and prints a warning, unless the variable
`TOKENIZERS_PARALLELISM` is set; then it trusts the variable.
"""

import functools
import os

_VARIABLE = "TOKENIZERS_PARALLELISM"


@functools.cache
def use_threads() -> None:
    """Let the library use threads in this process and one in its copies, without a warning in each."""
    os.environ.setdefault(_VARIABLE, "true")
    os.register_at_fork(after_in_child=functools.partial(os.environ.update, {_VARIABLE: "false"}))
