"""Counting of words in processes other than the one that reads the texts."""

import multiprocessing
import pickle
import signal
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.bpe.textbook import count_words
from lightning_modules.common.signals import STOPS, leave_to_the_parent


class WordCounter:
    """Counter of the words of texts, in this process or in others.

    The processes end when `close` is called, and when this process ends or is killed. The methods raise the errors
    of `count_words`, for these texts or earlier ones, and `MisconfigurationException` if a process was killed.

    Args:
        pattern: Pattern of words, as in `count_words`.
        special_tokens: Texts that are tokens as a whole.
        workers: Processes that count; 0 counts in this one. If the platform starts processes by `spawn`, a script needs
            its `if __name__ == "__main__"`.

    Attributes:
        words: Number of occurrences of each word in the texts that were added; complete after `wait()`.
        n_bytes: Number of UTF-8 bytes of the texts that were added.
    """

    def __init__(self, pattern: str, special_tokens: Sequence[str] = (), workers: int = 0) -> None:
        self.words: Counter[bytes] = Counter()
        self.n_bytes = 0
        self._arguments = (pattern, special_tokens)
        self._workers = workers
        self._processes: list[multiprocessing.Process] = []
        self._idle: list[Connection] = []
        self._busy: deque[Connection] = deque()  # in the order in which they were given texts

    def add(self, texts: list[str]) -> None:
        """Count the words of texts, or send them to a process that does; a text must end where a word ends."""
        self.n_bytes += sum(len(text.encode("utf-8", "surrogateescape")) for text in texts)
        if self._workers == 0:
            self.words.update(count_words(texts, *self._arguments))
            return
        counts: Counter[bytes] = Counter()
        if not self._idle and len(self._processes) < self._workers:
            self._idle.append(self._start())
        if not self._idle:
            counts = self._receive()
        connection = self._idle.pop()
        with _processes_that_live():
            # One batch at a time: two processes that both write to a full pipe would wait forever. If `send` fails, the
            # traceback keeps its buffer, with which Python before 3.12.2 can crash.
            connection.send_bytes(pickle.dumps(texts))
        self._busy.append(connection)
        self.words.update(counts)  # while the process counts already

    def wait(self) -> None:
        """Wait until all texts are counted."""
        while self._busy:
            self.words.update(self._receive())

    def close(self) -> None:
        """End the processes; what they have not yet counted is lost."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()
        self._processes, self._idle, self._busy = [], [], deque()

    def _start(self) -> Connection:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.Process(target=_count, args=(ours, theirs, *self._arguments), daemon=True)
        # A new process has the handlers of this one until it sets its own, and would lose a signal that comes before.
        blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)
        theirs.close()  # so that reading ends when the process does
        self._processes.append(process)
        return ours

    def _receive(self) -> Counter[bytes]:
        connection = self._busy.popleft()
        with _processes_that_live():
            counts = connection.recv()
        self._idle.append(connection)
        if isinstance(counts, Exception):
            raise counts
        return counts


@contextmanager
def _processes_that_live() -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError) as error:
        raise MisconfigurationException(
            "a process that counts words was killed, possibly for lack of memory; set model.count_workers lower"
        ) from error


def _count(parents: Connection, connection: Connection, pattern: str, special_tokens: Sequence[str]) -> None:
    """Count the words of each batch of texts that arrives, until the other end is closed."""
    parents.close()  # a copy, which would keep the pipe open when the parent is killed
    leave_to_the_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    while True:
        try:
            texts = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            connection.send(count_words(texts, pattern, special_tokens))
        except ValueError as error:
            connection.send(error)
        except ConnectionError:
            return
