"""Errors a user can mend, the exit codes they end the process with, and a reader who leaves early, which is none."""

import os
import sys
from collections.abc import Iterable
from difflib import get_close_matches

EXIT_OK = 0
EXIT_CONFIG = 64  # a setting is wrong
EXIT_DATA = 65  # the text or the tokenizer is wrong
EXIT_CHECKPOINT = 66  # a checkpoint is missing or damaged
EXIT_DIRECTORY = 73  # the run directory cannot be used
EXIT_DISK = 74  # the last checkpoint could not be written
EXIT_DIVERGED = 75  # training met a loss or gradient that is not finite
EXIT_MEMORY = 77  # the device has too little memory
EXIT_INTERRUPTED = 130  # Ctrl-C before training began; a signal to a training run ends it with 128 + its number


class UserError(Exception):
    """A mistake with a remedy: printed as it stands, without a traceback."""

    def __init__(self, message: str, exit_code: int = EXIT_CONFIG) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def unknown(kind: str, value: object, choices: Iterable[str]) -> str:
    """Say that `value` is no `kind`, what there is, and which of it was probably meant."""
    names = sorted(choices)
    typed = str(value) if len(str(value)) <= 100 else f"{str(value)[:90]}..."
    close = get_close_matches(typed.lower(), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {typed!r}.{hint} Choose from: {', '.join(names)}."


def say(text: str, end: str = "\n") -> None:
    """Print in one piece. Whoever reads may have closed the pipe (`| head -3`): that is no error of ours."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit: into nothing
