"""The signals that ask a run to stop."""

import signal

# A terminal sends the first on Ctrl-C, a job scheduler the others; a job of SLURM can ask for SIGUSR1.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def as_asked(signal_number: int) -> int:
    """Return the signal that another stands for: SIGUSR1 is a SIGTERM, and any other itself."""
    return signal.SIGTERM if signal_number == signal.SIGUSR1 else signal_number


def exit_at_once(signal_number: int, frame: object) -> None:
    """Exit with the code of a signal; a handler."""
    raise SystemExit(128 + as_asked(signal_number))


def leave_to_the_parent() -> None:
    """Ignore, in a copy of a process, the signals that go to a whole job; the parent ends its copies by SIGTERM."""
    for number in STOPS:  # SIGTERM is not ignored for a moment, in which one that is blocked would be lost
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
